package ioloop

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// slowSync is a Pace whose syncs a test holds up: each waits for a value of
// goOn, or for that to be closed.
type slowSync struct {
	*Pace
	begun chan int // the number of each sync
	goOn  chan error
	syncs atomic.Int32
}

func (s *slowSync) Ahead(ctx context.Context, images int, sync func(context.Context) error) (bool, error) {
	return s.Pace.Ahead(ctx, images, func(ctx context.Context) error {
		s.begun <- int(s.syncs.Add(1))
		if err := <-s.goOn; err != nil {
			return err
		}
		return sync(ctx)
	})
}

func newSlowSync(limit int64) *slowSync {
	return &slowSync{Pace: NewPace(limit), begun: make(chan int, 100), goOn: make(chan error)}
}

// pacer is rigConfig.pacer.
func (s *slowSync) pacer(d *Disk) state.Pacer {
	d.SetPace(s.Pace)
	return s
}

func newPacedRig(t *testing.T, limit int64) (*rig, *slowSync) {
	s := newSlowSync(limit)
	return newRig(t, rigConfig{pacer: s.pacer}), s
}

// waits is how many requests wait for their turn.
func (p *Pace) waits() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := p.mu.first; c != nil; c = c.waiters.next {
		for t := c.waiters.first; t != nil; t = t.next {
			n++
		}
	}
	return n
}

const piece = 64 << 10

// sendPieces sends n writes of piece bytes to places that differ.
func (c *client) sendPieces(n int) {
	for i := range n {
		c.send(OpWrite, 0, int64(i)*piece, piece, contents[:piece])
	}
}

// takePieces takes n replies, and returns how many writes were refused.
func (c *client) takePieces(n int) (refused int) {
	c.t.Helper()
	for range n {
		switch a := c.next(); a.errno {
		case 0:
		case unix.EPERM:
			refused++
		default:
			c.t.Fatalf("%+v", a)
		}
	}
	return refused
}

// While a slow sync runs ahead writers get what may be left when the gate closes
// and not a byte more; reads and flushes go on beside them.
func TestPaceBoundsWhatIsLeft(t *testing.T) {
	const may, soon, sent = 16, 8, 40
	r, s := newPacedRig(t, may*piece)
	c, d := r.connect(&testCodec{}), r.connect(&testCodec{})
	c.ok(OpWrite, 0, 0, piece, contents[:piece])
	inactive := background(r.inactivate)
	if n := await(t, s.begun, "the first sync"); n != 1 {
		t.Fatal(n)
	}
	eventually(t, "a sync that takes long slows writers", s.on.Load)
	c.sendPieces(sent)
	if n := c.takePieces(soon); n != 0 {
		t.Fatalf("%d writes refused", n)
	}
	if n := s.waits(); n < sent-may {
		t.Errorf("only %d writes wait", n)
	}
	// Small, large, of this connection and of another; nothing of them waits.
	taken := soon
	read := func(n int64) {
		t.Helper()
		cookie := c.send(OpRead, 0, 0, n, nil)
		for a := c.next(); a.cookie != cookie; a = c.next() {
			if taken++; a.errno != 0 || taken > may { // a write's reply
				t.Fatalf("%d writes are done: %+v", taken, a)
			}
		}
	}
	for range 5 {
		read(100)
		read(1 << 20)
		d.ok(OpRead, 0, 4096, 300_000, nil)
		d.ok(OpFlush, 0, 0, 0, nil)
		d.ok(OpStatus, 0, 0, 4096, nil)
	}
	d.ok(OpWrite, FUA, 0, 4096, contents[:4096]) // leaves nothing
	a := r.d.Stats().Ahead
	if a.Dirty < soon*piece || a.Dirty > may*piece || a.Delayed == 0 || a.Slowed <= 0 {
		t.Errorf("%+v", a)
	}
	if n := r.m.Status().Step; n != state.StepSyncAhead {
		t.Errorf("step %s", n)
	}
	close(s.goOn)
	await(t, inactive, "inactivation")
	c.takePieces(sent - taken)
	a = r.d.Stats().Ahead
	if a.Dirty > may*piece || a.Syncs < 2 || a.Syncs > 2*paceRounds {
		t.Errorf("%+v", a)
	}
	t.Logf("%+v", a)
}

// A writer whose sync is cancelled, or fails, goes on at once.
func TestPaceEnds(t *testing.T) {
	for name, end := range map[string]func(*rig, *slowSync){
		"cancel": func(r *rig, s *slowSync) {
			if !r.m.Cancel() {
				t.Error("there was nothing to cancel")
			}
		},
		"fail": func(_ *rig, s *slowSync) { s.goOn <- errors.New("not synced") },
	} {
		t.Run(name, func(t *testing.T) {
			r, s := newPacedRig(t, piece)
			c := r.connect(&testCodec{})
			result := make(chan error, 1)
			go func() { result <- state.Inactivate(context.Background(), r.m) }()
			await(t, s.begun, "the sync")
			eventually(t, "writers are slowed", s.on.Load)
			c.sendPieces(20)
			eventually(t, "some wait", func() bool { return s.waits() == 19 })
			end(r, s)
			if n := c.takePieces(20); n != 0 {
				t.Errorf("%d writes refused", n)
			}
			close(s.goOn)
			if err := await(t, result, "the order"); err == nil {
				t.Error("no error")
			}
			c.ok(OpWrite, 0, 0, piece, contents[:piece])
			if s.on.Load() || r.m.Status().State != state.Active {
				t.Errorf("still slowed, or %s", r.m.Status().State)
			}
		})
	}
}

// A connection that ends takes its waiting writes along.
func TestPaceDropsWaiting(t *testing.T) {
	r, s := newPacedRig(t, piece)
	c, d := r.connect(&testCodec{}), r.connect(&testCodec{})
	inactive := background(r.inactivate)
	await(t, s.begun, "the sync")
	eventually(t, "writers are slowed", s.on.Load)
	c.sendPieces(10)
	d.sendPieces(10)
	eventually(t, "they wait", func() bool { return s.waits() == 19 })
	c.nc.Close()
	_ = c.end()
	eventually(t, "only the other waits", func() bool { n := s.waits(); return n == 9 || n == 10 })
	close(s.goOn)
	await(t, inactive, "inactivation")
	d.takePieces(10)
}

// Writes that were held, and are then slowed by the next inactivation before
// all of them have run: each ends, in time, whatever comes of that.
func TestHeldThenPaced(t *testing.T) {
	const sent = 24 // more than all rounds let on
	for name, end := range map[string]func(*rig, *slowSync, *client){
		"cancelled":  func(r *rig, _ *slowSync, _ *client) { r.m.Cancel() },
		"inactive":   func(_ *rig, s *slowSync, _ *client) { close(s.goOn) },
		"closed":     func(_ *rig, _ *slowSync, c *client) { c.nc.Close() },
		"disconnect": func(r *rig, _ *slowSync, c *client) { c.send(OpDisconnect, 0, 0, 0, nil); r.m.Cancel() },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSlowSync(2 * piece)
			r := newHoldingRig(t, rigConfig{pacer: s.pacer})
			slow := newBlocker()
			r.img.set(func(h *hooked) { h.preparing = func(_ int64, m backend.Mode) error { return slow.mode(m) } })
			c := r.connect(&testCodec{})
			c.sendPieces(sent)
			r.awaitHeld(sent)
			r.activate()
			await(t, slow.entered, "the first of them")
			order := make(chan error, 1)
			go func() { order <- state.Inactivate(context.Background(), r.m) }()
			await(t, s.begun, "the sync")
			eventually(t, "writers are slowed", s.on.Load)
			close(slow.leave)
			eventually(t, "one waits, and the others for it", func() bool {
				return s.waits() == 1 && s.Stats().Delayed > 0 && r.d.Stats().Held < sent-1
			})
			end(r, s, c)
			refused := 0
			switch name {
			case "closed", "disconnect":
				_ = c.end()
			default:
				refused = c.takePieces(sent)
			}
			if name == "cancelled" && refused != 0 || name == "inactive" && (refused == 0 || refused == sent) {
				t.Errorf("%d writes refused", refused)
			}
			if name != "inactive" {
				close(s.goOn)
			}
			if err := await(t, order, "the order"); (err == nil) != (name == "inactive" || name == "closed") {
				t.Error(err)
			}
			if n := s.waits(); n != 0 {
				t.Errorf("%d wait", n)
			}
		})
	}
}

// A disk that never keeps up ends the rounds all the same, and writers that
// leave it alone are not slowed.
func TestPaceRounds(t *testing.T) {
	for _, c := range []struct {
		name    string
		limit   int64
		dirty   []uint64 // in each round
		took    time.Duration
		syncs   int
		dirties uint64
	}{
		{"clean", 1 << 20, []uint64{0}, 0, 1, 0},
		{"little", 1 << 20, []uint64{1 << 20}, 0, 1, 1 << 20},
		{"too much", 1 << 20, []uint64{1<<20 + 1, 4096}, 0, 2, 4096},
		{"slow", 1 << 20, nil, fewLeft + time.Millisecond, paceRounds, 0},
		{"nothing may be left", 0, []uint64{4096, 4096, 0}, 0, 3, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var n counts
				p := NewPace(c.limit)
				p.counts = &n
				syncs := 0
				for again := true; again; {
					var err error
					again, err = p.Ahead(t.Context(), 1, func(context.Context) error {
						if syncs < len(c.dirty) {
							n.dirtied.Add(c.dirty[syncs])
						}
						syncs++
						time.Sleep(c.took)
						return nil
					})
					must(t, err)
					if syncs > 1 && !p.on.Load() {
						t.Error("nobody is slowed")
					}
				}
				p.Done()
				if s := p.Stats(); syncs != c.syncs || s.Dirty != c.dirties || s.Syncs != syncs || p.on.Load() {
					t.Errorf("%d syncs, %+v", syncs, s)
				}
			})
		})
	}
}

// What was clean and has not been written since is not synced again.
func TestPaceSyncsTheCleanOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPace(1 << 20)
		p.counts = new(counts)
		syncs := 0
		for range 3 {
			again, err := p.Ahead(t.Context(), 1, func(context.Context) error { syncs++; return nil })
			if again || err != nil {
				t.Errorf("again %v, %v", again, err)
			}
			p.Done()
		}
		if syncs != 1 {
			t.Errorf("%d syncs", syncs)
		}
	})
}

// What an inactivation that has ended still had under way, its context and its
// timer, changes nothing for the next.
func TestPaceLateEnds(t *testing.T) {
	p := NewPace(1 << 20)
	p.counts = new(counts)
	sync := func(context.Context) error { p.counts.dirtied.Add(2 << 20); return nil }
	begin := func() {
		t.Helper()
		if again, err := p.Ahead(t.Context(), 1, sync); err != nil || !again {
			t.Fatal(again, err)
		}
	}
	begin()
	first := p.run
	p.Done()
	begin()
	want := p.mu.allowance
	p.release(first)
	p.allow(first, 0, 0, 7, time.Second)
	p.allow(first, 1, 0, 7, time.Second)
	if !p.on.Load() || !p.mu.engaged || p.mu.allowance != want {
		t.Errorf("slowed %v, %d bytes allowed, want %d", p.on.Load(), p.mu.allowance, want)
	}
	p.Done()
	if p.on.Load() {
		t.Error("still slowed")
	}
}

// A group shares the limit.
func TestPaceShares(t *testing.T) {
	for _, c := range []struct{ limit, images, want int64 }{
		{32 << 20, 1, 32 << 20}, {32 << 20, 4, 8 << 20}, {32 << 20, 1000, 1 << 20}, {4096, 10, 4096}, {0, 2, 0},
	} {
		p := NewPace(c.limit)
		p.counts = new(counts)
		_, err := p.Ahead(t.Context(), int(c.images), func(context.Context) error { return nil })
		must(t, err)
		p.Done()
		if p.share != c.want {
			t.Errorf("%+v: %d", c, p.share)
		}
	}
}

// Connections take turns, whoever came first and however much it wants.
func TestPaceTurns(t *testing.T) {
	var w waiting
	a, b, c := new(conn), new(conn), new(conn)
	for i, who := range []*conn{a, a, a, a, b, b, c} {
		w.push(&task{conn: who, req: Request{Tag: [2]uint64{uint64(i)}}})
	}
	var got []uint64
	for range 3 {
		got = append(got, w.pop().req.Tag[0])
	}
	for _, task := range w.takeOf(b) {
		got = append(got, 100+task.req.Tag[0])
	}
	w.push(&task{conn: c, req: Request{Tag: [2]uint64{9}}})
	for w.first != nil {
		got = append(got, w.pop().req.Tag[0])
	}
	if s := fmt.Sprint(got); s != "[0 4 6 105 1 9 2 3]" {
		t.Error(s)
	}
	for _, who := range []*conn{b, a, a, c} {
		w.push(&task{conn: who})
	}
	if n := len(w.takeAll()); n != 4 || a.waiters.first != nil || b.waiters.last != nil {
		t.Errorf("%d taken", n)
	}
	if !w.since.IsZero() || w.last != nil || w.takeAll() != nil {
		t.Errorf("%+v", w)
	}
}

// The rate falls with what is left of the allowance.
func TestPaceCharge(t *testing.T) {
	now := time.Now()
	w := waiting{allowance: 1000, spread: time.Second, begun: now, next: now}
	var took []time.Duration
	for w.allowance > 0 {
		if !w.charge(250, now) {
			t.Fatal("not let on in time")
		}
		took = append(took, w.next.Sub(now).Round(time.Millisecond))
		if w.charge(1, now) {
			t.Error("let on too early")
		}
		now = w.next
	}
	if s := fmt.Sprint(took); s != "[250ms 333ms 1.167s 7s]" {
		t.Error(s)
	}
	if w.charge(1, now.Add(time.Hour)) {
		t.Error("let on without an allowance")
	}
}

func TestDirties(t *testing.T) {
	for _, c := range []struct {
		r        Request
		slow, ok int64 // without and with fast zeroes
	}{
		{Request{Op: OpWrite, Offset: 0, Length: 4096}, 4096, 4096},
		{Request{Op: OpWrite, Offset: 4095, Length: 2}, 8192, 8192},
		{Request{Op: OpWrite, Offset: 5, Length: 1}, 4096, 4096},
		{Request{Op: OpWrite, Offset: 0, Length: 4096, Flags: FUA}, 0, 0},
		{Request{Op: OpWrite}, 0, 0},
		{Request{Op: OpZero, Offset: 1, Length: 1 << 30}, 1<<30 + 4096, 4096},
		{Request{Op: OpDiscard, Length: 1 << 30}, 4096, 4096},
		{Request{Op: OpRead, Length: 4096}, 0, 0},
		{Request{Op: OpFlush}, 0, 0},
		{Request{Op: OpCache, Length: 4096}, 0, 0},
		{Request{Op: OpStatus, Length: 4096}, 0, 0},
	} {
		slow, fast := &Pace{}, &Pace{fastZero: true}
		if a, b := slow.dirties(&c.r), fast.dirties(&c.r); a != c.slow || b != c.ok {
			t.Errorf("%+v: %d, %d", c.r, a, b)
		}
	}
}

// A write that was to be received in place, and cannot be, counts once.
func TestPaceChargesOnce(t *testing.T) {
	s := newSlowSync(64 * piece)
	r := newRig(t, rigConfig{tmpfs: true, pacer: s.pacer})
	d := r.drive(socketpair)
	d.batch(1, piece, 0) // shows that it pays to look at payloads
	r.img.set(func(h *hooked) {
		h.preparing = func(_ int64, m backend.Mode) error {
			if m&backend.MayBlock == 0 {
				return backend.ErrWait
			}
			return nil
		}
	})
	inactive := background(r.inactivate)
	await(t, s.begun, "the first sync")
	eventually(t, "writers are slowed", s.on.Load)
	left := func() int64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.mu.allowance
	}
	before := left()
	d.batch(2, piece, 2*piece)
	if n := before - left(); n != piece {
		t.Errorf("%d bytes of the allowance for a write of %d", n, piece)
	}
	close(s.goOn)
	await(t, inactive, "inactivation")
}
