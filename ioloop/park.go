package ioloop

import "github.com/nbd-export/nbd-export/state"

// park keeps t until the gate opens, if it still has to wait; otherwise the
// answer is false. If the connection is dead, or t cannot be held, t ends.
func (t *task) park() bool {
	c := t.conn
	c.mu.Lock()
	if c.mu.dead {
		c.mu.Unlock()
		t.forget()
		return true
	}
	// The gate may have opened since its verdict. If not, it will call reopen,
	// which waits for mu: until then the task cannot end, nor the lane close.
	v, _ := c.lane.EnterAgain(classOp(t.req.Op), t.since)
	var err error
	switch {
	case c.mu.leaving && (v == state.Hold || v == state.Wait && t.chained):
		err = errLeaves
		c.mu.releasing = c.mu.releasing && !t.chained
	case v == state.Hold || v == state.Wait && t.chained:
		err = c.holdLocked(t)
	case v == state.Wait:
		t.kept = true
		c.mu.parked = append(c.mu.parked, t)
	default:
		t.admitted = v == state.Admitted
		c.mu.Unlock()
		return false
	}
	c.mu.Unlock()
	switch {
	case err == errLeaves:
		c.refuseHeld() // what was to follow t too
		t.conclude(err)
	case err != nil:
		t.conclude(err)
	case v == state.Hold:
		c.lane.Want()
	}
	return true
}

// reopen gives parked tasks, and the first of those held, to workers, which ask
// the gate again.
func (c *conn) reopen() {
	c.mu.Lock()
	ready := c.mu.parked
	c.mu.parked = nil
	for _, t := range ready {
		t.kept = false
	}
	if !c.mu.releasing {
		if t := c.releaseLocked(); t != nil {
			ready = append(ready, t)
		}
	}
	c.mu.Unlock()
	for _, t := range ready {
		c.e.sched.submit(t)
	}
}
