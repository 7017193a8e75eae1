package ioloop

import (
	"sync/atomic"
	"time"
)

// leastMove is how many bytes a client has to move, unless it owes less, to
// count as moving: one that sends or takes a byte now and then holds memory for
// as long as one that does nothing.
const leastMove = 32 << 10

// stall is the clock of one direction of a connection. Its methods but restart are
// called by one goroutine at a time.
type stall struct {
	// since is when, in Unix nanoseconds, the client being waited for last
	// moved enough, or began to owe something; 0 while it is not waited for.
	since atomic.Int64
	begun atomic.Int64 // since, kept while the client is not waited for; 0 for none
	moved int          // bytes since then
}

// wait precedes waiting for the client.
func (s *stall) wait() {
	if s.begun.Load() == 0 {
		s.begun.Store(time.Now().UnixNano())
	}
	s.since.Store(s.begun.Load())
}

// move follows it: the client has moved n bytes.
func (s *stall) move(n int) {
	s.since.Store(0)
	if s.moved += n; s.moved >= leastMove {
		s.settled()
	}
}

// settled: what the client owed it has moved.
func (s *stall) settled() {
	s.begun.Store(0)
	s.moved = 0
}

// restart: who waits for the client has not heard of it, but it has moved enough after
// since. It reports false if it is not waited for since then any more.
func (s *stall) restart(since int64) bool {
	now := time.Now().UnixNano()
	s.begun.CompareAndSwap(since, now)
	return s.since.CompareAndSwap(since, now)
}
