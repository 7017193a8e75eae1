package state

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Options of a Machine.
type Options struct {
	// ReadOnly is for an image this process never writes: while it is active
	// write-class requests are refused with ErrReadOnly.
	ReadOnly bool
	// Observe is called once for each completed transition, without locks,
	// by the goroutine that made it. It may be nil. Neither it nor Step may
	// give orders.
	Observe func(Transition)
	// Step is called at the start of each named step of a transition, without
	// locks. Tests stop, kill and fail there. It may be nil.
	Step func(image string, step Step)
	// SlowDrain is called when a drain takes longer than Patience, with the
	// oldest request admitted. It may be nil.
	SlowDrain func(image string, oldest string, age time.Duration)
	// Patience is 5 s when zero.
	Patience time.Duration
	// Watch is how often an active image is checked (Watcher); 1 s when zero.
	Watch time.Duration
}

// Step names a step of a transition, in status, logs and tests.
type Step string

// The steps of inactivation, in their order.
const (
	StepSyncAhead Step = "sync-ahead"
	StepCloseGate Step = "close-gate"
	StepDrain     Step = "drain"
	StepSettle    Step = "settle"
	StepRelease   Step = "release"
)

// The steps of activation, in their order.
const (
	StepLock    Step = "lock"
	StepLoad    Step = "load"
	StepClaim   Step = "claim"
	StepPublish Step = "publish"
	StepRetire  Step = "retire"
)

// StepAbandon is the step of giving up a failed image.
const StepAbandon Step = "abandon"

// StepStop is the step of letting go at the end of the process.
const StepStop Step = "stop"

// gateClosed reports whether no request but reads is admitted at step s of
// letting an image go. Of a failed image that includes queries: a transition
// that drained counts on them too.
func (s Step) gateClosed() bool {
	switch s {
	case StepCloseGate, StepDrain, StepSettle, StepRelease, StepAbandon, StepStop:
		return true
	}
	return false
}

// Transition reports a completed change of state.
type Transition struct {
	Image    string
	Event    Event
	From, To State
	Epoch    uint64
	Duration time.Duration
	Err      error // why it failed, nil otherwise
}

// Status is a snapshot of a Machine.
type Status struct {
	Image string
	State State
	Epoch uint64    // of the last activation (Image.Claim), 0 before the first
	Since time.Time // when State was reached
	// Step and StepSince are set while a transition is under way.
	Step      Step
	StepSince time.Time
	Cause     error // why the image failed
	LastError error // what went wrong in the last transition, nil if nothing did
}

// Machine is one image's ownership. Its methods may be called concurrently.
//
// Lock order: several, mu of any number of machines, the gate's mu. No I/O and
// no callback runs under any of them.
type Machine struct {
	img  Image
	name string
	gate *Gate
	opt  Options

	// owned: the image is acquired and not released. Used only by the
	// operation under way.
	owned bool
	// claimed is the epoch of the activation under way, from StepClaim on.
	claimed uint64

	mu struct {
		sync.Mutex
		state     State
		epoch     uint64
		since     time.Time
		step      Step
		stepSince time.Time
		cause     error
		lastErr   error
		// op is the transition under way. It outlives the state change that
		// publishes an activation until the old view is retired.
		op *operation
		// late is a fault that came when everything was durable and the image
		// was already on its way out.
		late error
		// stopping refuses orders.
		stopping bool
		// stopWatch ends the watch over an owned image when closed.
		stopWatch chan struct{}
	}
}

// several is held while one goroutine locks more than one machine, so that no
// order among them is needed.
var several sync.Mutex

// operation is a transition of a group of machines.
type operation struct {
	machines []*Machine // that move, in the order of Image.Key
	done     chan struct{}
	err      error // valid when done is closed
	// ctx ends, while an inactivation syncs ahead, with its caller's context,
	// by Cancel, or when one of its images fails.
	ctx    context.Context
	cancel context.CancelCauseFunc
	began  time.Time
}

func newOperation(ctx context.Context) *operation {
	op := &operation{done: make(chan struct{}), began: time.Now()}
	op.ctx, op.cancel = context.WithCancelCause(ctx)
	return op
}

// NewMachine guards img, which is open and inactive.
func NewMachine(img Image, opt Options) *Machine {
	if opt.Patience == 0 {
		opt.Patience = 5 * time.Second
	}
	if opt.Watch == 0 {
		opt.Watch = time.Second
	}
	m := &Machine{img: img, name: img.Name(), gate: newGate(), opt: opt}
	m.mu.since = time.Now()
	return m
}

// Lane joins a connection to the image's gate. reopen is called, without
// locks, after each change that may let parked requests go on; it must not
// block. oldest describes the oldest request the connection has admitted, for
// the log of a slow drain; what is "" if there is none. Either may be nil. The
// lane is closed by its user.
func (m *Machine) Lane(reopen func(), oldest func() (what string, since time.Time)) *Lane {
	return m.gate.join(m, reopen, oldest)
}

// Status never waits for a transition.
func (m *Machine) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Status{
		Image: m.name, State: m.mu.state, Epoch: m.mu.epoch, Since: m.mu.since,
		Step: m.mu.step, StepSince: m.mu.stepSince, Cause: m.mu.cause, LastError: m.mu.lastErr,
	}
}

// Cancel ends an inactivation that has not closed the gate yet; the image
// stays active. It reports whether there was one to cancel.
func (m *Machine) Cancel() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.state != Inactivating || m.mu.step != StepSyncAhead {
		return false
	}
	m.mu.op.cancel(context.Canceled)
	return true
}

// Fence is told that another process may own the image: from here on nothing
// is written and the locks go, since they did not protect. It waits for a
// transition under way, which ends at its next step. An image that is already
// released, or about to be, has nothing to fence.
func (m *Machine) Fence(cause error) {
	if m.fault(Fenced, cause) {
		m.letGoFenced()
	}
}

func (m *Machine) letGoFenced() {
	op := m.exclusive()
	if m.in(FailedFenced) { // not closed or abandoned while waiting
		op.step(StepAbandon)
		_ = m.letGo() // what is lost was lost when the other side took over
	}
	_ = op.finish(nil)
}

// exclusive waits for the transition under way and keeps others out until the
// operation it returns is finished.
func (m *Machine) exclusive() *operation {
	op := newOperation(context.Background())
	op.machines = []*Machine{m}
	for {
		m.mu.Lock()
		busy := m.mu.op
		if busy == nil {
			m.mu.op, op.began = op, time.Now()
		}
		m.mu.Unlock()
		if busy == nil {
			return op
		}
		<-busy.done
	}
}

// fault applies an event that no order caused. It reports whether the state
// changed.
func (m *Machine) fault(ev Event, cause error) bool {
	if cause == nil {
		cause = errors.New(ev.String())
	}
	m.mu.Lock()
	from := m.mu.state
	if from == Inactivating && m.mu.step == StepRelease {
		// All is durable and nothing is written any more; the locks may be
		// gone. The hand-over cannot be taken back, only reported.
		m.mu.late = joinErrors(m.mu.late, cause)
		m.mu.Unlock()
		return false
	}
	if table[from][ev].kind != moves {
		m.mu.Unlock()
		return false
	}
	if from == Inactivating {
		m.mu.op.cancel(cause) // nothing is synced ahead any more
	}
	t, wake := m.applyLocked(ev, cause)
	m.mu.Unlock()
	wakeAll(wake)
	m.observe(t)
	return true
}

// applyLocked is the only place where a state changes.
func (m *Machine) applyLocked(ev Event, err error) (t Transition, wake []func()) {
	from := m.mu.state
	c := table[from][ev]
	if c.kind != moves {
		panic("state: " + ev.String() + " cannot happen while " + from.String())
	}
	m.mu.state, m.mu.since = c.next, time.Now()
	switch ev {
	case Published:
		m.mu.epoch = m.claimed
		m.mu.lastErr = nil
	case Released:
		err = joinErrors(err, m.mu.late)
		m.mu.late = nil
		m.mu.lastErr = err
	case ActivateFailed, InactivateFailed, SyncFailed, Fenced, OrderAbandon, OrderStop:
		m.mu.lastErr = err
	}
	switch c.next {
	case FailedIO, FailedFenced:
		m.mu.cause = err
	case Inactive, Closed:
		m.mu.cause = nil
	}
	t = Transition{Image: m.name, Event: ev, From: from, To: c.next, Epoch: m.mu.epoch, Err: err}
	if op := m.mu.op; op != nil {
		t.Duration = time.Since(op.began)
	}
	return t, m.setGateLocked()
}

// setGateLocked makes the gate follow state and step; nothing else but
// stopping moves it.
func (m *Machine) setGateLocked() (wake []func()) {
	md, refusal := modeHeld, error(nil)
	switch m.mu.state {
	case Inactive:
		md, refusal = modeInactive, ErrInactive
	case Active, Inactivating:
		switch {
		case m.mu.state == Inactivating && m.mu.step.gateClosed():
		case m.opt.ReadOnly:
			md, refusal = modeReadOnly, ErrReadOnly
		default:
			md = modeOpen
		}
	case FailedIO, FailedFenced:
		md, refusal = modeFailed, &FailedError{State: m.mu.state, Image: m.name, Cause: m.mu.cause}
		if m.mu.step.gateClosed() {
			md = modeLeaving
		}
	case Closed:
		md, refusal = modeStopping, ErrStopping
	}
	return m.gate.set(md, refusal)
}

func wakeAll(wake []func()) {
	for _, f := range wake {
		f()
	}
}

// apply is applyLocked for a transition's own goroutine. Unless the event is
// possible it does nothing: a fault came first.
func (m *Machine) apply(ev Event, err error) {
	m.mu.Lock()
	if table[m.mu.state][ev].kind != moves {
		m.mu.Unlock()
		return
	}
	t, wake := m.applyLocked(ev, err)
	m.mu.Unlock()
	wakeAll(wake)
	m.observe(t)
}

func (m *Machine) observe(t Transition) {
	if m.opt.Observe != nil {
		m.opt.Observe(t)
	}
}

func (m *Machine) setStepLocked(s Step) (wake []func()) {
	m.mu.step, m.mu.stepSince = s, time.Now()
	return m.setGateLocked()
}

// in reports whether the state is s.
func (m *Machine) in(s State) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.state == s
}

func (m *Machine) slow(oldest string, age time.Duration) {
	if m.opt.SlowDrain != nil {
		m.opt.SlowDrain(m.name, oldest, age)
	}
}

func (m *Machine) drain()       { m.gate.drain(m.opt.Patience, m.slow) }
func (m *Machine) synchronize() { m.gate.synchronize(m.opt.Patience, m.slow) }

// begin starts the transition that order asks of ms, all or none, with the step
// first. It returns no operation and no error if there is nothing to do, after
// waiting for the same transition where one is under way.
func begin(ctx context.Context, order Event, first Step, ms []*Machine) (*operation, error) {
	ms = distinct(ms)
	for len(ms) > 0 {
		op := newOperation(ctx)
		started, joined, busy, err := op.tryBegin(order, first, ms)
		if started {
			// Only now: no other operation calls the images' methods.
			slices.SortFunc(op.machines, byKey)
			op.hooks(first)
			return op, nil
		}
		op.cancel(nil)
		if err != nil {
			return nil, err
		}
		if len(joined)+len(busy) == 0 {
			return nil, nil
		}
		for _, o := range slices.Concat(joined, busy) {
			select {
			case <-o.done:
			case <-ctx.Done():
				return nil, fmt.Errorf("cannot %s: gave up waiting for the transition under way: %w", order, context.Cause(ctx))
			}
		}
		for _, o := range joined {
			if o.err != nil {
				return nil, o.err
			}
			// These have got what they were asked for, even if another order
			// has moved them on since.
			ms = slices.DeleteFunc(ms, func(m *Machine) bool { return slices.Contains(o.machines, m) })
		}
	}
	return nil, nil
}

// tryBegin looks at all machines at once and either starts op on those that
// have to move, or says why not: operations to join, others to wait for, or
// an order that is refused.
func (op *operation) tryBegin(order Event, first Step, ms []*Machine) (started bool, joined, busy []*operation, err error) {
	lockAll(ms)
	for _, m := range ms {
		c := table[m.mu.state][order]
		other := m.mu.op
		switch {
		case m.mu.stopping || m.mu.state == Closed:
			err = &OrderError{Image: m.name, Order: order, State: m.mu.state, Cause: ErrStopping}
		case c.kind == refused:
			err = &OrderError{Image: m.name, Order: order, State: m.mu.state, Step: m.mu.step, Cause: m.mu.cause}
		case c.kind == joins:
			if !slices.Contains(joined, other) {
				joined = append(joined, other)
			}
		case c.kind == moves && other != nil:
			// An activation that is published but has not retired its old
			// view yet, or a failed image's end.
			if !slices.Contains(busy, other) {
				busy = append(busy, other)
			}
		case c.kind == moves:
			op.machines = append(op.machines, m)
		}
		if err != nil {
			break
		}
	}
	if err != nil || len(joined)+len(busy)+len(op.machines) == 0 || len(joined)+len(busy) != 0 {
		unlockAll(ms)
		return false, joined, busy, err
	}
	var wake []func()
	for _, m := range op.machines {
		m.mu.op = op
		m.mu.step, m.mu.stepSince = first, op.began
		if order != OrderAbandon {
			_, w := m.applyLocked(order, nil)
			wake = append(wake, w...)
		}
		wake = append(wake, m.setGateLocked()...)
	}
	unlockAll(ms)
	wakeAll(wake)
	return true, nil, nil, nil
}

func distinct(ms []*Machine) []*Machine {
	seen := make(map[*Machine]bool, len(ms))
	var out []*Machine
	for _, m := range ms {
		if !seen[m] {
			seen[m] = true
			out = append(out, m)
		}
	}
	return out
}

func lockAll(ms []*Machine) {
	several.Lock()
	defer several.Unlock()
	for _, m := range ms {
		m.mu.Lock()
	}
}

func unlockAll(ms []*Machine) {
	for _, m := range ms {
		m.mu.Unlock()
	}
}

func byKey(a, b *Machine) int {
	ad, ai := a.img.Key()
	bd, bi := b.img.Key()
	return cmp.Or(cmp.Compare(ad, bd), cmp.Compare(ai, bi))
}

// finish ends op and returns its error.
func (op *operation) finish(err error) error {
	op.cancel(nil)
	op.err = err
	for _, m := range op.machines {
		m.mu.Lock()
		m.mu.op, m.mu.step, m.mu.stepSince = nil, "", time.Time{}
		wake := m.setGateLocked()
		m.mu.Unlock()
		wakeAll(wake)
	}
	close(op.done)
	return err
}

// step takes every machine of the group to s.
func (op *operation) step(s Step) {
	var wake []func()
	lockAll(op.machines)
	for _, m := range op.machines {
		wake = append(wake, m.setStepLocked(s)...)
	}
	unlockAll(op.machines)
	wakeAll(wake)
	op.hooks(s)
}

// hooks calls Options.Step.
func (op *operation) hooks(s Step) {
	for _, m := range op.machines {
		if m.opt.Step != nil {
			m.opt.Step(m.name, s)
		}
	}
}

// each runs f on every machine in order until one fails.
func (op *operation) each(f func(*Machine) error) (*Machine, error) {
	for _, m := range op.machines {
		if err := f(m); err != nil {
			return m, err
		}
	}
	return nil, nil
}

// joinErrors makes one line of two errors.
func joinErrors(a, b error) error {
	if a == nil {
		return b
	}
	if b == nil {
		return a
	}
	return fmt.Errorf("%w; %w", a, b)
}
