package state

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// The model is a sequential program of the same rules: each order is a
// coroutine that runs until it has to wait, on one thread, with no locks and
// no gate. It takes what an order does in a state from the golden table.

// modelMachine is what the model knows of one machine.
type modelMachine struct {
	state              State
	step               Step
	epoch              uint64
	stopping, refusing bool
	owned              bool
	op                 *modelOp
	others             int                 // admitted, not reads
	reads              []*modelRead        // under way
	hold               bool                // Options.Hold
	losses             int                 // of ownership
	waiting            []modelWrite        // writes that have to ask again
	fail               map[string][]string // failures to come, by method
	calls              []string            // expected of the image
	dropped            bool                // its next FLUSH comes too late
}

type modelRead struct {
	generation uint32 // as EnterRead gave it
	old        bool   // a view was replaced since
}

type modelWrite struct {
	since  Arrival // as EnterAgain gave it
	losses int     // before it
}

type modelOp struct {
	ms        []int
	orders    []*modelOrder // that want it
	done      bool
	cancelled bool // by Cancel, by a fault, or since no order wants it
	firm      bool // it cannot be
	err       string
}

// modelOrder is an order that may be given up.
type modelOrder struct {
	joined  []*modelOp
	givenUp bool
	ends    []*modelOp // which it has joined, and which end as it is given up
}

// task is a coroutine of the model and the goroutine that does the same.
type task struct {
	what   string
	waits  func() bool // reports whether to go on
	next   func() (func() bool, bool)
	stop   func()
	result string // of the model, "" while it runs
	real   <-chan error
	order  *modelOrder // nil for what is not given up
	giveUp func()      // for real
}

type world struct {
	t      *rapid.T
	golden map[string]string // state/event: outcome
	r      *rig
	m      []*modelMachine
	hold   []chan struct{} // SyncAhead of the image waits while not nil
	tasks  []*task
	// queue counts what waits for an operation in order to go on by itself.
	// There is at most one, as which of two goes first is not determined.
	queue int
}

type block func(until func() bool)

// start begins a task in the model and for real.
func (w *world) start(what string, model func(block) string, real func() error) *task {
	tk := &task{what: what}
	tk.next, tk.stop = iter.Pull(func(yield func(func() bool) bool) {
		type stopped struct{}
		defer func() {
			if e := recover(); e != nil && e != any(stopped{}) {
				panic(e)
			}
		}()
		tk.result = model(func(until func() bool) {
			for !until() {
				if !yield(until) {
					panic(stopped{})
				}
			}
		})
	})
	tk.waits = func() bool { return true }
	w.tasks = append(w.tasks, tk)
	w.run()
	tk.real = async(real)
	return tk
}

// run runs all tasks of the model until each waits.
func (w *world) run() {
	for again := true; again; {
		again = false
		for _, tk := range slices.Clone(w.tasks) {
			if tk.result == "" && tk.waits() {
				until, more := tk.next()
				if more {
					tk.waits = until
				}
				again = true
			}
		}
	}
}

// call is a call of an image's method: "" or how it fails.
func (w *world) call(i int, method string) string {
	x := w.m[i]
	x.calls = append(x.calls, w.r.imgs[i].name+"."+method)
	var err string
	if q := x.fail[method]; len(q) > 0 {
		err, x.fail[method] = q[0], q[1:]
	}
	return err
}

func (w *world) fault(i int, ev Event) bool {
	x := w.m[i]
	if x.state == Inactivating && x.step == StepRelease {
		return false
	}
	to, ok := strings.CutPrefix(w.golden[x.state.String()+"/"+ev.String()], "> ")
	if !ok {
		return false
	}
	if x.state == Inactivating {
		x.op.cancelled = true
	}
	for s := range numStates {
		if s.String() == to {
			x.state = s
		}
	}
	if x.state == FailedFenced {
		x.losses++
	}
	return true
}

var faultOf = map[string]Event{"sync": SyncFailed, "fence": Fenced}

func (w *world) exclusive(i int, b block) *modelOp {
	x := w.m[i]
	if x.op != nil {
		w.queue++
		b(func() bool { return x.op == nil })
		w.queue--
	}
	x.op = &modelOp{ms: []int{i}}
	return x.op
}

func (w *world) finish(op *modelOp, err string) string {
	for _, i := range op.ms {
		w.m[i].op, w.m[i].step = nil, ""
	}
	op.done, op.err = true, err
	return err
}

func (w *world) synchronize(i int, b block) {
	for _, r := range w.m[i].reads {
		r.old = true
	}
	b(func() bool {
		return !slices.ContainsFunc(w.m[i].reads, func(r *modelRead) bool { return r.old })
	})
}

func (w *world) drain(i int, b block) { b(func() bool { return w.m[i].others == 0 }) }

func (w *world) letGo(i int, b block) (failed bool) {
	w.m[i].step = StepAbandon
	w.drain(i, b)
	if w.m[i].owned {
		w.m[i].dropped = true
		failed = w.call(i, "Abandon") != ""
		w.call(i, "PublishInactive")
		w.synchronize(i, b)
		w.m[i].owned = false
		failed = w.call(i, "Release") != "" || failed
	}
	return failed
}

func (w *world) fence(i int, b block) string {
	if !w.fault(i, Fenced) {
		return "ok"
	}
	op := w.exclusive(i, b)
	if w.m[i].state == FailedFenced {
		w.letGo(i, b)
	}
	return w.finish(op, "ok")
}

func (w *world) stop(ms []int, onlyRefuse bool, b block) string {
	w.queue++ // all the time: it takes one machine after the other
	defer func() { w.queue-- }()
	for _, i := range ms {
		w.m[i].stopping = true
	}
	for _, i := range ms {
		op := w.exclusive(i, b)
		w.m[i].refusing = true
		w.finish(op, "")
	}
	result := "ok"
	if onlyRefuse {
		return result
	}
	for _, i := range ms {
		x := w.m[i]
		op := w.exclusive(i, b)
		if x.state != Closed {
			x.step = StepStop
			w.drain(i, b)
			bad := false
			if x.state == Active {
				bad = w.call(i, "Settle") != ""
			}
			w.synchronize(i, b)
			bad = bad || x.state == FailedIO || x.state == FailedFenced
			if w.call(i, "Close") != "" || bad {
				result = "failed"
			}
			x.state, x.owned = Closed, false
		}
		w.finish(op, "")
	}
	return result
}

// look says what an order finds, without changing anything.
func (w *world) look(order Event, ms []int) (err string, moving []int, joined, busy []*modelOp) {
	for _, i := range ms {
		x := w.m[i]
		if x.stopping || x.state == Closed {
			return "stopping", nil, nil, nil
		}
		switch o := w.golden[x.state.String()+"/"+order.String()]; {
		case o == "no":
			return "refused", nil, nil, nil
		case o == "+":
			joined = append(joined, x.op)
		case o != "=" && x.op != nil:
			busy = append(busy, x.op)
		case o != "=":
			moving = append(moving, i)
		}
	}
	return "", moving, joined, busy
}

func (w *world) order(order Event, ms []int, me *modelOrder, b block) string {
	for {
		err, moving, joined, busy := w.look(order, ms)
		if err != "" {
			return err
		}
		if wait := slices.Concat(joined, busy); len(wait) > 0 {
			left := func(i int) bool {
				return !slices.ContainsFunc(joined, func(op *modelOp) bool { return slices.Contains(op.ms, i) })
			}
			goesOn := slices.ContainsFunc(ms, left)
			if goesOn {
				w.queue++
			}
			for _, op := range joined {
				op.orders = append(op.orders, me)
			}
			me.joined = joined
			b(func() bool {
				if me.givenUp {
					wait = me.ends
				}
				return !slices.ContainsFunc(wait, func(op *modelOp) bool { return !op.done })
			})
			if goesOn {
				w.queue--
			}
			if me.givenUp {
				return "cancelled"
			}
			for _, op := range joined {
				if op.err != "ok" {
					return op.err
				}
			}
			ms = slices.DeleteFunc(slices.Clone(ms), func(i int) bool { return !left(i) })
			continue
		}
		if len(moving) == 0 {
			return "ok"
		}
		slices.Sort(moving) // keys are in this order
		op := &modelOp{ms: moving, orders: []*modelOrder{me}}
		for _, i := range moving {
			w.m[i].op = op
		}
		switch order {
		case OrderActivate:
			return w.finish(op, w.activate(op, b))
		case OrderInactivate:
			return w.finish(op, w.inactivate(op, b))
		}
		return w.finish(op, w.abandon(op, b))
	}
}

// giveUp ends what nobody wants any more, as long as that is possible.
func (w *world) giveUp(o *modelOrder) {
	o.givenUp = true
	for _, x := range w.m {
		if op := x.op; op != nil && !op.firm {
			op.cancelled = op.cancelled || !slices.ContainsFunc(op.orders, func(o *modelOrder) bool { return !o.givenUp })
			if op.cancelled && slices.Contains(o.joined, op) {
				o.ends = append(o.ends, op)
			}
		}
	}
}

func (w *world) step(op *modelOp, s Step) {
	for _, i := range op.ms {
		w.m[i].step = s
	}
}

func (w *world) activate(op *modelOp, b block) string {
	op.firm = true // as soon as the one or the last lock is taken
	for _, i := range op.ms {
		w.m[i].state = Activating
	}
	err, acquired := "", 0
	for _, method := range []string{"Acquire", "Load", "Claim"} {
		for _, i := range op.ms {
			if err == "" {
				err = w.call(i, method)
				if err == "" && method == "Acquire" {
					acquired++
				}
			}
		}
	}
	if err != "" {
		for n, i := range op.ms {
			if n < acquired {
				w.call(i, "Withdraw")
			}
			w.m[i].state = Inactive
		}
		return err
	}
	for _, i := range op.ms {
		w.call(i, "PublishActive")
		w.m[i].state, w.m[i].owned = Active, true
		w.m[i].epoch++
	}
	w.step(op, StepRetire)
	for _, i := range op.ms {
		w.synchronize(i, b)
		w.call(i, "Retire")
	}
	return "ok"
}

func (w *world) inactivate(op *modelOp, b block) string {
	for _, i := range op.ms {
		w.m[i].state = Inactivating
	}
	w.step(op, StepSyncAhead)
	err, bad, settled := "", -1, 0
	for _, i := range op.ms {
		if err == "" && !op.cancelled {
			bad = i
			err = w.call(i, "SyncAhead")
			b(func() bool { return op.cancelled || w.hold[i] == nil })
		}
	}
	if op.cancelled {
		// The fake prefers the interruption to the failure it was told.
		err = ""
	}
	for _, s := range []Step{StepCloseGate, StepDrain, StepSettle, StepRelease} {
		if err != "" {
			break
		}
		for _, i := range op.ms {
			if st := w.m[i].state; err == "" && st != Inactivating {
				bad, err = i, map[State]string{FailedIO: "sync", FailedFenced: "fence"}[st]
			}
		}
		if err == "" && s == StepCloseGate && op.cancelled {
			bad, err = -1, "cancelled"
		}
		if err != "" {
			break
		}
		op.firm = true
		w.step(op, s)
		for _, i := range op.ms {
			switch s {
			case StepDrain:
				w.drain(i, b)
			case StepSettle:
				if err == "" {
					if bad, err = i, w.call(i, "Settle"); err == "" {
						settled++
					}
				}
			}
		}
	}
	if err == "" {
		for _, i := range op.ms {
			w.call(i, "PublishInactive")
		}
		for _, i := range op.ms {
			w.synchronize(i, b)
			w.m[i].owned = false
			w.call(i, "Release")
		}
		for _, i := range op.ms {
			w.m[i].state = Inactive
			w.m[i].losses++
		}
		return "ok"
	}
	if ev, failed := faultOf[err]; failed {
		w.fault(bad, ev)
	}
	for n, i := range op.ms {
		if n < settled && w.m[i].state == Inactivating {
			switch w.call(i, "Unsettle") {
			case "":
			case "fence":
				w.fault(i, Fenced)
			default:
				w.fault(i, SyncFailed)
			}
		}
		if w.m[i].state == Inactivating {
			w.m[i].state = Active
		}
	}
	for _, i := range op.ms {
		if w.m[i].state == FailedFenced {
			w.letGo(i, b)
		}
	}
	return err
}

func (w *world) abandon(op *modelOp, b block) string {
	w.step(op, StepAbandon)
	err := "ok"
	for _, i := range op.ms {
		if w.letGo(i, b) {
			err = "failed"
		}
		w.m[i].state = Inactive
		w.m[i].losses++
	}
	return err
}

func (x *modelMachine) gate() string {
	closed := slices.Contains([]Step{StepCloseGate, StepDrain, StepSettle, StepRelease, StepAbandon}, x.step)
	switch {
	case x.refusing:
		return "RRR"
	case x.state == Inactive && x.hold:
		return "HRN"
	case x.state == Inactive:
		return "RRN"
	case x.state == Active, x.state == Inactivating && !closed:
		return "AAA"
	case x.state == Activating, x.state == Inactivating:
		return "WWW"
	case closed:
		return "RWR"
	}
	return "RAR"
}

// asks is what a write does, the first time or again.
func (w *world) asks(i int, write modelWrite) {
	x := w.m[i]
	want := x.gate()[:1]
	if write.losses != x.losses && want != "R" {
		want = "L"
	}
	v, since := w.r.lanes[i].EnterAgain(Mutate, write.since)
	if got := string("AWNRHLE"[v]); got != want {
		w.t.Fatalf("machine %d, %s: a write that came %d losses ago got %s, want %s", i, x.state, x.losses-write.losses, got, want)
	}
	switch v {
	case Admitted:
		w.r.lanes[i].Leave()
	case Wait, Hold:
		x.waiting = append(x.waiting, modelWrite{since, write.losses})
	}
}

// kind says in the model's words how an order ended.
func kind(err error) string {
	var oe *OrderError
	var te *testError
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, ErrStopping):
		return "stopping"
	case errors.As(err, &oe):
		return "refused"
	case errors.Is(err, context.Canceled):
		return "cancelled"
	case strings.Contains(err.Error(), "given up") || strings.Contains(err.Error(), "may be lost"):
		return "failed"
	case errors.As(err, &te):
		return map[*testError]string{errIO: "io", errSync: "sync", errFence: "fence"}[te]
	}
	return err.Error()
}

// compare lets everything come to rest and compares model and machines.
func (w *world) compare() {
	w.run()
	synctest.Wait()
	for _, tk := range w.tasks {
		got := ""
		select {
		case err := <-tk.real:
			got = kind(err)
			if strings.HasPrefix(tk.what, "stop") && err != nil {
				got = "failed"
			}
		default:
		}
		if got != tk.result {
			w.t.Fatalf("%s: ended as %q, want %q", tk.what, got, tk.result)
		}
	}
	w.tasks = slices.DeleteFunc(w.tasks, func(tk *task) bool { return tk.result != "" })

	calls := make(map[string][]string)
	for _, c := range strings.Fields(w.r.trace.take()) {
		name, _, _ := strings.Cut(c, ".")
		calls[name] = append(calls[name], c)
	}
	for i, x := range w.m {
		st := w.r.ms[i].Status()
		got := fmt.Sprint(st.State, st.Step, st.Epoch, ask(w.r.lanes[i]), calls[st.Image])
		gate := x.gate()
		if x.dropped && strings.ContainsRune("AN", rune(gate[2])) {
			gate, x.dropped = gate[:2]+"D", false // told once
		}
		want := fmt.Sprint(x.state, x.step, x.epoch, gate, x.calls)
		if got != want {
			w.t.Fatalf("machine %s:\n got %s\nwant %s", st.Image, got, want)
		}
		if (st.Cause != nil) != (x.state == FailedIO || x.state == FailedFenced) {
			w.t.Fatalf("machine %s is %s with cause %v", st.Image, st.State, st.Cause)
		}
		if holds := w.r.imgs[i].disk.owner.Load() != nil; holds != x.owned {
			w.t.Fatalf("machine %s is %s and holds its lock: %v", st.Image, st.State, holds)
		}
		x.calls = nil
	}
}

func (w *world) release(i int) {
	if w.hold[i] != nil {
		close(w.hold[i])
		w.hold[i] = nil
	}
}

// end lets everything go, one after the other, so that all tasks end.
func (w *world) end() {
	rest := func() {
		w.run()
		synctest.Wait()
	}
	rest()
	for i, x := range w.m {
		w.release(i)
		rest()
		for x.others > 0 {
			x.others--
			w.r.lanes[i].Leave()
			rest()
		}
		for len(x.reads) > 0 {
			g := x.reads[0].generation
			x.reads = x.reads[1:]
			w.r.lanes[i].LeaveRead(g)
			rest()
		}
	}
}

func TestModel(t *testing.T) {
	golden := make(map[string]string)
	for _, p := range goldenPairs(t) {
		golden[p.state+"/"+p.event] = p.outcome
	}
	synctest.Test(t, func(t *testing.T) {
		// A bubble has no deadline to ask for.
		rapid.Check(struct{ testing.TB }{t}, func(rt *rapid.T) {
			var hold time.Duration
			if rapid.Bool().Draw(rt, "writes are held") {
				hold = time.Hour
			}
			r := newRig(nil, Options{Watch: 1 << 60, Hold: hold}, "a", "b", "c")
			w := &world{t: rt, golden: golden, r: r, hold: make([]chan struct{}, 3)}
			for i, f := range r.imgs {
				w.m = append(w.m, &modelMachine{fail: make(map[string][]string), hold: hold > 0})
				f.onSync = func(ctx context.Context) error {
					if h := w.hold[i]; h != nil {
						select {
						case <-h:
						case <-ctx.Done():
						}
					}
					return ctx.Err()
				}
			}
			defer func() {
				w.end()
				_ = Stop(r.ms...)
				for _, tk := range w.tasks {
					tk.stop()
				}
			}()
			one := rapid.IntRange(0, 2)
			some := rapid.SliceOfN(one, 1, 4)
			machines := func(is []int) (ms []*Machine, distinct []int) {
				for _, i := range is {
					ms = append(ms, r.ms[i])
					if !slices.Contains(distinct, i) {
						distinct = append(distinct, i)
					}
				}
				return ms, distinct
			}
			order := func(ev Event, f func(context.Context, ...*Machine) error) func(*rapid.T) {
				return func(rt *rapid.T) {
					w.t = rt
					is := some.Draw(rt, "machines")
					ms, ds := machines(is)
					if err, _, joined, busy := w.look(ev, ds); err == "" && len(joined)+len(busy) > 0 && w.queue > 0 {
						rt.Skip()
					}
					ctx, cancel := context.WithCancel(context.Background())
					me := &modelOrder{}
					tk := w.start(fmt.Sprint(ev, is), func(b block) string { return w.order(ev, ds, me, b) },
						func() error { defer cancel(); return f(ctx, ms...) })
					tk.order, tk.giveUp = me, cancel
				}
			}
			rt.Repeat(map[string]func(*rapid.T){
				"": func(rt *rapid.T) { w.t = rt; w.compare() },
				"activate": order(OrderActivate, func(ctx context.Context, ms ...*Machine) error {
					return Activate(ctx, ActivateOptions{}, ms...)
				}),
				"inactivate": order(OrderInactivate, Inactivate),
				"abandon":    order(OrderAbandon, Abandon),
				"fail": func(rt *rapid.T) {
					i := one.Draw(rt, "machine")
					method := rapid.SampledFrom([]string{
						"Acquire", "Load", "Claim", "SyncAhead", "Settle", "Settle", "Unsettle", "Release", "Abandon", "Close",
					}).Draw(rt, "method")
					how := rapid.SampledFrom([]*testError{errIO, errSync, errFence}).Draw(rt, "how")
					r.imgs[i].failNext(method, how)
					w.m[i].fail[method] = append(w.m[i].fail[method], kind(how))
				},
				"hold": func(rt *rapid.T) {
					i := one.Draw(rt, "machine")
					if w.hold[i] == nil {
						w.hold[i] = make(chan struct{})
					} else {
						w.release(i)
					}
				},
				"cancel": func(rt *rapid.T) {
					i := one.Draw(rt, "machine")
					x := w.m[i]
					want := x.state == Inactivating && x.step == StepSyncAhead
					if want {
						x.op.cancelled = true
					}
					if got := r.ms[i].Cancel(); got != want {
						rt.Fatalf("Cancel: %v, want %v", got, want)
					}
				},
				"give up": func(rt *rapid.T) {
					var orders []*task
					for _, tk := range w.tasks {
						if tk.order != nil && !tk.order.givenUp {
							orders = append(orders, tk)
						}
					}
					if len(orders) == 0 {
						rt.Skip()
					}
					tk := orders[rapid.IntRange(0, len(orders)-1).Draw(rt, "which")]
					w.giveUp(tk.order)
					tk.giveUp()
				},
				"enter": func(rt *rapid.T) {
					i, c := one.Draw(rt, "machine"), Class(rapid.IntRange(0, int(numClasses)-1).Draw(rt, "class"))
					if v := r.lanes[i].Enter(c); v == Admitted {
						w.m[i].others++
					}
				},
				"write": func(rt *rapid.T) {
					w.t = rt
					for i, x := range w.m { // to wait, or rarely anything comes of it
						if x.gate()[0] != 'A' {
							w.asks(i, modelWrite{losses: x.losses})
						}
					}
				},
				"ask again": func(rt *rapid.T) {
					w.t = rt
					i := one.Draw(rt, "machine")
					waiting := w.m[i].waiting
					w.m[i].waiting = nil
					for _, write := range waiting {
						w.asks(i, write)
					}
				},
				"leave": func(rt *rapid.T) {
					i := one.Draw(rt, "machine")
					if w.m[i].others == 0 {
						rt.Skip()
					}
					w.m[i].others--
					r.lanes[i].Leave()
				},
				"enter read": func(rt *rapid.T) {
					i := one.Draw(rt, "machine")
					g := r.lanes[i].EnterRead()
					if r.lanes[i].Stopping() != w.m[i].refusing {
						rt.Fatal("reads are refused wrongly")
					}
					if w.m[i].refusing {
						r.lanes[i].LeaveRead(g)
						return
					}
					w.m[i].reads = append(w.m[i].reads, &modelRead{generation: g})
				},
				"leave read": func(rt *rapid.T) {
					i := one.Draw(rt, "machine")
					x := w.m[i]
					if len(x.reads) == 0 {
						rt.Skip()
					}
					n := rapid.IntRange(0, len(x.reads)-1).Draw(rt, "which")
					g := x.reads[n].generation
					x.reads = slices.Delete(x.reads, n, n+1)
					r.lanes[i].LeaveRead(g)
				},
				"fault": func(rt *rapid.T) {
					i := one.Draw(rt, "machine")
					w.fault(i, SyncFailed)
					r.lanes[i].Fault(errSync)
				},
				"fence": func(rt *rapid.T) {
					w.t = rt
					i := one.Draw(rt, "machine")
					if w.queue > 0 {
						rt.Skip()
					}
					w.start(fmt.Sprint("fence ", i), func(b block) string { return w.fence(i, b) },
						func() error { r.ms[i].Fence(errFence); return nil })
				},
				"stop": func(rt *rapid.T) {
					w.t = rt
					is := some.Draw(rt, "machines")
					// Rarely, or there is little left to do.
					if rapid.IntRange(0, 5).Draw(rt, "rarely") > 0 || w.queue > 0 {
						rt.Skip()
					}
					ms, _ := machines(is)
					if rapid.Bool().Draw(rt, "only refuse") {
						w.start(fmt.Sprint("refuse ", is), func(b block) string { return w.stop(is, true, b) },
							func() error { Refuse(ms...); return nil })
						return
					}
					w.start(fmt.Sprint("stop ", is), func(b block) string { return w.stop(is, false, b) },
						func() error { return Stop(ms...) })
				},
			})
			w.end()
			w.compare()
		})
	})
}
