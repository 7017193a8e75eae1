package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
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
			locks := procLocks(t, path)
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

// Two exporters on one image: each other's changes are seen, and only one owns.
func TestTwoOwners(t *testing.T) {
	modes(t, func(t *testing.T, dir string, o Options) {
		if o.ReadOnly {
			return // neither would write
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

func TestKeyAndName(t *testing.T) {
	path := writeFile(t, t.TempDir(), nil)
	st := statOf(t, path)
	r := openImage(t, Options{Path: path}, nil)
	if dev, ino := r.Key(); dev != st.Dev || ino != st.Ino || r.Name() != path {
		t.Errorf("%d %d %s", dev, ino, r.Name())
	}
}
