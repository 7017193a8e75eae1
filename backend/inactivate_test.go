package backend

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A failed step of inactivation leaves the image active with its locks.
func TestSettleFails(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, op := range []sysop{opReopen, opSync} {
			path := writeFile(t, dir, make([]byte, 5000))
			// Before Linux 6.13 the file of a moment ago had the same times, and of
			// that it says that it is on the disk.
			_ = os.Remove(path + ".owner")
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
