package ioloop

import (
	"fmt"
	"slices"
	"time"

	"github.com/nbd-export/nbd-export/state"
)

// Writes that find the image inactive may be held for a while (state.Hold): it
// may become active within that time. Their memory counts in a part of the
// budget of its own, so that reads, and the receiving of this connection, go on
// whatever is held. They wait in conn.mu.held, in the order in which they came,
// which is also that of their deadlines: one timer serves a connection. Once
// the gate opens they run one after the other, and ask the gate again first.

// maxHeld is how many requests of one connection may be held. It leaves tasks
// to its reads.
const maxHeld = maxTasks / 2

// wait is start for a request that was not admitted: the gate did not, or the
// disk's Pace.
func (c *conn) wait(t *task) {
	c.list(t)
	if !c.pace.wait(t) && !t.park() {
		c.e.sched.submit(t)
	}
}

// holdLocked keeps t, or says why it cannot be.
func (c *conn) holdLocked(t *task) error {
	if !t.chained && len(c.mu.held) >= maxHeld {
		return &state.HeldError{Why: fmt.Sprintf("%d writes of this connection are held already", maxHeld)}
	}
	if t.lease.of != forHeld {
		if most, ok := c.e.budget.hold(&t.lease); !ok {
			return &state.HeldError{Why: fmt.Sprintf("the memory for held writes, %d KiB, is full; --memory sets four times that", most>>10)}
		}
		c.held.Add(-t.lease.n)
		c.signalRoom()
	}
	if t.chained { // it was on its way
		t.chained, c.mu.releasing = false, false
	}
	t.kept = true
	i, _ := slices.BinarySearchFunc(c.mu.held, t.began, func(o *task, began time.Time) int {
		if o.began.After(began) {
			return 1
		}
		return -1
	})
	c.mu.held = slices.Insert(c.mu.held, i, t)
	c.disk.counts.held.Add(1)
	c.disk.counts.heldBytes.Add(t.req.Payload)
	if i == 0 {
		c.armLocked()
	}
	return nil
}

// armLocked sets the timer to the end of the first task's time.
func (c *conn) armLocked() {
	left := max(0, time.Until(c.mu.held[0].began.Add(c.lane.HoldFor())))
	if c.mu.expiry == nil {
		c.mu.expiry = time.AfterFunc(left, c.expire)
		return
	}
	c.mu.expiry.Reset(left)
}

// takeHeldLocked takes the first n held tasks out.
func (c *conn) takeHeldLocked(n int) []*task {
	if n == 0 {
		return nil
	}
	taken := slices.Clone(c.mu.held[:n])
	c.mu.held = slices.Delete(c.mu.held, 0, n)
	for _, t := range taken {
		t.kept = false
		c.disk.counts.held.Add(-1)
		c.disk.counts.heldBytes.Add(-t.req.Payload)
	}
	if len(c.mu.held) == 0 && c.mu.expiry != nil {
		c.mu.expiry.Stop()
	}
	return taken
}

// expire refuses the tasks whose time is over.
func (c *conn) expire() {
	limit := c.lane.HoldFor()
	c.mu.Lock()
	n := 0
	for n < len(c.mu.held) && time.Since(c.mu.held[n].began) >= limit {
		n++
	}
	over := c.takeHeldLocked(n)
	if len(c.mu.held) > 0 {
		c.armLocked()
	}
	c.mu.Unlock()
	for _, t := range over {
		t.conclude(&state.HeldError{Why: fmt.Sprintf("it was not activated within the %v that writes are held", limit)})
	}
}

// releaseLocked is the next held task, which is to be given to a worker; nil
// if there is none.
func (c *conn) releaseLocked() *task {
	c.mu.releasing = len(c.mu.held) > 0
	if !c.mu.releasing {
		return nil
	}
	t := c.takeHeldLocked(1)[0]
	t.chained = true
	return t
}

// releaseNext follows the end of a chained task.
func (c *conn) releaseNext() {
	c.mu.Lock()
	t := c.releaseLocked()
	c.mu.Unlock()
	if t != nil {
		c.e.sched.submit(t)
	}
}

// errLeaves refuses what is held when its client says that it leaves. It is told
// so, since the protocol has each request answered that came before (NBD
// specification, NBD_CMD_DISC).
var errLeaves = &state.HeldError{Why: "its client has disconnected before it was activated"}

// refuseHeld refuses held tasks and lets no more be held. While the image is active
// they are on their way, one after the other, and so they stay: see park.
func (c *conn) refuseHeld() {
	c.mu.Lock()
	c.mu.leaving = true
	var held []*task
	if !c.mu.releasing {
		held = c.takeHeldLocked(len(c.mu.held))
	}
	c.mu.Unlock()
	for _, t := range held {
		t.conclude(errLeaves)
	}
}

// endLate forgets t, which was held, if its client is gone; otherwise the answer is
// false.
func (t *task) endLate() bool {
	c := t.conn
	c.mu.Lock()
	dead := c.mu.dead
	c.mu.Unlock()
	if dead {
		t.forget()
	}
	return dead
}
