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
	if c.ring == nil {
		return false
	}
	switch t.req.Op {
	case OpRead:
		if !t.prepareRead() {
			return false
		}
	case OpWrite:
		if !t.prepareWrite() {
			return false
		}
	default:
		return false
	}
	if c.prepared = append(c.prepared, t); len(c.prepared) == ringEntries {
		c.submit()
	}
	return true
}

// prepareRead admits and maps a read. What is larger than inlineLarge and may
// be in the page cache is for a worker, which copies it beside this goroutine.
func (t *task) prepareRead() bool {
	c, r := t.conn, &t.req
	g := c.lane.EnterRead()
	if c.mapRead(&t.plan, r, 0) != nil {
		c.lane.LeaveRead(g)
		return false
	}
	data, rest := 0, t.buf.payload(r.Length)
	for i := range t.plan.Extents {
		e := &t.plan.Extents[i]
		part := rest[:e.Length]
		rest = rest[e.Length:]
		switch e.Kind {
		case backend.Zero:
			clear(part)
			continue
		case backend.Data:
			if e.File.AsyncRead(part, e.Offset) && (r.Length <= inlineLarge || e.File.Traits().Direct) {
				data++
				continue
			}
		}
		data = 0
		break
	}
	if data == 0 {
		c.disk.Image.Unmap(&t.plan)
		c.lane.LeaveRead(g)
		return false
	}
	t.ring.generation = g
	return true
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
