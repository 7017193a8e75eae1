package state

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// Options of a Machine.
type Options struct {
	// ReadOnly is for an image this process never writes: while it is active
	// write-class requests are refused with ErrReadOnly.
	ReadOnly bool
	// Hold is how long writes that find the image inactive are kept for the
	// case that it becomes active; 0: they are refused at once. It is nothing
	// for a ReadOnly image.
	Hold time.Duration
	// Wanted is called, without locks, whenever a write begins to be held. It
	// must not block, nor give orders itself. It may be nil.
	Wanted func()
	// RefuseLate refuses a write, rather than hold it, on a connection that
	// has written during an earlier ownership of this process.
	RefuseLate bool
	// Observe is called once for each completed transition, without locks,
	// by the goroutine that made it. It may be nil. Neither it nor Step may
	// give orders.
	Observe func(Transition)
	// Step is called at the start of each named step of a transition, without
	// locks. Tests stop, kill and fail there. It may be nil.
	Step func(image string, step Step)
	// SlowDrain is called when a drain takes longer than 5 s, with the oldest
	// request admitted. It may be nil.
	SlowDrain func(image string, oldest string, age time.Duration)
	// Unwritten is called, without locks, when a stop could not write all that was
	// acknowledged. It returns true, after a pause, if that is to be tried once more,
	// as on a disk that is full. nil: it is not.
	Unwritten func(image string, err error) bool
	// Pacer is asked while the image is synced ahead; nil means that one sync
	// will do.
	Pacer Pacer
	// Watch is how often an owned image is checked (Image.Check); 1 s when zero.
	Watch time.Duration
	// Later runs what a transition leaves to be done and nobody is to wait for.
	// nil: the transition does it.
	Later func(func())
}

// Transition reports a completed change of state.
type Transition struct {
	Image    string
	Event    Event
	From, To State
	Epoch    uint64
	Duration time.Duration
	Steps    []StepTime // that it went through, in their order
	Err      error      // why it failed, nil otherwise
}

// StepTime is how long a step took, for the whole group.
type StepTime struct {
	Step Step
	Took time.Duration
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
	gate *gate
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
		past      []StepTime // before step, of the transition under way
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
		// pins refuse inactivation.
		pins int
		// watch is over an owned image.
		watch *watch
	}
}

// NewMachine guards img, which is open and inactive.
func NewMachine(img Image, opt Options) *Machine {
	if opt.Watch == 0 {
		opt.Watch = time.Second
	}
	m := &Machine{img: img, name: img.Name(), gate: newGate(), opt: opt}
	m.mu.since = time.Now()
	m.setGateLocked() // nobody else has it yet
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

// HoldFor is how long writes are held while the image is inactive, 0 if they
// are refused.
func (m *Machine) HoldFor() time.Duration { return m.opt.Hold }

// Status never waits for a transition.
func (m *Machine) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Status{
		Image: m.name, State: m.mu.state, Epoch: m.mu.epoch, Since: m.mu.since,
		Step: m.mu.step, StepSince: m.mu.stepSince, Cause: m.mu.cause, LastError: m.mu.lastErr,
	}
}

// Cancel ends an inactivation that has not closed the gate yet, whoever has ordered
// it; the image stays active. It reports whether there was one to cancel.
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
	if c.next == FailedFenced || (c.next == Inactive && from != Activating) {
		m.gate.lose()
	}
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
		if m.mu.step != "" {
			t.Steps = append(slices.Clone(m.mu.past), StepTime{m.mu.step, time.Since(m.mu.stepSince)})
		}
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
		if m.opt.Hold > 0 && !m.opt.ReadOnly {
			md = modeHolding
		}
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
	now := time.Now()
	if m.mu.step != "" {
		m.mu.past = append(m.mu.past, StepTime{m.mu.step, now.Sub(m.mu.stepSince)})
	}
	m.mu.step, m.mu.stepSince = s, now
	return m.setGateLocked()
}

// in reports whether the state is s.
func (m *Machine) in(s State) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.state == s
}

// Oldest describes the oldest request that is admitted and that its connection
// has not answered at once, as where storage hangs; "" if there is none.
func (m *Machine) Oldest() (what string, age time.Duration) {
	what, age = m.gate.oldest()
	if age == 0 {
		return "", 0
	}
	return what, age
}

func (m *Machine) slow(oldest string, age time.Duration) {
	if m.opt.SlowDrain != nil {
		m.opt.SlowDrain(m.name, oldest, age)
	}
}

func (m *Machine) drain()       { m.gate.drain(m.slow) }
func (m *Machine) synchronize() { m.gate.synchronize(m.slow) }
