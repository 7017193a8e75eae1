package ioloop

import (
	"bytes"
	"context"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// Flushes that arrive while the disk syncs share the next sync, and never the
// one that was under way: it may have begun before the writes they are about.
func TestFlushesShareSyncs(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	began, end := make(chan struct{}), make(chan error)
	r.img.set(func(h *hooked) {
		h.flushing = func() error { began <- struct{}{}; return <-end }
	})
	c, d := r.connect(&testCodec{}), r.connect(&testCodec{})
	waiting := func() int {
		r.d.flushes.mu.Lock()
		defer r.d.flushes.mu.Unlock()
		return len(r.d.flushes.waiting)
	}
	for _, result := range []error{nil, unix.ENOSPC} {
		first := c.send(OpFlush, 0, 0, 0, nil)
		await(t, began, "the first sync")
		const others = 50
		for range others {
			c.send(OpFlush, 0, 0, 0, nil)
			d.send(OpFlush, 0, 0, 0, nil)
		}
		eventually(t, "all others wait", func() bool { return waiting() == 2*others })
		c.ok(OpDiscard, 0, 0, 4096, nil) // there are workers left
		end <- nil
		if a := c.next(); a.cookie != first || a.errno != 0 {
			t.Fatalf("%+v", a)
		}
		await(t, began, "the second sync")
		if n := waiting(); n != 0 {
			t.Fatalf("%d wait for a third sync", n)
		}
		end <- result
		for _, c := range []*client{c, d} {
			for range others {
				if a := c.next(); (a.errno != 0) != (result != nil) {
					t.Fatalf("%+v", a)
				}
			}
		}
	}
	select {
	case <-began:
		t.Fatal("a sync for nobody")
	default:
	}
}

// Flushes that wait for a slow disk take one worker, however many they are:
// another connection's requests that need one go on.
func TestFlushesLeaveWorkers(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true, workers: 3})
	slow := newBlocker()
	r.img.set(func(h *hooked) { h.flushing = func() error { slow.wait(); return nil } })
	many, other := r.connect(&testCodec{}), r.connect(&testCodec{})
	want := map[uint64]bool{}
	for range 100 {
		want[many.send(OpFlush, 0, 0, 0, nil)] = true
	}
	await(t, slow.entered, "the first sync")
	for range 10 {
		other.ok(OpRead, 0, 0, inlineLarge+1, nil)
		other.ok(OpDiscard, 0, 0, 4096, nil)
	}
	close(slow.leave)
	for range 100 {
		a := many.next()
		if !want[a.cookie] || a.errno != 0 {
			t.Fatalf("%+v", a)
		}
		delete(want, a.cookie)
	}
}

// Where a write leaves a mapping that is not on disk, one with FUA is followed
// by a flush, whose failure is the write's; other writes are not.
func TestDurableWritesFlushTheMapping(t *testing.T) {
	for name, rig := range map[string]func(t *testing.T) *rig{
		"inline": func(t *testing.T) *rig { return newRig(t, rigConfig{tmpfs: true, mapped: true}) },
		"worker": func(t *testing.T) *rig { return newRig(t, rigConfig{mapped: true}) },
		"through": func(t *testing.T) *rig {
			return newRig(t, rigConfig{mapped: true, cache: backend.CacheWritethrough})
		},
		"ring": func(t *testing.T) *rig {
			r, _ := newRingRig(t, rigConfig{mapped: true})
			return r
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := rig(t)
			var flushed atomic.Int64
			end := func(result error) {
				r.img.set(func(h *hooked) {
					h.flushing = func() error { flushed.Add(1); return result }
				})
			}
			end(nil)
			c := r.connect(&testCodec{})
			c.ok(OpWrite, 0, 0, 4096, contents[:4096])
			plain := int64(0)
			if name == "through" {
				plain = 1
			}
			if n := flushed.Load(); n != plain {
				t.Errorf("%d flushes after a plain write", n)
			}
			c.ok(OpWrite, FUA, 4096, 4096, contents[:4096])
			if n := flushed.Load(); n != plain+1 {
				t.Errorf("%d flushes after one with FUA", n)
			}
			end(unix.ENOSPC)
			if a := c.do(OpWrite, FUA, 8192, 4096, contents[:4096]); a.errno != unix.ENOSPC {
				t.Errorf("%+v where the flush fails", a)
			}
			end(&backend.SyncError{Path: r.path, Err: unix.EIO})
			if a := c.do(OpWrite, FUA, 8192, 4096, contents[:4096]); a.errno != unix.EIO || r.m.Status().State != state.FailedIO {
				t.Errorf("%+v, %s where the sync fails", a, r.m.Status().State)
			}
			must(t, state.Abandon(context.Background(), r.m))
		})
	}
}

// Durable writes that arrive while one is at it share a sync, wait for it
// without a worker, and are answered with what it says.
func TestDurableWritesShareSyncs(t *testing.T) {
	for _, result := range []error{nil, unix.ENOSPC} {
		r := newRig(t, rigConfig{workers: 3})
		slow := newBlocker()
		var first atomic.Bool
		var syncs atomic.Int64
		first.Store(true)
		r.img.set(func(h *hooked) {
			h.preparing = func(_ int64, m backend.Mode) error {
				if m&backend.MayBlock != 0 && first.Swap(false) {
					slow.wait()
				}
				return nil
			}
			h.flushing = func() error { syncs.Add(1); return result }
		})
		c, d := r.connect(&testCodec{}), r.connect(&testCodec{})
		alone := c.send(OpWrite, FUA, 0, 4096, contents[:4096])
		await(t, slow.entered, "the first write")
		const others = 50
		for i := range int64(others) {
			c.send(OpWrite, FUA, 4096+i*4096, 4096, contents[:4096])
			d.send(OpWrite, FUA, 1<<20+i*4096, 4096, contents[:4096])
		}
		d.send(OpDiscard, FUA, 2<<20, 4096, nil)
		c.send(OpFlush, 0, 0, 0, nil)
		eventually(t, "all others wait", func() bool {
			r.d.flushes.mu.Lock()
			defer r.d.flushes.mu.Unlock()
			return len(r.d.flushes.waiting) == 2*others+2
		})
		if n := syncs.Load(); n != 0 {
			t.Fatalf("%d syncs before the first write has ended", n)
		}
		close(slow.leave)
		for _, k := range []*client{c, d} {
			for range others + 1 {
				a := k.next()
				if fails := result != nil && (k == d || a.cookie != alone); (a.errno != 0) != fails {
					t.Fatalf("%+v", a)
				}
			}
		}
		if a := c.next(); (a.errno != 0) != (result != nil) {
			t.Fatalf("%+v", a)
		}
		if n := syncs.Load(); n != 1 {
			t.Fatalf("%d syncs", n)
		}
		if got := r.content(); !bytes.Equal(got[4096:8192], contents[:4096]) {
			t.Error("other bytes")
		}
	}
}
