package backend

import (
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A system call that fails at any step of activation leaves the image
// inactive, holding nothing, and to be tried again.
func TestActivateFails(t *testing.T) {
	modes(t, func(t *testing.T, dir string, o Options) {
		o.Path = writeFile(t, dir, pattern(5000, 1))
		o.DropCache = DropCacheOn
		for _, op := range []sysop{opOpen, opReopen, opStat, opLock, opTestLock, opAdvise, opSync} {
			for nth := 1; ; nth++ {
				var mu sync.Mutex
				armed, seen := false, 0
				r := openImage(t, o, func(o sysop, _ int64, n int) (int, error) {
					mu.Lock()
					defer mu.Unlock()
					if armed && o == op {
						if seen++; seen == nth {
							return 0, unix.EIO
						}
					}
					return n, nil
				})
				mu.Lock()
				armed = true
				mu.Unlock()
				err := activate(r, false)
				mu.Lock()
				armed = false
				mu.Unlock()
				if err != nil {
					wantErrno(t, err, unix.EIO)
					all, w := descriptors(t, o.Path)
					if open := 1 + b2i(r.cur.Load().file.tailFd >= 0); all != open || w != 0 || len(procLocks(t, o.Path)) != 0 || r.LocksHeld() != "none" {
						t.Errorf("op %d, call %d: %d descriptors, %d writable, %v", op, nth, all, w, procLocks(t, o.Path))
					}
					must(t, read(r, 0, make([]byte, 5000)))
					must(t, activate(r, true))
				}
				must(t, r.Close())
				if seen < nth {
					break // no such call any more
				}
			}
		}
	})
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestActivateNewSize(t *testing.T) {
	modes(t, func(t *testing.T, dir string, o Options) {
		o.Path = writeFile(t, dir, pattern(5000, 1))
		r := openImage(t, o, nil)
		for _, size := range []int64{8192, 100, 70001, 0, 4096} {
			must(t, os.Truncate(o.Path, size))
			must(t, activate(r, false))
			if r.Size() != size {
				t.Fatalf("size %d, want %d", r.Size(), size)
			}
			if !o.ReadOnly && size > 0 {
				must(t, write(r, size-1, []byte{7}, true))
			}
			must(t, read(r, 0, make([]byte, size)))
			must(t, inactivate(r))
			if r.Size() != size {
				t.Fatalf("inactive: size %d, want %d", r.Size(), size)
			}
		}
	})
}

// Another file under the same name is not ours.
func TestReplaced(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, pattern(5000, 1))
		r := openImage(t, Options{Path: path}, nil)
		must(t, os.Rename(path, path+".old"))
		err := activate(r, false)
		wantErrno(t, err, unix.ENOENT)
		where := procPath(r.cur.Load().file.fd)
		if strings.Contains(err.Error(), "truncate") || !strings.Contains(err.Error(), "was removed or renamed while this process had it open; its bytes are still at "+where) {
			t.Error(err)
		}
		wantContent(t, where, pattern(5000, 1))
		must(t, os.WriteFile(path, nil, 0o600))
		err = activate(r, false)
		wantErrno(t, err, unix.ESTALE)
		t.Log(err)
		if all, _ := descriptors(t, path); all != 0 {
			t.Errorf("%d descriptors of the other", all)
		}
		must(t, read(r, 0, make([]byte, 5000)))
		must(t, os.Rename(path+".old", path))
		must(t, activate(r, false))

		// While active the inactive description is of the very inode.
		must(t, os.Rename(path, path+".old"))
		must(t, os.WriteFile(path, nil, 0o600))
		must(t, inactivate(r))
		must(t, read(r, 0, make([]byte, 5000)))
		if all, _ := descriptors(t, path); all != 0 {
			t.Errorf("%d descriptors of the other", all)
		}
	})
}

// Replaced between opening and locking.
func TestReplacedInTheAct(t *testing.T) {
	path := writeFile(t, t.TempDir(), pattern(5000, 1))
	r := openImage(t, Options{Path: path}, nil)
	r.faults = func(op sysop, _ int64, n int) (int, error) {
		if op == opLock {
			os.Rename(path, path+".old")
			os.WriteFile(path, nil, 0o600)
		}
		return n, nil
	}
	wantErrno(t, r.Acquire(), unix.ESTALE)
	if _, w := descriptors(t, path+".old"); w != 0 {
		t.Error("left open")
	}
}

// Without /proc the path serves, if it still names the inode.
func TestReopenWithoutProc(t *testing.T) {
	path := writeFile(t, t.TempDir(), pattern(5000, 1))
	f := openTest(t, path, openHow{})
	first := true
	how := openHow{faults: func(op sysop, _ int64, n int) (int, error) {
		if op == opReopen && first {
			first = false
			return 0, unix.ENOENT
		}
		return n, nil
	}}
	g, err := f.reopen(how)
	must(t, err)
	g.Close()
	must(t, os.Rename(path, path+".old"))
	must(t, os.WriteFile(path, nil, 0o600))
	first = true
	_, err = f.reopen(how)
	wantErrno(t, err, unix.ESTALE)
}
