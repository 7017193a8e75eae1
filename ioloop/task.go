package ioloop

import (
	"fmt"
	"sync"
	"time"
	"unsafe"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// task is a request away from the receiving goroutine: waiting for a worker,
// with one, parked at the gate, or a reply waiting to be sent.
type task struct {
	conn     *conn
	req      Request
	plan     backend.Plan
	buf      *buffer // payload of a write, data of a read, or nil
	lease    lease   // of the budget, until the reply is sent
	admitted bool    // holds an admission of the lane
	passed   bool    // need not wait for the disk's Pace
	stored   bool    // a write that only has to be flushed
	ahead    bool    // see readAhead
	began    time.Time
	since    state.Arrival // when it first asked the gate
	chained  bool          // was held; when it has ended the next one may go
	kept     bool          // in conn.mu.held or parked; guarded by conn.mu
	heads    []byte        // reply headers
	segs     []segment
	status   []backend.Status // of all contexts
	ends     []int            // in status, of each context
	ring     onRing

	next         *task // scheduler.mu, or Pace.mu while it waits there
	older, newer *task // conn.mu
}

var tasks = sync.Pool{New: func() any { return new(task) }}

// taskCost is what a task counts in the budget for itself, its headers and its
// place in the queue of replies, in bytes.
const taskCost = 1 << 10

// newTask makes a task with a buffer for n bytes, or none if n is 0, waiting
// for memory if it must; false if the connection ended meanwhile. The caller
// holds no admission and no other task.
func (c *conn) newTask(r *Request, n int64) (*task, bool) {
	t, ok := c.lendTask(r, n)
	if ok && n > 0 {
		t.buf = c.e.buffers.get(n)
	}
	return t, ok
}

// lendTask is newTask for who takes the buffer when it is needed.
func (c *conn) lendTask(r *Request, n int64) (*task, bool) {
	cost := int64(taskCost)
	if n > 0 {
		cost += bufferCost(classOf(n))
	}
	if r.Op == OpStatus {
		extents := int64(c.codec.MaxStatus(r)) * (16 + int64(unsafe.Sizeof(backend.Status{})))
		cost += int64(len(c.codec.Contexts())) * (MaxHeader + extents)
	}
	l, ok := c.lend(cost, n <= smallRequest)
	if !ok {
		return nil, false
	}
	return taskFor(c, r, l), true
}

// taskFor makes a task of what is lent.
func taskFor(c *conn, r *Request, l lease) *task {
	t := tasks.Get().(*task)
	t.conn, t.req, t.lease = c, *r, l
	return t
}

// taskOf wraps a reply buffer, which is counted already.
func taskOf(c *conn, b *buffer) *task {
	t := tasks.Get().(*task)
	t.conn, t.buf, t.lease = c, b, lease{b.cost(), floor}
	return t
}

// dropBuffer gives the buffer back before the rest of the task.
func (t *task) dropBuffer() {
	if t.buf == nil {
		return
	}
	l := lease{t.buf.cost(), t.lease.of}
	t.conn.e.buffers.put(t.buf)
	t.buf = nil
	t.lease.n -= l.n
	t.conn.discharge(l)
}

// free gives back what the task holds.
func (t *task) free() {
	c, l := t.conn, t.lease
	if t.buf != nil {
		c.e.buffers.put(t.buf)
		t.buf = nil
	}
	t.recycle()
	c.discharge(l)
}

// recycle forgets the task without giving anything back.
func (t *task) recycle() {
	clear(t.segs)
	t.plan.Recycle()
	*t = task{
		plan:  t.plan,
		heads: keep(t.heads), segs: keep(t.segs), status: keep(t.status), ends: keep(t.ends),
		ring: onRing{writes: keep(t.ring.writes)},
	}
	tasks.Put(t)
}

// keep empties s for the next use, or drops it if it has become large.
func keep[E any](s []E) []E {
	if cap(s) > 64*MaxHeader {
		return nil
	}
	return s[:0]
}

// start hands t to the ring or a worker. It never waits.
func (c *conn) start(t *task) {
	c.list(t)
	if !c.toRing(t) {
		c.e.sched.submit(t)
	}
}

// list counts t in.
func (c *conn) list(t *task) {
	t.began, t.since = time.Now(), c.since
	c.tasks.Add(1)
	c.mu.Lock()
	t.older, t.newer = c.mu.last, nil
	if c.mu.last == nil {
		c.mu.first = t
	} else {
		c.mu.last.newer = t
	}
	c.mu.last = t
	c.mu.Unlock()
	c.disk.counts.inFlight.Add(1)
}

// unlink takes t off the connection's list: its I/O has ended.
func (t *task) unlink() {
	c := t.conn
	c.disk.counts.inFlight.Add(-1)
	c.mu.Lock()
	if t.older == nil {
		c.mu.first = t.newer
	} else {
		t.older.newer = t.newer
	}
	if t.newer == nil {
		c.mu.last = t.older
	} else {
		t.newer.older = t.older
	}
	t.older, t.newer = nil, nil
	c.mu.Unlock()
}

// ended counts a task out, after its reply was queued: who waits for the tasks
// to be done then waits for the replies.
func (c *conn) ended() {
	c.mu.Lock()
	if c.tasks.Add(-1) == 0 && c.mu.idle != nil {
		close(c.mu.idle)
		c.mu.idle = nil
	}
	c.mu.Unlock()
	c.signalRoom()
}

// forget drops a task unanswered.
func (t *task) forget() {
	c := t.conn
	t.unlink()
	t.free()
	c.ended()
}

// oldest describes the oldest task that may be admitted, for the log of a slow
// drain.
func (c *conn) oldest() (string, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.mu.first
	for t != nil && t.kept {
		t = t.newer
	}
	if t == nil {
		return "", time.Time{}
	}
	return fmt.Sprintf("%s of %d bytes at %d from %s", t.req.Op, t.req.Length, t.req.Offset, c.name), t.began
}
