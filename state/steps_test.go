package state

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
)

// prepare brings a, b and c (keys in this order) to: a and b as said, c always
// inactive and always named too, so that the idempotent part is in every case.
func prepare(t *testing.T, opt Options, s State) *rig {
	r := newRig(t, opt, "a", "b", "c")
	switch s {
	case Active:
		noError(t, Activate(t.Context(), ActivateOptions{}, r.ms[:2]...))
	case FailedIO:
		noError(t, Activate(t.Context(), ActivateOptions{}, r.ms[:2]...))
		r.lanes[0].Fault(errSync)
		r.lanes[1].Fault(errSync)
	case FailedFenced:
		noError(t, Activate(t.Context(), ActivateOptions{}, r.ms[:2]...))
		r.ms[0].Fence(errFence)
		r.ms[1].Fence(errFence)
	}
	r.forget()
	return r
}

// stepCase is one failure, or several, in one transition of the group.
type stepCase struct {
	fail   string // methods that fail, as "a.Settle=sync b.Unsettle=io"
	err    string
	calls  string
	states string // of a, b and c
	gates  string
	events string // observed
}

func (c stepCase) run(t *testing.T, from State, order func(ms ...*Machine) error) {
	t.Helper()
	r := prepare(t, Options{}, from)
	for _, f := range strings.Fields(c.fail) {
		call, kind, _ := strings.Cut(f, "=")
		name, method, _ := strings.Cut(call, ".")
		err := map[string]error{"io": errIO, "sync": errSync, "fence": errFence, "busy": errBusy}[kind]
		r.imgs[name[0]-'a'].failNext(method, err)
	}
	// Named twice and out of order: that must not matter.
	err := order(r.ms[1], r.ms[0], r.ms[2], r.ms[1])
	check(t, "error", errText(err), c.err)
	check(t, "calls", r.trace.take(), c.calls)
	check(t, "states", r.states(), c.states)
	check(t, "gates", r.gates(), c.gates)
	var events []string
	for _, e := range r.takeEvents() {
		s := e.Image + ":" + e.Event.String()
		if e.Err != nil {
			s += "!"
		}
		events = append(events, strings.ReplaceAll(s, " ", "-"))
	}
	check(t, "events", strings.Join(events, " "), c.events)
	for i, m := range r.ms {
		st := m.Status()
		if st.Step != "" || !st.StepSince.IsZero() {
			t.Errorf("%s is still at step %s", st.Image, st.Step)
		}
		if failed := st.State == FailedIO || st.State == FailedFenced; failed != (st.Cause != nil) {
			t.Errorf("%s is %s with cause %v", st.Image, st.State, st.Cause)
		}
		owner := r.imgs[i].disk.owner.Load() != nil
		if owner != st.State.Owns() {
			t.Errorf("%s is %s and holds its lock: %v", st.Image, st.State, owner)
		}
	}

	// Whatever happened, it can be got out of, and tried again.
	ctx := t.Context()
	gates := strings.Fields(r.gates()) // who was told already is not told again
	for i, m := range r.ms {
		gates[i] = "AAA"
		if s := m.Status().State; s == FailedIO || s == FailedFenced {
			noError(t, Abandon(ctx, m))
			gates[i] = "AAD"
		}
	}
	noError(t, Activate(ctx, ActivateOptions{}, r.ms...))
	check(t, "gates after a new activation", r.gates(), strings.Join(gates, " "))
	check(t, "gates asked again", r.gates(), "AAA AAA AAA")
	noError(t, Inactivate(ctx, r.ms...))
	check(t, "gates after a new inactivation", r.gates(), "RRN RRN RRN")
	noError(t, Stop(r.ms...))
}

func TestActivateSteps(t *testing.T) {
	for _, c := range []stepCase{
		{"", "ok",
			"a.Acquire b.Acquire c.Acquire a.Load b.Load c.Load a.Claim b.Claim c.Claim " +
				"a.PublishActive b.PublishActive c.PublishActive a.Retire b.Retire c.Retire",
			"active active active", "AAA AAA AAA", "a:published b:published c:published"},
		{"a.Acquire=busy", `cannot activate image a: Failed to get "write" lock`,
			"a.Acquire",
			"inactive inactive inactive", "RRN RRN RRN", "a:activate-failed! b:activate-failed! c:activate-failed!"},
		{"b.Acquire=busy", `cannot activate image b: Failed to get "write" lock`,
			"a.Acquire b.Acquire a.Withdraw",
			"inactive inactive inactive", "RRN RRN RRN", "a:activate-failed! b:activate-failed! c:activate-failed!"},
		{"c.Acquire=busy", `cannot activate image c: Failed to get "write" lock`,
			"a.Acquire b.Acquire c.Acquire a.Withdraw b.Withdraw",
			"inactive inactive inactive", "RRN RRN RRN", "a:activate-failed! b:activate-failed! c:activate-failed!"},
		{"a.Load=io", "cannot activate image a: no space left on device",
			"a.Acquire b.Acquire c.Acquire a.Load a.Withdraw b.Withdraw c.Withdraw",
			"inactive inactive inactive", "RRN RRN RRN", "a:activate-failed! b:activate-failed! c:activate-failed!"},
		{"c.Load=io", "cannot activate image c: no space left on device",
			"a.Acquire b.Acquire c.Acquire a.Load b.Load c.Load a.Withdraw b.Withdraw c.Withdraw",
			"inactive inactive inactive", "RRN RRN RRN", "a:activate-failed! b:activate-failed! c:activate-failed!"},
		{"a.Claim=io", "cannot activate image a: no space left on device",
			"a.Acquire b.Acquire c.Acquire a.Load b.Load c.Load a.Claim a.Withdraw b.Withdraw c.Withdraw",
			"inactive inactive inactive", "RRN RRN RRN", "a:activate-failed! b:activate-failed! c:activate-failed!"},
		{"c.Claim=io", "cannot activate image c: no space left on device",
			"a.Acquire b.Acquire c.Acquire a.Load b.Load c.Load a.Claim b.Claim c.Claim a.Withdraw b.Withdraw c.Withdraw",
			"inactive inactive inactive", "RRN RRN RRN", "a:activate-failed! b:activate-failed! c:activate-failed!"},
		// A repair's failed sync: nothing of ours was acknowledged, so there is nothing to keep.
		{"b.Load=sync", "cannot activate image b: fdatasync: input/output error",
			"a.Acquire b.Acquire c.Acquire a.Load b.Load a.Withdraw b.Withdraw c.Withdraw",
			"inactive inactive inactive", "RRN RRN RRN", "a:activate-failed! b:activate-failed! c:activate-failed!"},
		{"b.Load=fence", "cannot activate image b: owner record has epoch 9",
			"a.Acquire b.Acquire c.Acquire a.Load b.Load a.Withdraw b.Withdraw c.Withdraw",
			"inactive inactive inactive", "RRN RRN RRN", "a:activate-failed! b:activate-failed! c:activate-failed!"},
	} {
		t.Run(c.fail, func(t *testing.T) {
			c.run(t, Inactive, func(ms ...*Machine) error { return Activate(t.Context(), ActivateOptions{}, ms...) })
		})
	}
}

func TestInactivateSteps(t *testing.T) {
	const (
		ahead  = "a.SyncAhead b.SyncAhead"
		settle = ahead + " a.Settle b.Settle"
		leave  = " only inactivate --abandon, or ending the process, leaves that state"
	)
	for _, c := range []stepCase{
		{"", "ok",
			settle + " a.PublishInactive b.PublishInactive a.Release b.Release",
			"inactive inactive inactive", "RRN RRN RRN", "a:released b:released"},

		{"a.SyncAhead=io", "cannot inactivate image a: sync-ahead: no space left on device; it stays active",
			"a.SyncAhead",
			"active active inactive", "AAA AAA RRN", "a:inactivate-failed! b:inactivate-failed!"},
		{"b.SyncAhead=io", "cannot inactivate image b: sync-ahead: no space left on device; it stays active",
			ahead,
			"active active inactive", "AAA AAA RRN", "a:inactivate-failed! b:inactivate-failed!"},
		{"a.SyncAhead=sync", "cannot inactivate image a: sync-ahead: fdatasync: input/output error; it is now failed(io):" + leave,
			"a.SyncAhead",
			"failed(io) active inactive", "RAR AAA RRN", "a:sync-failed! b:inactivate-failed!"},
		{"b.SyncAhead=sync", "cannot inactivate image b: sync-ahead: fdatasync: input/output error; it is now failed(io):" + leave,
			ahead,
			"active failed(io) inactive", "AAA RAR RRN", "b:sync-failed! a:inactivate-failed!"},
		{"b.SyncAhead=fence", "cannot inactivate image b: sync-ahead: owner record has epoch 9; it is now failed(fenced):" + leave,
			ahead + " b.Abandon b.PublishInactive b.Release",
			"active failed(fenced) inactive", "AAA RAR RRN", "b:fenced! a:inactivate-failed!"},

		{"a.Settle=io", "cannot inactivate image a: settle: no space left on device; it stays active",
			ahead + " a.Settle",
			"active active inactive", "AAA AAA RRN", "a:inactivate-failed! b:inactivate-failed!"},
		{"b.Settle=io", "cannot inactivate image b: settle: no space left on device; it stays active",
			settle + " a.Unsettle",
			"active active inactive", "AAA AAA RRN", "a:inactivate-failed! b:inactivate-failed!"},
		{"a.Settle=sync", "cannot inactivate image a: settle: fdatasync: input/output error; it is now failed(io):" + leave,
			ahead + " a.Settle",
			"failed(io) active inactive", "RAR AAA RRN", "a:sync-failed! b:inactivate-failed!"},
		{"b.Settle=sync", "cannot inactivate image b: settle: fdatasync: input/output error; it is now failed(io):" + leave,
			settle + " a.Unsettle",
			"active failed(io) inactive", "AAA RAR RRN", "b:sync-failed! a:inactivate-failed!"},
		{"b.Settle=fence", "cannot inactivate image b: settle: owner record has epoch 9; it is now failed(fenced):" + leave,
			settle + " a.Unsettle b.Abandon b.PublishInactive b.Release",
			"active failed(fenced) inactive", "AAA RAR RRN", "b:fenced! a:inactivate-failed!"},
		{"b.Settle=fence b.Release=io", "cannot inactivate image b: settle: owner record has epoch 9; it is now failed(fenced):" + leave,
			settle + " a.Unsettle b.Abandon b.PublishInactive b.Release",
			"active failed(fenced) inactive", "AAA RAR RRN", "b:fenced! a:inactivate-failed!"},

		// An image that cannot be made writable again must not take writes.
		{"b.Settle=io a.Unsettle=io", "cannot inactivate image b: settle: no space left on device; it stays active; " +
			"cannot take back the inactivation of image a: no space left on device",
			settle + " a.Unsettle",
			"failed(io) active inactive", "RAR AAA RRN", "a:sync-failed! b:inactivate-failed!"},
		{"b.Settle=sync a.Unsettle=sync", "cannot inactivate image b: settle: fdatasync: input/output error; it is now failed(io):" + leave + "; " +
			"cannot take back the inactivation of image a: fdatasync: input/output error",
			settle + " a.Unsettle",
			"failed(io) failed(io) inactive", "RAR RAR RRN", "b:sync-failed! a:sync-failed!"},
		{"b.Settle=io a.Unsettle=fence", "cannot inactivate image b: settle: no space left on device; it stays active; " +
			"cannot take back the inactivation of image a: owner record has epoch 9",
			settle + " a.Unsettle a.Abandon a.PublishInactive a.Release",
			"failed(fenced) active inactive", "RAR AAA RRN", "a:fenced! b:inactivate-failed!"},

		// Past the last step that can refuse: reported, and released.
		{"a.Release=io", "ok",
			settle + " a.PublishInactive b.PublishInactive a.Release b.Release",
			"inactive inactive inactive", "RRN RRN RRN", "a:released! b:released"},
		{"b.Release=sync", "ok",
			settle + " a.PublishInactive b.PublishInactive a.Release b.Release",
			"inactive inactive inactive", "RRN RRN RRN", "a:released b:released!"},
	} {
		t.Run(c.fail, func(t *testing.T) {
			c.run(t, Active, func(ms ...*Machine) error { return Inactivate(t.Context(), ms...) })
		})
	}
}

func TestAbandonSteps(t *testing.T) {
	const all = "a.Abandon a.PublishInactive a.Release b.Abandon b.PublishInactive b.Release"
	abandon := func(t *testing.T) func(ms ...*Machine) error {
		return func(ms ...*Machine) error { return Abandon(t.Context(), ms...) }
	}
	for _, c := range []stepCase{
		{"", "ok", all, "inactive inactive inactive", "RRD RRD RRN", "a:abandon b:abandon"},
		{"a.Abandon=io", "image a was given up, but not in order: no space left on device",
			all, "inactive inactive inactive", "RRD RRD RRN", "a:abandon! b:abandon"},
		{"b.Release=io", "image b was given up, but not in order: no space left on device",
			all, "inactive inactive inactive", "RRD RRD RRN", "a:abandon b:abandon!"},
	} {
		t.Run(c.fail, func(t *testing.T) { c.run(t, FailedIO, abandon(t)) })
	}
	t.Run("fenced", func(t *testing.T) { // let go when they were fenced
		stepCase{"", "ok", "", "inactive inactive inactive", "RRD RRD RRN", "a:abandon b:abandon"}.
			run(t, FailedFenced, abandon(t))
	})
}

func TestStopSteps(t *testing.T) {
	const lost = "writes acknowledged since the last flush may be lost: "
	for _, c := range []struct {
		from             State
		fail, err, calls string
	}{
		{Inactive, "", "ok", "b.Close a.Close c.Close"},
		{Active, "", "ok", "b.Settle b.Close a.Settle a.Close c.Close"},
		{Active, "a.Settle", "image a: " + lost + "no space left on device", "b.Settle b.Close a.Settle a.Close c.Close"},
		{Active, "b.Close", "image b: no space left on device", "b.Settle b.Close a.Settle a.Close c.Close"},
		{FailedIO, "", "image b: " + lost + "it is failed(io): fdatasync: input/output error; " +
			"image a: " + lost + "it is failed(io): fdatasync: input/output error", "b.Close a.Close c.Close"},
		{FailedFenced, "", "image b: " + lost + "it is failed(fenced): owner record has epoch 9; " +
			"image a: " + lost + "it is failed(fenced): owner record has epoch 9", "b.Close a.Close c.Close"},
	} {
		t.Run(c.from.String()+c.fail, func(t *testing.T) {
			r := prepare(t, Options{}, c.from)
			if name, method, ok := strings.Cut(c.fail, "."); ok {
				r.imgs[name[0]-'a'].failNext(method, errIO)
			}
			err := Stop(r.ms[1], r.ms[0], r.ms[2], r.ms[1])
			check(t, "error", errText(err), c.err)
			check(t, "calls", r.trace.take(), c.calls)
			check(t, "states", r.states(), "closed closed closed")
			check(t, "gates", r.gates(), "RRR RRR RRR")
			noError(t, Stop(r.ms...))
			check(t, "calls of a second stop", r.trace.take(), "")
		})
	}
}

// TestInterference has faults, fences, cancellations and orders arrive at each
// step of an inactivation of a and b, before the step does anything.
func TestInterference(t *testing.T) {
	const (
		ahead   = "a.SyncAhead b.SyncAhead"
		settle  = ahead + " a.Settle b.Settle"
		release = settle + " a.PublishInactive b.PublishInactive a.Release b.Release"
		done    = "ok | " + release + " | inactive inactive | RRN RRN"
		leave   = ": only inactivate --abandon, or ending the process, leaves that state"
		let     = " b.Abandon b.PublishInactive b.Release"
	)
	ioAt := func(s string) string {
		return "cannot inactivate image b: " + s + ": fdatasync: input/output error; it is now failed(io)" + leave
	}
	fencedAt := func(s string) string {
		return "cannot inactivate image b: " + s + ": owner record has epoch 9; it is now failed(fenced)" + leave
	}
	for _, c := range []struct {
		what string
		do   func(r *rig)
		at   map[Step]string // step: error, calls, states, gates
		late string          // LastError of b when it arrives at StepRelease
	}{
		{"sync failed", func(r *rig) { r.lanes[1].Fault(errSync) }, map[Step]string{
			StepSyncAhead: ioAt("close-gate") + " |  | active failed(io) | AAA RAR",
			StepCloseGate: ioAt("drain") + " | " + ahead + " | active failed(io) | AAA RAR",
			StepDrain:     ioAt("settle") + " | " + ahead + " | active failed(io) | AAA RAR",
			StepSettle:    ioAt("release") + " | " + settle + " a.Unsettle | active failed(io) | AAA RAR",
			StepRelease:   done,
		}, errSync.text},
		{"fenced", func(r *rig) { go r.ms[1].Fence(errFence); synctest.Wait() }, map[Step]string{
			StepSyncAhead: fencedAt("close-gate") + " | " + let[1:] + " | active failed(fenced) | AAA RAR",
			StepCloseGate: fencedAt("drain") + " | " + ahead + let + " | active failed(fenced) | AAA RAR",
			StepDrain:     fencedAt("settle") + " | " + ahead + let + " | active failed(fenced) | AAA RAR",
			StepSettle:    fencedAt("release") + " | " + settle + " a.Unsettle" + let + " | active failed(fenced) | AAA RAR",
			StepRelease:   done,
		}, errFence.text},
		{"cancel", func(r *rig) {
			early := r.ms[1].Status().Step == StepSyncAhead
			if r.ms[1].Cancel() != early {
				panic("Cancel is wrong about what it did")
			}
		}, map[Step]string{
			StepSyncAhead: "inactivation cancelled, everything stays active: context canceled |  | active active | AAA AAA",
			StepCloseGate: done, StepDrain: done, StepSettle: done, StepRelease: done,
		}, "ok"},
		{"activate", func(r *rig) {
			err := Activate(context.Background(), ActivateOptions{}, r.ms...)
			step := r.ms[0].Status().Step
			if errText(err) != "cannot activate image a: it is inactivating (step "+string(step)+"); try again when that is done" {
				panic(err)
			}
		}, map[Step]string{
			StepSyncAhead: done, StepCloseGate: done, StepDrain: done, StepSettle: done, StepRelease: done,
		}, "ok"},
	} {
		for s, want := range c.at {
			t.Run(c.what+"/"+string(s), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newRig(t, Options{}, "a", "b")
					noError(t, Activate(t.Context(), ActivateOptions{}, r.ms...))
					r.forget()
					r.on(s, func(image string) {
						if image == "a" {
							c.do(r)
						}
					})
					err := Inactivate(t.Context(), r.ms...)
					synctest.Wait()
					check(t, "outcome", errText(err)+" | "+r.trace.take()+" | "+r.states()+" | "+r.gates(), want)
					if s == StepRelease { // too late to matter, but not to be told
						check(t, "last error", errText(r.ms[1].Status().LastError), c.late)
					}
				})
			})
		}
	}
}

// TestStopDuringTransition has a stop arrive at each step of each transition,
// with further orders after it: the transition finishes, then the image is
// closed, and nothing reopens the gate.
func TestStopDuringTransition(t *testing.T) {
	const (
		load   = "a.Acquire a.Load a.Claim a.PublishActive a.Retire"
		leave  = "a.SyncAhead a.Settle a.PublishInactive a.Release a.Close"
		letGo  = "a.Abandon a.PublishInactive a.Release a.Close"
		closed = " a.Settle a.Close"
	)
	activate := func(ms ...*Machine) error { return Activate(context.Background(), ActivateOptions{}, ms...) }
	inactivate := func(ms ...*Machine) error { return Inactivate(context.Background(), ms...) }
	abandon := func(ms ...*Machine) error { return Abandon(context.Background(), ms...) }
	for _, c := range []struct {
		from  State
		order func(...*Machine) error
		steps []Step
		calls string
	}{
		{Inactive, activate, []Step{StepLock, StepLoad, StepClaim, StepPublish, StepRetire}, load + closed},
		{Active, inactivate, []Step{StepSyncAhead, StepCloseGate, StepDrain, StepSettle, StepRelease}, leave},
		{FailedIO, abandon, []Step{StepAbandon}, letGo},
	} {
		for _, s := range c.steps {
			t.Run(string(s), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newRig(t, Options{}, "a")
					into(t, r, c.from)
					r.forget()
					there, goOn := r.pauseAt(s)
					result, stopped, refused := make(chan error, 1), make(chan error, 1), make(chan error, 3)
					go func() { result <- c.order(r.ms...) }()
					<-there
					before := r.states() + " " + r.gates()
					go func() { stopped <- Stop(r.ms...) }()
					synctest.Wait()
					check(t, "while the transition is under way", r.states()+" "+r.gates(), before)
					for _, order := range []func(...*Machine) error{activate, inactivate, abandon} {
						refused <- order(r.ms...)
					}
					goOn()
					noError(t, <-result)
					noError(t, <-stopped)
					close(refused)
					for err := range refused {
						if !errors.Is(err, ErrStopping) {
							t.Errorf("an order while stopping: %v", err)
						}
					}
					check(t, "calls", r.trace.take(), c.calls)
					check(t, "end", r.states()+" "+r.gates(), "closed RRR")
				})
			})
		}
	}
}

// TestRefuse: after it nothing is admitted and no order is taken, whatever the
// state; an image that failed can still be fenced, an active one is settled by
// Stop.
func TestRefuse(t *testing.T) {
	for _, c := range []struct {
		state State
		calls string
	}{{Inactive, "a.Close"}, {Active, "a.Settle a.Close"}, {FailedIO, "a.Close"}, {FailedFenced, "a.Close"}} {
		t.Run(c.state.String(), func(t *testing.T) {
			r := newRig(t, Options{}, "a")
			into(t, r, c.state)
			r.forget()
			Refuse(r.ms...)
			late := r.ms[0].Lane(nil, nil)
			defer late.Close()
			ctx := t.Context()
			for _, err := range []error{
				Activate(ctx, ActivateOptions{}, r.ms...), Inactivate(ctx, r.ms...), Abandon(ctx, r.ms...),
			} {
				if !errors.Is(err, ErrStopping) || !strings.HasSuffix(err.Error(), " image a: server is shutting down") {
					t.Errorf("order after Refuse: %v", err)
				}
			}
			check(t, "gate, calls, state", r.gates()+ask(late)+r.trace.take()+r.states(), "RRRRRR"+c.state.String())
			check(t, "refusal", r.lanes[0].Refusal().Error(), ErrStopping.Error())
			if !r.lanes[0].Stopping() || r.wakes["a"] != 1 {
				t.Errorf("reads are refused: %v, parked requests woken %d times", r.lanes[0].Stopping(), r.wakes["a"])
			}
			_ = Stop(r.ms...)
			check(t, "calls", r.trace.take(), c.calls)
		})
	}
}
