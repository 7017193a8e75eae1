package control

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbd-export/nbd-export/state"
)

// handoverCase is a handover of two images from a, which owns them, to b.
type handoverCase struct {
	name     string
	from, to map[string]trouble
	unsure   bool // deaths are not seen
	owner    string
	outcome  HandoverOutcome
	next     string // beginning of the command to run, "again" for the same
	// again is the outcome of the same command when all is well again: who is
	// mute answers, who is gone stays gone.
	again HandoverOutcome
}

func on(order string, tr trouble) map[string]trouble { return map[string]trouble{order: tr} }

var handoverCases = []handoverCase{
	{name: "all well", owner: "b", outcome: HandoverMoved, again: HandoverAlready},

	{name: "source fails", from: on("inactivate", fails), owner: "a", outcome: HandoverRefused, next: "again", again: HandoverMoved},
	{name: "source lost", from: on("inactivate", vanishes), owner: "a", outcome: HandoverRefused, next: "again", again: HandoverMoved},
	{name: "source late", from: on("inactivate", late), owner: "a", outcome: HandoverRefused, next: "again", again: HandoverMoved},
	{name: "source done", from: on("inactivate", done), owner: "b", outcome: HandoverMoved, again: HandoverAlready},
	{name: "source slow", from: on("inactivate", slow), owner: "b", outcome: HandoverMoved, again: HandoverAlready},
	{name: "source gone before", from: on("inactivate", goneBefore), owner: "", outcome: HandoverUnowned, next: "nbd-export activate --control b", again: HandoverRefused},
	{name: "source gone after", from: on("inactivate", goneAfter), owner: "", outcome: HandoverUnowned, next: "nbd-export activate --control b", again: HandoverRefused},
	{name: "source gone unseen", from: on("inactivate", goneAfter), unsure: true, owner: "", outcome: HandoverUnknown, next: "again", again: HandoverRefused},
	{name: "source mute", from: on("inactivate", mute), owner: "a", outcome: HandoverUnknown, next: "again", again: HandoverMoved},
	{name: "source mute, done", from: on("inactivate", muteDone), owner: "", outcome: HandoverUnknown, next: "again", again: HandoverMoved},

	{name: "destination fails", to: on("activate", fails), owner: "a", outcome: HandoverReturned, next: "again", again: HandoverMoved},
	{name: "destination fails, mute", to: on("activate", failsMute), owner: "a", outcome: HandoverReturned, next: "again", again: HandoverMoved},
	{name: "destination lost", to: on("activate", vanishes), owner: "a", outcome: HandoverReturned, next: "again", again: HandoverMoved},
	{name: "destination late", to: on("activate", late), owner: "a", outcome: HandoverReturned, next: "again", again: HandoverMoved},
	{name: "destination slow", to: on("activate", slow), owner: "b", outcome: HandoverMoved, again: HandoverAlready},
	{name: "destination done", to: on("activate", done), owner: "b", outcome: HandoverMoved, again: HandoverAlready},
	{name: "destination gone before", to: on("activate", goneBefore), owner: "a", outcome: HandoverReturned, next: "again", again: HandoverRefused},
	{name: "destination gone after", to: on("activate", goneAfter), owner: "a", outcome: HandoverReturned, next: "again", again: HandoverRefused},
	{name: "destination gone, wrote", to: on("activate", goneWrote), owner: "", outcome: HandoverUnowned, next: "nbd-export activate --control a", again: HandoverRefused},
	{name: "destination gone unseen", to: on("activate", goneBefore), unsure: true, owner: "", outcome: HandoverUnknown, next: "again", again: HandoverRefused},
	{name: "destination mute", to: on("activate", mute), owner: "", outcome: HandoverUnknown, next: "again", again: HandoverMoved},
	{name: "destination mute, done", to: on("activate", muteDone), owner: "b", outcome: HandoverUnknown, next: "again", again: HandoverAlready},
	{name: "destination mute, then gone", to: on("activate", muteGone), owner: "a", outcome: HandoverReturned, next: "again", again: HandoverRefused},

	{name: "return fails", to: on("activate", fails), from: on("reactivate", fails), owner: "", outcome: HandoverUnowned, next: "again", again: HandoverMoved},
	{name: "return lost", to: on("activate", fails), from: on("reactivate", vanishes), owner: "", outcome: HandoverUnowned, next: "again", again: HandoverMoved},
	{name: "return late", to: on("activate", fails), from: on("reactivate", late), owner: "", outcome: HandoverUnowned, next: "again", again: HandoverMoved},
	{name: "return done", to: on("activate", fails), from: on("reactivate", done), owner: "a", outcome: HandoverReturned, next: "again", again: HandoverMoved},
	{name: "return slow", to: on("activate", fails), from: on("reactivate", slow), owner: "a", outcome: HandoverReturned, next: "again", again: HandoverMoved},
	{name: "return gone", to: on("activate", fails), from: on("reactivate", goneAfter), owner: "", outcome: HandoverUnowned, next: "nbd-export activate --control b", again: HandoverRefused},
	{name: "return mute", to: on("activate", fails), from: on("reactivate", mute), owner: "", outcome: HandoverUnknown, next: "again", again: HandoverMoved},
	{name: "return mute, done", to: on("activate", fails), from: on("reactivate", muteDone), owner: "a", outcome: HandoverUnknown, next: "again", again: HandoverMoved},
}

const againCommand = "nbd-export handover --from a --to b"

func TestHandoverTable(t *testing.T) {
	for _, c := range handoverCases {
		for _, locks := range []bool{true, false} {
			name := c.name
			if !locks {
				name += ", without locks"
			}
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { c.run(t, locks) })
			})
		}
	}
}

func (c handoverCase) run(t *testing.T, locks bool) {
	s := newFakeStore(2)
	s.noLock = !locks
	a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
	for k, v := range c.from {
		a.trouble[k] = v
	}
	for k, v := range c.to {
		b.trouble[k] = v
	}
	a.unsure, b.unsure = c.unsure, c.unsure
	began := time.Now()
	r := Handover(context.Background(), a, b, HandoverOptions{})
	if d := time.Since(began); d > 45*time.Second {
		t.Errorf("it took %v", d)
	}
	if r.Outcome != c.outcome {
		t.Errorf("outcome %q (%s), want %q", r.Outcome, r.Error, c.outcome)
	}
	if got := s.owner(t); got != c.owner {
		t.Errorf("%q owns the images, want %q", got, c.owner)
	}
	c.judge(t, &r, a, b)
	// What was still on its way arrives now.
	a.arrive()
	b.arrive()
	if got := s.owner(t); got != c.owner {
		t.Errorf("an order that arrived late made %q the owner, want %q", got, c.owner)
	}
	time.Sleep(time.Minute)
	a.trouble, b.trouble, a.silent, b.silent = nil, nil, false, false
	r = Handover(context.Background(), a, b, HandoverOptions{})
	if r.Outcome != c.again {
		t.Errorf("again: outcome %q (%s), want %q", r.Outcome, r.Error, c.again)
	}
	if owner := s.owner(t); r.Outcome.Good() != (owner == "b") && c.again != HandoverRefused {
		t.Errorf("again: %q owns the images", owner)
	}
}

// judge holds a report against what is.
func (c handoverCase) judge(t *testing.T, r *HandoverReport, a, b *fakeSide) {
	t.Helper()
	for _, x := range []struct {
		f    *fakeSide
		said string
	}{{a, r.From.State}, {b, r.To.State}} {
		want := "inactive"
		switch {
		case x.f.silent || x.f.dead:
			want = "unknown"
		case c.owner == x.f.name:
			want = "active"
		}
		if x.said != want {
			t.Errorf("the report says that %s is %s, it is %s", x.f.name, x.said, want)
		}
	}
	err := r.Err()
	if r.Outcome.Good() {
		if err != nil || r.Next != "" || r.Error != "" {
			t.Errorf("good, and yet %v", err)
		}
		return
	}
	next, when := c.next, "next: "
	// Who has said no will say so again, and who has ended stays away.
	lasts := next == "again" && (strings.Contains(r.Error, "does not want to") || a.dead || b.dead)
	if r.Retry == lasts {
		t.Errorf("%s: to be run again at once: %v", r.Error, r.Retry)
	}
	if lasts {
		when = "once the cause is gone: "
	}
	if next == "again" {
		next = againCommand
	}
	if r.Next != next {
		t.Errorf("next %q, want %q", r.Next, next)
	}
	if err == nil || !strings.Contains(err.Error(), r.From.text("source")) || !strings.Contains(err.Error(), r.To.text("destination")) ||
		!strings.Contains(err.Error(), "; "+when+r.Next) || strings.Contains(err.Error(), "\n") {
		t.Errorf("the error does not say all: %v", err)
	}
	want := ""
	switch {
	case r.To.State == "unknown" && r.From.State == "inactive" && !b.Gone():
		want = "nbd-export activate --if-unchanged --control a"
	case r.From.State == "unknown" && r.To.State == "inactive" && !a.Gone():
		want = "nbd-export activate --control b"
	}
	if r.IfGone != want {
		t.Errorf("if gone %q, want %q", r.IfGone, want)
	}
}

// A destination that answers that it failed, and yet owns an image, or is about
// to: the source keeps its hands off, locks or not.
func TestHandoverHalf(t *testing.T) {
	for name, c := range map[string]struct {
		states  []State
		outcome HandoverOutcome
	}{
		"a half":       {[]State{"active", "inactive"}, HandoverUnknown},
		"on its way":   {[]State{"activating", "inactive"}, HandoverUnknown},
		"on its way 2": {[]State{"inactivating", "inactivating"}, HandoverUnknown},
		"failed":       {[]State{"failed(io)", "failed(io)"}, HandoverUnknown},
		"all the same": {[]State{"active", "active"}, HandoverMoved},
		"none":         {[]State{"inactive", "inactive"}, HandoverReturned},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newFakeStore(2)
				s.noLock = true
				a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
				b.trouble["activate"] = fails
				b.hook = func(Order) { b.states = c.states }
				r := Handover(context.Background(), a, b, HandoverOptions{})
				if r.Outcome != c.outcome || (s.owner(t) == "a") != (c.outcome == HandoverReturned) {
					t.Errorf("%q (%s), %q owns them", r.Outcome, r.Error, s.owner(t))
				}
			})
		})
	}
}

// The check refuses, and nothing is ordered.
func TestHandoverRefused(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(a, b *fakeSide)
		want    string
	}{
		"another image":      {func(a, b *fakeSide) { b.store = newFakeStore(2) }, "not the same image"},
		"no record":          {func(a, b *fakeSide) { a.noRecord = true }, "--assume-same-image"},
		"other size":         {func(a, b *fakeSide) { b.size++ }, "1048577"},
		"other format":       {func(a, b *fakeSide) { b.format = "qcow2" }, "qcow2 at the other (node image0)"},
		"unusable":           {func(a, b *fakeSide) { b.unusable = "permission denied" }, "permission denied"},
		"read-only":          {func(a, b *fakeSide) { b.readOnly = true }, "without --read-only"},
		"source failed":      {func(a, b *fakeSide) { a.failed = "failed(io)" }, "failed(io) at the source and inactive at the destination; give it up with nbd-export inactivate --abandon --control a --node image0,"},
		"destination failed": {func(a, b *fakeSide) { b.failed = "failed(fenced)" }, "failed(fenced) at the destination; give it up with nbd-export inactivate --abandon --control b --node image0,"},
		"two owners": {func(a, b *fakeSide) {
			for _, d := range a.store.images {
				d.owners = append(d.owners, b)
			}
		}, "both sides"},
		"one process":      {func(a, b *fakeSide) { a.pid, b.pid = 7, 7 }, "the same process"},
		"source away":      {func(a, b *fakeSide) { a.dead = true }, "the source cannot be asked"},
		"destination away": {func(a, b *fakeSide) { b.dead = true }, "the destination cannot be asked"},
		"destination mute": {func(a, b *fakeSide) { b.silent = true }, "the destination cannot be asked"},
		"in transition":    {func(a, b *fakeSide) { a.states = []State{"active", "inactivating"} }, "inactivating at the source"},
		"QEMU, no proof":   {func(a, b *fakeSide) { b.plain = true }, "--assume-same-image"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newFakeStore(2)
				a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
				c.prepare(a, b)
				r := Handover(context.Background(), a, b, HandoverOptions{})
				again := againCommand
				if name == "one process" {
					again = "" // it would end alike
				}
				if r.Outcome != HandoverRefused || !strings.Contains(r.Error, c.want) || r.Next != again && !a.dead && !b.dead {
					t.Errorf("%q: %s; next %s; want %s", r.Outcome, r.Error, r.Next, c.want)
				}
				// Only what passes by itself is to be tried again at once.
				retry := name == "destination mute" || name == "in transition"
				if retry != r.Retry && !a.dead && !b.dead || strings.Contains(r.Err().Error(), "; next: ") != r.Retry ||
					strings.Contains(r.Err().Error(), "; once the cause is gone: ") != (r.Next != "" && !r.Retry) {
					t.Errorf("%v: %v", r.Retry, r.Err())
				}
				if len(a.orders)+len(b.orders) > 0 {
					t.Errorf("orders %v, %v", a.orders, b.orders)
				}
			})
		})
	}
}

func TestHandoverWithoutRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFakeStore(2)
		a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
		a.noRecord, b.noRecord = true, true
		a.boot, b.boot, a.dev, b.dev = "x", "x", 7, 7
		r := Handover(context.Background(), a, b, HandoverOptions{})
		if r.Outcome != HandoverMoved || r.Images[0].Proof != ProofInode || r.Images[1].To != "image1" {
			t.Errorf("%+v", r)
		}
		b.boot = "y"
		if r = Handover(context.Background(), b, a, HandoverOptions{}); r.Outcome != HandoverRefused {
			t.Errorf("%+v", r)
		}
		r = Handover(context.Background(), b, a, HandoverOptions{AssumeSameImage: true, Nodes: []string{"image0", "image1"}})
		if r.Outcome != HandoverMoved || r.Images[0].Proof != ProofAssumed {
			t.Errorf("%+v", r)
		}
	})
}

func TestHandoverOfSomeNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFakeStore(3)
		a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
		if r := Handover(context.Background(), a, b, HandoverOptions{Nodes: []string{"image1"}}); r.Outcome != HandoverMoved || len(r.Images) != 1 {
			t.Fatalf("%+v", r)
		}
		if s.owner(t) != "mixed" {
			t.Error("the others moved too")
		}
		// The rest, where a part has been moved: taken back alike.
		b.trouble["activate"] = fails
		if r := Handover(context.Background(), a, b, HandoverOptions{}); r.Outcome != HandoverReturned {
			t.Fatalf("%+v", r)
		}
		if s.owner(t) != "mixed" || !b.owns(s.images[1]) {
			t.Error("what had been moved before was taken back too")
		}
		b.trouble = nil
		if r := Handover(context.Background(), a, b, HandoverOptions{}); r.Outcome != HandoverMoved || s.owner(t) != "b" {
			t.Fatalf("%+v", r)
		}
	})
}

// What is to be run next names the images, if the side has others too.
func TestHandoverNextNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFakeStore(3)
		a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
		a.trouble["inactivate"] = goneAfter
		opt := HandoverOptions{Nodes: []string{"image1", "image2"}}
		r := Handover(context.Background(), a, b, opt)
		if want := "nbd-export activate --control b --node image1 --node image2"; r.Outcome != HandoverUnowned || r.Next != want {
			t.Errorf("%+v", r)
		}
		// Which those are is not known any more.
		if r = Handover(context.Background(), a, b, opt); r.Outcome != HandoverRefused || r.Next != againCommand+" --node image1 --node image2" || r.IfGone != "" {
			t.Errorf("%+v", r)
		}
		// Who gave it long is not told to give it less.
		if opt.Timeout = time.Minute; !strings.HasSuffix(Handover(context.Background(), a, b, opt).Next, " --timeout 1m0s") {
			t.Errorf("%+v", r)
		}
		opt.Nodes[0] = "nothing"
		r = Handover(context.Background(), b, newFakeSide("c", s, false), opt)
		if r.Outcome != HandoverRefused || !strings.Contains(r.Error, "the source answers: Failed to find node with node-name='nothing'") {
			t.Errorf("%+v", r)
		}
	})
}

// Who was too slow is told which limit that was.
func TestHandoverOverdue(t *testing.T) {
	b := newBed(t, 1)
	b.activate(t)
	begun := make(chan struct{})
	stuck := make(chan struct{})
	b.images[0].syncAhead = func(ctx context.Context) error {
		close(begun)
		<-ctx.Done()
		<-stuck // a sync cannot be called off
		return context.Cause(ctx)
	}
	p := NewPeer(b.listen(t, Config{}))
	defer p.Close()
	h := &handover{ctx: t.Context(), from: p, name: "x", give: []string{"image0"}, opt: HandoverOptions{Timeout: 20 * time.Second}}
	// Its time is over once it is known to have begun.
	ctx, cancel := context.WithCancelCause(h.ctx)
	go func() { <-begun; cancel(overdue(h.opt.Timeout)) }()
	o := Order{Name: "x", Nodes: h.give}
	err := h.order(ctx, o)
	if err == nil || answered(err) || !strings.Contains(err.Error(), "not done within 20s (--timeout)") {
		t.Error(err)
	}
	// The source is told to leave it, and goes on as before once it can.
	if _, settled, why := glance(t.Context(), p, o); settled || why == nil || !strings.Contains(why.Error(), "still under way (/srv/a.img: sync-ahead for ") {
		t.Error(settled, why)
	}
	close(stuck)
	if f, why := h.fate(p, o); f != fateNot || why != nil {
		t.Error(f, why)
	}
	b.want(t, state.Active)
}

func TestHandoverWithQEMU(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFakeStore(2)
		a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
		b.plain = true
		opt := HandoverOptions{AssumeSameImage: true, Nodes: []string{"image0", "image1"}}
		if r := Handover(context.Background(), a, b, opt); r.Outcome != HandoverMoved {
			t.Fatalf("%+v", r)
		}
		opt.Nodes = opt.Nodes[:1]
		if r := Handover(context.Background(), b, a, opt); r.Outcome != HandoverMoved {
			t.Fatalf("%+v", r)
		}
		// Taken back without the condition, which it does not know.
		b.trouble["activate"] = fails
		if r := Handover(context.Background(), a, b, opt); r.Outcome != HandoverReturned {
			t.Fatalf("%+v", r)
		}
		three := newFakeStore(3)
		c, d := newFakeSide("a", three, true), newFakeSide("b", three, false)
		d.plain = true
		opt.Nodes = []string{"image0", "image1"}
		if r := Handover(context.Background(), c, d, opt); r.Outcome != HandoverRefused || !strings.Contains(r.Error, "2 of 3") {
			t.Fatalf("%+v", r)
		}
	})
}

// QEMU's daemon stops an order for all nodes at the first that fails, and leaves
// those before it as ordered. All images or none is for the handover to see to.
func TestHandoverHalfByQEMU(t *testing.T) {
	for _, c := range []struct {
		plain    string // side
		from, to map[string]trouble
		outcome  HandoverOutcome
		owner    string
		orders   string // to the plain side
	}{
		{"a", on("inactivate", half), nil, HandoverReturned, "a", "inactivate reactivate"},
		{"a", on("inactivate", fails), nil, HandoverRefused, "a", "inactivate"},
		{"a", map[string]trouble{"inactivate": half, "reactivate": fails}, nil, HandoverUnowned, "mixed", "inactivate reactivate"},
		{"b", nil, on("activate", half), HandoverReturned, "a", "activate inactivate"},
		{"b", nil, map[string]trouble{"activate": half, "inactivate": fails}, HandoverUnknown, "mixed", "activate inactivate"},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newFakeStore(2)
			a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
			a.plain, b.plain = c.plain == "a", c.plain == "b"
			maps.Copy(a.trouble, c.from)
			maps.Copy(b.trouble, c.to)
			r := Handover(context.Background(), a, b, HandoverOptions{AssumeSameImage: true, Nodes: a.nodes()})
			orders := strings.Join(map[string][]string{"a": a.orders, "b": b.orders}[c.plain], " ")
			if r.Outcome != c.outcome || s.owner(t) != c.owner || orders != c.orders {
				t.Errorf("%+v: %q (%s), %q owns them, orders %s", c, r.Outcome, r.Error, s.owner(t), orders)
			}
		})
	}
}

// An interrupt before the source is inactive leaves everything as it was,
// later it is finished, or taken back.
func TestHandoverInterrupted(t *testing.T) {
	for _, c := range []struct {
		at      string // order that meets it, "" for before all
		to      map[string]trouble
		outcome HandoverOutcome
		owner   string
	}{
		{"", nil, HandoverCancelled, "a"},
		{"inactivate", nil, HandoverCancelled, "a"},
		{"activate", nil, HandoverMoved, "b"},
		{"activate", on("activate", fails), HandoverReturned, "a"},
		{"reactivate", on("activate", fails), HandoverReturned, "a"},
	} {
		t.Run(c.at, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newFakeStore(2)
				a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
				for k, v := range c.to {
					b.trouble[k] = v
				}
				interrupt := make(chan struct{})
				if c.at == "" {
					close(interrupt)
				}
				hook := func(o Order) {
					if kindOf(o) == c.at {
						close(interrupt)
						synctest.Wait() // until it has been noticed
					}
				}
				a.hook, b.hook = hook, hook
				r := Handover(context.Background(), a, b, HandoverOptions{Interrupt: interrupt})
				if r.Outcome != c.outcome || s.owner(t) != c.owner || !r.Interrupted {
					t.Errorf("%q (%s), %q owns them; want %q, %q", r.Outcome, r.Error, s.owner(t), c.outcome, c.owner)
				}
			})
		})
	}
}

// A second interrupt ends it at once, wherever it is.
func TestHandoverStoppedAtOnce(t *testing.T) {
	for _, at := range []string{"inactivate", "activate", "reactivate"} {
		t.Run(at, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newFakeStore(1)
				a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
				b.trouble["activate"] = fails
				if at == "activate" {
					b.trouble["activate"] = mute
				} else {
					a.trouble[at] = mute
				}
				ctx, cancel := context.WithCancel(context.Background())
				time.AfterFunc(time.Second, cancel)
				began := time.Now()
				r := Handover(ctx, a, b, HandoverOptions{})
				if d := time.Since(began); d > time.Second {
					t.Errorf("it took %v", d)
				}
				if r.Outcome != HandoverUnknown || r.Err() == nil || r.Next != againCommand {
					t.Errorf("%+v", r)
				}
			})
		})
	}
}

// Another handover is at work: who comes later waits until it knows.
func TestHandoverWaitsForTransition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFakeStore(2)
		a, b := newFakeSide("a", s, true), newFakeSide("b", s, false)
		a.states = []State{stateInactivating, stateInactivating}
		time.AfterFunc(2*time.Second, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			a.states = nil
			_ = a.apply(Order{})
		})
		if r := Handover(context.Background(), a, b, HandoverOptions{}); r.Outcome != HandoverRefused || !strings.Contains(r.Error, "neither owns it") {
			t.Errorf("without a nonce of the last handover: %+v", r)
		}
		for _, d := range s.images {
			d.nonce = "from the handover before"
		}
		if r := Handover(context.Background(), a, b, HandoverOptions{}); r.Outcome != HandoverMoved || !slices.Equal(b.orders, []string{"activate"}) || len(a.orders) > 0 {
			t.Errorf("%+v", r)
		}
	})
}

func TestHandoverSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFakeStore(1)
		a, b := newFakeSide("a b", s, true), newFakeSide("exec:it's", s, false)
		b.trouble["activate"] = vanishes
		var told []string
		r := Handover(context.Background(), a, b, HandoverOptions{Progress: func(s HandoverStep, ended bool) {
			if ended {
				told = append(told, s.Name)
			}
		}, Nodes: []string{"image0"}})
		var names []string
		for _, s := range r.Steps {
			names = append(names, s.Name)
		}
		want := []string{"check", "compare", "inactivate", "activate", "ask", "reactivate"}
		if !slices.Equal(names, want) || !slices.Equal(told, want) {
			t.Errorf("steps %q, told %q", names, told)
		}
		if want := `nbd-export handover --from 'a b' --to 'exec:it'\''s' --node image0`; r.Next != want {
			t.Errorf("next %s, want %s", r.Next, want)
		}
	})
}
