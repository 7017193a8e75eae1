package ioloop

import (
	"errors"
	"time"

	"go.uber.org/zap"
)

// stallLimit is how long a client may take to move leastMove bytes, or all that it
// owes, while others wait for the memory it holds, before it is disconnected.
const stallLimit = 10 * time.Second

// acquire takes what c wants of the budget, waiting for it; false if c broke
// meanwhile. As long as anyone waits stalled clients are evicted.
func (e *Engine) acquire(w want, c *conn) (lease, bool) {
	e.mu.Lock()
	if e.waiting++; e.waiting == 1 {
		e.calm = make(chan struct{})
		go e.evictStalled(e.calm)
	}
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		if e.waiting--; e.waiting == 0 {
			close(e.calm)
		}
		e.mu.Unlock()
	}()
	c.waited.Store(true)
	return e.budget.acquire(w, c.out.broken)
}

var errStalled = errors.New("the client has moved next to nothing for too long while others waited for the memory it held")

// evictStalled disconnects clients that have moved next to nothing for longer than
// the stall limit while others wait for memory, as many as it takes, those that
// stalled first first.
func (e *Engine) evictStalled(calm <-chan struct{}) {
	tick := time.NewTicker(max(e.stall/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-calm:
			return
		case <-tick.C:
		}
		for need := e.budget.wantedBytes(); need > 0; {
			c := e.longestStalled(time.Now())
			if c == nil {
				break
			}
			held := c.held.Load()
			need -= held
			e.log.Warn("client disconnected: it has moved next to nothing for too long while others wait for the memory it holds",
				zap.String("client", c.name), zap.Int64("bytes", held), zap.Duration("limit", e.patience(c)))
			c.out.fail(errStalled)
		}
	}
}

// patience is how long c's client may move too little while others wait. One
// that had to wait for memory itself gets less: a crowd of them would else
// keep the others waiting in turns.
func (e *Engine) patience(c *conn) time.Duration {
	if c.waited.Load() {
		return e.stall / 4
	}
	return e.stall
}

// longestStalled is the connection whose client has moved too little for longest,
// if that is too long and another connection waits for memory.
func (e *Engine) longestStalled(now time.Time) (worst *conn) {
	oldest := now.UnixNano()
	for _, c := range e.all() {
		since := c.stalledSince()
		if since == 0 || since >= oldest || c.out.cause(nil) != nil {
			continue
		}
		if now.Sub(time.Unix(0, since)) > e.patience(c) && e.budget.wanted(&c.held) {
			worst, oldest = c, since
		}
	}
	return worst
}

// stalledSince is when the client last moved enough of what it owes us, in Unix
// nanoseconds; 0 if it owes nothing. See stall.
func (c *conn) stalledSince() int64 {
	a, b := c.out.stalledSince(), c.owes.since.Load()
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}
