package state

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// async runs f and gives its result when it is there.
func async(f func() error) <-chan error {
	c := make(chan error, 1)
	go func() { c <- f() }()
	return c
}

// bubble is a test in a synctest bubble with a rig.
func bubble(t *testing.T, opt Options, names []string, f func(t *testing.T, r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newRig(t, opt, names...)) })
}

func (r *rig) activate(which ...int) error {
	return Activate(context.Background(), ActivateOptions{}, r.some(which)...)
}

func (r *rig) inactivate(which ...int) error {
	return Inactivate(context.Background(), r.some(which)...)
}

func (r *rig) abandon(which ...int) error {
	return Abandon(context.Background(), r.some(which)...)
}

// some are the machines with these indices, all if there are none.
func (r *rig) some(which []int) []*Machine {
	if len(which) == 0 {
		return r.ms
	}
	var ms []*Machine
	for _, i := range which {
		ms = append(ms, r.ms[i])
	}
	return ms
}

func pending(t *testing.T, what string, c <-chan error) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-c:
		t.Fatalf("%s did not wait: %v", what, err)
	default:
	}
}

func finished(t *testing.T, what string, c <-chan error) error {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-c:
		return err
	default:
		t.Fatalf("%s still waits", what)
		return nil
	}
}

func TestDrainWaitsForWhatIsAdmitted(t *testing.T) {
	for _, c := range []Class{Mutate, Query, Flush} {
		bubble(t, Options{}, []string{"a"}, func(t *testing.T, r *rig) {
			noError(t, r.activate())
			l := r.lanes[0]
			if v := l.Enter(c); v != Admitted {
				t.Fatal(v)
			}
			out := async(func() error { return r.inactivate() })
			pending(t, "inactivate", out)
			check(t, "gate", r.gates(), "WWW")
			check(t, "step", string(r.ms[0].Status().Step), "drain")

			// Lanes that come and go during the drain neither hold it up nor
			// end it.
			other := r.ms[0].Lane(nil, nil)
			check(t, "gate of a new lane", ask(other), "WWW")
			pending(t, "inactivate", out)
			other.Close()
			pending(t, "inactivate", out)
			l.Leave()
			noError(t, finished(t, "inactivate", out))
			check(t, "gate", r.gates(), "RRN")
		})
	}
}

func TestSlowDrainNamesTheOldest(t *testing.T) {
	var told []string
	opt := Options{SlowDrain: func(image, what string, age time.Duration) {
		told = append(told, fmt.Sprintf("%s: %s, %s", image, what, age))
	}}
	bubble(t, opt, []string{"a"}, func(t *testing.T, r *rig) {
		noError(t, r.activate())
		start := time.Now()
		oldest := func(what string, after time.Duration) *Lane {
			return r.ms[0].Lane(nil, func() (string, time.Time) { return what, start.Add(after) })
		}
		for _, l := range []*Lane{oldest("young", time.Second), oldest("old", time.Millisecond), oldest("", 0)} {
			defer l.Close()
		}
		r.lanes[0].Enter(Mutate)
		read := r.lanes[0].EnterRead()
		out := async(func() error { return r.inactivate() })
		time.Sleep(time.Minute)
		r.lanes[0].Leave()
		time.Sleep(time.Minute)
		pending(t, "inactivate", out)
		r.lanes[0].LeaveRead(read)
		noError(t, finished(t, "inactivate", out))
		check(t, "told", strings.Join(told, "; "), "a: old, 4.999s; a: old, 1m4.999s")
		if what, age := r.ms[0].Oldest(); what != "old" || age != 2*time.Minute-time.Millisecond {
			t.Errorf("the oldest is %q, %v", what, age)
		}
	})
}

// TestStuckRead: a read that does not end holds up the end of a transition,
// but neither writes nor Status, and other reads go on.
func TestStuckRead(t *testing.T) {
	bubble(t, Options{}, []string{"a", "b"}, func(t *testing.T, r *rig) {
		l := r.lanes[0]
		stuck := l.EnterRead()
		on := async(func() error { return r.activate() })
		pending(t, "activate", on)
		st := r.ms[0].Status()
		if st.State != Active || st.Step != StepRetire || st.Epoch != 1 {
			t.Errorf("while a read uses the old view: %+v", st)
		}
		check(t, "gates", r.gates(), "AAA AAA")
		check(t, "calls", strings.Join(strings.Fields(r.trace.take())[4:], " "), "a.Claim b.Claim a.PublishActive b.PublishActive")
		noError(t, r.activate()) // it is active: nothing to do
		for range 3 {
			l.LeaveRead(l.EnterRead())
		}

		// What comes next waits for it, can be given up, and is no error.
		ctx, cancel := context.WithCancel(t.Context())
		late := async(func() error { return Inactivate(ctx, r.ms...) })
		pending(t, "inactivate", late)
		cancel()
		if err := finished(t, "inactivate", late); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		off := async(func() error { return r.inactivate() })
		pending(t, "inactivate", off)
		check(t, "gates", r.gates(), "AAA AAA")
		newer := l.EnterRead()
		l.LeaveRead(stuck)
		noError(t, finished(t, "activate", on))

		// Now the newer one uses the view that has to be closed.
		pending(t, "inactivate", off)
		check(t, "states", r.states(), "inactivating inactivating")
		check(t, "gates", r.gates(), "WWW WWW")
		if r.imgs[0].disk.owner.Load() == nil || r.imgs[1].disk.owner.Load() == nil {
			t.Error("released under a read")
		}
		l.LeaveRead(l.EnterRead())
		pending(t, "inactivate", off)
		l.LeaveRead(newer)
		noError(t, finished(t, "inactivate", off))
		check(t, "states", r.states(), "inactive inactive")
	})
}

// TestFailedImageStillDrains: queries go on while an image is failed, so
// giving it up has to hold them, also where they are admitted on the view of
// a fenced image that was let go long ago.
func TestFailedImageStillDrains(t *testing.T) {
	bubble(t, Options{}, []string{"a"}, func(t *testing.T, r *rig) {
		l, img := r.lanes[0], r.imgs[0]
		noError(t, r.activate())
		l.Enter(Mutate)
		l.Fault(errSync)
		l.Enter(Query)
		off := async(func() error { return r.abandon() })
		pending(t, "abandon", off)
		check(t, "gates", r.gates(), "RWR")
		l.Leave()
		pending(t, "abandon", off)
		l.Leave()
		noError(t, finished(t, "abandon", off))

		noError(t, r.activate())
		l.Enter(Query)
		fence := async(func() error { r.ms[0].Fence(errFence); return nil })
		pending(t, "fence", fence)
		check(t, "gates", r.gates(), "RWR")
		r.mu.Lock()
		clear(r.wakes)
		r.mu.Unlock()
		l.Leave()
		finished(t, "fence", fence)
		if r.wakes["a"] == 0 {
			t.Error("queries parked while the image was let go are not woken")
		}
		check(t, "gates", r.gates(), "RAR")
		if img.disk.owner.Load() != nil {
			t.Error("a fenced image holds its lock")
		}

		l.Enter(Query)
		off = async(func() error { return r.abandon() })
		pending(t, "abandon", off) // or Retire would close the view under the query
		l.Leave()
		noError(t, finished(t, "abandon", off))
		noError(t, r.activate())
	})
}

// TestFenceMeetsOtherEnds: whoever comes first, a fenced image is let go
// exactly once.
func TestFenceMeetsOtherEnds(t *testing.T) {
	end := map[string]func(r *rig) error{
		"abandon": func(r *rig) error { return r.abandon() },
		"stop":    func(r *rig) error { _ = Stop(r.ms...); return nil },
		"fence":   func(r *rig) error { r.ms[0].Fence(errFence); return nil },
	}
	for name, f := range end {
		t.Run(name, func(t *testing.T) {
			for range 20 { // which of two that wait goes first is up to the scheduler
				bubble(t, Options{}, []string{"a"}, func(t *testing.T, r *rig) {
					stuck := r.lanes[0].EnterRead()
					on := async(func() error { return r.activate() })
					pending(t, "activate", on) // to keep both waiting
					fence := async(func() error { r.ms[0].Fence(errFence); return nil })
					pending(t, "fence", fence)
					check(t, "at once", r.states()+" "+r.gates(), "failed(fenced) RAR")
					end := async(func() error { return f(r) })
					synctest.Wait()
					r.lanes[0].LeaveRead(stuck)
					noError(t, finished(t, "activate", on))
					noError(t, finished(t, "fence", fence))
					noError(t, finished(t, name, end))
					if r.imgs[0].disk.owner.Load() != nil || r.ms[0].owned {
						t.Fatal("a fenced image is not let go")
					}
				})
			}
		})
	}

	// The fence arrives while the image is being given up anyway.
	bubble(t, Options{}, []string{"a"}, func(t *testing.T, r *rig) {
		noError(t, r.activate())
		r.lanes[0].Fault(errSync)
		r.on(StepAbandon, func(string) {
			go r.ms[0].Fence(errFence)
			synctest.Wait()
			check(t, "while abandoning", r.states()+" "+r.gates(), "failed(fenced) RWR")
		})
		noError(t, r.abandon())
		synctest.Wait()
		check(t, "end", r.states()+" "+r.gates(), "inactive RRD")
	})
}

func TestFencedWithoutCause(t *testing.T) {
	r := newRig(t, Options{}, "a")
	noError(t, r.activate())
	r.ms[0].Fence(nil)
	check(t, "cause", errText(r.ms[0].Status().Cause), "fenced")
}

func TestOrderErrors(t *testing.T) {
	r := newRig(t, Options{}, "a")
	say := func(what string, err error, want string) {
		t.Helper()
		check(t, what, errText(err), want)
	}
	r.on(StepLoad, func(string) {
		say("during activation", r.inactivate(), "cannot inactivate image a: it is activating (step load); try again when that is done")
		say("during activation", r.abandon(), "cannot abandon image a: it is activating (step load); try again when that is done")
	})
	noError(t, r.activate())
	say("active", r.abandon(), "cannot abandon image a: it is active, not failed; hand it back with inactivate")
	r.on(StepDrain, func(string) {
		say("during inactivation", r.activate(), "cannot activate image a: it is inactivating (step drain); try again when that is done")
	})
	noError(t, r.inactivate())
	r.on(StepLoad, nil)
	noError(t, r.activate())
	r.lanes[0].Fault(errSync)
	for what, err := range map[string]error{"activate": r.activate(), "inactivate": r.inactivate()} {
		say("failed", err, "cannot "+what+" image a: it is failed(io): fdatasync: input/output error; "+
			"only inactivate --abandon, or ending the process, leaves that state")
		if !errors.Is(err, errSync) {
			t.Errorf("%v does not wrap its cause", err)
		}
	}
	_ = Stop(r.ms...)
	say("closed", r.activate(), "cannot activate image a: server is shutting down")
}

// TestGroupsAreAllOrNone: with one member that cannot, none moves.
func TestGroupsAreAllOrNone(t *testing.T) {
	ctx := t.Context()
	r := newRig(t, Options{}, "a", "b", "c")
	noError(t, r.activate(1)) // one is already there
	noError(t, r.activate())
	check(t, "states", r.states(), "active active active")
	check(t, "calls", r.trace.take(), "b.Acquire b.Load b.Claim b.PublishActive b.Retire a.Acquire c.Acquire a.Load c.Load a.Claim c.Claim "+
		"a.PublishActive c.PublishActive a.Retire c.Retire")
	noError(t, r.inactivate(2))
	r.lanes[1].Fault(errSync)
	r.forget()
	for _, err := range []error{r.inactivate(), r.activate(), r.inactivate(0, 1), r.activate(2, 1)} {
		var oe *OrderError
		if !errors.As(err, &oe) || oe.Image != "b" {
			t.Errorf("order to a group with a failed member: %v", err)
		}
	}
	if err := r.abandon(); err == nil { // a is not failed
		t.Error("abandoned an active image")
	}
	check(t, "states", r.states()+r.trace.take(), "active failed(io) inactive")
	noError(t, r.abandon(2, 1))
	check(t, "states", r.states(), "active inactive inactive")
	noError(t, Activate(ctx, ActivateOptions{}))
	noError(t, Inactivate(ctx))
}

// TestLockOrder: images are acquired in the order of their keys, whatever the
// order they are named in.
func TestLockOrder(t *testing.T) {
	r := newRig(t, Options{}, "a", "b", "c", "d")
	for i, k := range [][2]uint64{{2, 1}, {1, 9}, {1, 8}, {1, 9}} {
		r.imgs[i].dev, r.imgs[i].ino = k[0], k[1]
	}
	noError(t, r.activate(3, 0, 2))
	check(t, "calls", strings.Join(strings.Fields(r.trace.take())[:3], " "), "c.Acquire d.Acquire a.Acquire")
	noError(t, r.inactivate())
	r.forget()
	noError(t, r.activate(1, 0, 2))
	check(t, "calls", strings.Join(strings.Fields(r.trace.take())[:3], " "), "c.Acquire b.Acquire a.Acquire")
}

func TestJoins(t *testing.T) {
	// The joiner shares the outcome, good or bad, and moves what else it named.
	bubble(t, Options{}, []string{"a", "b", "c"}, func(t *testing.T, r *rig) {
		there, goOn := r.pauseAt(StepLoad)
		first := async(func() error { return r.activate(0, 1) })
		<-there
		same, more := async(func() error { return r.activate(1) }), async(func() error { return r.activate(1, 2) })
		pending(t, "the same order", same)
		pending(t, "a wider order", more)
		check(t, "states", r.states(), "activating activating inactive")
		goOn()
		noError(t, finished(t, "first", first))
		noError(t, finished(t, "same", same))
		noError(t, finished(t, "more", more))
		check(t, "states", r.states(), "active active active")

		there, goOn = r.pauseAt(StepDrain)
		r.imgs[0].failNext("Settle", errIO)
		first = async(func() error { return r.inactivate(0, 1) })
		<-there
		same, more = async(func() error { return r.inactivate(1) }), async(func() error { return r.inactivate(2, 1) })
		pending(t, "the same order", same)
		pending(t, "a wider order", more)
		goOn()
		err := finished(t, "first", first)
		if err == nil || finished(t, "same", same) != err || finished(t, "more", more) != err {
			t.Errorf("joined, but not the outcome: %v", err)
		}
		check(t, "states", r.states(), "active active active")
	})

	// A joiner that wakes up late has got what it asked for, even if the image
	// has moved on: it must not start over.
	for range 50 {
		bubble(t, Options{}, []string{"a"}, func(t *testing.T, r *rig) {
			there, goOn := r.pauseAt(StepLoad)
			first := async(func() error {
				err := r.activate()
				return errors.Join(err, r.inactivate())
			})
			<-there
			same := async(func() error { return r.activate() })
			pending(t, "joiner", same)
			goOn()
			noError(t, finished(t, "first", first))
			noError(t, finished(t, "joiner", same))
			check(t, "state", r.states(), "inactive")
		})
	}

	// Two operations joined at once, and one that is refused by a third.
	bubble(t, Options{}, []string{"a", "b", "c"}, func(t *testing.T, r *rig) {
		l := r.lanes[0]
		noError(t, r.activate())
		l.Enter(Mutate)
		r.lanes[1].Enter(Mutate)
		one, two := async(func() error { return r.inactivate(0) }), async(func() error { return r.inactivate(1) })
		pending(t, "one", one)
		pending(t, "two", two)
		all := async(func() error { return r.inactivate() })
		pending(t, "all", all)
		if err := r.activate(); err == nil {
			t.Error("activated during an inactivation")
		}
		l.Leave()
		noError(t, finished(t, "one", one))
		pending(t, "all", all)
		check(t, "states", r.states(), "inactive inactivating active")
		r.lanes[1].Leave()
		noError(t, finished(t, "two", two))
		noError(t, finished(t, "all", all))
		check(t, "states", r.states(), "inactive inactive inactive")
	})
}

// TestCancel: an inactivation ends without effect until the gate closes, by
// Cancel or by its context; a cancelled one can be repeated.
func TestCancel(t *testing.T) {
	bubble(t, Options{}, []string{"a", "b"}, func(t *testing.T, r *rig) {
		if r.ms[0].Cancel() {
			t.Error("cancelled what is not there")
		}
		noError(t, r.activate())
		if r.ms[0].Cancel() {
			t.Error("cancelled what is not there")
		}
		type waits struct{ ctx context.Context }
		inside := make(chan waits, 1)
		ctx, cancel := context.WithCancelCause(t.Context())
		order := func() error {
			return Inactivate(ctx, r.ms...)
		}
		block := func() {
			r.imgs[1].onSync = func(ctx context.Context) error {
				inside <- waits{ctx}
				<-ctx.Done()
				return fmt.Errorf("interrupted: %w", ctx.Err())
			}
		}
		block()
		off := async(order)
		<-inside
		check(t, "while syncing ahead", r.states()+" "+r.gates(), "inactivating inactivating AAA AAA")
		if !r.ms[0].Cancel() { // any member will do
			t.Error("nothing to cancel")
		}
		err := finished(t, "inactivate", off)
		check(t, "error", errText(err), "inactivation cancelled, everything stays active: context canceled")
		check(t, "end", r.states()+" "+r.gates(), "active active AAA AAA")
		check(t, "last error", errText(r.ms[1].Status().LastError), errText(err))

		off = async(order)
		<-inside
		cancel(errors.New("the client has gone"))
		check(t, "error", errText(finished(t, "inactivate", off)), "inactivation cancelled, everything stays active: the client has gone")

		// A fault ends the syncing, and is what is reported.
		ctx, cancel = context.WithCancelCause(t.Context())
		defer cancel(nil)
		off = async(order)
		<-inside
		r.lanes[1].Fault(errSync)
		if err := finished(t, "inactivate", off); !errors.Is(err, errSync) {
			t.Error(err)
		}
		check(t, "end", r.states()+" "+r.gates(), "active failed(io) AAA RAR")
		noError(t, r.abandon(1))
		noError(t, r.activate(1))

		// A sync that fails while it is cancelled has failed all the same.
		r.imgs[1].onSync = func(ctx context.Context) error { r.ms[1].Cancel(); return errSync }
		if err := order(); !errors.Is(err, errSync) {
			t.Error(err)
		}
		check(t, "end", r.states()+" "+r.gates(), "active failed(io) AAA RAR")
		noError(t, r.abandon(1))
		noError(t, r.activate(1))
		r.imgs[1].onSync = nil
		noError(t, order())
	})

	// Activation is cancelled by its context until the last lock is taken.
	r := newRig(t, Options{}, "a", "b", "c")
	ctx, cancel := context.WithCancel(t.Context())
	r.imgs[1].on("Acquire", func() error { cancel(); return nil })
	err := Activate(ctx, ActivateOptions{}, r.ms...)
	check(t, "error", errText(err), "cannot activate image c: context canceled")
	check(t, "calls", r.trace.take(), "a.Acquire b.Acquire a.Withdraw b.Withdraw")
	check(t, "end", r.states()+" "+r.gates(), "inactive inactive inactive RRN RRN RRN")
	ctx, cancel = context.WithCancel(t.Context())
	r.imgs[1].on("Acquire", nil)
	r.imgs[0].on("Load", func() error { cancel(); return nil })
	noError(t, Activate(ctx, ActivateOptions{}, r.ms...))
}

// TestGiveUp: an operation goes on as long as one order wants it. Who joined and
// gives up waits no longer; who began it waits for its end.
func TestGiveUp(t *testing.T) {
	const gaveUp = "cannot inactivate: gave up waiting for the transition under way: "
	const cancelled = "inactivation cancelled, everything stays active: "
	type order struct {
		err    <-chan error
		giveUp func(why string)
	}
	give := func(t *testing.T, r *rig, which ...int) order {
		ctx, cancel := context.WithCancelCause(t.Context())
		t.Cleanup(func() { cancel(nil) })
		return order{async(func() error { return Inactivate(ctx, r.some(which)...) }), func(why string) { cancel(errors.New(why)) }}
	}
	syncing := func(t *testing.T, r *rig) (goOn func()) {
		noError(t, r.activate())
		inside, leave := make(chan struct{}, 1), make(chan struct{})
		r.imgs[0].onSync = func(ctx context.Context) error {
			inside <- struct{}{}
			select {
			case <-leave:
			case <-ctx.Done():
			}
			return ctx.Err()
		}
		t.Cleanup(func() { r.imgs[0].onSync = nil })
		return sync.OnceFunc(func() { close(leave) })
	}
	run := func(f func(t *testing.T, r *rig)) { bubble(t, Options{}, []string{"a", "b"}, f) }

	// Who joined, whatever it named beside.
	run(func(t *testing.T, r *rig) {
		goOn := syncing(t, r)
		first := give(t, r, 0)
		pending(t, "first", first.err)
		same, wider := give(t, r, 0), give(t, r, 1, 0)
		pending(t, "same", same.err)
		pending(t, "wider", wider.err)
		same.giveUp("time is over")
		check(t, "same", errText(finished(t, "same", same.err)), gaveUp+"time is over")
		wider.giveUp("interrupted")
		check(t, "wider", errText(finished(t, "wider", wider.err)), gaveUp+"interrupted")
		pending(t, "first", first.err)
		check(t, "states", r.states(), "inactivating active")
		goOn()
		noError(t, finished(t, "first", first.err))
		check(t, "states", r.states(), "inactive active")
	})
	// Who began it: it goes on for who joined, and is done.
	run(func(t *testing.T, r *rig) {
		goOn := syncing(t, r)
		first := give(t, r)
		pending(t, "first", first.err)
		second := give(t, r, 0)
		pending(t, "second", second.err)
		first.giveUp("time is over")
		pending(t, "first", first.err)
		pending(t, "second", second.err)
		goOn()
		noError(t, finished(t, "first", first.err))
		noError(t, finished(t, "second", second.err))
		check(t, "states", r.states(), "inactive inactive")
	})
	// All, in either order, and an order that comes later may join again.
	for _, last := range []int{0, 1} {
		run(func(t *testing.T, r *rig) {
			syncing(t, r)
			orders := []order{give(t, r)}
			pending(t, "first", orders[0].err)
			orders = append(orders, give(t, r))
			pending(t, "second", orders[1].err)
			for i := range orders {
				if i != last {
					orders[i].giveUp(fmt.Sprint("order ", i))
				}
			}
			synctest.Wait()
			check(t, "states", r.states(), "inactivating inactivating")
			third := give(t, r, 1)
			pending(t, "third", third.err)
			orders[last].giveUp(fmt.Sprint("order ", last))
			synctest.Wait()
			check(t, "states", r.states(), "inactivating inactivating")
			third.giveUp("order 2")
			check(t, "first", errText(finished(t, "first", orders[0].err)), cancelled+"order 0")
			check(t, "second", errText(finished(t, "second", orders[1].err)), gaveUp+"order 1")
			check(t, "third", errText(finished(t, "third", third.err)), gaveUp+"order 2")
			check(t, "states", r.states(), "active active")
		})
	}
	// Cancel ends it for all.
	run(func(t *testing.T, r *rig) {
		syncing(t, r)
		first := give(t, r)
		pending(t, "first", first.err)
		second := give(t, r)
		pending(t, "second", second.err)
		if !r.ms[1].Cancel() {
			t.Error("nothing to cancel")
		}
		check(t, "first", errText(finished(t, "first", first.err)), cancelled+"context canceled")
		check(t, "second", errText(finished(t, "second", second.err)), cancelled+"context canceled")
	})
	// One that was given up is not joined any more: who comes then begins anew.
	run(func(t *testing.T, r *rig) {
		noError(t, r.activate())
		inside, leave := make(chan struct{}, 1), make(chan struct{})
		r.imgs[0].onSync = func(ctx context.Context) error { inside <- struct{}{}; <-leave; return ctx.Err() }
		first := give(t, r)
		<-inside
		first.giveUp("time is over")
		synctest.Wait()
		second := give(t, r)
		pending(t, "second", second.err)
		close(leave)
		check(t, "first", errText(finished(t, "first", first.err)), cancelled+"time is over")
		noError(t, finished(t, "second", second.err))
		check(t, "states", r.states(), "inactive inactive")
	})
	// Behind the closed gate nobody ends it.
	run(func(t *testing.T, r *rig) {
		noError(t, r.activate())
		there, goOn := r.pauseAt(StepDrain)
		first := give(t, r)
		<-there
		second := give(t, r)
		pending(t, "second", second.err)
		first.giveUp("time is over")
		second.giveUp("time is over")
		check(t, "second", errText(finished(t, "second", second.err)), gaveUp+"time is over")
		third := give(t, r)
		pending(t, "third", third.err)
		goOn()
		noError(t, finished(t, "first", first.err))
		noError(t, finished(t, "third", third.err))
		check(t, "states", r.states(), "inactive inactive")
	})
	// An activation goes on for others too.
	run(func(t *testing.T, r *rig) {
		inside, leave := make(chan struct{}), make(chan struct{})
		r.imgs[0].on("Acquire", func() error { close(inside); <-leave; return nil })
		ctx, cancel := context.WithCancel(t.Context())
		first := async(func() error { return Activate(ctx, ActivateOptions{}, r.ms...) })
		<-inside
		second := async(func() error { return r.activate(1) })
		pending(t, "second", second)
		cancel()
		close(leave)
		noError(t, finished(t, "first", first))
		noError(t, finished(t, "second", second))
		check(t, "states", r.states(), "active active")
	})
}

// What ends with the order that gives up last has ended when that returns, whatever
// else its context has to tell first.
func TestGiveUpLast(t *testing.T) {
	bubble(t, Options{}, []string{"a"}, func(t *testing.T, r *rig) {
		noError(t, r.activate())
		leave := make(chan struct{})
		goOn := sync.OnceFunc(func() { close(leave) })
		defer func() { r.ms[0].Cancel(); goOn() }() // or it would never end where it fails
		r.imgs[0].onSync = func(ctx context.Context) error { <-ctx.Done(); <-leave; return ctx.Err() }
		ctx, cancel := context.WithCancel(t.Context())
		first := async(func() error { return Inactivate(ctx, r.ms...) })
		pending(t, "first", first)
		joined, giveUp := context.WithCancel(t.Context())
		second := async(func() error { return Inactivate(tardy{joined}, r.ms...) })
		pending(t, "second", second)
		cancel()
		pending(t, "first", first)
		giveUp()
		pending(t, "second", second) // the sync does not end at once
		goOn()
		if finished(t, "first", first) == nil || finished(t, "second", second) == nil {
			t.Error("it went on")
		}
		check(t, "states", r.states(), "active")
	})
}

// tardy is a context that has not come to who watches it when the one that waits for
// its end has: the end of any is told to one after the other.
type tardy struct{ context.Context }

func (tardy) AfterFunc(func()) (stop func() bool) { return func() bool { return true } }

// TestNothingBlocksStatus: with any method of the image stuck, status,
// requests and orders' refusals are immediate; and callbacks may call back.
func TestNothingBlocksStatus(t *testing.T) {
	look := func(r *rig) {
		for i, m := range r.ms {
			m.Status()
			m.Cancel()
			l := m.Lane(nil, nil)
			ask(l)
			l.LeaveRead(l.EnterRead())
			_ = l.Stopping()
			_ = l.Refusal()
			l.Close()
			ask(r.lanes[i])
		}
	}
	for _, c := range []struct {
		method string
		from   State
		order  func(r *rig) error
	}{
		{"Acquire", Inactive, func(r *rig) error { return r.activate() }},
		{"Load", Inactive, func(r *rig) error { return r.activate() }},
		{"Claim", Inactive, func(r *rig) error { return r.activate() }},
		{"PublishActive", Inactive, func(r *rig) error { return r.activate() }},
		{"Retire", Inactive, func(r *rig) error { return r.activate() }},
		{"Settle", Active, func(r *rig) error { return r.inactivate() }},
		{"PublishInactive", Active, func(r *rig) error { return r.inactivate() }},
		{"Release", Active, func(r *rig) error { return r.inactivate() }},
		{"Abandon", FailedIO, func(r *rig) error { return r.abandon() }},
		{"Close", FailedIO, func(r *rig) error { _ = Stop(r.ms...); return nil }},
	} {
		t.Run(c.method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := prepare(t, Options{}, c.from)
				out := make(chan struct{})
				r.imgs[1].on(c.method, func() error { <-out; return nil })
				over := async(func() error { return c.order(r) })
				pending(t, c.method, over)
				look(r)
				close(out)
				noError(t, finished(t, c.method, over))
			})
		})
	}

	t.Run("callbacks", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var m *Machine
			calls := make(map[string]int)
			var mu sync.Mutex
			look := func(who string) {
				m.Status()
				l := m.Lane(nil, nil)
				ask(l)
				l.Close()
				mu.Lock()
				calls[who]++
				mu.Unlock()
			}
			m = NewMachine(newFake("a", 1, nil), Options{
				Observe:   func(Transition) { look("observe") },
				Step:      func(string, Step) { look("step") },
				SlowDrain: func(string, string, time.Duration) { look("slow") },
			})
			l := m.Lane(func() { look("reopen") }, func() (string, time.Time) { look("oldest"); return "", time.Time{} })
			ctx := t.Context()
			noError(t, Activate(ctx, ActivateOptions{}, m))
			l.Enter(Mutate)
			off := async(func() error { return Inactivate(ctx, m) })
			time.Sleep(time.Minute)
			l.Leave()
			noError(t, finished(t, "inactivate", off))
			noError(t, Activate(ctx, ActivateOptions{}, m))
			l.Fault(errSync)
			noError(t, Abandon(ctx, m))
			noError(t, Stop(m))
			check(t, "callbacks", fmt.Sprint(calls), "map[observe:6 oldest:1 reopen:7 slow:1 step:17]")
		})
	})
}

func TestTransitionsAreReported(t *testing.T) {
	bubble(t, Options{}, []string{"a"}, func(t *testing.T, r *rig) {
		m := r.ms[0]
		take := func(want string) {
			t.Helper()
			var s []string
			for _, e := range r.takeEvents() {
				s = append(s, fmt.Sprintf("%s %s: %s -> %s, epoch %d, %s, %v", e.Image, e.Event, e.From, e.To, e.Epoch, e.Duration, e.Err))
			}
			check(t, "report", strings.Join(s, "; "), want)
		}
		r.on(StepLoad, func(string) { time.Sleep(time.Second) })
		r.on(StepDrain, func(string) { time.Sleep(2 * time.Second) })
		noError(t, Activate(t.Context(), ActivateOptions{IfUnchanged: true}, m))
		take("a published: activating -> active, epoch 1, 1s, <nil>")
		if !r.imgs[0].ifUnchanged {
			t.Error("IfUnchanged is lost")
		}
		since := m.Status().Since
		time.Sleep(time.Second)
		if since != m.Status().Since || time.Since(since) != time.Second {
			t.Errorf("active since %v", since)
		}
		noError(t, r.inactivate())
		take("a released: inactivating -> inactive, epoch 1, 2s, <nil>")
		r.imgs[0].failNext("Load", errBusy)
		err := Activate(t.Context(), ActivateOptions{}, m)
		if !errors.Is(err, errBusy) || r.imgs[0].ifUnchanged || m.Status().LastError != err {
			t.Errorf("error %v, status %+v", err, m.Status())
		}
		take("a activate failed: activating -> inactive, epoch 1, 1s, " + err.Error())
		noError(t, r.activate())
		if m.Status().LastError != nil {
			t.Error("an old error is kept")
		}
		take("a published: activating -> active, epoch 2, 1s, <nil>")
		time.Sleep(time.Second)
		r.lanes[0].Fault(errSync)
		r.lanes[0].Fault(errSync) // once
		take("a sync failed: active -> failed(io), epoch 2, 0s, fdatasync: input/output error")
		if st := m.Status(); !errors.Is(st.Cause, errSync) || !errors.Is(st.LastError, errSync) {
			t.Errorf("status %+v", st)
		}
		m.Fence(errFence)
		m.Fence(errFence)
		take("a fenced: failed(io) -> failed(fenced), epoch 2, 0s, owner record has epoch 9")
		noError(t, r.abandon())
		take("a abandon: failed(fenced) -> inactive, epoch 2, 0s, <nil>")
		noError(t, Stop(m))
		take("a stop: inactive -> closed, epoch 2, 0s, <nil>")
	})
}

// The epoch is what the claim says, higher than that of any owner there was,
// and a group that is not claimed as a whole leaves all as they were.
func TestEpoch(t *testing.T) {
	r := newRig(t, Options{}, "a", "b")
	epochs := func(what, want string) {
		t.Helper()
		check(t, what, fmt.Sprint(r.ms[0].Status().Epoch, r.ms[1].Status().Epoch, ", recorded ",
			r.imgs[0].disk.epoch.Load(), r.imgs[1].disk.epoch.Load()), want)
	}
	noError(t, r.activate())
	noError(t, r.inactivate())
	epochs("at first", "1 1, recorded 1 1")
	r.imgs[0].disk.epoch.Store(41)
	r.imgs[1].disk.epoch.Store(0) // lost: what this process knows counts
	r.imgs[1].failNext("Claim", errIO)
	if err := r.activate(); !errors.Is(err, errIO) {
		t.Error(err)
	}
	epochs("not claimed", "1 1, recorded 41 0")
	noError(t, r.activate())
	epochs("claimed", "42 2, recorded 42 2")
}

func TestWatch(t *testing.T) {
	bubble(t, Options{}, []string{"a"}, func(t *testing.T, r *rig) {
		m, img := r.ms[0], r.imgs[0]
		checked := func(want int64) {
			t.Helper()
			if n := img.checked.Swap(0); n != want {
				t.Errorf("checked %d times, want %d", n, want)
			}
		}
		const ten = 10*time.Second + time.Second/2
		time.Sleep(ten)
		checked(0)
		noError(t, r.activate())
		time.Sleep(ten)
		checked(10)
		noError(t, r.inactivate())
		time.Sleep(ten)
		checked(0)

		// Most errors are none of its business; an inactivation that failed
		// does not end the watch.
		noError(t, r.activate())
		img.failNext("Check", errIO)
		img.failNext("Settle", errIO)
		if r.inactivate() == nil {
			t.Error("inactivated")
		}
		time.Sleep(ten)
		checked(10)
		check(t, "state", r.states(), "active")

		// A failed sync is, and a fence after it is too.
		img.failNext("Check", fmt.Errorf("stat: %w", errSync))
		time.Sleep(2 * time.Second)
		checked(2)
		check(t, "state", r.states(), "failed(io)")
		img.failNext("Check", fmt.Errorf("record: %w", errFence))
		r.forget()
		time.Sleep(ten)
		checked(1)
		check(t, "state", r.states()+" "+r.trace.take(), "failed(fenced) a.Abandon a.PublishInactive a.Release")
		noError(t, r.abandon())
		noError(t, r.activate())
		time.Sleep(ten)
		checked(10)

		// A check that is stuck holds up Release, and nothing else.
		out := make(chan struct{})
		img.on("Check", func() error { <-out; return nil })
		time.Sleep(2 * time.Second)
		off := async(func() error { return r.inactivate() })
		pending(t, "inactivate", off)
		check(t, "step", string(m.Status().Step), "release")
		close(out)
		noError(t, finished(t, "inactivate", off))

		// What it finds after everything was settled is told, no more.
		img.on("Check", nil)
		noError(t, r.activate())
		out = make(chan struct{})
		img.on("Check", func() error { <-out; return errFence })
		time.Sleep(2 * time.Second)
		off = async(func() error { return r.inactivate() })
		pending(t, "inactivate", off)
		close(out)
		noError(t, finished(t, "inactivate", off))
		check(t, "state", r.states()+": "+errText(m.Status().LastError), "inactive: owner record has epoch 9")
		img.on("Check", nil)
		noError(t, r.activate())
		noError(t, r.inactivate())
		check(t, "last error", errText(m.Status().LastError), "ok")

		// Stop while a check is stuck: what it finds is not lost.
		noError(t, r.activate())
		out = make(chan struct{})
		img.on("Check", func() error { <-out; return errSync })
		time.Sleep(2 * time.Second)
		off = async(func() error { return Stop(m) })
		pending(t, "stop", off)
		close(out)
		check(t, "stop", errText(finished(t, "stop", off)),
			"image a: writes acknowledged since the last flush may be lost: it is failed(io): fdatasync: input/output error")
	})

	// The watch begins when the old view is gone.
	bubble(t, Options{Watch: time.Minute}, []string{"a"}, func(t *testing.T, r *rig) {
		stuck := r.lanes[0].EnterRead()
		on := async(func() error { return r.activate() })
		time.Sleep(time.Hour)
		r.lanes[0].LeaveRead(stuck)
		noError(t, finished(t, "activate", on))
		if n := r.imgs[0].checked.Load(); n != 0 {
			t.Errorf("checked %d times beside Retire", n)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := r.imgs[0].checked.Load(); n != 1 {
			t.Errorf("checked %d times in a minute", n)
		}
	})
}

func TestClosingALaneInUsePanics(t *testing.T) {
	r := newRig(t, Options{}, "a")
	noError(t, r.activate())
	l := r.lanes[0]
	for what, enter := range map[string]func() func(){
		"write": func() func() { l.Enter(Mutate); return l.Leave },
		"read":  func() func() { g := l.EnterRead(); return func() { l.LeaveRead(g) } },
	} {
		leave := enter()
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("a lane with a %s admitted was closed", what)
				}
			}()
			l.Close()
		}()
		leave()
	}
	l.Close()
}

// TestParkedRequestsAreWoken: whatever ends a hold tells each lane, after the
// gate has its new answer.
func TestParkedRequestsAreWoken(t *testing.T) {
	type end struct {
		what string
		hold Step
		from State
		run  func(r *rig) error
		want string
	}
	for _, c := range []end{
		{"activated", StepLoad, Inactive, func(r *rig) error { return r.activate() }, "AAA"},
		{"not activated", StepLoad, Inactive, func(r *rig) error { r.imgs[0].failNext("Load", errIO); _ = r.activate(); return nil }, "RRN"},
		{"inactivated", StepDrain, Active, func(r *rig) error { return r.inactivate() }, "RRN"},
		{"not inactivated", StepDrain, Active, func(r *rig) error { r.imgs[0].failNext("Settle", errIO); _ = r.inactivate(); return nil }, "AAA"},
		{"failed", StepDrain, Active, func(r *rig) error { r.imgs[0].failNext("Settle", errSync); _ = r.inactivate(); return nil }, "RAR"},
		{"abandoned", StepAbandon, FailedIO, func(r *rig) error { return r.abandon() }, "RRD"},
		{"stopped", StepDrain, Active, func(r *rig) error {
			return errors.Join(r.inactivate(), Stop(r.ms...))
		}, "RRR"},
	} {
		t.Run(c.what, func(t *testing.T) {
			r := newRig(t, Options{}, "a")
			into(t, r, c.from)
			var last string
			var l *Lane
			l = r.ms[0].Lane(func() { last = ask(l) }, nil)
			defer l.Close()
			r.on(c.hold, func(string) {
				last = "not woken"
				if v := l.Enter(Query); v != Wait {
					t.Errorf("held: %v", v)
				}
			})
			noError(t, c.run(r))
			check(t, "when woken", last, c.want)
		})
	}
}

func TestErrorTexts(t *testing.T) {
	check(t, "inactive", ErrInactive.Error(), "export is inactive")
	fe := &FailedError{State: FailedIO, Image: "a", Cause: errSync}
	if !errors.Is(fe, errSync) {
		t.Error("a FailedError does not wrap its cause")
	}
	one, two := errors.New("one"), errors.New("two")
	both := joinErrors(one, two)
	check(t, "joined", both.Error(), "one; two")
	if !errors.Is(both, one) || !errors.Is(both, two) || joinErrors(nil, two) != two || joinErrors(one, nil) != one {
		t.Error("joinErrors loses errors")
	}
	if !slices.Equal(distinct([]*Machine{nil, nil}), []*Machine{nil}) {
		t.Error("distinct")
	}
}

// What was written before an image was given up may be lost. Each connection that
// was there hears of it by its next FLUSH, once, also if that comes when the image
// is owned again; one that comes later hears of nothing.
func TestGivenUpIsToldByFlush(t *testing.T) {
	bubble(t, Options{}, []string{"a"}, func(t *testing.T, r *rig) {
		old := []*Lane{r.lanes[0], r.ms[0].Lane(nil, nil), r.ms[0].Lane(nil, nil)}
		defer old[1].Close()
		defer old[2].Close()
		noError(t, r.activate())
		old[0].Fault(errSync)
		if v := old[0].Enter(Flush); v != Refused { // told, but not of what follows
			t.Errorf("failed: %v", v)
		}
		noError(t, r.abandon())
		late := r.ms[0].Lane(nil, nil)
		defer late.Close()
		check(t, "given up", ask(old[0])+" "+ask(old[0])+" "+ask(late), "RRD RRN RRN")
		noError(t, r.activate())
		check(t, "owned again", ask(old[1])+" "+ask(old[1])+" "+ask(late), "AAD AAA AAA")
		noError(t, r.inactivate())
		check(t, "inactive again", ask(old[2])+" "+ask(old[2]), "RRD RRN")
	})
}
