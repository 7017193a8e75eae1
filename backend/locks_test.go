package backend

import (
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLockBytes(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 4096))
		f := openTest(t, path, openHow{write: true})
		must(t, f.lock(lockActive))
		if got := procLocks(t, path); !sameLocks(got, "100", "101", "103", "201", "203") {
			t.Errorf("active: %v", got)
		}
		if f.heldText() != "100,101,103,201,203" {
			t.Error(f.heldText())
		}
		must(t, f.Close())
		if got := procLocks(t, path); len(got) != 0 || f.heldText() != "none" {
			t.Errorf("closed: %v", got)
		}
		ro := openTest(t, path, openHow{})
		must(t, ro.lock(lockReadOnly))
		if got := procLocks(t, path); !sameLocks(got, "100", "201", "203") {
			t.Errorf("read-only: %v", got)
		}
	})
}

// sameLocks reports whether exactly these bytes are locked, shared.
func sameLocks(got []string, bytes ...string) bool {
	for i, b := range bytes {
		bytes[i] = "ADVISORY READ " + b
	}
	for i := range got {
		got[i] = strings.TrimPrefix(got[i], "OFDLCK ")
	}
	return slices.Equal(got, bytes)
}

// heldBy lists the descriptors of this process that hold byte b of path.
func heldBy(t *testing.T, path string, b int64) (fds []int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, e := range entries {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err != nil || name != path {
			continue
		}
		info, err := os.ReadFile("/proc/self/fdinfo/" + e.Name())
		must(t, err)
		if strings.Contains(string(info), fmt.Sprintf(" %d %d\n", b, b)) {
			fd, err := strconv.Atoi(e.Name())
			must(t, err)
			fds = append(fds, fd)
		}
	}
	return fds
}

// dropLock takes a lock away behind the back of the File.
func dropLock(t *testing.T, fd int, b lockByte) {
	t.Helper()
	l := unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart, Start: int64(b), Len: 1}
	must(t, unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l))
}

// Who is refused by whom, and by which byte.
func TestLockMatrix(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 4096))
		for _, c := range []struct {
			name   string
			held   []int64 // by somebody, shared
			rw, ro int64   // byte that refuses, 0 for none
		}{
			{name: "nobody"},
			{name: "qcow2 writer", held: []int64{100, 101, 103, 201, 203}, rw: 201, ro: 101},
			{name: "qcow2 reader", held: []int64{100, 201, 203}, rw: 201},
			{name: "info", held: []int64{201, 203}, rw: 201},
			{name: "raw guest disk", held: []int64{100, 101, 201}, rw: 201, ro: 101},
			{name: "raw qemu-io", held: []int64{100, 101}, rw: 101, ro: 101},
			{name: "raw qemu-io -r", held: []int64{100}},
			{name: "raw qemu-nbd", held: []int64{100, 101, 203}, rw: 203, ro: 101},
			{name: "raw read-only export", held: []int64{100, 203}, rw: 203},
			{name: "resizer", held: []int64{103}, rw: 103, ro: 103},
			{name: "no readers wanted", held: []int64{200}, rw: 200, ro: 200},
			{name: "write unchanged", held: []int64{102, 202}},
		} {
			t.Run(c.name, func(t *testing.T) {
				other := openTest(t, path, openHow{write: true})
				for _, b := range c.held {
					must(t, other.takeLock(other.fd, lockByte(b)))
				}
				for _, try := range []struct {
					how  openHow
					want int64
				}{{openHow{write: true}, c.rw}, {openHow{}, c.ro}} {
					f := openTest(t, path, try.how)
					set := lockReadOnly
					if try.how.write {
						set = lockActive
					}
					err := f.lock(set)
					if try.want == 0 {
						must(t, err)
					} else {
						var le *LockError
						if !errors.As(err, &le) || le.Byte != try.want || !isErrno(err, unix.EBUSY) {
							t.Errorf("write=%v: %v, want byte %d", try.how.write, err, try.want)
						}
					}
					f.Close()
					if n := len(procLocks(t, path)); n != len(c.held) {
						t.Errorf("%d locks after a failure", n)
					}
				}
			})
		}
	})
}

func TestLockErrorText(t *testing.T) {
	for b, want := range map[lockByte]string{
		201: `Failed to get "write" lock on /x`,
		200: `Failed to get "consistent read" lock on /x`,
		101: `Failed to get shared "write" lock on /x`,
		103: `Failed to get shared "resize" lock on /x`,
	} {
		s := newLockError("/x", b).Error()
		if !strings.Contains(s, want) || !strings.Contains(s, "inactivate") {
			t.Errorf("%d: %s", b, s)
		}
	}
}

// Who is refused can copy what has the holder let go.
func TestLockErrorNamesTheOrder(t *testing.T) {
	for control, want := range map[string]string{
		"":                 "inactivate it there (SIGUSR2 to pid 812), or stop",
		"/run/a-1.ctl":     "inactivate it there (nbd-export inactivate --control /run/a-1.ctl), or stop",
		"/run/a b; rm.ctl": "inactivate it there (nbd-export inactivate --control CTL), or stop",
	} {
		r := OwnerRecord{Host: "a", PID: 812, Control: control}
		err := newLockError("/x", 201)
		err.Holder, err.Order = r.Owner(time.Now()), r.release()
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", control, err)
		}
	}
	// QEMU's programs take no orders of ours.
	for programs, want := range map[string]string{
		"":                                    "; inactivate it there (nbd-export inactivate --control CTL), or stop that program",
		"nbd-export (pid 7), qemu-io (pid 8)": "; inactivate it there (nbd-export inactivate --control CTL), or stop that program",
		"qemu-nbd (pid 7)":                    "lock on /x; stop that program",
	} {
		err := newLockError("/x", 201)
		if err.Programs = programs; !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%q: %v", programs, err)
		}
	}
}

// Racing owners: never two at once.
func TestLockRace(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 4096))
		var owners, won, lost atomic.Int32
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 300 {
					f, err := openFile(path, openHow{write: true})
					if err != nil {
						t.Error(err)
						return
					}
					err = f.lock(lockActive)
					if err == nil {
						if owners.Add(1) != 1 {
							t.Error("two owners")
						}
						won.Add(1)
						owners.Add(-1)
					} else if isErrno(err, unix.EBUSY) {
						lost.Add(1)
					} else {
						t.Error(err)
					}
					f.Close()
				}
			})
		}
		wg.Wait()
		t.Logf("won %d, lost %d", won.Load(), lost.Load())
		if won.Load() == 0 {
			t.Error("nobody ever won")
		}
		if l := procLocks(t, path); len(l) != 0 {
			t.Errorf("left: %v", l)
		}
	})
}

// Where locks do not work, or are taken and never compared, activation refuses
// and says how to go on without.
func TestLocksDoNotWork(t *testing.T) {
	for name, h := range map[string]faults{
		"not supported": func(op sysop, _ int64, n int) (int, error) {
			if op == opLock {
				return 0, unix.EOPNOTSUPP
			}
			return n, nil
		},
		"no test": func(op sysop, _ int64, n int) (int, error) {
			if op == opTestLock {
				return 0, unix.ENOLCK
			}
			return n, nil
		},
		// The lock goes unnoticed: taking it is made to do nothing.
		"no conflict": nil,
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, t.TempDir(), make([]byte, 4096))
			r := openImage(t, Options{Path: path}, nil)
			if h == nil {
				r.faults = func(op sysop, b int64, n int) (int, error) {
					if op == opLock && b == 203 { // the last: take the others away again
						fds := heldBy(t, path, 201)
						for _, fd := range fds {
							dropLock(t, fd, 201)
						}
					}
					return n, nil
				}
			} else {
				r.faults = h
			}
			err := activate(r, false)
			if err == nil || !strings.Contains(err.Error(), "--locking off") {
				t.Fatal(err)
			}
			t.Log(err)
			if all, w := descriptors(t, path); all != 1 || w != 0 || len(procLocks(t, path)) != 0 {
				t.Errorf("left: %d, %d, %v", all, w, procLocks(t, path))
			}
			r.opts.Locking = LockingOff
			must(t, activate(r, false))
			if r.LocksHeld() != "none" {
				t.Error(r.LocksHeld())
			}
			must(t, r.Check())
		})
	}
}

// An error that says nothing about locks is no reason to go on without.
func TestLockFails(t *testing.T) {
	for op, errno := range map[sysop]unix.Errno{opReopen: unix.EMFILE, opLock: unix.EIO, opTestLock: unix.EIO} {
		path := writeFile(t, t.TempDir(), make([]byte, 4096))
		r := openImage(t, Options{Path: path}, nil)
		if op == opReopen {
			asOnNetwork(r)
		}
		r.faults = func(o sysop, _ int64, n int) (int, error) {
			if o == op {
				return 0, errno
			}
			return n, nil
		}
		err := activate(r, false)
		if !errors.Is(err, errno) || strings.Contains(err.Error(), "--locking") {
			t.Errorf("%v: %v", op, err)
		}
		if l := procLocks(t, path); len(l) != 0 {
			t.Errorf("left: %v", l)
		}
	}
}

func TestLocksLost(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 4096))
		r := openImage(t, Options{Path: path}, nil)
		must(t, r.Check())
		must(t, activate(r, false))
		must(t, r.Check())
		f := r.cur.Load().file
		dropLock(t, f.fd, 201)
		err := r.Check()
		var fenced interface{ Fenced() bool }
		if !errors.As(err, &fenced) || !fenced.Fenced() {
			t.Fatal(err)
		}
		r.faults, f.faults = nil, func(sysop, int64, int) (int, error) { return 0, unix.EIO }
		if err := r.Check(); err == nil || errors.As(err, &fenced) {
			t.Errorf("a check that fails is no fence: %v", err)
		}
		f.faults = nil
	})
}

func wantLost(t *testing.T, err error, want bool) {
	t.Helper()
	var fe *FencedError
	if errors.As(err, &fe) != want || !want && err != nil {
		t.Fatalf("fenced, want %v: %v", want, err)
	}
}

// A thief who holds the same bytes does not hide that ours are lost, of either
// description.
func TestLocksStolen(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, cache := range []CacheMode{CacheWriteback, CacheNone} {
			for _, twin := range []bool{false, true} {
				if twin && cache != CacheNone {
					continue
				}
				t.Run(fmt.Sprintf("%s/twin=%v", cache, twin), func(t *testing.T) {
					path := writeFile(t, dir, make([]byte, 5000))
					r := openImage(t, Options{Path: path, Cache: cache}, nil)
					must(t, activate(r, false))
					f := r.cur.Load().file
					wantLost(t, r.Check(), false)
					fd := f.fd
					if twin {
						if f.traits.Tmpfs {
							return // which has no O_DIRECT, and so no twin
						}
						fd = f.tailFd
					}
					for _, b := range f.held {
						dropLock(t, fd, b)
					}
					thief := openTest(t, path, openHow{write: true})
					for _, b := range f.held {
						must(t, thief.takeLock(thief.fd, b))
					}
					wantLost(t, r.Check(), true)
				})
			}
		}
	})
}

// Where the kernel does not list the locks, others tell whether they are seen.
func TestLocksNotListed(t *testing.T) {
	for _, when := range []string{"always", "later"} {
		path := writeFile(t, t.TempDir(), make([]byte, 4096))
		h := new(failing)
		r := openImage(t, Options{Path: path}, h.hook)
		if when == "always" {
			h.set(opListLocks, unix.ENOENT)
		}
		must(t, activate(r, false))
		h.set(opListLocks, unix.ENOENT)
		wantLost(t, r.Check(), false)
		dropLock(t, r.cur.Load().file.fd, 201)
		wantLost(t, r.Check(), true)
	}
}

// Who writes in spite of our locks is found out; who only tries is not.
func TestStranger(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 4096))
		r := openImage(t, Options{Path: path}, nil)
		must(t, activate(r, false))
		for range 2 {
			other := openTest(t, path, openHow{write: true})
			must(t, other.takeLock(other.fd, 101))
			for range strangerTimes - 1 {
				wantLost(t, r.Check(), false)
			}
			other.Close()
			wantLost(t, r.Check(), false)
		}
		other := openTest(t, path, openHow{write: true})
		must(t, other.takeLock(other.fd, 101))
		for range strangerTimes - 1 {
			wantLost(t, r.Check(), false)
		}
		wantLost(t, r.Check(), true)
	})
}

func TestListsLock(t *testing.T) {
	const info = "pos:\t0\nflags:\t0100002\n" +
		"lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:9977875 100 101\n" +
		"lock:\t2: POSIX  ADVISORY  READ 77 fe:00:9977875 103 103\n" +
		"lock:\t3: OFDLCK ADVISORY  READ -1 fe:00:9977875 203 EOF\n" +
		"lock:\t4: OFDLCK\n"
	for b, want := range map[lockByte]bool{99: false, 100: true, 101: true, 102: false, 103: false, 201: false, 203: true, 204: true} {
		if listsLock(info, b) != want {
			t.Errorf("%d: %v", b, !want)
		}
	}
}

// With O_DIRECT and a tail both descriptions hold the locks.
func TestLockTwin(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 5000))
	r := openImage(t, Options{Path: path, Cache: CacheNone}, nil)
	must(t, activate(r, false))
	if n := len(procLocks(t, path)); n != 10 {
		t.Errorf("%d locks", n)
	}
	must(t, r.Check())
	if _, w := descriptors(t, path); w != 2 {
		t.Errorf("%d writable descriptors", w)
	}
	must(t, inactivate(r))
	if n := len(procLocks(t, path)); n != 0 {
		t.Errorf("%d locks when inactive", n)
	}
	if _, w := descriptors(t, path); w != 0 {
		t.Errorf("%d writable descriptors when inactive", w)
	}
}

func TestLockScope(t *testing.T) {
	const mountinfo = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
40 22 0:50 / /a rw - nfs4 h:/x rw,vers=4.2,local_lock=none,addr=1.2.3.4
41 22 0:51 / /b rw - nfs h:/y rw,vers=3,nolock,local_lock=none
42 22 0:52 / /c rw - nfs h:/y rw,vers=3,local_lock=all
43 22 0:53 / /d rw - nfs h:/y rw,vers=3,local_lock=flock
44 22 0:54 / /e rw - cifs //h/y rw,vers=3.1.1,nobrl
`
	for id, want := range map[string]bool{"40": true, "41": false, "42": false, "43": true, "44": false, "99": true} {
		if got := optionsShareLocks(superOptions(mountinfo, id)); got != want {
			t.Errorf("mount %s: %v", id, got)
		}
	}
	f := openTest(t, writeFile(t, t.TempDir(), nil), openHow{})
	if mountOptions(f.fd) == "" {
		t.Error("no options of a real mount")
	}
	if f.traits.FS == "ext4" && f.lockScope() != "cluster" {
		t.Error(f.lockScope())
	}
	for fs, want := range map[string]string{"fuse": "host-local", "block": "host-local", "xfs": "cluster"} {
		f.traits.FS = fs
		if got := f.lockScope(); got != want {
			t.Errorf("%s: %s", fs, got)
		}
	}
}

func TestLockSets(t *testing.T) {
	var got []lockByte
	collect := func(b lockByte) error { got = append(got, b); return nil }
	lockActive.each(lockUses, lockActive.uses, collect)
	lockActive.each(lockForbids, lockActive.forbids, collect)
	if !reflect.DeepEqual(got, []lockByte{100, 101, 103, 201, 203}) {
		t.Error(got)
	}
}
