package ioloop

import (
	"sync"
	"time"
)

// mostWorkers is how many operations of all connections may block at once.
const mostWorkers = 32

// workerIdle is how long a worker without work stays.
const workerIdle = 2 * time.Second

// scheduler runs tasks that may block on workers, which come and go with the
// load. Connections take turns, so that one with a thousand queued discards
// does not keep another's read waiting behind them, and none gets all workers,
// so that one whose reads hang in a bad disk does not stop the others.
type scheduler struct {
	run   func(*task)   // (*task).run, but for tests
	limit int           // most workers
	share int           // most of them for one connection
	stay  time.Duration // of a worker without work
	wake  chan struct{} // one token for each idle worker to wake

	mu      sync.Mutex // leaf
	first   *conn      // connections with queued tasks, in turn
	last    *conn
	workers int
	idle    int // that wait and have no token on its way
}

func newScheduler(workers int) *scheduler {
	return &scheduler{run: (*task).run, limit: workers, share: workers - workers/4, stay: workerIdle, wake: make(chan struct{}, workers)}
}

// turn is a connection's place in the scheduler; guarded by scheduler.mu.
type turn struct {
	next        *conn
	queued      bool
	running     int // tasks with a worker
	first, last *task
}

// submit queues t. It never blocks.
func (s *scheduler) submit(t *task) {
	c := t.conn
	s.mu.Lock()
	if c.turn.last == nil {
		c.turn.first = t
	} else {
		c.turn.last.next = t
	}
	c.turn.last = t
	if !s.enqueueLocked(c) {
		s.mu.Unlock()
		return // who runs a task of c will see to it
	}
	switch {
	case s.idle > 0:
		s.idle--
		s.wake <- struct{}{} // has room: a token for each worker at most
	case s.workers < s.limit:
		s.workers++
		go s.work()
	}
	s.mu.Unlock()
}

// enqueueLocked gives c a turn if it has none and has something to run. It
// reports false if c has all the workers it may have.
func (s *scheduler) enqueueLocked(c *conn) bool {
	if c.turn.running >= s.share {
		return false
	}
	if c.turn.queued || c.turn.first == nil {
		return true
	}
	c.turn.queued, c.turn.next = true, nil
	if s.last == nil {
		s.first = c
	} else {
		s.last.turn.next = c
	}
	s.last = c
	return true
}

// takeLocked is the next task of the connection whose turn it is.
func (s *scheduler) takeLocked() *task {
	c := s.first
	if c == nil {
		return nil
	}
	s.first = c.turn.next
	if s.first == nil {
		s.last = nil
	}
	c.turn.queued, c.turn.next = false, nil
	t := c.turn.first
	c.turn.first = t.next
	t.next = nil
	if c.turn.first == nil {
		c.turn.last = nil
	}
	c.turn.running++
	s.enqueueLocked(c)
	return t
}

func (s *scheduler) work() {
	timer := time.NewTimer(s.stay)
	defer timer.Stop()
	var ran *conn // whose task this worker ran last
	for {
		s.mu.Lock()
		if ran != nil {
			ran.turn.running--
			s.enqueueLocked(ran)
			ran = nil
		}
		t := s.takeLocked()
		if t == nil {
			s.idle++
			s.mu.Unlock()
			timer.Reset(s.stay)
			select {
			case <-s.wake:
				continue
			case <-timer.C:
			}
			s.mu.Lock()
			if s.idle == 0 { // a token for us is on its way
				s.mu.Unlock()
				<-s.wake
				continue
			}
			s.idle--
			s.workers--
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		ran = t.conn
		s.run(t)
	}
}
