package ioloop

import (
	"bytes"
	"errors"
	"io"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// floorOf is what n connections have beside the budget.
func floorOf(n int) int64 {
	return int64(n) * (bufferCost(classOf(inputSize)) + bufferCost(classOf(replySize)))
}

// peak is the most memory that was seen in use.
type peak struct {
	r    *rig
	most atomic.Int64
}

func (p *peak) look() {
	n := p.r.e.budget.inUse()
	for {
		most := p.most.Load()
		if n <= most || p.most.CompareAndSwap(most, n) {
			return
		}
	}
}

// Clients that read none of their replies hold no more memory than the budget
// and the floor, and others get on.
func TestStalledReaders(t *testing.T) {
	for _, kind := range []struct {
		name  string
		op    Op
		n     int64
		count int  // of each client
		wait  bool // every read has to wait for a worker
	}{
		{"inline", OpRead, inlineRead, 12, false},
		{"tiny", OpRead, 1, 500, false},
		{"buffered", OpRead, 200_000, 3, false},
		{"large", OpRead, 1 << 20, 1, false},
		{"cold", OpRead, 4096, 40, true},
		{"flush", OpFlush, 0, 200, false},
		{"status", OpStatus, 1 << 20, 200, false},
		{"refused", OpReject, 0, 200, false},
	} {
		t.Run(kind.name, func(t *testing.T) {
			const readers, budget = 64, 16 << 20
			r := newRig(t, rigConfig{tmpfs: true, content: contents, Config: Config{Memory: budget}, stall: time.Hour})
			if kind.wait {
				r.img.set(func(h *hooked) {
					h.mapping = func(_, n int64, m backend.Mode) error {
						if m&backend.MayBlock == 0 && n == kind.n {
							return backend.ErrWait
						}
						return nil
					}
				})
			}
			peak := peak{r: r}
			var stalled []*client
			var sent []<-chan struct{}
			for range readers {
				c := r.connectOver(&testCodec{}, small(socketpair))
				stalled = append(stalled, c)
				sent = append(sent, background(func() {
					var b []byte
					for range kind.count {
						h, _ := c.header(kind.op, 0, 0, kind.n)
						b = append(b, h...)
					}
					c.nc.Write(b)
				}))
			}
			eventually(t, "all wait for their clients, or for memory", func() bool {
				peak.look()
				n := r.e.budget.waiting()
				for _, c := range stalled {
					if c.conn.out.owes.since.Load() != 0 {
						n++
					}
				}
				return n >= readers
			})
			other := r.connect(&testCodec{})
			for i := range int64(30) {
				other.ok(OpWrite, 0, 1<<20+i*4096, 4096, contents[:4096])
				other.ok(OpRead, 0, 1<<20+i*4096, 4096, nil)
				other.ok(OpRead, 0, 0, 32<<10, nil)
				other.ok(OpRead, 0, 0, 60_000, nil) // from the reserve
				other.ok(OpFlush, 0, 0, 0, nil)
				other.ok(OpStatus, 0, 0, 1<<20, nil)
				peak.look()
			}
			// They lose nothing by it.
			var wg sync.WaitGroup
			for _, c := range stalled {
				wg.Go(func() {
					for range kind.count {
						a, err := c.receive()
						peak.look()
						if err != nil || (a.errno != 0) != (kind.op == OpReject) {
							t.Errorf("%+v, %v", a, err)
							return
						}
						if kind.op == OpRead && !bytes.Equal(a.data, contents[:kind.n]) {
							t.Error("other bytes")
						}
					}
				})
			}
			await(t, background(wg.Wait), "the clients to get their replies")
			for _, s := range sent {
				await(t, s, "the clients")
			}
			limit := budget + bufferCost(classOf(1<<20)) + floorOf(readers+1)
			if n := peak.most.Load(); n > limit {
				t.Errorf("%d bytes in use, the limit is %d", n, limit)
			} else {
				t.Logf("%d KiB in use at most, the limit is %d", n>>10, limit>>10)
			}
		})
	}
}

// A connection never has more than its share, but its largest request fits;
// also when its last reply is still being sent.
func TestShare(t *testing.T) {
	for _, memory := range []int64{1, 160 << 20} {
		r := newRig(t, rigConfig{tmpfs: true, size: 64 << 20, Config: Config{Memory: memory}})
		share := r.e.budget.share
		peak := peak{r: r}
		c := r.connect(&testCodec{})
		c.discard = true
		const count = 3
		for range count {
			c.send(OpRead, 0, 0, 32<<20, nil)
		}
		for range count {
			if a := c.next(); a.errno != 0 || a.discarded != 32<<20 {
				t.Fatal(a.errno, a.discarded)
			}
			peak.look()
		}
		c.ok(OpWrite, 0, 0, 32<<20, make([]byte, 32<<20))
		if n := peak.most.Load(); n > share+floorOf(1) {
			t.Errorf("memory %d: %d bytes in use, a share is %d", memory, n, share)
		}
	}
}

// Who asks for more than is left waits until somebody gives something back,
// and nobody is thrown out before the limit.
func TestWaitForMemory(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true, size: 16 << 20, Config: Config{Memory: 12 << 20}, stall: time.Hour})
	holder, waiter := r.connect(&testCodec{}), r.connect(&testCodec{})
	first := holder.send(OpRead, 0, 0, 8<<20, nil)
	eventually(t, "the reply waits for the client", func() bool { return holder.conn.out.owes.since.Load() != 0 })
	second := waiter.send(OpRead, 0, 0, 8<<20, nil)
	eventually(t, "the other waits for memory", func() bool { return r.e.budget.waiting() == 1 })
	if c := r.e.longestStalled(time.Now().Add(-time.Minute)); c != nil {
		t.Fatal("evicted though it stalls for a moment only")
	}
	if c := r.e.longestStalled(time.Unix(0, math.MaxInt64)); c != holder.conn {
		t.Fatal("the one that stalls is not found")
	}
	if a := holder.next(); a.cookie != first {
		t.Fatalf("%+v", a)
	}
	if a := waiter.next(); a.cookie != second {
		t.Fatalf("%+v", a)
	}
}

// Replies without content are paid for too, until they are sent.
func TestUnreadFlushes(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true, Config: Config{Memory: 256 << 10}})
	c := r.connectOver(&testCodec{}, small(socketpair))
	const count = 1000
	sent := background(func() {
		for range count {
			c.send(OpFlush, 0, 0, 0, nil)
		}
	})
	eventually(t, "it is held up", func() bool { return r.e.budget.waiting() == 1 })
	for range count {
		if a := c.next(); a.errno != 0 {
			t.Fatalf("%+v", a)
		}
	}
	await(t, sent, "the client")
}

// Who waits for nobody but itself is not evicted.
func TestOwnMemory(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true, Config: Config{Memory: 5 << 20}, stall: time.Hour})
	c := r.connect(&testCodec{})
	for range 4 {
		c.send(OpRead, 0, 0, 1<<20+1, nil)
	}
	eventually(t, "it waits for memory", func() bool { return r.e.budget.waiting() == 1 })
	eventually(t, "it reads nothing", func() bool { return c.conn.out.owes.since.Load() != 0 })
	if r.e.longestStalled(time.Unix(0, math.MaxInt64)) != nil {
		t.Fatal("evicted for its own sake")
	}
	for range 4 {
		c.next()
	}
}

// Clients that hold memory and move nothing are disconnected when others need
// it: those that do not read and those that owe a payload. Those that move
// are not.
func TestEviction(t *testing.T) {
	for name, link := range links {
		for _, stall := range []string{"reading", "payload", "sipping", "dripping"} {
			t.Run(name+"/"+stall, func(t *testing.T) {
				r := newRig(t, rigConfig{tmpfs: true, size: 16 << 20, Config: Config{Memory: 12 << 20}, stall: 20 * time.Millisecond})
				holder := r.connectOver(&testCodec{}, link)
				quiet := r.connectOver(&testCodec{}, link)
				quiet.ok(OpRead, 0, 0, 4096, nil)
				if stall == "reading" || stall == "sipping" {
					holder.send(OpRead, 0, 0, 8<<20, nil)
				} else {
					b, _ := holder.header(OpWrite, 0, 0, 8<<20)
					holder.write(append(b, 1, 2, 3))
				}
				// A byte now and then is as good as none.
				move := map[string]func([]byte) (int, error){"sipping": holder.nc.Read, "dripping": holder.nc.Write}[stall]
				if move != nil {
					moved := background(func() {
						for one, err := []byte{1}, error(nil); err == nil; time.Sleep(time.Millisecond) {
							_, err = move(one)
						}
					})
					defer func() {
						holder.nc.Close()
						await(t, moved, "the client to end")
					}()
				}
				eventually(t, "the client stalls, and holds memory", func() bool {
					return holder.conn.stalledSince() != 0 && holder.conn.held.Load() > 8<<20
				})
				c := r.connectOver(&testCodec{}, link)
				c.ok(OpRead, 0, 0, 8<<20, nil)
				if err := holder.end(); !errors.Is(err, errStalled) {
					t.Fatal(err)
				}
				quiet.ok(OpRead, 0, 0, 4096, nil)
				c.ok(OpRead, 0, 0, 8<<20, nil)
			})
		}
	}
}

// What counts as moving.
func TestStall(t *testing.T) {
	var s stall
	long := func(n int) bool { // n bytes later, does it still count from the beginning?
		begun := s.begun.Load()
		s.wait()
		s.move(n)
		s.wait()
		same := s.since.Load() == begun
		s.move(0)
		if s.since.Load() != 0 {
			t.Error("not waited for, and stalls")
		}
		return same
	}
	s.wait()
	s.begun.Add(-int64(time.Minute))
	for _, n := range []int{0, 1, leastMove / 2, leastMove/2 - 2} {
		if !long(n) {
			t.Errorf("%d bytes more count", n)
		}
	}
	if long(1) {
		t.Error("enough does not count")
	}
	s.begun.Add(-int64(time.Minute))
	if s.settled(); long(1) {
		t.Error("stalls though it owed nothing")
	}
}

// A connection has at most so many requests away from it.
func TestTaskLimit(t *testing.T) {
	h := hold(state.StepLoad)
	r := newRig(t, rigConfig{tmpfs: true, inactive: true, onStep: h.step})
	c, other := r.connect(&testCodec{}), r.connect(&testCodec{})
	h.armed.Store(true)
	active := background(r.activate)
	await(t, h.reached, "the step")
	const count = 3000
	sent := background(func() {
		var b []byte
		for i := range int64(count) {
			h, _ := c.header(OpWrite, 0, i*512, 512)
			b = append(append(b, h...), contents[i*512:][:512]...)
		}
		c.write(b)
	})
	c.awaitParked(maxTasks)
	other.ok(OpRead, 0, 0, 4096, nil)
	if n := c.conn.tasks.Load(); n != maxTasks {
		t.Fatalf("%d tasks", n)
	}
	close(h.goOn)
	for range count {
		if a := c.next(); a.errno != 0 {
			t.Fatalf("%+v", a)
		}
	}
	await(t, sent, "the client")
	await(t, active, "activation")
	if a := c.ok(OpRead, 0, 0, count*512, nil); !bytes.Equal(a.data, contents[:count*512]) {
		t.Fatal("other bytes")
	}
}

// A client that vanishes while its requests wait: for memory, at the gate,
// because there are too many.
func TestVanishWhileWaiting(t *testing.T) {
	h := hold(state.StepLoad)
	r := newRig(t, rigConfig{tmpfs: true, inactive: true, size: 16 << 20, onStep: h.step, Config: Config{Memory: 12 << 20}, stall: time.Hour})
	holder := r.connect(&testCodec{})
	holder.send(OpRead, 0, 0, 8<<20, nil)
	eventually(t, "the reply waits for the client", func() bool { return holder.conn.out.owes.since.Load() != 0 })
	h.armed.Store(true)
	active := background(r.activate)
	await(t, h.reached, "the step")

	many := r.connect(&testCodec{})
	sent := background(func() {
		for i := range int64(maxTasks + 100) {
			b, _ := many.header(OpZero, 0, i*512, 512)
			if _, err := many.nc.Write(b); err != nil {
				return
			}
		}
	})
	eventually(t, "too many requests", func() bool { return many.conn.tasks.Load() == maxTasks })
	parked := r.connect(&testCodec{})
	parked.send(OpWrite, 0, 0, 4096, contents[:4096])
	eventually(t, "a request is parked", func() bool { return parked.conn.tasks.Load() == 1 })
	memory := r.connect(&testCodec{})
	memory.send(OpRead, 0, 0, 8<<20, nil)
	eventually(t, "a request waits for memory", func() bool { return r.e.budget.waiting() == 1 })

	// A receiving side that waits for something else does not see that its
	// client has gone; the engine may find out in another way.
	must(t, parked.nc.Close())
	parked.end()
	for _, c := range []*client{many, memory} {
		must(t, c.nc.Close())
		c.conn.out.fail(errStalled)
		if err := c.end(); err != errStalled {
			t.Fatal(err)
		}
	}
	await(t, sent, "the client")
	holder.next()
	close(h.goOn)
	await(t, active, "activation")
	// Nothing of what was parked has run.
	if a := holder.ok(OpRead, 0, 0, 4096, nil); !bytes.Equal(a.data, make([]byte, 4096)) {
		t.Fatal("a write of a client that was gone has run")
	}
}

// Idle connections hold no buffers.
func TestIdleHoldsNothing(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	for name, link := range links {
		for range 20 {
			c := r.connectOver(&testCodec{}, link)
			c.ok(OpRead, 0, 0, 4096, nil)
			c.ok(OpWrite, 0, 0, 100_000, contents[:100_000])
		}
		eventually(t, name+": all buffers are given back", func() bool { used, _ := r.e.Memory(); return used == 0 })
	}
	if _, limit := r.e.Memory(); limit != 256<<20 {
		t.Fatal(limit)
	}
}

// An error with a long text fits.
func TestLongError(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	long := string(bytes.Repeat([]byte("x"), 4000))
	r.img.set(func(h *hooked) {
		h.mapping = func(int64, int64, backend.Mode) error { return &longError{long} }
		h.flushing = func() error { return &longError{long} }
	})
	c := r.connect(&testCodec{})
	const count = 100
	sent := background(func() {
		for range count {
			c.send(OpRead, 0, 0, 4096, nil)
			c.send(OpRead, 0, 0, 100_000, nil)
			c.send(OpFlush, 0, 0, 0, nil)
		}
		c.send(OpDisconnect, 0, 0, 0, nil)
	})
	for range 3 * count {
		if a := c.next(); a.errno != unix.EDOM || a.text != long {
			t.Fatalf("%+v", a)
		}
	}
	await(t, sent, "the client")
	if _, err := c.receive(); err != io.EOF {
		t.Fatal(err)
	}
}

type longError struct{ text string }

func (e *longError) Error() string { return e.text }
func (e *longError) Unwrap() error { return unix.EDOM }

// A client that takes its replies slowly does not stall, though its socket says nothing
// of that before most of what it holds is taken.
func TestSlowTaker(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{tmpfs: true, size: 16 << 20, stall: time.Hour})
			c := r.connectOver(&testCodec{}, link)
			c.send(OpRead, 0, 0, 16<<20, nil)
			eventually(t, "the reply waits for the client", func() bool { return c.conn.stalledSince() != 0 })
			for range 4 {
				before := c.conn.stalledSince()
				_, err := io.CopyN(io.Discard, c.br, 256<<10)
				must(t, err)
				eventually(t, "the client is seen to move", func() bool { return c.conn.stalledSince() != before })
			}
		})
	}
}
