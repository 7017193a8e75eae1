package ioloop

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// long is a time for which a write is held whatever the machine is doing.
const long = time.Hour

func newHoldingRig(t testing.TB, cfg rigConfig) *rig {
	if cfg.holdFor == 0 {
		cfg.holdFor = long
	}
	cfg.inactive = true
	return newRig(t, cfg)
}

func (r *rig) awaitHeld(n int64) {
	r.t.Helper()
	eventually(r.t, "so many are held", func() bool { return r.d.Stats().Held == n })
}

func (c *client) refused(text string) {
	c.t.Helper()
	if a := c.next(); a.errno != unix.EPERM || !strings.HasPrefix(a.text, state.ErrInactive.Error()+": ") || !strings.Contains(a.text, text) {
		c.t.Fatalf("%+v, want a refusal with %q", a, text)
	}
}

func (r *rig) content() []byte {
	r.t.Helper()
	b, err := os.ReadFile(r.path)
	must(r.t, err)
	return b
}

// What came while the image was inactive runs when it is active, in the order
// in which it came; reads go on meanwhile, and so does what is not a write.
func TestHeldRunInOrder(t *testing.T) {
	var wanted atomic.Int64
	r := newHoldingRig(t, rigConfig{content: contents[:2<<20], wanted: func() { wanted.Add(1) }})
	c := r.connect(&testCodec{})
	var cookies []uint64
	sizes := []int64{512, 4096, smallPayload, smallPayload + 1, 300_000, 1 << 20}
	var bytesHeld int64
	for i := range 30 { // each over the one before
		n := sizes[i%len(sizes)]
		bytesHeld += n
		cookies = append(cookies, c.send(OpWrite, 0, int64(i), n, contents[i*1000:i*1000+int(n)]))
	}
	cookies = append(cookies, c.send(OpDiscard, 0, 3<<19, 4096, nil), c.send(OpZero, 0, 3<<19, 8192, nil))
	r.awaitHeld(int64(len(cookies)))
	if s := r.d.Stats(); s.HeldBytes != bytesHeld || s.Writes != 0 {
		t.Errorf("%+v, want %d bytes held", s, bytesHeld)
	}
	// It is told after it is counted.
	eventually(t, "each has told that it wants the image", func() bool { return wanted.Load() == int64(len(cookies)) })
	if what, _ := c.conn.oldest(); what != "" {
		t.Errorf("a drain would blame %s, which waits for it", what)
	}
	for range 20 {
		if a := c.ok(OpRead, 0, 0, 200_000, nil); !bytes.Equal(a.data, contents[:200_000]) {
			t.Fatal("a held write has run")
		}
	}
	c.ok(OpFlush, 0, 0, 0, nil)
	for _, op := range []Op{OpCache, OpStatus} {
		if a := c.do(op, 0, 0, 4096, nil); a.errno != unix.EPERM || a.text != state.ErrInactive.Error() {
			t.Errorf("%v: %+v", op, a)
		}
	}
	r.activate()
	for _, want := range cookies {
		if a := c.next(); a.cookie != want || a.errno != 0 {
			t.Fatalf("%+v, want success of %d", a, want)
		}
	}
	want := slices.Clone(contents[:2<<20])
	for i := range 30 {
		copy(want[i:], contents[i*1000:i*1000+int(sizes[i%len(sizes)])])
	}
	clear(want[3<<19 : 3<<19+8192])
	if !bytes.Equal(r.content(), want) {
		t.Error("not as if they had run in their order")
	}
}

// Nobody activates.
func TestHeldExpire(t *testing.T) {
	r := newHoldingRig(t, rigConfig{holdFor: 30 * time.Millisecond, content: contents[:1<<20]})
	c := r.connect(&testCodec{})
	for range 3 { // the timer serves more than once
		began := time.Now()
		for _, n := range []int64{512, 100_000} {
			c.send(OpWrite, 0, 0, n, contents[7:7+n])
		}
		c.send(OpDiscard, 0, 0, 4096, nil)
		for range 3 {
			c.refused("it was not activated within the 30ms that writes are held")
		}
		if d := time.Since(began); d < 30*time.Millisecond {
			t.Errorf("refused after %v", d)
		}
	}
	if s := r.d.Stats(); s.Refused != 9 || s.Errors != 0 {
		t.Errorf("%+v", s)
	}
	if !bytes.Equal(r.content(), contents[:1<<20]) {
		t.Error("a refused write has changed the image")
	}
	r.activate()
	c.ok(OpWrite, 0, 0, 512, contents[:512])
}

// Activation that fails neither runs nor refuses what is held.
func TestHeldOutlastFailedActivation(t *testing.T) {
	r := newHoldingRig(t, rigConfig{})
	c := r.connect(&testCodec{})
	for i := range 5 {
		c.send(OpWrite, 0, int64(i)*4096, 4096, contents[:4096])
	}
	r.awaitHeld(5)
	away := r.path + ".away"
	must(t, os.Rename(r.path, away))
	if err := state.Activate(t.Context(), state.ActivateOptions{}, r.m); err == nil {
		t.Fatal("activated what is not there")
	}
	must(t, os.Rename(away, r.path))
	r.awaitHeld(5)
	r.activate()
	for range 5 {
		if a := c.next(); a.errno != 0 {
			t.Fatalf("%+v", a)
		}
	}
}

// A write does not run once its connection closes, in whatever way. A client that
// says so is answered before.
func TestHeldDroppedWithConnection(t *testing.T) {
	for name, leave := range map[string]func(c *client){
		"close":      func(c *client) { c.nc.Close() },
		"disconnect": func(c *client) { c.send(OpDisconnect, 0, 0, 0, nil) },
		"garbage":    func(c *client) { c.write([]byte("garbage!")) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newHoldingRig(t, rigConfig{content: contents[:1<<20]})
			c, other := r.connect(&testCodec{}), r.connect(&testCodec{})
			for _, n := range []int64{512, 100_000} {
				c.send(OpWrite, 0, 0, n, contents[7:7+n])
			}
			other.send(OpWrite, 0, 500_000, 512, contents[:512])
			r.awaitHeld(3)
			leave(c)
			if name == "disconnect" {
				c.refused("disconnected")
				c.refused("disconnected")
			}
			c.end()
			r.awaitHeld(1)
			r.activate()
			if a := other.next(); a.errno != 0 {
				t.Fatalf("%+v", a)
			}
			want := slices.Clone(contents[:1<<20])
			copy(want[500_000:], contents[:512])
			if !bytes.Equal(r.content(), want) {
				t.Error("a dropped write has run")
			}
		})
	}
}

// A write that came before the image was won and lost again does not run.
func TestHeldNotRunAfterLoss(t *testing.T) {
	b := newBlocker()
	r := newHoldingRig(t, rigConfig{content: contents[:1<<20], workers: 1})
	// The only worker hangs in a read, so what is held cannot run at once.
	r.img.set(func(h *hooked) { h.mapping = func(off, n int64, m backend.Mode) error { return b.mode(m) } })
	c, other := r.connect(&testCodec{}), r.connect(&testCodec{})
	for range 3 {
		c.send(OpWrite, 0, 0, 512, contents[7:519])
	}
	r.awaitHeld(3)
	other.send(OpRead, 0, 0, 512, nil)
	await(t, b.entered, "the read")
	r.img.set(func(h *hooked) { h.mapping = nil })
	active := background(r.activate) // it waits for the read in the end
	eventually(t, "active", func() bool { return r.m.Status().State == state.Active })
	lost := background(func() { r.inactivate(); r.activate() })
	close(b.leave)
	await(t, active, "activation")
	await(t, lost, "the rest")
	if a := other.next(); a.errno != 0 {
		t.Fatalf("%+v", a)
	}
	// Each either ran while the image was owned first, or was refused; none ran
	// after that.
	for range 3 {
		if a := c.next(); a.errno != 0 && (a.errno != unix.EPERM || a.text != state.ErrLost.Error()) {
			t.Fatalf("%+v", a)
		}
	}
}

// Without the option a write that had to wait is told what it is always told.
func TestLostWithoutHolding(t *testing.T) {
	h := hold(state.StepSettle)
	r := newRig(t, rigConfig{onStep: h.step, content: contents[:1<<20]})
	c := r.connect(&testCodec{})
	h.armed.Store(true)
	lost := background(func() { r.inactivate(); r.activate() })
	await(t, h.reached, "the step")
	for range 3 {
		c.send(OpWrite, 0, 0, 512, contents[7:519])
	}
	c.awaitParked(3)
	close(h.goOn)
	await(t, lost, "the changes")
	for range 3 {
		if a := c.next(); a.errno != unix.EPERM || a.text != state.ErrInactive.Error() {
			t.Fatalf("%+v", a)
		}
	}
	if !bytes.Equal(r.content(), contents[:1<<20]) {
		t.Error("a write has run that came before the loss")
	}
}

// What was held and has its turn, since the image is active, runs although its client
// says meanwhile that it leaves: it came before that. If the gate closes again the
// rest is refused.
func TestHeldRunsThroughDisconnect(t *testing.T) {
	for _, lost := range []bool{false, true} {
		b := newBlocker()
		r := newHoldingRig(t, rigConfig{content: contents[:1<<20]})
		r.img.set(func(h *hooked) { h.preparing = func(_ int64, m backend.Mode) error { return b.mode(m) } })
		c := r.connect(&testCodec{})
		for i := range 4 {
			c.send(OpWrite, 0, int64(i)*4096, 4096, contents[7:7+4096])
		}
		r.awaitHeld(4)
		r.activate()
		await(t, b.entered, "the first write")
		c.send(OpDisconnect, 0, 0, 0, nil)
		eventually(t, "the client is seen to leave", func() bool {
			c.conn.mu.Lock()
			defer c.conn.mu.Unlock()
			return c.conn.mu.leaving
		})
		var gone <-chan struct{} = closed
		if lost {
			gone = background(r.inactivate)
			eventually(t, "the gate is closed", func() bool { return r.m.Status().Step == state.StepDrain })
		}
		close(b.leave)
		for i := range 4 {
			if lost && i > 0 {
				if a := c.next(); a.errno != unix.EPERM {
					t.Fatalf("%+v", a)
				}
			} else if a := c.next(); a.errno != 0 {
				t.Fatalf("%+v", a)
			}
		}
		c.end()
		await(t, gone, "the inactivation")
		want := slices.Clone(contents[:1<<20])
		for i := range 4 {
			if i == 0 || !lost {
				copy(want[i*4096:], contents[7:7+4096])
			}
		}
		if !bytes.Equal(r.content(), want) {
			t.Errorf("lost %v: not what was answered has run", lost)
		}
	}
}

// What was held, and finds the gate closed again, is refused too when its
// client has said that it leaves.
func TestHeldAfterDisconnect(t *testing.T) {
	h := hold(state.StepLoad)
	r := newHoldingRig(t, rigConfig{onStep: h.step})
	c := r.connect(&testCodec{}).conn
	h.armed.Store(true)
	active := background(r.activate)
	await(t, h.reached, "the step")
	for _, leaving := range []bool{false, true} {
		c.mu.Lock()
		c.mu.leaving, c.mu.releasing = leaving, true
		c.mu.Unlock()
		p := &task{conn: c, req: Request{Op: OpWrite}, lease: lease{of: forHeld}, chained: true}
		c.list(p)
		if !p.park() {
			t.Fatal("not parked, though the gate holds")
		}
		want := int64(0)
		if !leaving {
			want = 1
		}
		if n := c.tasks.Load(); n != want || r.d.Stats().Held != want {
			t.Errorf("leaving %v: %d tasks, %d held", leaving, n, r.d.Stats().Held)
		}
		c.refuseHeld()
	}
	close(h.goOn)
	await(t, active, "activation")
}

// A stop answers what is held.
func TestHeldAtStop(t *testing.T) {
	r := newHoldingRig(t, rigConfig{content: contents[:1<<20]})
	c := r.connect(&testCodec{})
	for range 4 {
		c.send(OpWrite, 0, 0, 512, contents[7:519])
	}
	r.awaitHeld(4)
	state.Refuse(r.m)
	for range 4 {
		if a := c.next(); a.errno != unix.ESHUTDOWN {
			t.Fatalf("%+v", a)
		}
	}
	if !bytes.Equal(r.content(), contents[:1<<20]) {
		t.Error("a refused write has changed the image")
	}
}

// What is held takes no more than its part of the memory, whoever sends it,
// and others are served all the while.
func TestHeldMemory(t *testing.T) {
	r := newHoldingRig(t, rigConfig{Config: Config{Memory: 8 << 20}, content: contents[:2<<20]})
	c, reader := r.connect(&testCodec{}), r.connect(&testCodec{})
	const n = 512 << 10
	held, refused := 0, 0
	for range 20 {
		c.send(OpWrite, 0, 0, n, contents[7:7+n])
		eventually(t, "it is held or refused", func() bool {
			s := r.d.Stats()
			return int(s.Held)+int(s.Refused) > held+refused
		})
		s := r.d.Stats()
		held, refused = int(s.Held), int(s.Refused)
		if a := reader.ok(OpRead, 0, 0, 1<<20, nil); !bytes.Equal(a.data, contents[:1<<20]) {
			t.Fatal("wrong data")
		}
	}
	if held != 3 || refused != 17 { // a buffer is a little more than its payload
		t.Errorf("%d held, %d refused", held, refused)
	}
	for range refused {
		c.refused("the memory for held writes, 2048 KiB, is full")
	}
	if used, limit := r.e.Memory(); used > limit {
		t.Errorf("%d bytes in use", used)
	}
	r.activate()
	for range held {
		if a := c.next(); a.errno != 0 {
			t.Fatalf("%+v", a)
		}
	}
	c.ok(OpWrite, 0, 0, n, contents[:n])
}

// However many writes a connection sends, its reads go on.
func TestHeldLimit(t *testing.T) {
	r := newHoldingRig(t, rigConfig{content: contents[:1<<20]})
	c := r.connect(&testCodec{})
	sent := background(func() {
		for range maxHeld + 2*maxTasks {
			c.send(OpWrite, 0, 0, 512, contents[7:519])
		}
		c.send(OpRead, 0, 0, 512, nil)
	})
	for range 2 * maxTasks {
		c.refused("512 writes of this connection are held already")
	}
	if a := c.next(); !bytes.Equal(a.data, contents[:512]) {
		t.Fatalf("%+v", a)
	}
	await(t, sent, "the client")
	r.activate()
	for range maxHeld {
		if a := c.next(); a.errno != 0 {
			t.Fatalf("%+v", a)
		}
	}
}

// Ownership comes and goes under writers that are held again and again.
func TestHeldUnderChanges(t *testing.T) {
	r := newHoldingRig(t, rigConfig{tmpfs: true, holdFor: 20 * time.Millisecond})
	over := background(func() {
		for range 300 {
			r.activate()
			r.inactivate()
		}
	})
	for i := range 4 {
		c := r.connect(&testCodec{})
		go func() {
			base := int64(i) << 20
			for {
				for _, n := range []int64{512, 50_000} {
					b, _ := c.header(OpWrite, 0, base, n)
					if _, err := c.nc.Write(append(b, contents[:n]...)); err != nil {
						return
					}
				}
			}
		}()
		go func() {
			for {
				if _, err := c.receive(); err != nil {
					return
				}
			}
		}()
	}
	await(t, over, "the changes")
}
