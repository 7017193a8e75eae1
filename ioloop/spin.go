package ioloop

import (
	"runtime"
	"time"
)

// A connection that is the only busy one of the process asks its socket again
// for a while before it sleeps: waking up costs more than most requests. Between
// two looks it lets others have the core, most of all the client it waits for.
//
// Operations/s and server's processor time in microseconds, tmpfs, Unix socket
// (nbd-export bench, two cores), asleep, spinning without giving way, and so: 4k
// reads at depth 1 38k @17, 36k @25, 58k @14; 64k reads at depth 8 54k @13, 71k
// @14, 72k @13. With four busy connections spinning costs more than it brings.
const (
	spinLimit = 50 * time.Microsecond
	// spinWorth is how long a wait may have taken that was, or would have been,
	// worth spinning; waking up is part of one that was slept through.
	spinWorth = 2 * spinLimit
	// spinGap between two looks says that the core was needed by somebody else.
	spinGap = 20 * time.Microsecond

	// The budget: waits that are worth it earn it, others use it up.
	spinAt   = 8 // from here on there is spinning
	spinMost = 16
	spinMiss = 4
)

// crowdEvery is how often connections are counted.
const crowdEvery = 50 * time.Millisecond

// started is when clock begins.
var started = time.Now()

// clock is how long that is ago, or a little more, so that it is never 0.
func clock() time.Duration { return time.Since(started) + 1 }

// spinner decides for one connection. It belongs to the receiving goroutine.
type spinner struct {
	may    func() bool          // nil: never
	clock  func() time.Duration // moves forward only
	budget int
	since  time.Duration // when the present wait began; 0 for none
	last   time.Duration // look at the clock in it
	over   bool          // it is slept through
	// device: the last request has waited for one. To wake up is little beside that:
	// 4k O_DIRECT reads at depth 1 with spinning after them are 9.1k to 9.8k
	// operations/s at 53 us of processor time, and without 9.8k to 10.7k at 40.
	device bool
}

// again is called when there is nothing to receive, and says whether to look
// again at once.
func (s *spinner) again() bool {
	if s.may == nil {
		return false
	}
	now := s.clock()
	switch {
	case s.since == 0:
		s.since = now
		s.over = s.device || s.budget < spinAt || !s.may()
		s.device = false
	case s.over:
	case now-s.last > spinGap:
		s.over = true
		s.budget = max(s.budget-spinMiss, 0)
	case now-s.since > spinLimit:
		s.over = true
	}
	s.last = now
	if s.over {
		return false
	}
	yieldCore()
	return true
}

// got ends the wait, if there was one.
func (s *spinner) got() {
	if s.since == 0 {
		return
	}
	if s.clock()-s.since <= spinWorth {
		s.budget = min(s.budget+1, spinMost)
	} else {
		s.budget = max(s.budget-spinMiss, 0)
	}
	s.since = 0
}

// spins reports whether there is a core to spin on.
func spins() bool { return runtime.NumCPU() > 1 && runtime.GOMAXPROCS(0) > 1 }

// maySpin reports whether the connection has no other work under way and no
// other connection does anything.
func (c *conn) maySpin() bool { return c.tasks.Load() == 0 && c.e.alone() }

// alone reports whether at most one connection has received anything of late.
func (e *Engine) alone() bool { return e.crowd() <= 1 }

// crowd is how many connections have.
func (e *Engine) crowd() int {
	now := int64(clock())
	if next := e.nextCount.Load(); now >= next && e.nextCount.CompareAndSwap(next, now+int64(crowdEvery)) {
		busy := int32(0)
		e.mu.Lock()
		for c := range e.conns {
			if n := c.received.Load(); n != c.counted {
				c.counted = n
				busy++
			}
		}
		e.mu.Unlock()
		e.busy.Store(busy)
	}
	return int(e.busy.Load())
}
