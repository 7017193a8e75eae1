package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func modes(t *testing.T, fn func(t *testing.T, dir string, o Options)) {
	onEach(t, func(t *testing.T, dir string) {
		for _, cache := range []CacheMode{CacheWriteback, CacheNone, CacheWritethrough} {
			for _, ro := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/ro=%v", cache, ro), func(t *testing.T) {
					fn(t, dir, Options{Cache: cache, ReadOnly: ro})
				})
			}
		}
	})
}

// state of a file that an inactive owner must not change.
func asIs(t *testing.T, path string) string {
	st := statOf(t, path)
	return fmt.Sprintf("size %d blocks %d mtime %v ctime %v %x", st.Size, st.Blocks, st.Mtim, st.Ctim, contentOf(t, path))
}

// The whole way there and back, with what is held at each step.
func TestLifecycle(t *testing.T) {
	modes(t, func(t *testing.T, dir string, o Options) {
		want := pattern(10000, 1)
		path := writeFile(t, dir, want)
		before := asIs(t, path)
		o.Path = path
		r := openImage(t, o, nil)
		locks := "100,101,103,201,203"
		if o.ReadOnly {
			locks = "100,201,203"
		}
		held := func(step, want string) {
			t.Helper()
			// The list is not read at once: while others lock, a line may be missed.
			locks := procLocks(t, path)
			for range 100 {
				if (want == "none") == (len(locks) == 0) {
					break
				}
				time.Sleep(10 * time.Millisecond)
				locks = procLocks(t, path)
			}
			if r.LocksHeld() != want || (want == "none") != (len(locks) == 0) {
				t.Errorf("%s: held %s, %v", step, r.LocksHeld(), locks)
			}
			if _, w := descriptors(t, path); (w > 0) != (want != "none" && !o.ReadOnly) {
				t.Errorf("%s: %d writable descriptors", step, w)
			}
		}
		held("open", "none")
		must(t, r.Acquire())
		held("acquired", locks)
		r.Withdraw()
		held("withdrawn", "none")
		must(t, r.Acquire())
		must(t, r.Load(true))
		r.Withdraw()
		held("withdrawn", "none")
		if asIs(t, path) != before {
			t.Error("trying to activate has changed the file")
		}
		for i := range 3 {
			must(t, r.Acquire())
			must(t, r.Load(true))
			got := make([]byte, len(want))
			must(t, read(r, 0, got))
			if epoch, err := r.Claim(0); err != nil || o.ReadOnly != (epoch == 1) && i > 0 {
				t.Fatal(epoch, err)
			}
			r.PublishActive()
			held("published", locks)
			must(t, read(r, 0, got))
			if !bytes.Equal(got, want) {
				t.Fatal("the bytes differ")
			}
			r.Retire()
			held("active", locks)
			must(t, r.Check())
			if !o.ReadOnly {
				b := pattern(3000, uint64(i))
				must(t, write(r, int64(i*1111), b, i == 1))
				copy(want[i*1111:], b)
			}
			must(t, r.SyncAhead(context.Background()))
			must(t, r.Settle())
			held("settled", locks)
			must(t, r.Unsettle())
			held("unsettled", locks)
			if !o.ReadOnly {
				must(t, write(r, 5, []byte{byte(i)}, false))
				want[5] = byte(i)
			}
			must(t, r.Settle())
			r.PublishInactive()
			held("inactive published", locks)
			must(t, r.Release())
			held("inactive", "none")
			wantContent(t, path, want)
			must(t, read(r, 0, got))
		}
		before = asIs(t, path)
		must(t, r.Flush())
		must(t, r.Check())
		must(t, r.Close())
		must(t, r.Close())
		if all, _ := descriptors(t, path); all != 0 {
			t.Errorf("%d descriptors left", all)
		}
		if asIs(t, path) != before {
			t.Error("closing has changed the file")
		}
	})
}

// Close in any state leaves nothing open and adds nothing to the file.
func TestCloseAnywhere(t *testing.T) {
	modes(t, func(t *testing.T, dir string, o Options) {
		steps := []func(r *Owned) error{
			func(r *Owned) error { return nil },
			(*Owned).Acquire,
			func(r *Owned) error { return r.Load(false) },
			func(r *Owned) error { _, err := r.Claim(0); return err },
			func(r *Owned) error { r.PublishActive(); return nil },
			func(r *Owned) error { r.Retire(); return nil },
			(*Owned).Settle,
			func(r *Owned) error { r.PublishInactive(); return nil },
			(*Owned).Release,
		}
		for last := range steps {
			o.Path = writeFile(t, dir, pattern(5000, 1))
			before := asIs(t, o.Path)
			r := openImage(t, o, nil)
			for _, step := range steps[:last+1] {
				must(t, step(r))
			}
			must(t, r.Close())
			if all, _ := descriptors(t, o.Path); all != 0 || len(procLocks(t, o.Path)) != 0 || r.LocksHeld() != "none" {
				t.Errorf("after step %d: %d descriptors, %v", last, all, procLocks(t, o.Path))
			}
			if asIs(t, o.Path) != before {
				t.Errorf("after step %d the file is another", last)
			}
		}
	})
}

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

// A failed step of inactivation leaves the image active with its locks.
func TestSettleFails(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, op := range []sysop{opReopen, opSync} {
			path := writeFile(t, dir, make([]byte, 5000))
			h := new(failing)
			r := openImage(t, Options{Path: path}, h.hook)
			open := 2 // the inactive description is kept
			if op == opReopen {
				asOnNetwork(r)
				open = 1
			}
			must(t, activate(r, false))
			h.set(op, unix.EIO)
			err := r.Settle()
			wantErrno(t, err, unix.EIO)
			if SyncFailed(err) != (op == opSync) {
				t.Errorf("op %d: %v", op, err)
			}
			var ve *ViewError
			if errors.As(err, &ve) != (op == opReopen) || op == opReopen && (!ve.Durable() || h.count(opSync) != 1 || !strings.Contains(err.Error(), "is on disk")) {
				t.Errorf("op %d, %d syncs: %v", op, h.count(opSync), err)
			}
			h.set(op, nil)
			if all, w := descriptors(t, path); all != open || w != 1 || len(procLocks(t, path)) != 5 {
				t.Errorf("op %d: %d descriptors, %d writable, %v", op, all, w, procLocks(t, path))
			}
			must(t, write(r, 0, []byte("still"), false))
			err = r.Settle()
			if op == opSync {
				if !SyncFailed(err) {
					t.Errorf("a second settle: %v", err)
				}
				if err := r.SyncAhead(context.Background()); !SyncFailed(err) {
					t.Errorf("sync ahead: %v", err)
				}
				if err := r.Flush(); !SyncFailed(err) {
					t.Errorf("flush: %v", err)
				}
			} else {
				must(t, err)
				r.PublishInactive()
				must(t, r.Release())
			}
			r.Close()
		}
	})
}

// Giving up a failed image works whatever else fails, and ends as usual.
func TestAbandon(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, settled := range []bool{false, true} {
			for _, dead := range []bool{false, true} {
				path := writeFile(t, dir, pattern(5000, 1))
				h := new(failing)
				r := openImage(t, Options{Path: path}, h.hook)
				if dead {
					asOnNetwork(r)
				}
				must(t, activate(r, false))
				if settled {
					must(t, r.Settle())
				} else {
					h.set(opSync, unix.EIO)
					if err := r.Settle(); !SyncFailed(err) {
						t.Fatal(err)
					}
				}
				if dead {
					if settled {
						r.next.file.traits.coherent = false
					}
					h.set(opReopen, unix.EIO)
					h.set(opAdvise, unix.EIO)
				}
				if err := r.Abandon(); (err != nil) != dead {
					t.Fatal(err)
				}
				r.PublishInactive()
				must(t, r.Release())
				if _, w := descriptors(t, path); w != 0 || len(procLocks(t, path)) != 0 {
					t.Errorf("%d writable, %v", w, procLocks(t, path))
				}
				err := read(r, 0, make([]byte, 5000))
				if !dead {
					must(t, err)
				} else {
					wantErrno(t, err, unix.EIO)
					ext, err := r.Status(nil, 0, 5000, 10)
					if err != nil || len(ext) != 1 {
						t.Error(ext, err)
					}
					r.Cache(0, 100)
					must(t, r.Check())
				}
				for op := range h.errs {
					h.set(op, nil)
				}
				var me *ModifiedError
				if err := activate(r, true); !errors.As(err, &me) {
					t.Errorf("--if-unchanged after giving up: %v", err)
				}
				must(t, activate(r, false))
				must(t, write(r, 0, []byte("again"), true))
				must(t, inactivate(r))
				r.Close()
			}
		}
	})
}

// What is dirty after a failed sync is written before the locks go, once, and
// nobody minds whether that works.
func TestAbandonWritesWhatIsDirty(t *testing.T) {
	for _, failed := range []bool{false, true} {
		var trace []sysop
		sync := error(nil)
		r := openImage(t, Options{Path: writeFile(t, t.TempDir(), make([]byte, 5000))}, func(op sysop, _ int64, n int) (int, error) {
			if op == opSync || op == opAdvise {
				trace = append(trace, op)
			}
			if op == opSync {
				return n, sync
			}
			return n, nil
		})
		must(t, activate(r, false))
		if failed {
			sync = unix.EIO
			if err := r.Flush(); !SyncFailed(err) {
				t.Fatal(err)
			}
		}
		trace = nil
		must(t, r.Abandon())
		want := []sysop{opAdvise}
		if failed {
			want = []sysop{opSync, opAdvise}
		}
		if !slices.Equal(trace, want) {
			t.Errorf("failed=%v: %v, want %v", failed, trace, want)
		}
		r.PublishInactive()
		must(t, r.Release())
	}
}

// An active image that is removed or replaced by name is told of, once.
func TestCheckSeesName(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, replaced := range []bool{false, true} {
			path := writeFile(t, dir, pattern(5000, 1))
			var warned []string
			r := openImage(t, Options{Path: path, Warn: func(s string) { warned = append(warned, s) }}, nil)
			must(t, activate(r, false))
			must(t, r.Check())
			if len(warned) != 0 {
				t.Errorf("%q", warned)
			}
			must(t, os.Remove(path))
			if replaced {
				must(t, os.WriteFile(path, nil, 0o600))
			}
			must(t, r.Check())
			must(t, r.Check())
			where := procPath(r.cur.Load().file.fd)
			if len(warned) != 1 || !strings.Contains(warned[0], "the path no longer names the image that is being served; its bytes are still reachable as "+where+"; copy them before the server stops") {
				t.Errorf("replaced=%v: %q", replaced, warned)
			}
			wantContent(t, where, pattern(5000, 1))
			must(t, r.Close())
			os.Remove(path)
			os.Remove(path + ".owner")
		}
	})
}

func TestReleaseReportsAndGoesOn(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 5000))
	h := new(failing)
	r := openImage(t, Options{Path: path}, h.hook)
	must(t, activate(r, false))
	must(t, r.Settle())
	r.PublishInactive()
	h.set(opClose, unix.EIO)
	err := r.Release()
	wantErrno(t, err, unix.EIO)
	h.set(opClose, nil)
	if _, w := descriptors(t, path); w != 0 || len(procLocks(t, path)) != 0 || r.LocksHeld() != "none" {
		t.Errorf("%d writable, %v, %s", w, procLocks(t, path), r.LocksHeld())
	}
	must(t, activate(r, true))
}

// Two exporters on one image: each other's changes are seen, and only one owns.
func TestTwoOwners(t *testing.T) {
	modes(t, func(t *testing.T, dir string, o Options) {
		if o.ReadOnly {
			t.Skip()
		}
		o.Path = writeFile(t, dir, make([]byte, 9999))
		a, b := openImage(t, o, nil), openImage(t, o, nil)
		must(t, activate(a, false))
		for i := range 10 {
			var le *LockError
			if err := activate(b, false); !errors.As(err, &le) {
				t.Fatal(err)
			}
			want := pattern(9999, uint64(i))
			must(t, write(a, 0, want, false))
			must(t, inactivate(a))
			must(t, activate(b, false))
			got := make([]byte, 9999)
			must(t, read(b, 0, got))
			if !bytes.Equal(got, want) {
				t.Fatalf("round %d: the bytes differ", i)
			}
			if i == 5 {
				must(t, write(b, 7, []byte{1}, false))
				must(t, inactivate(b))
				var me *ModifiedError
				if err := activate(a, true); !errors.As(err, &me) || !strings.Contains(err.Error(), "image was modified while inactive") {
					t.Fatal(err)
				}
				must(t, activate(b, true))
			}
			a, b = b, a
		}
		ro := o
		ro.ReadOnly = true
		c, d := openImage(t, ro, nil), openImage(t, ro, nil)
		if err := activate(c, false); err == nil {
			t.Error("a reader beside a writer")
		}
		must(t, inactivate(a))
		must(t, activate(c, false))
		must(t, activate(d, false))
		if err := activate(a, false); err == nil {
			t.Error("a writer beside readers")
		}
	})
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

func TestSyncAheadIsCancelled(t *testing.T) {
	h := new(failing)
	r := openImage(t, Options{Path: writeFile(t, t.TempDir(), make([]byte, 100))}, h.hook)
	must(t, activate(r, false))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.SyncAhead(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if h.count(opSync) != 0 {
		t.Error("synced all the same")
	}
	must(t, r.SyncAhead(context.Background()))
	if n := h.count(opSync); n != 1 {
		t.Errorf("%d syncs", n)
	}
}

// Requests go on through handovers: reads always, writes while active.
func TestRequestsDuringHandover(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		r := openImage(t, Options{Path: writeFile(t, dir, make([]byte, 1<<20))}, nil)
		var gate sync.RWMutex // stands for the gate of package state
		active := false
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				b := make([]byte, 70000)
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					gate.RLock()
					var err error
					switch off := int64(i*4099) % (900 << 10); {
					case g%2 == 0 || !active:
						err = read(r, off, b)
					case i%3 == 0:
						err = r.Flush()
					default:
						err = write(r, off, b, i%7 == 0)
					}
					gate.RUnlock()
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		grace := func() { // waits for requests
			gate.Lock()
			defer gate.Unlock()
		}
		for range 20 {
			must(t, r.Acquire())
			must(t, r.Load(true))
			_, err := r.Claim(0)
			must(t, err)
			gate.Lock()
			r.PublishActive()
			active = true
			gate.Unlock()
			grace()
			r.Retire()
			time.Sleep(time.Millisecond)
			must(t, r.SyncAhead(context.Background()))
			gate.Lock()
			must(t, r.Settle())
			r.PublishInactive()
			active = false
			gate.Unlock()
			grace()
			must(t, r.Release())
		}
		close(stop)
		wg.Wait()
	})
}

// A shrink is seen by the next check, without any request.
func TestCheckSeesShrink(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 8192))
	var warned []string
	r := openImage(t, Options{Path: path, Warn: func(s string) { warned = append(warned, s) }}, nil)
	must(t, activate(r, false))
	must(t, os.Truncate(path, 4096))
	must(t, r.Check())
	must(t, r.Check())
	if len(warned) != 1 || !strings.Contains(warned[0], "shrunk to 4096") {
		t.Errorf("%q", warned)
	}
	wantErrno(t, write(r, 4000, make([]byte, 97), false), unix.EIO)
	must(t, write(r, 4000, make([]byte, 96), false))
	must(t, os.Truncate(path, 100000)) // grown: what clients know is served
	must(t, r.Check())
	must(t, write(r, 8000, make([]byte, 192), false))
	wantErrno(t, write(r, 8000, make([]byte, 193), false), unix.EIO)
}

func TestKeyAndName(t *testing.T) {
	path := writeFile(t, t.TempDir(), nil)
	st := statOf(t, path)
	r := openImage(t, Options{Path: path}, nil)
	if dev, ino := r.Key(); dev != st.Dev || ino != st.Ino || r.Name() != path {
		t.Errorf("%d %d %s", dev, ino, r.Name())
	}
}

// What is settled is synced unless nothing can be dirty: the last owner let go
// clean, under this kernel, nobody changed the image since, and this one wrote
// nothing.
func TestSettleUnwritten(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 8192))
		h := new(failing)
		r := openImage(t, Options{Path: path, Warn: func(string) {}}, h.hook)
		record := func(change func(*OwnerRecord)) {
			rec, _, err := readRecord(path+recordSuffix, nil)
			must(t, err)
			change(rec)
			must(t, os.WriteFile(path+recordSuffix, rec.bytes(), 0o644))
		}
		for _, c := range []struct {
			name   string
			before func() // while nobody owns it
			during func() // while it is owned
			syncs  int
		}{
			{"the first ownership", func() {}, func() {}, 1},
			{"nothing happened", func() {}, func() {}, 0},
			{"written", func() {}, func() { must(t, write(r, 0, []byte("x"), false)) }, 1},
			{"nothing again", func() {}, func() {}, 0},
			{"written and flushed", func() {}, func() { must(t, errors.Join(write(r, 0, []byte("x"), false), r.Flush())) }, 2},
			{"zeroed", func() {}, func() { must(t, r.Zero(0, 4096, 0)) }, 1},
			{"trimmed", func() {}, func() { must(t, r.Discard(0, 4096)) }, 1},
			{"resized", func() {}, func() { must(t, r.Resize(4096)) }, 1},
			{"written by others", func() { must(t, os.WriteFile(path, make([]byte, 8192), 0o644)) }, func() {}, 1},
			{"not let go in order", func() { record(func(r *OwnerRecord) { r.Clean = false }) }, func() {}, 1},
			{"another boot", func() { record(func(r *OwnerRecord) { r.BootID = "another" }) }, func() {}, 1},
			{"an older record", func() { record(func(r *OwnerRecord) { r.Image = "" }) }, func() {}, 1},
			{"no record", func() { must(t, os.Remove(path+recordSuffix)) }, func() {}, 1},
			{"no locks", func() { r.opts.Locking = LockingOff }, func() {}, 1},
		} {
			c.before()
			must(t, activate(r, false))
			was := h.count(opSync)
			c.during()
			must(t, r.Settle())
			if n := h.count(opSync) - was; n != c.syncs {
				t.Errorf("%s: %d syncs, want %d", c.name, n, c.syncs)
			}
			r.PublishInactive()
			must(t, r.Release())
		}
	})
}
