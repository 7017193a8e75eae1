package ioloop

import (
	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// run executes the task on a worker.
func (t *task) run() {
	c, chained := t.conn, t.chained
	if t.try() && chained {
		c.releaseNext()
	}
}

// try reports whether the task has ended, or will without this worker; it may
// have been parked again.
func (t *task) try() (ended bool) {
	c := t.conn
	if t.ahead {
		t.runAhead()
		return true
	}
	if t.req.Op == OpRead {
		t.conclude(t.fetch(false))
		return true
	}
	if t.chained && t.endLate() {
		return true
	}
	if !t.admitted && c.pace.wait(t) {
		return false
	}
	for !t.admitted {
		switch v, _ := c.lane.EnterAgain(classOp(t.req.Op), t.since); v {
		case state.Admitted:
			t.admitted = true
		case state.Wait, state.Hold:
			if t.park() {
				return false
			}
		case state.Nothing:
			t.conclude(nil)
			return true
		default:
			t.conclude(c.refusal(v))
			return true
		}
	}
	t.execute()
	return true
}

// execute ends an admitted task, at once or when its effect is durable.
func (t *task) execute() {
	disk := t.conn.disk
	f, img := &disk.flushes, disk.Image
	if t.req.Op == OpFlush || t.stored {
		f.run(t, img, false)
		return
	}
	durable := t.conn.durable(&t.req)
	// A durable write syncs what it writes and no more, but each by itself. In
	// the page cache one that comes while another is at it shares a sync.
	leads := durable && disk.cached && f.lead()
	sync, err := t.perform(durable, leads || !disk.cached)
	switch {
	case err == nil && sync:
		f.run(t, img, leads)
		return
	case leads:
		t.leave(err)
		f.rest(img)
	default:
		t.leave(err)
	}
}

// refusal is the error of a request that the gate does not let in.
func (c *conn) refusal(v state.Verdict) error {
	switch v {
	case state.Lost:
		if c.lane.HoldFor() == 0 {
			return state.ErrInactive // as if it had looked when it was lost
		}
		return state.ErrLost
	case state.Late:
		return state.ErrLate
	case state.Dropped:
		return state.ErrDropped
	}
	return c.lane.Refusal()
}

// leave ends the admission and answers.
func (t *task) leave(err error) {
	lane := t.conn.lane
	if err != nil && backend.SyncFailed(err) {
		lane.Fault(err)
	}
	// Storage I/O has ended: from here on a transition need not wait for this
	// request, even if its client never takes the reply.
	lane.Leave()
	t.admitted = false
	t.conclude(err)
}

// perform does the storage work of an admitted task that is no flush. atOnce
// says that a write that is to be durable is made so at once. sync says that
// what is to be durable is not, until the image is flushed.
func (t *task) perform(durable, atOnce bool) (sync bool, err error) {
	r, img := &t.req, t.conn.disk.Image
	if err := t.leaveRing(durable); err != nil {
		return false, err
	}
	if err := checkRange(img, r); err != nil {
		return false, err
	}
	switch r.Op {
	case OpWrite:
		mapped, err := t.store(durable && atOnce)
		return durable && !(atOnce && mapped), err
	case OpDiscard:
		err = img.Discard(r.Offset, r.Length)
	case OpZero:
		var f backend.ZeroFlags
		if r.Flags&NoHole != 0 {
			f |= backend.NoHole
		}
		if r.Flags&FastZero != 0 {
			f |= backend.FastZero
		}
		err = img.Zero(r.Offset, r.Length, f)
	case OpCache:
		return false, img.Cache(r.Offset, r.Length)
	case OpStatus:
		return false, t.findStatus()
	}
	return durable, err
}

// store writes the payload, with durable so that its bytes survive power loss.
// mapped says that so does where they are.
func (t *task) store(durable bool) (mapped bool, err error) {
	r, img := &t.req, t.conn.disk.Image
	payload := t.buf.payload(r.Length)
	if err := img.Prepare(&t.plan, r.Offset, payload, backend.MayBlock); err != nil {
		return false, err
	}
	for i := range t.plan.Extents {
		e := &t.plan.Extents[i]
		if err := e.File.WriteAt(payload[:e.Length], e.Offset, durable); err != nil {
			img.Abort(&t.plan)
			return false, err
		}
		payload = payload[e.Length:]
	}
	return img.Commit(&t.plan), nil
}

// fetch reads the request's range into the buffer; with now it returns ErrWait
// rather than wait. The plan's kinds stay for sendData; its pins are released.
func (t *task) fetch(now bool) error {
	c, r, img := t.conn, &t.req, t.conn.disk.Image
	defer c.lane.LeaveRead(c.lane.EnterRead())
	mode := backend.MayBlock
	if now {
		mode = 0
	}
	if err := c.mapRead(&t.plan, r, mode); err != nil {
		return err
	}
	err := fetch(img, &t.plan, t.buf.payload(r.Length), now)
	img.Unmap(&t.plan)
	return err
}
