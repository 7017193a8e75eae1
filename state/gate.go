package state

import (
	"sync"
	"sync/atomic"
	"time"
)

// Class groups requests that the gate treats alike.
type Class uint8

const (
	// Mutate: WRITE, WRITE_ZEROES, TRIM.
	Mutate Class = iota
	// Query: CACHE, BLOCK_STATUS.
	Query
	// Flush: FLUSH.
	Flush

	numClasses
)

// Verdict is the gate's answer to a request that is not a READ. (A READ is
// refused only while stopping.)
type Verdict uint8

const (
	// Admitted: run it, then Leave.
	Admitted Verdict = iota
	// Wait: a transition is under way; park it and ask again when the lane's
	// reopen is called, which may be before Enter has returned.
	Wait
	// Nothing: succeed without doing anything (FLUSH with nothing dirty).
	Nothing
	// Refused: answer with the error of Lane.Refusal.
	Refused
	// Hold: the image is inactive and its writes are kept for a while
	// (Options.Hold). Park it as after Wait, until that time is over.
	Hold
	// Lost: the request came before this process lost the image, so it must
	// not run on what others may have written since: answer with ErrLost.
	Lost
	// Late: to be held, but of a connection that wrote during an earlier
	// ownership (Options.RefuseLate): answer with ErrLate.
	Late
	// Dropped: a FLUSH of what may be lost, since the image was given up without
	// it: answer with ErrDropped. Each connection is told once.
	Dropped
)

// mode is what the gate does at present; the machine sets it.
type mode uint32

const (
	modeInactive mode = iota
	modeHolding       // inactive, and writes are kept for a while
	modeOpen          // active, and inactivating while syncing ahead
	modeReadOnly      // the same for a read-only export
	modeHeld          // activating, and inactivating once the gate is closed
	modeFailed
	modeLeaving // failed, and a transition that closed the gate under way
	modeStopping

	numModes
)

var verdicts = [numModes][numClasses]Verdict{
	modeInactive: {Mutate: Refused, Query: Refused, Flush: Nothing},
	modeHolding:  {Mutate: Hold, Query: Refused, Flush: Nothing},
	modeOpen:     {Mutate: Admitted, Query: Admitted, Flush: Admitted},
	modeReadOnly: {Mutate: Refused, Query: Admitted, Flush: Nothing},
	modeHeld:     {Mutate: Wait, Query: Wait, Flush: Wait},
	modeFailed:   {Mutate: Refused, Query: Admitted, Flush: Refused},
	modeLeaving:  {Mutate: Refused, Query: Wait, Flush: Refused},
	modeStopping: {Mutate: Refused, Query: Refused, Flush: Refused},
}

// gate admits the requests of one image.
//
// The fast path writes no cache line that another connection writes: each
// connection counts its own admissions in a Lane, and only a transition sums
// them. It works as Dekker's algorithm does: a request announces itself in
// its lane, then looks at the mode; a transition changes the mode, then looks
// at the lanes. Go's atomics are sequentially consistent, so at least one of
// the two sees the other.
//
// Reads are admitted in every state, so their drain is by generation instead:
// a lane counts them under the parity of the view they started with, and
// Synchronize flips the parity and waits for the old one, as sleepable RCU
// does.
//
// A write that has to wait is judged by what has happened since it came: the
// word that holds the mode also counts how often this process has lost the
// image, so one load gives both.
//
// A pair of Enter and Leave, or of EnterRead and LeaveRead, takes 4.3 ns on one
// core of an AMD EPYC, as much on each of two, and allocates nothing
// (BenchmarkEnterLeave, BenchmarkEnterLeaveRead, best of 20).
type gate struct {
	// word is the mode, and in units of oneLoss how often ownership was lost;
	// written by transitions only.
	word   atomic.Uint64
	parity atomic.Uint32 // 0 or 1: the generation new reads are counted in
	// watchers counts transitions that wait for lanes to empty. It is read
	// after every leave, written only by transitions.
	watchers atomic.Int32
	kick     chan struct{} // wakes the watcher; capacity 1
	_        [64]byte      // what follows is written now and then

	// mu guards lanes and refusal, and is a leaf: nothing is locked under it.
	mu struct {
		sync.Mutex
		lanes   map[*Lane]struct{}
		refusal error
	}
}

// oneLoss separates the mode from the count in gate.word.
const oneLoss = 1 << 8

func modeOf(word uint64) mode { return mode(word % oneLoss) }

// Lane is one connection's count of admissions. Its counters stand on cache
// lines of their own.
type Lane struct {
	_       [64]byte
	reads   [2]atomic.Int64
	others  atomic.Int64
	wrote   atomic.Uint64 // Arrival of the last write admitted, 0 for none
	_       [64]byte
	dropped atomic.Bool // its next FLUSH is Dropped
	gate    *gate
	reopen  func()
	oldest  func() (what string, since time.Time)
	machine *Machine
}

func newGate() *gate {
	g := &gate{kick: make(chan struct{}, 1)}
	g.mu.lanes = make(map[*Lane]struct{})
	return g
}

// join adds a lane; see Machine.Lane.
func (g *gate) join(m *Machine, reopen func(), oldest func() (string, time.Time)) *Lane {
	l := &Lane{gate: g, machine: m, reopen: reopen, oldest: oldest}
	g.mu.Lock()
	g.mu.lanes[l] = struct{}{}
	g.mu.Unlock()
	return l
}

// Close takes the lane out of its gate. Nothing may be admitted through it: a
// transition would no longer wait for that, so Close panics. reopen may still
// be called once while Close returns.
func (l *Lane) Close() {
	if l.others.Load() != 0 || l.reads[0].Load() != 0 || l.reads[1].Load() != 0 {
		panic("state: a lane is closed with requests admitted")
	}
	g := l.gate
	g.mu.Lock()
	delete(g.mu.lanes, l)
	g.mu.Unlock()
}

// EnterRead admits a read and pins the current view until LeaveRead is called
// with the value returned. It never waits and never refuses; whether reads are
// refused is asked afterwards, of Stopping.
func (l *Lane) EnterRead() (generation uint32) {
	for {
		p := l.gate.parity.Load()
		l.reads[p].Add(1)
		if l.gate.parity.Load() == p {
			return p
		}
		// A view was published in between; counted in the old generation this
		// read could keep a second Synchronize waiting for ever, or be missed.
		l.leave(&l.reads[p])
	}
}

// LeaveRead ends what EnterRead began.
func (l *Lane) LeaveRead(generation uint32) { l.leave(&l.reads[generation]) }

// Enter asks for a request of class c. Only after Admitted must Leave follow,
// when the request's storage I/O has ended (not when its reply is sent, or a
// client that does not read could hold up a transition).
func (l *Lane) Enter(c Class) Verdict {
	v, _ := l.EnterAgain(c, 0)
	return v
}

// Arrival tells when a request first asked, in losses of ownership; 0 means
// that it has not asked yet.
type Arrival uint64

// EnterAgain is Enter for a request that may have asked before, and was then
// given the arrival that it now brings along.
func (l *Lane) EnterAgain(c Class, since Arrival) (Verdict, Arrival) {
	l.others.Add(1)
	word := l.gate.word.Load()
	v, now := verdicts[modeOf(word)][c], Arrival(word/oneLoss+1)
	if c == Flush && (v == Admitted || v == Nothing) && l.dropped.Load() && l.dropped.CompareAndSwap(true, false) {
		l.leave(&l.others)
		return Dropped, now
	}
	if v == Admitted && since == 0 && (c != Mutate || Arrival(l.wrote.Load()) == now) {
		return v, now
	}
	if since == 0 {
		since = now
	}
	if c == Mutate {
		v = l.judge(v, since, now)
	}
	if v != Admitted {
		l.leave(&l.others)
	}
	return v, since
}

// judge is the verdict on a write that came at since, given the gate's own.
func (l *Lane) judge(v Verdict, since, now Arrival) Verdict {
	switch v {
	case Admitted, Wait, Hold:
	default:
		return v
	}
	if since != now {
		return Lost
	}
	wrote := Arrival(l.wrote.Load())
	switch {
	case v == Admitted:
		l.wrote.Store(uint64(now))
	case v == Hold && l.machine.opt.RefuseLate && wrote != 0 && wrote != now:
		return Late
	}
	return v
}

// Leave ends what an admitted Enter began.
func (l *Lane) Leave() { l.leave(&l.others) }

func (l *Lane) leave(n *atomic.Int64) {
	n.Add(-1)
	if l.gate.watchers.Load() != 0 {
		select {
		case l.gate.kick <- struct{}{}:
		default:
		}
	}
}

// Stopping reports whether even reads are refused, with ErrStopping. For a
// read it must be asked after EnterRead and before the view is looked at (then
// LeaveRead follows at once): asked before, the image may be closed by the
// time the read is counted.
func (l *Lane) Stopping() bool { return modeOf(l.gate.word.Load()) == modeStopping }

// Refusal is the error of a Refused request: ErrInactive, ErrReadOnly,
// ErrStopping or a *FailedError.
func (l *Lane) Refusal() error {
	g := l.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mu.refusal == nil { // a transition began since
		return ErrInactive
	}
	return g.mu.refusal
}

// HoldFor is how long a request with the verdict Hold is kept.
func (l *Lane) HoldFor() time.Duration { return l.machine.opt.Hold }

// Want tells, by Options.Wanted, that a request is held.
func (l *Lane) Want() {
	if w := l.machine.opt.Wanted; w != nil {
		w()
	}
}

// Fault tells the machine that a sync of this image failed under a request.
// It is called before the request's Leave: until then no transition can take
// the image for clean.
func (l *Lane) Fault(err error) { l.machine.fault(SyncFailed, err) }

// set changes the mode and what Refused requests are told. The caller runs the
// functions it returns, which let parked requests look again, after giving up
// its own locks. Stopping is for good.
func (g *gate) set(m mode, refusal error) (reopen []func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	word := g.word.Load()
	old := modeOf(word)
	if old == modeStopping {
		return nil
	}
	g.mu.refusal = refusal
	if m == old {
		return nil
	}
	g.word.Store(word - uint64(old) + uint64(m))
	if m == modeHeld {
		return nil
	}
	for l := range g.mu.lanes {
		if l.reopen != nil {
			reopen = append(reopen, l.reopen)
		}
	}
	return reopen
}

// lose counts a loss of ownership. It comes before the mode in which others
// may own the image.
func (g *gate) lose() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.word.Add(oneLoss)
}

// drop has the next FLUSH of each connection told that it comes too late for what
// was written before. The mode lets none in.
func (g *gate) drop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for l := range g.mu.lanes {
		l.dropped.Store(true)
	}
}

// patience is how long a transition waits for requests before it says so.
const patience = 5 * time.Second

// drain waits until no request but reads is admitted; the mode admits none.
// slow is called once if that takes longer than patience.
func (g *gate) drain(slow func(oldest string, age time.Duration)) {
	g.await(func(l *Lane) bool { return l.others.Load() == 0 }, slow)
}

// synchronize waits until every read that may use the view published before
// is done. New reads are not held up.
func (g *gate) synchronize(slow func(oldest string, age time.Duration)) {
	old := g.parity.Load()
	g.parity.Store(1 - old)
	g.await(func(l *Lane) bool { return l.reads[old].Load() == 0 }, slow)
}

// await waits until all lanes are empty, looking again after each leave. There
// is one await at a time, of the machine's operation under way (two would take
// each other's kicks).
func (g *gate) await(empty func(*Lane) bool, slow func(oldest string, age time.Duration)) {
	g.watchers.Add(1)
	defer g.watchers.Add(-1)
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		if g.allLanes(empty) {
			return
		}
		select {
		case <-g.kick:
		case <-timer.C:
			slow(g.oldest())
		}
	}
}

func (g *gate) allLanes(empty func(*Lane) bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for l := range g.mu.lanes {
		if !empty(l) {
			return false
		}
	}
	return true
}

// oldest asks the lanes for their oldest admitted request.
func (g *gate) oldest() (what string, age time.Duration) {
	g.mu.Lock()
	lanes := make([]*Lane, 0, len(g.mu.lanes))
	for l := range g.mu.lanes {
		lanes = append(lanes, l)
	}
	g.mu.Unlock()
	what = "unknown request"
	for _, l := range lanes {
		if l.oldest == nil {
			continue
		}
		if w, t := l.oldest(); w != "" {
			if d := time.Since(t); d > age {
				what, age = w, d
			}
		}
	}
	return what, age
}
