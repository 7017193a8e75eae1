package state

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

// fakePacer asks for rounds rounds of whoever it is given, and notes what it is
// told.
type fakePacer struct {
	trace  *trace
	rounds int // calls that want another
	fail   error
}

func (p *fakePacer) Ahead(ctx context.Context, images int, sync func(context.Context) error) (bool, error) {
	p.trace.add(fmt.Sprintf("ahead/%d", images))
	if err := errors.Join(sync(ctx), p.fail); err != nil {
		return true, err
	}
	p.rounds--
	return p.rounds >= 0, nil
}

func (p *fakePacer) Done() { p.trace.add("done") }

// A group is synced ahead for as long as one of its images asks for it, and what
// slows writers ends when the gates are closed, or nothing comes of it.
func TestPacer(t *testing.T) {
	const one = "ahead/2 a.SyncAhead ahead/2 b.SyncAhead"
	for _, c := range []struct {
		name string
		p    fakePacer
		img  error // of b's sync
		want string
	}{
		{"once", fakePacer{}, nil, one + " done done a.Settle b.Settle a.PublishInactive b.PublishInactive a.Release b.Release"},
		{"again", fakePacer{rounds: 1}, nil, one + " " + one + " done done a.Settle b.Settle a.PublishInactive b.PublishInactive a.Release b.Release"},
		{"fails", fakePacer{fail: errors.New("x")}, nil, "ahead/2 a.SyncAhead done done"},
		{"sync fails", fakePacer{rounds: 9}, errors.New("x"), one + " done done"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := c.p
			r := newRig(t, Options{Pacer: &p}, "a", "b")
			p.trace = r.trace
			noError(t, Activate(t.Context(), ActivateOptions{}, r.ms...))
			r.forget()
			if c.img != nil {
				r.imgs[1].failNext("SyncAhead", c.img)
			}
			err := Inactivate(t.Context(), r.ms...)
			if (err != nil) != (c.img != nil || c.p.fail != nil) {
				t.Error(err)
			}
			check(t, "calls", r.trace.take(), c.want)
		})
	}
}

// Writers are slowed until the gate is closed and not before it.
func TestPacerEndsBehindTheGate(t *testing.T) {
	r := newRig(t, Options{Pacer: &fakePacer{}}, "a")
	r.ms[0].opt.Pacer = gatePacer{func() { check(t, "gate", r.gates(), "WWW") }}
	noError(t, Activate(t.Context(), ActivateOptions{}, r.ms...))
	noError(t, Inactivate(t.Context(), r.ms...))
}

type gatePacer struct{ done func() }

func (gatePacer) Ahead(ctx context.Context, _ int, sync func(context.Context) error) (bool, error) {
	return false, sync(ctx)
}

func (p gatePacer) Done() { p.done() }

// A transition says how long each of its steps took.
func TestStepTimes(t *testing.T) {
	r := newRig(t, Options{}, "a", "b")
	noError(t, Activate(t.Context(), ActivateOptions{}, r.ms...))
	noError(t, Inactivate(t.Context(), r.ms...))
	for _, e := range r.takeEvents() {
		var steps []Step
		for _, s := range e.Steps {
			steps = append(steps, s.Step)
			if s.Took < 0 || s.Took > e.Duration {
				t.Errorf("%s: %v of %v", s.Step, s.Took, e.Duration)
			}
		}
		want := []Step{StepLock, StepLoad, StepClaim, StepPublish}
		if e.Event == Released {
			want = []Step{StepSyncAhead, StepCloseGate, StepDrain, StepSettle, StepRelease}
		}
		check(t, e.Event.String(), fmt.Sprint(steps), fmt.Sprint(want))
	}
}
