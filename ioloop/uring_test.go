package ioloop

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// newRingRig has its image on O_DIRECT, so that whole blocks go to the ring.
func newRingRig(t *testing.T, cfg rigConfig) (*rig, *Uring) {
	t.Helper()
	u, err := OpenUring()
	must(t, err)
	cfg.Ring, cfg.cache = u, backend.CacheNone
	r := newRig(t, cfg)
	t.Cleanup(func() { // before the rig's
		u.mu.Lock()
		defer u.mu.Unlock()
		if len(u.free) != ringOps {
			t.Errorf("%d operations left", ringOps-len(u.free))
		}
	})
	return r, u
}

// tamper makes fn change the results of operations.
func (u *Uring) tamper(fn func(res int32) int32) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.results = fn
}

// count makes u count the operations whose results it reaps.
func (u *Uring) count() *atomic.Int64 {
	n := new(atomic.Int64)
	u.tamper(func(res int32) int32 { n.Add(1); return res })
	return n
}

func TestRingServes(t *testing.T) {
	want := pattern(4<<20, 1)
	r, u := newRingRig(t, rigConfig{content: want})
	ops := u.count()
	c := r.connect(&testCodec{})
	for _, n := range []int64{4096, 64 << 10, 2 << 20} {
		at := n % (1 << 20)
		if a := c.ok(OpRead, 0, at, n, nil); !bytes.Equal(a.data, want[at:at+n]) {
			t.Errorf("%d bytes differ", n)
		}
		for _, f := range []Flags{0, FUA} {
			p := pattern(int(n), uint64(n)+uint64(f))
			c.ok(OpWrite, f, at, n, p)
			copy(want[at:], p)
		}
	}
	if n := ops.Load(); n != 9 {
		t.Errorf("%d operations on the ring, want 9", n)
	}
	// Edges are for workers.
	c.ok(OpWrite, 0, 100, 5000, pattern(5000, 3))
	copy(want[100:], pattern(5000, 3))
	c.ok(OpRead, 0, 1, 511, nil)
	if n := ops.Load(); n != 9 {
		t.Errorf("%d operations on the ring, want 9 still", n)
	}
	got, err := os.ReadFile(r.path)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Error("the image is not what was written")
	}
}

// Reads of what is not in the page cache go to the ring, of what is do not.
func TestRingReadsTheCold(t *testing.T) {
	want := pattern(1<<20, 1)
	u, err := OpenUring()
	must(t, err)
	ops := u.count()
	r := newRig(t, rigConfig{Config: Config{Ring: u}, content: want})
	f, err := os.Open(r.path)
	must(t, err)
	defer f.Close()
	c := r.connect(&testCodec{})
	c.ok(OpRead, 0, 0, 4096, nil)
	if ops.Load() != 0 {
		t.Error("a cached read went to the ring")
	}
	must(t, r.raw.SyncAhead(context.Background())) // and off the map, which keeps pages in the cache
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	if a := c.ok(OpRead, 0, 512<<10, 4096, nil); !bytes.Equal(a.data, want[512<<10:][:4096]) {
		t.Error("the bytes differ")
	}
	if n := ops.Load(); n != 1 {
		t.Errorf("%d operations on the ring, want 1", n)
	}
}

// What there is no place for on the ring goes to workers.
func TestRingFullOfOthers(t *testing.T) {
	want := pattern(1<<20, 1)
	r, u := newRingRig(t, rigConfig{content: want})
	ops := u.count()
	var kept []uint32
	u.mu.Lock()
	kept, u.free = u.free, nil
	u.mu.Unlock()
	c := r.connect(&testCodec{})
	for i := range int64(100) {
		c.send(OpRead, 0, i*4096, 4096, nil)
		c.send(OpWrite, 0, 512<<10+i*4096, 4096, want[:4096])
	}
	for range 200 {
		if a := c.next(); a.errno != 0 {
			t.Fatal(a.text)
		}
	}
	if n := ops.Load(); n != 0 {
		t.Errorf("%d operations on the ring", n)
	}
	u.mu.Lock()
	u.free = kept
	u.mu.Unlock()
}

// Any result but success is found out by a worker, and what the kernel says
// but once is not asked twice.
func TestRingResults(t *testing.T) {
	for name, x := range map[string]struct {
		op    Op
		flags Flags
		res   int32
		errno unix.Errno
		state state.State
	}{
		"read again":          {OpRead, 0, -int32(unix.EAGAIN), 0, state.Active},
		"read interrupted":    {OpRead, 0, -int32(unix.EINTR), 0, state.Active},
		"read fails once":     {OpRead, 0, -int32(unix.EIO), 0, state.Active},
		"short read":          {OpRead, 0, 4096, 0, state.Active},
		"empty read":          {OpRead, 0, 0, 0, state.Active},
		"read cancelled":      {OpRead, 0, -int32(unix.ECANCELED), 0, state.Active},
		"write cancelled":     {OpWrite, 0, -int32(unix.ECANCELED), 0, state.Active},
		"durable cancelled":   {OpWrite, FUA, -int32(unix.ECANCELED), 0, state.Active},
		"write again":         {OpWrite, 0, -int32(unix.EAGAIN), 0, state.Active},
		"write fails once":    {OpWrite, 0, -int32(unix.EIO), 0, state.Active},
		"short write":         {OpWrite, 0, 4096, 0, state.Active},
		"short durable write": {OpWrite, FUA, 4096, 0, state.Active},
		"durable write again": {OpWrite, FUA, -int32(unix.EAGAIN), 0, state.Active},
		"no RWF_DSYNC":        {OpWrite, FUA, -int32(unix.EOPNOTSUPP), 0, state.Active},
		"sync failed":         {OpWrite, FUA, -int32(unix.EIO), unix.EIO, state.FailedIO},
		"full for a moment":   {OpWrite, FUA, -int32(unix.ENOSPC), 0, state.Active},
	} {
		t.Run(name, func(t *testing.T) {
			want := pattern(64<<10, 1)
			r, u := newRingRig(t, rigConfig{content: want})
			c := r.connect(&testCodec{})
			var done atomic.Int64
			u.tamper(func(int32) int32 { done.Add(1); return x.res })
			p := pattern(8192, 2)
			var a answer
			if x.op == OpRead {
				a = c.do(OpRead, x.flags, 4096, 8192, nil)
			} else {
				a = c.do(OpWrite, x.flags, 4096, 8192, p)
				copy(want[4096:], p)
			}
			if a.errno != x.errno || (x.op == OpRead && !bytes.Equal(a.data, want[4096:][:8192])) {
				t.Errorf("%v %s", a.errno, a.text)
			}
			if done.Load() != 1 {
				t.Errorf("%d operations on the ring", done.Load())
			}
			if got := r.m.Status().State; got != x.state {
				t.Errorf("state %v, want %v", got, x.state)
			}
			if got, err := os.ReadFile(r.path); err != nil || !bytes.Equal(got, want) {
				t.Error("the image is not what was written", err)
			}
			if x.state == state.FailedIO {
				must(t, state.Abandon(context.Background(), r.m))
			}
		})
	}
}

// A file that has shrunk gives EIO, from the worker that does it again.
func TestRingFileShrinks(t *testing.T) {
	r, u := newRingRig(t, rigConfig{size: 1 << 20})
	ops := u.count()
	c := r.connect(&testCodec{})
	must(t, os.Truncate(r.path, 512<<10))
	if a := c.do(OpRead, 0, 512<<10, 4096, nil); a.errno != unix.EIO {
		t.Error(a.errno, a.text)
	}
	if a := c.do(OpRead, 0, 508<<10, 8192, nil); a.errno != unix.EIO {
		t.Error(a.errno, a.text)
	}
	if ops.Load() != 2 {
		t.Errorf("%d operations on the ring, want 2", ops.Load())
	}
}

// A connection that breaks keeps its buffers until the kernel is through with
// them.
func TestRingClientDies(t *testing.T) {
	r, u := newRingRig(t, rigConfig{size: 4 << 20})
	open := make(chan struct{})
	u.tamper(func(res int32) int32 { <-open; return res })
	c := r.connect(&testCodec{})
	for i := range int64(64) {
		c.send(OpRead, 0, i*4096, 4096, nil)
		c.send(OpWrite, 0, i*4096, 4096, contents[:4096])
	}
	eventually(t, "all are under way", func() bool { return r.d.Stats().InFlight == 128 })
	c.nc.Close()
	// Its receiving ends; what is under way stays.
	eventually(t, "the end of the stream is seen", func() bool {
		c.conn.mu.Lock()
		defer c.conn.mu.Unlock()
		return c.conn.mu.dead
	})
	if n := c.conn.tasks.Load(); n != 128 {
		t.Errorf("%d tasks, want 128", n)
	}
	select {
	case <-c.served:
		t.Error("the connection ended before its operations")
	default:
	}
	close(open)
	_ = c.end()
}

// Inactivation waits for everything on the ring, and nothing is there after.
func TestRingInactivate(t *testing.T) {
	const n = 1000
	r, u := newRingRig(t, rigConfig{size: 8 << 20})
	open := make(chan struct{})
	var inactive atomic.Bool
	var got, late atomic.Int64
	u.tamper(func(res int32) int32 {
		<-open
		got.Add(1)
		if inactive.Load() {
			late.Add(1)
		}
		return res
	})
	c := r.connect(&testCodec{})
	drained := background(func() {
		for range n {
			if a, err := c.receive(); err != nil || a.errno != 0 {
				t.Error(err, a.text)
				return
			}
		}
	})
	for i := range int64(n) {
		op := OpWrite
		if i%4 == 0 {
			op = OpRead
		}
		var p []byte
		if op == OpWrite {
			p = contents[:4096]
		}
		c.send(op, 0, i*4096, 4096, p)
	}
	eventually(t, "the ring has its share, and workers have done the rest", func() bool {
		u.mu.Lock()
		defer u.mu.Unlock()
		s := r.d.Stats()
		return c.conn.onRing == ringShare && s.Reads+s.Writes == n-ringShare
	})
	ended := background(func() {
		if err := state.Inactivate(context.Background(), r.m); err != nil {
			t.Error(err)
		}
		inactive.Store(true)
	})
	eventually(t, "it drains", func() bool { return r.m.Status().State == state.Inactivating })
	select {
	case <-ended:
		t.Error("inactive while operations are under way")
	default:
	}
	close(open)
	await(t, ended, "inactivation")
	await(t, drained, "the replies")
	if got.Load() != ringShare || late.Load() != 0 {
		t.Errorf("%d completions, %d of them when the image was inactive", got.Load(), late.Load())
	}
	u.mu.Lock()
	if len(u.free) != ringOps {
		t.Errorf("%d operations on the ring of an inactive image", ringOps-len(u.free))
	}
	u.mu.Unlock()
	if a := c.do(OpWrite, 0, 0, 4096, contents[:4096]); a.errno != unix.EPERM {
		t.Error(a.errno, a.text)
	}
}

// Reads and writes of random shapes, on the ring and beside it, from several
// connections to ranges of their own.
func TestRingRandom(t *testing.T) {
	const part = 1 << 20
	r, u := newRingRig(t, rigConfig{size: 4 * part})
	ops := u.count()
	var done []<-chan struct{}
	for k := range int64(4) {
		c := r.connect(&testCodec{})
		done = append(done, background(func() {
			rnd := rand.New(rand.NewPCG(uint64(k), 1))
			want := make([]byte, part)
			for i := range 150 {
				n := rnd.Int64N(100<<10) + 1
				off := rnd.Int64N(part - n)
				if rnd.IntN(2) == 0 {
					off, n = off&^4095, (n+4095)&^4095
				}
				n = min(n, part-off)
				f := Flags(0)
				if rnd.IntN(4) == 0 {
					f = FUA
				}
				p := pattern(int(n), uint64(i))
				copy(want[off:], p)
				if a := c.do(OpWrite, f, k*part+off, n, p); a.errno != 0 {
					t.Error(a.text)
					return
				}
				if a := c.do(OpRead, 0, k*part+off, n, nil); !bytes.Equal(a.data, want[off:off+n]) {
					t.Errorf("%d bytes at %d differ", n, off)
					return
				}
			}
			if a := c.do(OpRead, 0, k*part, part, nil); !bytes.Equal(a.data, want) {
				t.Error("the whole differs")
			}
		}))
	}
	for _, d := range done {
		await(t, d, "a client")
	}
	if ops.Load() == 0 {
		t.Error("nothing went to the ring")
	}
}

// Nor does what goes to the ring allocate.
func TestRingAllocatesNothing(t *testing.T) {
	for _, op := range []Op{OpRead, OpWrite} {
		r, u := newRingRig(t, rigConfig{content: pattern(batchOps*4096, 1)})
		ops := u.count()
		k := newCheap(r, op, 4096)
		if n := k.allocations(t); n != 0 {
			t.Errorf("%v: %v allocations for a batch", op, n)
		}
		if ops.Load() < 100*batchOps {
			t.Errorf("%v: %d operations on the ring", op, ops.Load())
		}
	}
}
