package ioloop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// holding stops a machine's transition at a step.
type holding struct {
	at      state.Step
	reached chan struct{}
	goOn    chan struct{}
	armed   atomic.Bool
}

func hold(at state.Step) *holding {
	return &holding{at: at, reached: make(chan struct{}), goOn: make(chan struct{})}
}

func (h *holding) step(s state.Step) {
	if s == h.at && h.armed.CompareAndSwap(true, false) {
		close(h.reached)
		<-h.goOn
	}
}

var writeClass = []Op{OpWrite, OpZero, OpDiscard}

// awaitParked waits until n requests of c are parked.
func (c *client) awaitParked(n int) {
	c.t.Helper()
	eventually(c.t, "all are parked", func() bool {
		c.conn.mu.Lock()
		defer c.conn.mu.Unlock()
		return len(c.conn.mu.parked) == n
	})
}

// While an image is being activated reads go on and the rest waits; then it
// runs.
func TestHeldUntilActive(t *testing.T) {
	h := hold(state.StepLoad)
	r := newRig(t, rigConfig{inactive: true, onStep: h.step, content: contents[:1<<20]})
	c := r.connect(&testCodec{})
	for _, op := range writeClass {
		if a := c.do(op, 0, 0, 4096, payloadOf(op, 4096)); a.errno != unix.EPERM || a.text != state.ErrInactive.Error() {
			t.Fatalf("%v while inactive: %+v", op, a)
		}
	}
	for _, n := range []int64{100_000, 1 << 19} { // their payload is consumed
		if a := c.do(OpWrite, 0, 0, n, contents[:n]); a.errno != unix.EPERM {
			t.Fatalf("%+v", a)
		}
	}
	for _, op := range []Op{OpCache, OpStatus} {
		if a := c.do(op, 0, 0, 4096, nil); a.errno != unix.EPERM {
			t.Fatalf("%v while inactive: %+v", op, a)
		}
	}
	c.ok(OpFlush, 0, 0, 0, nil)
	if s := r.d.Stats(); s.Refused != 7 || s.Errors != 0 {
		t.Fatalf("%+v", s)
	}

	h.armed.Store(true)
	active := background(r.activate)
	await(t, h.reached, "the step")
	want := map[uint64]bool{}
	for _, n := range []int64{10, 4096, 40_000, 1 << 19} {
		want[c.send(OpWrite, 0, 0, n, contents[5:5+n])] = true
	}
	for _, op := range []Op{OpFlush, OpStatus, OpCache, OpZero, OpDiscard} {
		want[c.send(op, 0, 1<<19, 4096, nil)] = true
	}
	for range 20 {
		if a := c.ok(OpRead, 0, 0, 200_000, nil); !bytes.Equal(a.data, contents[:200_000]) {
			t.Fatal("a write ran while the gate was held")
		}
		c.ok(OpRead, 0, 0, 100, nil)
	}
	c.awaitParked(len(want))
	close(h.goOn)
	for len(want) > 0 {
		a := c.next()
		if a.errno != 0 || !want[a.cookie] {
			t.Fatalf("%+v", a)
		}
		delete(want, a.cookie)
	}
	await(t, active, "activation")
}

func payloadOf(op Op, n int) []byte {
	if op == OpWrite {
		return contents[:n]
	}
	return nil
}

// While an image is being given away the rest waits too, and is then refused.
func TestHeldUntilInactive(t *testing.T) {
	h := hold(state.StepSettle)
	r := newRig(t, rigConfig{onStep: h.step, content: contents[:1<<20]})
	c := r.connect(&testCodec{})
	h.armed.Store(true)
	inactive := background(r.inactivate)
	await(t, h.reached, "the step")
	writes := map[uint64]bool{}
	for _, n := range []int64{10, 4096, 40_000, 1 << 19} {
		writes[c.send(OpWrite, 0, 0, n, contents[5:5+n])] = true
	}
	flush := c.send(OpFlush, 0, 0, 0, nil)
	for range 20 {
		c.ok(OpRead, 0, 0, 200_000, nil)
	}
	close(h.goOn)
	for range 5 {
		switch a := c.next(); {
		case writes[a.cookie] && a.errno == unix.EPERM:
		case a.cookie == flush && a.errno == 0:
		default:
			t.Fatalf("%+v", a)
		}
	}
	await(t, inactive, "inactivation")
	got, err := os.ReadFile(r.path)
	must(t, err)
	if !bytes.Equal(got, contents[:1<<20]) {
		t.Fatal("a refused write has changed the image")
	}
}

// A drain waits for storage, never for a client.
func TestStalledClientsDelayNobody(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{tmpfs: true})
			type stall struct {
				c    *client
				then func()
			}
			var stalls []stall
			// Inside headers and payloads.
			for _, n := range []int64{4096, smallPayload + 1, 1 << 20} {
				for _, part := range []int64{-10, 0, 10, n - 1} {
					c := r.connectOver(&testCodec{}, link)
					b, _ := c.header(OpWrite, 0, 0, n)
					b = append(b, contents[:n]...)
					c.write(b[:reqSize+part])
					eventually(t, "the client is seen to owe a payload", func() bool { return c.conn.owes.since.Load() != 0 })
					stalls = append(stalls, stall{c, func() {
						c.write(b[reqSize+part:])
						if a := c.next(); a.errno != unix.EPERM {
							t.Errorf("%+v", a)
						}
					}})
				}
			}
			// Not reading, while writes are under way.
			unread := []int64{16 << 10, 256 << 10}
			if name == "tcp" {
				unread = []int64{1 << 20} // its buffers grow
			}
			for _, n := range unread {
				c := r.connectOver(&testCodec{}, small(link))
				const reads = 24
				sent := background(func() {
					for range reads {
						c.send(OpWrite, 0, 0, 100_000, contents[:100_000])
						c.send(OpRead, 0, 0, n, nil)
						c.send(OpFlush, 0, 0, 0, nil)
					}
				})
				eventually(t, "the client is seen not to read", func() bool { return c.conn.out.owes.since.Load() != 0 })
				stalls = append(stalls, stall{c, func() {
					for range 3 * reads {
						if a := c.next(); a.errno != 0 && a.errno != unix.EPERM {
							t.Errorf("%+v", a)
						}
					}
					await(t, sent, "the client")
				}})
			}
			r.inactivate() // returns
			for _, s := range stalls {
				eventually(t, "the client still stalls", func() bool { return s.c.conn.stalledSince() != 0 })
			}
			for _, s := range stalls {
				s.then()
			}
		})
	}
}

// Nothing that is queued runs once the image is inactive.
func TestQueuedDiscardsEndBeforeInactive(t *testing.T) {
	h := hold(state.StepDrain)
	r := newRig(t, rigConfig{tmpfs: true, onStep: h.step})
	slow := newBlocker()
	var inactive atomic.Bool
	var ran, late atomic.Int64
	r.img.set(func(i *hooked) {
		i.discarding = func(int64, int64) error {
			slow.wait()
			ran.Add(1)
			if inactive.Load() {
				late.Add(1)
			}
			return nil
		}
	})
	c, other := r.connect(&testCodec{}), r.connect(&testCodec{})
	const queued = 1000
	for i := range int64(queued) {
		c.send(OpDiscard, 0, i*4096, 4096, nil)
	}
	for range 24 { // of 32: what one connection may have
		await(t, slow.entered, "the workers")
	}
	h.armed.Store(true)
	done := background(func() {
		r.inactivate()
		inactive.Store(true)
	})
	await(t, h.reached, "the gate to close")
	for range 100 {
		other.send(OpDiscard, 0, 0, 4096, nil)
	}
	close(h.goOn)
	select {
	case <-done:
		t.Fatal("inactive with discards under way")
	default:
	}
	close(slow.leave)
	await(t, done, "inactivation")
	granted := 0
	for range queued {
		switch a := c.next(); a.errno {
		case 0:
			granted++
		case unix.EPERM:
		default:
			t.Fatalf("%+v", a)
		}
	}
	for range 100 {
		if a := other.next(); a.errno != unix.EPERM {
			t.Fatalf("%+v", a)
		}
	}
	if int64(granted) != ran.Load() || late.Load() != 0 {
		t.Fatalf("%d ran, %d were granted, %d ran late", ran.Load(), granted, late.Load())
	}
}

// A task is not parked if the gate has opened since it was told to wait:
// nobody would wake it.
func TestParkAsksAgain(t *testing.T) {
	h := hold(state.StepLoad)
	r := newRig(t, rigConfig{inactive: true, onStep: h.step})
	c := r.connect(&testCodec{}).conn
	p := &task{conn: c, req: Request{Op: OpWrite}}
	if p.park() || p.admitted {
		t.Fatal("parked, though it would be refused")
	}
	h.armed.Store(true)
	active := background(r.activate)
	await(t, h.reached, "the step")
	if !p.park() || p.admitted {
		t.Fatal("not parked, though the gate holds")
	}
	c.mu.Lock()
	c.mu.parked = nil // it is no real task
	c.mu.Unlock()
	close(h.goOn)
	await(t, active, "activation")
	if p.park() || !p.admitted {
		t.Fatal("parked, though the gate is open")
	}
	c.lane.Leave()
}

// A task that has to wait for the gate when its client is gone already is
// dropped then.
func TestParkedTooLate(t *testing.T) {
	h := hold(state.StepLoad)
	r := newRig(t, rigConfig{inactive: true, onStep: h.step, workers: 1})
	slow := newBlocker()
	r.img.set(func(i *hooked) {
		i.mapping = func(_, _ int64, m backend.Mode) error { return slow.mode(m) }
	})
	other, c := r.connect(&testCodec{}), r.connect(&testCodec{})
	h.armed.Store(true)
	active := background(r.activate)
	await(t, h.reached, "the step")
	other.send(OpRead, 0, 0, 4096, nil)
	await(t, slow.entered, "the worker")
	c.send(OpWrite, 0, 0, 4096, contents[:4096])
	eventually(t, "the write is queued", func() bool { return c.conn.tasks.Load() == 1 })
	must(t, c.nc.Close())
	eventually(t, "the connection ends", func() bool {
		c.conn.mu.Lock()
		defer c.conn.mu.Unlock()
		return c.conn.mu.dead
	})
	close(slow.leave)
	c.end() // while the gate holds
	other.next()
	close(h.goOn)
	await(t, active, "activation")
}

// lostSync is an error that means lost writes.
type lostSync struct{}

func (lostSync) Error() string    { return "lost" }
func (lostSync) SyncFailed() bool { return true }
func (lostSync) Unwrap() error    { return unix.EIO }

// A failed flush is told to the client and to the machine, before the
// admission ends.
func TestFailedFlush(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	r.img.set(func(h *hooked) { h.flushing = func() error { return fmt.Errorf("oh: %w", lostSync{}) } })
	c := r.connect(&testCodec{})
	if a := c.do(OpFlush, 0, 0, 0, nil); a.errno != unix.EIO {
		t.Fatalf("%+v", a)
	}
	if s := r.m.Status().State; s != state.FailedIO {
		t.Fatal(s)
	}
	if a := c.do(OpWrite, 0, 0, 512, contents[:512]); a.errno != unix.EIO {
		t.Fatalf("%+v", a)
	}
	c.ok(OpRead, 0, 0, 512, nil)
	c.ok(OpStatus, 0, 0, 512, nil)
	r.img.set(func(h *hooked) { h.flushing = nil })
	must(t, state.Abandon(context.Background(), r.m))
	if a := c.do(OpFlush, 0, 0, 0, nil); a.errno != unix.EIO || !strings.Contains(a.text, "may be lost") {
		t.Errorf("given up: %+v", a)
	}
	c.ok(OpFlush, 0, 0, 0, nil) // it has been told
}

// Reads meet a stop: each is answered with its bytes or refused, and none
// touches a closed image.
func TestReadsMeetStop(t *testing.T) {
	for range 20 {
		r := newRig(t, rigConfig{content: contents[:1<<20]})
		var rnd, late atomic.Int64
		var stopped atomic.Bool
		r.img.set(func(h *hooked) {
			h.mapping = func(_, _ int64, m backend.Mode) error {
				if stopped.Load() {
					late.Add(1)
				}
				if m&backend.MayBlock == 0 && rnd.Add(1)%3 == 0 {
					return backend.ErrWait
				}
				return nil
			}
		})
		var wg sync.WaitGroup
		begun := make(chan struct{}, 4)
		for i := range int64(4) {
			c := r.connect(&testCodec{})
			wg.Go(func() {
				for n := int64(100 + i*40_000); ; {
					cookie := c.send(OpRead, 0, 0, n, nil)
					a, err := c.receive()
					switch {
					case err != nil || a.cookie != cookie:
						t.Errorf("%+v, %v", a, err)
						return
					case a.errno == unix.ESHUTDOWN:
						return
					case a.errno != 0 || !bytes.Equal(a.data, contents[:n]):
						t.Errorf("%v %s", a.errno, a.text)
						return
					}
					select {
					case begun <- struct{}{}:
					default:
					}
				}
			})
		}
		await(t, begun, "reads")
		must(t, state.Stop(r.m))
		stopped.Store(true)
		await(t, background(wg.Wait), "the clients")
		for _, n := range []int64{100, 100_000, 1 << 19} {
			if a := r.connect(&testCodec{}).do(OpRead, 0, 0, n, nil); a.errno != unix.ESHUTDOWN {
				t.Fatalf("%v %s", a.errno, a.text)
			}
		}
		if n := late.Load(); n != 0 {
			t.Fatalf("%d reads of a closed image", n)
		}
	}
}

// Clients come, ask and vanish at any point while ownership goes back and
// forth: nothing panics, hangs or is left behind, and what was acknowledged is
// there.
func TestChurn(t *testing.T) {
	const conns, rounds, flips = 6, 25, 40
	r := newRig(t, rigConfig{tmpfs: true, size: conns << 20, Config: Config{Memory: 2 << 20}, workers: 3})
	var delays atomic.Int64
	r.img.set(func(h *hooked) {
		h.preparing = func(_ int64, m backend.Mode) error {
			if m&backend.MayBlock == 0 && delays.Add(1)%2 == 0 {
				return backend.ErrWait
			}
			return nil
		}
	})
	stop := make(chan struct{})
	flipped := make(chan error, 1)
	go func() {
		for range flips {
			if err := errors.Join(state.Inactivate(context.Background(), r.m),
				state.Activate(context.Background(), state.ActivateOptions{}, r.m)); err != nil {
				flipped <- err
				return
			}
		}
		close(stop)
		flipped <- nil
	}()
	names := []string{"unix", "tcp", "pipe"}
	var wg sync.WaitGroup
	for i := range conns {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 5))
			base := int64(i) << 20
			for round := 0; ; round++ {
				select {
				case <-stop:
					if round >= rounds {
						return
					}
				default:
				}
				c := r.connectOver(&testCodec{chunked: rnd.IntN(2) == 0}, links[names[rnd.IntN(3)]])
				if err := visit(c, base, rnd); err != nil {
					t.Error(err)
					return
				}
				c.nc.Close()
				await(t, c.served, "the connection to end")
			}
		})
	}
	must(t, await(t, flipped, "the flips"))
	await(t, background(wg.Wait), "the clients")
}

// visit is a short life of a client: a write that it sees acknowledged and
// finds again, or refused; then a burst, and away in the middle of it.
func visit(c *client, base int64, rnd *rand.Rand) error {
	n := rnd.Int64N(60_000) + 1
	p := contents[rnd.IntN(10_000):][:n]
	cookie := c.send(OpWrite, 0, base, n, p)
	a, err := c.receive()
	if err != nil || a.cookie != cookie {
		return fmt.Errorf("%+v, %v", a, err)
	}
	if a.errno != 0 && a.errno != unix.EPERM {
		return fmt.Errorf("%v %s", a.errno, a.text)
	}
	if a.errno == 0 {
		c.send(OpRead, 0, base, n, nil)
		b, err := c.receive()
		if err != nil || b.errno != 0 || !bytes.Equal(b.data, p) {
			return fmt.Errorf("an acknowledged write is not there: %v, %v", b.errno, err)
		}
	}
	var burst []byte
	for range rnd.IntN(30) {
		ops := []Op{OpRead, OpWrite, OpFlush, OpDiscard, OpZero, OpStatus}
		op := ops[rnd.IntN(len(ops))]
		n := rnd.Int64N(100_000)
		b, _ := c.header(op, 0, base+1<<18, n)
		burst = append(append(burst, b...), payloadOf(op, int(n))...)
	}
	burst = burst[:len(burst)-rnd.IntN(len(burst)+1)]
	if rnd.IntN(2) == 0 {
		go c.nc.Write(burst)
	} else if _, ok := c.nc.(interface{ CloseWrite() error }); ok && len(burst) < 20_000 {
		c.write(burst)
	}
	return nil
}
