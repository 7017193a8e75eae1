package ioloop

import (
	"syscall"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// onRing is what a task needs while it is on a ring.
type onRing struct {
	left       int           // operations that have not ended; Uring.mu
	redo       bool          // by a worker; Uring.mu while left > 0
	errno      syscall.Errno // of a durable write, with which
	failed     int           // extent
	generation uint32        // of a read's admission
	flags      int           // of a write
	writes     []backend.AsyncWrite
}

// toRing prepares t and queues it for submit, if that can be done without
// waiting; otherwise the answer is false and t is for a worker.
func (c *conn) toRing(t *task) bool {
	if c.ring == nil || !t.prepare() {
		return false
	}
	if c.prepared = append(c.prepared, t); len(c.prepared) == ringEntries {
		c.submit()
	}
	return true
}

func (t *task) prepare() bool {
	switch t.req.Op {
	case OpRead:
		return t.prepareRead()
	case OpWrite:
		return t.prepareWrite()
	}
	return false
}

// prepareRead admits and maps a read.
func (t *task) prepareRead() bool {
	c := t.conn
	g := c.lane.EnterRead()
	if c.mapRead(&t.plan, &t.req, 0) != nil {
		c.lane.LeaveRead(g)
		return false
	}
	if !t.readsAsync() {
		c.disk.Image.Unmap(&t.plan)
		c.lane.LeaveRead(g)
		return false
	}
	t.ring.generation = g
	return true
}

// readsAsync reports whether the mapped read t has data, and the ring can read all
// of it; the zeroes between are then in the buffer. What is larger than inlineLarge
// and may be in the page cache is for a worker, which copies it beside this
// goroutine.
func (t *task) readsAsync() bool {
	data, rest := false, t.buf.payload(t.req.Length)
	for i := range t.plan.Extents {
		e := &t.plan.Extents[i]
		part := rest[:e.Length]
		rest = rest[e.Length:]
		switch {
		case e.Kind == backend.Zero:
			clear(part)
		case e.Kind == backend.Data && e.File.AsyncRead(part, e.Offset) && (t.req.Length <= inlineLarge || e.File.Traits().Direct):
			data = true
		default:
			return false
		}
	}
	return data
}

// prepareWrite admits and prepares a write. Where the answer is false t may
// have been admitted all the same.
func (t *task) prepareWrite() bool {
	c, r, img := t.conn, &t.req, t.conn.disk.Image
	if !t.admitted {
		// The receiving goroutine was let in, but had to leave to get memory.
		if v, _ := c.lane.EnterAgain(classOp(r.Op), t.since); v != state.Admitted {
			return false
		}
		t.admitted = true
	}
	rest := t.buf.payload(r.Length)
	if checkRange(img, r) != nil || img.Prepare(&t.plan, r.Offset, rest, 0) != nil {
		return false
	}
	durable := c.durable(r)
	for i := range t.plan.Extents {
		e := &t.plan.Extents[i]
		w, flags, ok := e.File.StartWrite(rest[:e.Length], e.Offset, durable)
		if !ok {
			t.endWrites()
			img.Abort(&t.plan)
			return false
		}
		t.ring.writes, t.ring.flags = append(t.ring.writes, w), flags
		rest = rest[e.Length:]
	}
	return true
}

func (t *task) endWrites() {
	for i, w := range t.ring.writes {
		t.plan.Extents[i].File.EndWrite(w)
	}
	clear(t.ring.writes)
	t.ring.writes = t.ring.writes[:0]
}

// endRing ends a task whose operations have all ended, or gives it to a worker
// if they did not do all.
func (t *task) endRing() {
	c, img := t.conn, t.conn.disk.Image
	if t.req.Op == OpRead {
		img.Unmap(&t.plan)
		c.lane.LeaveRead(t.ring.generation)
		if t.ring.redo {
			t.ring = onRing{writes: t.ring.writes}
			c.e.sched.submit(t)
			return
		}
		t.conclude(nil)
		return
	}
	t.endWrites()
	if t.ring.redo {
		c.e.sched.submit(t) // admitted; see leaveRing
		return
	}
	if mapped := img.Commit(&t.plan); !mapped && c.durable(&t.req) {
		t.stored = true
		c.e.sched.submit(t) // it may block
		return
	}
	t.leave(nil)
}

// leaveRing takes a write that a worker is to do again off its plan, unless
// it must not be done again: a failed sync is told once.
func (t *task) leaveRing(durable bool) (err error) {
	if !t.ring.redo {
		return nil
	}
	if on := &t.ring; durable && on.errno != 0 {
		rest := t.buf.payload(t.req.Length)
		for i := range on.failed {
			rest = rest[t.plan.Extents[i].Length:]
		}
		e := &t.plan.Extents[on.failed]
		err = e.File.DurableWriteFailed(rest[:e.Length], e.Offset, on.errno)
	}
	t.conn.disk.Image.Abort(&t.plan)
	t.ring = onRing{writes: t.ring.writes}
	return err
}
