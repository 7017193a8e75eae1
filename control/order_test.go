package control

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbd-export/nbd-export/state"
)

// What comes of an order to one server, whatever happens to it.
func TestGive(t *testing.T) {
	type want struct {
		outcome OrderOutcome
		next    bool
	}
	for tr, w := range map[trouble]want{
		fine:       {OrderDone, false},
		done:       {OrderDone, false},
		slow:       {OrderDone, false},
		muteDone:   {OrderUnknown, true},
		fails:      {OrderRefused, false},
		vanishes:   {OrderRefused, true},
		late:       {OrderRefused, true},
		mute:       {OrderUnknown, true},
		goneBefore: {OrderUnknown, false},
	} {
		carriedOut := tr == fine || tr == done || tr == slow || tr == muteDone
		for _, activate := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				s := newFakeStore(2)
				a := newFakeSide("a", s, !activate)
				order := "inactivate"
				if activate {
					order = "activate"
				}
				a.trouble[order] = tr
				began := time.Now()
				r := Give(context.Background(), a, Order{Active: activate}, OrderOptions{Timeout: 10 * time.Second})
				if d := time.Since(began); d > 25*time.Second {
					t.Errorf("%s, %q: it took %v", order, tr, d)
				}
				if r.Outcome != w.outcome || (r.Next != "") != w.next || (r.Err() == nil) != r.Outcome.Good() || (r.Error == "") != r.Outcome.Good() {
					t.Errorf("%s, %q: %+v", order, tr, r)
				}
				if next := "nbd-export " + order + " --control a --timeout 10s"; w.next && r.Next != next {
					t.Errorf("next is %s", r.Next)
				}
				// What was still on its way comes to nothing.
				a.arrive()
				owns := len(s.images[0].owners) > 0
				if wantOwns := activate == carriedOut; !a.dead && owns != wantOwns {
					t.Errorf("%s, %q: it owns its images: %v", order, tr, owns)
				}
				a.trouble, a.silent = nil, false
				r = Give(context.Background(), a, Order{Active: activate}, OrderOptions{})
				again := OrderDone
				switch {
				case a.dead:
					again = OrderRefused
				case carriedOut:
					again = OrderAlready
				}
				if r.Outcome != again {
					t.Errorf("%s, %q, again: %+v", order, tr, r)
				}
			})
		}
	}
}

// A server that does not answer at all is ordered nothing, and one without a limit
// is waited for.
func TestGiveTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFakeStore(1)
		a := newFakeSide("a b", s, true)
		a.silent = true
		began := time.Now()
		r := Give(context.Background(), a, Order{Nodes: []string{"image0"}, Abandon: true}, OrderOptions{Timeout: 3 * time.Second})
		if d := time.Since(began); r.Outcome != OrderRefused || d != 3*time.Second {
			t.Errorf("%+v after %v", r, d)
		}
		if want := "nbd-export inactivate --control 'a b' --node image0 --abandon --timeout 3s"; r.Next != want {
			t.Errorf("next is %s", r.Next)
		}
		if a.orders != nil {
			t.Errorf("it was ordered %v", a.orders)
		}
		a.silent = false
		a.hook = func(Order) { time.Sleep(time.Hour) }
		if r = Give(context.Background(), a, Order{}, OrderOptions{}); r.Outcome != OrderDone || r.Milliseconds != 3_600_000 {
			t.Errorf("%+v", r)
		}
	})
}

// An interrupt takes the order back if that is possible.
func TestGiveInterrupted(t *testing.T) {
	b := newBed(t, 2)
	b.activate(t)
	p := NewPeer(b.listen(t, Config{}))
	defer p.Close()
	interrupt := make(chan struct{})
	// While writes are served it goes back, also what is about all images.
	b.images[1].syncAhead = func(ctx context.Context) error {
		close(interrupt)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	r := Give(t.Context(), p, Order{}, OrderOptions{Interrupt: interrupt})
	if r.Outcome != OrderCancelled || !r.Interrupted || !strings.Contains(r.Err().Error(), "; it is active; next: nbd-export inactivate --control ") {
		t.Errorf("%+v", r)
	}
	b.want(t, state.Active)
	b.images[1].syncAhead = nil
	// Nothing is ordered after one.
	r = Give(t.Context(), p, Order{}, OrderOptions{Interrupt: interrupt})
	if r.Outcome != OrderCancelled || !strings.Contains(r.Error, "before anything was ordered") {
		t.Errorf("%+v", r)
	}
	b.want(t, state.Active)
	// Behind the closed gate it is too late.
	interrupt = make(chan struct{})
	b.images[0].settle = func() error { close(interrupt); return nil }
	if r = Give(t.Context(), p, Order{}, OrderOptions{Interrupt: interrupt}); r.Outcome != OrderDone || !r.Interrupted || r.Server.State != "inactive" {
		t.Errorf("%+v", r)
	}
	b.want(t, state.Inactive)
}

// One that another order has begun goes on, and then it is not as before.
func TestGiveInterruptedBesideAnother(t *testing.T) {
	b := newBed(t, 1)
	b.activate(t)
	path := b.listen(t, Config{})
	p := interrupting{Peer: NewPeer(path), interrupt: make(chan struct{})}
	defer p.Close()
	begun, goOn, theirs := make(chan struct{}), make(chan struct{}), make(chan error)
	b.images[0].syncAhead = func(ctx context.Context) error {
		close(begun)
		select {
		case <-goOn:
		case <-ctx.Done():
		}
		return ctx.Err()
	}
	other := dial(t, path)
	go func() { theirs <- other.SetActive(context.Background(), false) }()
	<-begun
	r := Give(t.Context(), p, Order{}, OrderOptions{Interrupt: p.interrupt})
	if r.Outcome != OrderUnknown || r.Next == "" || r.Server.State != "inactivating" || !strings.HasPrefix(r.Error, "interrupted; server at ") ||
		!strings.HasSuffix(r.Error, "; and yet inactivating: image0, as another order asks") {
		t.Errorf("%+v", r)
	}
	close(goOn)
	if err := <-theirs; err != nil {
		t.Error(err)
	}
	b.want(t, state.Inactive)
}

// interrupting is interrupted when it is given an order.
type interrupting struct {
	*Peer
	interrupt chan struct{}
}

func (p interrupting) SetActive(ctx context.Context, o Order) error {
	close(p.interrupt)
	return p.Peer.SetActive(ctx, o)
}

// What failed and has moved images all the same says so, and which.
func TestGivePartly(t *testing.T) {
	for _, activate := range []bool{false, true} {
		order, as := "inactivate", "1 inactive, 1 active"
		if activate {
			order, as = "activate", "1 active, 1 inactive"
		}
		a := newFakeSide("a", newFakeStore(2), !activate)
		a.plain = true // ours leaves nothing half done
		a.trouble[order] = half
		r := Give(t.Context(), a, Order{Active: activate}, OrderOptions{})
		want := "server at a: a: only one of them; and yet these have moved: image0; it is " + as + "; next: nbd-export " + order + " --control a"
		if r.Outcome != OrderPartly || r.Err().Error() != want || len(r.Server.Images) != 2 {
			t.Errorf("%+v, want %s", r, want)
		}
		a.trouble = nil
		if r = Give(t.Context(), a, Order{Active: activate}, OrderOptions{}); r.Outcome != OrderDone {
			t.Errorf("again: %+v", r)
		}
		// Of one that says no more after it has failed it is not known.
		synctest.Test(t, func(t *testing.T) {
			a := newFakeSide("a", newFakeStore(2), !activate)
			a.plain = true
			a.trouble[order] = failsMute
			if r := Give(t.Context(), a, Order{Active: activate}, OrderOptions{}); r.Outcome != OrderUnknown || r.Next == "" {
				t.Errorf("%+v", r)
			}
			// Ours has left all as it was.
			a.plain, a.silent = false, false
			if r := Give(t.Context(), a, Order{Active: activate}, OrderOptions{}); r.Outcome != OrderRefused || r.Server.State != stateUnknown {
				t.Errorf("%+v", r)
			}
		})
	}
}

// A failed image is given up only if the others of its group can be inactivated.
func TestAbandonGroup(t *testing.T) {
	b := newBed(t, 3)
	b.activate(t)
	p := NewPeer(b.listen(t, Config{}))
	defer p.Close()
	b.images[1].settle = func() error { return lost{} }
	if r := Give(t.Context(), p, Order{Nodes: []string{"image1"}}, OrderOptions{}); r.Outcome != OrderRefused {
		t.Errorf("%+v", r)
	}
	b.images[2].settle = func() error { return errors.New("no space left on device") }
	r := Give(t.Context(), p, Order{Abandon: true}, OrderOptions{})
	if r.Outcome != OrderRefused || !strings.Contains(r.Error, "no space left on device; it stays active") {
		t.Errorf("%+v", r)
	}
	b.want(t, state.Active, state.FailedIO, state.Active)
	b.images[2].settle = nil
	if r = Give(t.Context(), p, Order{Abandon: true}, OrderOptions{}); r.Outcome != OrderDone {
		t.Errorf("%+v", r)
	}
	b.want(t, state.Inactive, state.Inactive, state.Inactive)
}

// One that was not answered is ended as long as writes are served.
func TestGiveUnanswered(t *testing.T) {
	b := newBed(t, 1)
	b.activate(t)
	p := NewPeer(b.listen(t, Config{}))
	defer p.Close()
	begun, result := make(chan struct{}), make(chan error, 1)
	b.images[0].syncAhead = func(ctx context.Context) error {
		close(begun)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	g := &giving{ctx: t.Context(), side: p, order: Order{Name: "x"}, about: []string{"image0"}}
	go func() { result <- p.SetActive(t.Context(), g.order) }()
	<-begun
	g.find(errBroken)
	if g.report.Outcome != OrderRefused || !strings.Contains(g.report.Error, "did not carry out the order, which was taken back: "+errBroken.Error()) {
		t.Errorf("%+v", g.report)
	}
	if err := <-result; !answered(err) {
		t.Error(err)
	}
	b.want(t, state.Active)
}

// QEMU's daemon is asked for nothing that it would do otherwise than ordered.
func TestGivePlain(t *testing.T) {
	s := newFakeStore(3)
	a := newFakeSide("a", s, true)
	a.plain = true
	for want, o := range map[string]Order{
		"server at a: QEMU's storage daemon cannot do that: --abandon":                                        {Abandon: true},
		"server at a: QEMU's storage daemon cannot do that: --if-unchanged":                                   {Active: true, IfUnchanged: true},
		"QEMU's storage daemon at a moves one node or all of them, not 2 of 3; name one with --node, or none": {Nodes: []string{"image0", "image1"}},
	} {
		if r := Give(t.Context(), a, o, OrderOptions{}); r.Outcome != OrderRefused || r.Error != want || r.Next != "" {
			t.Errorf("%+v, want %s", r, want)
		}
	}
	if a.orders != nil {
		t.Errorf("it was ordered %v", a.orders)
	}
	if r := Give(t.Context(), a, Order{Nodes: []string{"image0"}}, OrderOptions{}); r.Outcome != OrderDone {
		t.Errorf("%+v", r)
	}
}
