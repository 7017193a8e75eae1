package ioloop

import (
	"bytes"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/nbd-export/nbd-export/backend"
)

// Reads that come one by one and have to wait do so in the receiving goroutine,
// after a while; what comes several at a time goes to workers, and so does all
// when too many wait already.
func TestReadHere(t *testing.T) {
	want := pattern(1<<20, 1)
	r := newRig(t, rigConfig{content: want, tmpfs: true})
	var here, elsewhere atomic.Int64
	r.img.set(func(h *hooked) {
		h.mapping = func(_, _ int64, mode backend.Mode) error {
			switch {
			case mode&backend.MayBlock == 0:
				return backend.ErrWait
			case r.e.reading.Load() > 0:
				here.Add(1)
			default:
				elsewhere.Add(1)
			}
			return nil
		}
	})
	c := r.connect(&testCodec{})
	expect := func(what string, wantHere, wantElsewhere int64) {
		t.Helper()
		if h, e := here.Swap(0), elsewhere.Swap(0); h != wantHere || e != wantElsewhere {
			t.Errorf("%s: %d here and %d elsewhere, want %d and %d", what, h, e, wantHere, wantElsewhere)
		}
	}
	single := func(n int) {
		t.Helper()
		for i := range n {
			off, size := int64(63-i%64)*4096, int64(4096) // no sequence
			if i%2 == 1 {
				size = 64 << 10
			}
			if a := c.ok(OpRead, 0, off, size, nil); !bytes.Equal(a.data, want[off:off+size]) {
				t.Errorf("read %d: the bytes differ", i)
			}
		}
	}
	single(singleAt)
	expect("not used to it yet", 0, singleAt)
	single(8)
	expect("one by one", 8, 0)
	c.ok(OpRead, 0, 0, 512<<10, nil)
	expect("a large one", 1, 0)
	single(4)
	expect("one by one again", 4, 0)

	for i := range int64(4) { // what was only looked at is no further request
		c.ok(OpWrite, 0, 512<<10, 4096, want[512<<10:][:4096])
		c.ok(OpRead, 0, i*8192, 4096, nil)
	}
	expect("between writes", 4, 0)

	// Two at once.
	var both []byte
	for i := range uint64(2) {
		both = appendRequest(both, OpRead, 0, i, 0, 4096, 0)
	}
	c.write(both)
	for range 2 {
		c.next()
	}
	expect("two at once", 0, 2)
	single(singleAt + 1)
	// The second of the two was alone if the first had ended by then.
	if h, e := here.Swap(0), elsewhere.Swap(0); e < singleAt-1 || h < 1 || h+e != singleAt+1 {
		t.Errorf("one by one after them: %d here and %d elsewhere", h, e)
	}

	full := int32(r.e.sched.limit)
	r.e.reading.Add(full)
	for range 4 {
		if r.e.mayRead() {
			t.Error("more wait than may")
		}
	}
	single(2)
	if n := r.e.reading.Add(-full); n != 0 {
		t.Errorf("%d too many counted", n)
	}
}

// What a client asks while its read waits shows that it does not ask one by one.
func TestReadHereFindsMore(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	c := r.connect(&testCodec{})
	var here atomic.Int64
	var more atomic.Bool
	r.img.set(func(h *hooked) {
		h.mapping = func(_, _ int64, mode backend.Mode) error {
			if mode&backend.MayBlock == 0 {
				return backend.ErrWait
			}
			if r.e.reading.Load() > 0 {
				here.Add(1)
				if more.CompareAndSwap(true, false) {
					_, err := c.nc.Write(appendRequest(nil, OpRead, 0, 99, 0, 512, 0))
					return err
				}
			}
			return nil
		}
	})
	for range singleAt + 1 {
		c.ok(OpRead, 0, 0, 4096, nil)
	}
	if here.Swap(0) != 1 {
		t.Fatal("it did not wait here")
	}
	more.Store(true)
	c.write(appendRequest(nil, OpRead, 0, 98, 0, 512, 0))
	for range 2 {
		c.next()
	}
	c.ok(OpRead, 0, 0, 4096, nil)
	if n := here.Load(); n != 1 {
		t.Errorf("%d waited here, want the one that met another", n)
	}
}

// Where a ring reads without a thread, half of the processors at most wait here.
func TestReadHereLeavesProcessors(t *testing.T) {
	e := &Engine{sched: newScheduler(mostWorkers), ring: new(Uring)}
	n := 0
	for e.mayRead() {
		n++
	}
	if want := max(1, runtime.NumCPU()/2); n != want || int(e.reading.Load()) != want {
		t.Errorf("%d wait here and %d are counted, want %d", n, e.reading.Load(), want)
	}
}
