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
	t := tasks.Get().(*task)
	t.conn, t.req, t.lease = c, *r, l
	return t, true
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
		c.mu.Unlock()
		t.forget()
		return true
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
	if t.chained && c.holdsNone() {
		t.forget()
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
	return img.Commit(&t.plan)
}

// fetch reads the request's range into the buffer; with now it returns ErrWait
// rather than wait. The plan's kinds stay for sendData; its pins are released.
func (t *task) fetch(now bool) error {
	r, img, lane := &t.req, t.conn.disk.Image, t.conn.lane
	defer lane.LeaveRead(lane.EnterRead())
	if lane.Stopping() {
		return state.ErrStopping
	}
	if err := checkRange(img, r); err != nil {
		return err
	}
	mode := backend.MayBlock
	if now {
		mode = 0
	}
	if r.Length >= findHolesAt && t.conn.codec.Chunked(r) {
		mode |= backend.FindHoles
	}
	if err := img.Map(&t.plan, r.Offset, r.Length, mode); err != nil {
		return err
	}
	err := fetch(img, &t.plan, t.buf.payload(r.Length), now)
	img.Unmap(&t.plan)
	return err
}

// conclude answers the request.
func (t *task) conclude(err error) {
	c, r := t.conn, &t.req
	counts := &c.disk.counts
	switch {
	case err != nil:
		var b batch
		b.count(err)
		b.addTo(counts)
		t.sendHead(c.codec.AppendError(t.heads[:0], r, err))
		return
	case r.Op == OpRead:
		counts.reads.Add(1)
		counts.bytesRead.Add(uint64(r.Length))
		t.unlink()
		t.sendData()
		c.ended()
		return
	case r.Op == OpWrite:
		counts.writes.Add(1)
		counts.bytesWritten.Add(uint64(r.Length))
		c.noteDirty(r)
	case r.Op == OpFlush:
		counts.flushes.Add(1)
	default:
		counts.other.Add(1)
		c.noteDirty(r)
	}
	if r.Op == OpStatus {
		t.sendStatus()
		return
	}
	t.sendHead(c.codec.AppendDone(t.heads[:0], r))
}

// findStatus gets what an OpStatus asks for, of all contexts before anything is
// sent: an error is the whole reply.
func (t *task) findStatus() (err error) {
	img, codec, r := t.conn.disk.Image, t.conn.codec, &t.req
	limit := codec.MaxStatus(r)
	t.status, t.ends = t.status[:0], t.ends[:0]
	for _, bitmap := range codec.Contexts() {
		if bitmap == "" {
			t.status, err = img.Status(t.status, r.Offset, r.Length, limit)
		} else {
			t.status, err = img.BitmapStatus(t.status, bitmap, r.Offset, r.Length, limit)
		}
		if err != nil {
			return err
		}
		t.ends = append(t.ends, len(t.status))
	}
	return nil
}

func (t *task) sendStatus() {
	head, from := t.heads[:0], 0
	for i, end := range t.ends {
		head = t.conn.codec.AppendStatus(head, &t.req, i, t.status[from:end], i == len(t.ends)-1)
		from = end
	}
	t.sendHead(head)
}

// sendHead sends a reply without payload; the buffer is not needed any more.
func (t *task) sendHead(head []byte) {
	c := t.conn
	t.heads = head
	t.dropBuffer()
	t.unlink()
	c.out.enqueue(segment{head, t})
	c.ended()
}

// sendData sends a read's reply: in one piece, or with its holes told apart.
func (t *task) sendData() {
	c, r := t.conn, &t.req
	if !t.hasHoles() {
		t.heads = c.codec.AppendData(t.heads[:0], r, 0, r.Length, true)
		c.out.enqueue(segment{t.buf.framed(t.heads, r.Length), t})
		return
	}
	t.lay(false)
	t.segs[len(t.segs)-1].task = t
	c.out.enqueue(t.segs...)
}

// maxChunks is the most pieces that a reply with holes has. One of more, as of
// a fragmented image, is sent whole: a client has work with each.
const maxChunks = 64

// hasHoles reports whether the reply to a read tells its holes.
func (t *task) hasHoles() bool {
	if t.req.Length < findHolesAt || len(t.plan.Extents) > maxChunks || !t.conn.codec.Chunked(&t.req) {
		return false
	}
	for i := range t.plan.Extents {
		if t.plan.Extents[i].Kind == backend.Zero {
			return true
		}
	}
	return false
}
