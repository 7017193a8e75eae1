package ioloop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// The pipeline of a connection:
//
//		recv -> decode -> admit -> map -> move -> reply -> send
//
//	 1. One receive brings many requests (conn.fill).
//	 2. The codec decodes them one by one; a payload of up to smallPayload is
//	    used where it lies, a larger one is received into a buffer of its own
//	    (conn.process, conn.largePayload). Nothing is admitted before its
//	    payload is here: a client that stalls in it delays nobody.
//	 3. What cannot wait for a device runs at once, in this goroutine, and its
//	    reply is appended to the reply buffer (inline.go). Everything else
//	    becomes a task for a worker (task.go), or is parked while the gate holds.
//	 4. When the input has no complete request left, or the replies reach
//	    flushAt, they go out in one send (conn.flush). What the socket does not
//	    take is queued (outgoing.go); receiving goes on until the connection's
//	    share of the memory is used up.
//
// An admission is held from the gate's verdict to the end of the storage I/O,
// and never across a wait for memory or for a client. Nor is memory that
// others may wait for held by who waits for more of it.
const (
	inputSize    = 64 << 10 // bytes of one receive; 256 KiB is slower for 4k writes, the client idles
	replySize    = 64 << 10
	flushAt      = 48 << 10
	smallPayload = 32 << 10  // larger payloads are received apart
	inlineRead   = 32 << 10  // larger reads get a buffer of their own
	inlineLarge  = 256 << 10 // larger ones always a worker: copying them here would hold up the connection
	findHolesAt  = 64 << 10  // reads from this size are asked for holes
	maxTasks     = 1024      // of one connection, queued, running or parked

	// goodbye is how long replies are still sent to a client that has left.
	goodbye = 5 * time.Second
	// lingering is how long a client may take to close its side when the
	// engine shuts down.
	lingering = time.Second
)

// These end the loop in order.
var (
	errDisconnect = errors.New("client disconnected")
	errShutdown   = errors.New("the engine shuts down")
)

// errGone: the connection broke while its request waited.
var errGone = net.ErrClosed

type conn struct {
	e     *Engine
	name  string
	nc    net.Conn
	t     transport
	codec Codec
	disk  *Disk
	lane  *state.Lane
	size  int64
	out   outgoing
	room  chan struct{} // a task or memory was freed; capacity 1

	atRest, inPayload func() (released bool)

	done chan struct{} // closed when serve returns

	// held is what tasks and queued replies have of the budget, in bytes: what
	// others give back without the receiving goroutine.
	held atomic.Int64
	// unsent counts the reply buffers among them.
	unsent atomic.Int64
	// payloadSince is stalledSince of the receiving side.
	payloadSince atomic.Int64
	// stopping: the engine shuts down and has interrupted the receiving.
	stopping atomic.Bool

	// Of the receiving goroutine only:
	in     *buffer // nil while idle
	r, w   int     // unread bytes of in.raw
	reply  *buffer // nil while there is nothing in it
	filled int     // bytes in reply.raw
	req    Request
	plan   backend.Plan
	batch  batch

	turn turn // scheduler.mu

	// tasks counts those queued, running and parked.
	tasks atomic.Int64

	// mu is a leaf.
	mu struct {
		sync.Mutex
		first, last *task // of tasks, oldest first, until their I/O has ended
		parked      []*task
		dead        bool          // nobody is left to answer; parked tasks are dropped
		idle        chan struct{} // closed when tasks is 0, for who waits
	}
}

// batch counts what one batch did, to be added to the disk's counts at once.
type batch struct {
	reads, writes, bytesRead, bytesWritten, refused, errors uint64
}

func newConn(e *Engine, nc net.Conn, codec Codec, d *Disk, size int64) *conn {
	c := &conn{
		e: e, nc: nc, t: newTransport(nc), codec: codec, disk: d, size: size,
		room: make(chan struct{}, 1), done: make(chan struct{}),
	}
	if a := nc.RemoteAddr(); a != nil {
		c.name = a.String()
	}
	c.atRest, c.inPayload = c.onRest, c.onPayload
	c.out.init(c.t)
	c.lane = d.Machine.Lane(c.reopen, c.oldest)
	return c
}

// serve is the receiving goroutine.
func (c *conn) serve() error {
	defer close(c.done)
	var err error
	for err == nil {
		if err = c.process(); err == nil {
			c.flush()
			err = c.fill()
		}
	}
	switch {
	case c.stopping.Load() && errors.Is(err, os.ErrDeadlineExceeded):
		err = errShutdown
	case err != errDisconnect && err != io.EOF:
		err = c.out.cause(err) // if it is we who closed it, why
	}
	c.close(err)
	switch err {
	case errDisconnect, errShutdown, io.EOF:
		return nil
	}
	return err
}

// close waits for what is under way, sends what is left to send and gives
// everything back.
func (c *conn) close(cause error) {
	c.flush()
	if cause == errDisconnect || cause == errShutdown {
		select {
		case <-c.tasksDone():
		case <-c.out.broken:
		}
	}
	c.drop() // parked writes were not acknowledged
	<-c.tasksDone()
	timer := time.NewTimer(goodbye)
	select {
	case <-c.out.flushed():
	case <-timer.C:
	}
	timer.Stop()
	if cause == errShutdown {
		c.linger()
	}
	c.out.fail(net.ErrClosed)
	<-c.out.flushed() // the sender uses no buffer any more
	c.releaseBuffers()
	c.lane.Close()
}

// linger ends the sending side and waits for the client to do the same. A TCP
// socket that is closed with requests unread is reset, and the replies still
// on their way are lost.
func (c *conn) linger() {
	half, ok := c.nc.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil || c.nc.SetReadDeadline(time.Now().Add(lingering)) != nil {
		return
	}
	if c.in == nil {
		c.takeInput()
	}
	for {
		if _, err := c.t.recv(c.in.raw, nil); err != nil {
			return
		}
	}
}

// finish ends the connection from outside: it takes no more requests, and
// ends when those it has are answered, or when ctx ends.
func (c *conn) finish(ctx context.Context) {
	c.stopping.Store(true)
	if err := c.nc.SetReadDeadline(time.Unix(1, 0)); err != nil { // wakes serve
		c.out.fail(net.ErrClosed)
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		c.out.fail(net.ErrClosed)
	}
}

// drop forgets parked tasks and lets no more be parked.
func (c *conn) drop() {
	c.mu.Lock()
	c.mu.dead = true
	parked := c.mu.parked
	c.mu.parked = nil
	c.mu.Unlock()
	for _, t := range parked {
		t.forget()
	}
}

// tasksDone is closed when no task is left; more may start later.
func (c *conn) tasksDone() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tasks.Load() == 0 {
		return closed
	}
	if c.mu.idle == nil {
		c.mu.idle = make(chan struct{})
	}
	return c.mu.idle
}

// fill receives more input, at least one byte.
func (c *conn) fill() error {
	if c.in == nil {
		c.takeInput()
	}
	if c.r == c.w {
		c.r, c.w = 0, 0
	} else if c.r > 0 && len(c.in.raw)-c.w < smallPayload {
		c.w = copy(c.in.raw, c.in.raw[c.r:c.w])
		c.r = 0
	}
	idle := c.inPayload
	if c.r == c.w {
		idle = c.atRest
	}
	n, err := c.t.recv(c.in.raw[c.w:min(len(c.in.raw), c.w+inputSize)], idle)
	c.payloadSince.Store(0)
	if err == errAgain {
		return nil
	}
	if err == io.EOF && c.r < c.w {
		err = io.ErrUnexpectedEOF
	}
	c.w += n
	return err
}

// takeInput gets the input buffer. It counts in the budget but is never waited
// for: without it a connection could not even be refused.
func (c *conn) takeInput() {
	c.in = c.e.buffers.get(inputSize)
	c.r, c.w = 0, 0
	c.e.budget.takeFloor(c.in.cost())
}

// takeReply gets a reply buffer. Each connection may have one in any case.
// Another, while the first waits for the client to take it, is only for memory
// that nobody else needs; without that, receiving pauses until there is one or
// the client has taken the first.
func (c *conn) takeReply() {
	c.filled = 0
	n := bufferCost(classOf(replySize))
	for c.unsent.Load() > 0 {
		if c.held.Load()+n <= c.e.budget.share && c.e.budget.tryFloor(n) {
			c.reply = c.e.buffers.get(replySize)
			return
		}
		if !c.awaitRoom() {
			break
		}
	}
	c.e.budget.takeFloor(n)
	c.reply = c.e.buffers.get(replySize)
}

// releaseBuffers is called when there is nothing to receive and nothing to
// send: a thousand idle connections hold no memory.
func (c *conn) releaseBuffers() {
	for _, b := range []**buffer{&c.in, &c.reply} {
		if *b != nil {
			c.e.budget.release(lease{(*b).cost(), floor})
			c.e.buffers.put(*b)
			*b = nil
		}
	}
	c.r, c.w, c.filled = 0, 0, 0
}

// onRest and onPayload are what a receive does that has to wait; see
// transport.recv. They are bound once, in atRest and inPayload: a bound method
// made for each receive would be an allocation.
func (c *conn) onRest() (released bool) {
	c.releaseBuffers()
	return true
}

// onPayload notes that the client owes the rest of a request.
func (c *conn) onPayload() (released bool) {
	c.payloadSince.Store(time.Now().UnixNano())
	return false
}

// discharge gives memory back that was counted in held.
func (c *conn) discharge(l lease) {
	c.held.Add(-l.n)
	if l.of == floor {
		c.unsent.Add(-1)
	}
	c.e.budget.release(l)
	c.signalRoom()
}

func (c *conn) signalRoom() {
	select {
	case c.room <- struct{}{}:
	default:
	}
}

// awaitRoom waits until a task ends or memory of this connection is given
// back since it was last called, or reports that the connection is broken.
func (c *conn) awaitRoom() bool {
	select {
	case <-c.room:
		return true
	case <-c.out.broken:
		return false
	}
}

// lend takes n bytes of the budget for a request, waiting if it must; then
// receiving pauses, and what was answered is sent first. small requests may
// use the reserve. The caller holds no admission and no memory of which more
// is waited for. It reports whether it got them.
func (c *conn) lend(n int64, small bool) (lease, bool) {
	for c.held.Load() > 0 && c.held.Load()+n > c.e.budget.share {
		c.flush()
		if !c.awaitRoom() {
			return lease{}, false
		}
	}
	w := want{n, small, &c.held}
	l, ok := c.e.budget.try(w)
	if !ok {
		c.flush()
		if l, ok = c.e.acquire(w, c); !ok {
			return lease{}, false
		}
	}
	c.held.Add(n)
	return l, true
}

// stalledSince is when the client last moved anything it owes us, in Unix
// nanoseconds; 0 if it owes nothing.
func (c *conn) stalledSince() int64 {
	a, b := c.out.stalledSince.Load(), c.payloadSince.Load()
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}

// process decodes and executes every complete request of the input.
func (c *conn) process() error {
	for c.in != nil {
		b := c.in.raw[c.r:c.w]
		r := &c.req
		n, err := c.codec.Decode(b, r)
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		if int64(len(b)-n) >= r.Payload {
			c.r += n + int(r.Payload)
			err = c.execute(r, b[n:n+int(r.Payload)])
		} else if r.Payload <= smallPayload {
			return nil // decoded again when the rest is here
		} else {
			c.r += n
			err = c.largePayload(r)
		}
		if err != nil {
			return err
		}
		if c.filled >= flushAt {
			c.flush()
		}
		if c.tasks.Load() >= maxTasks {
			if err := c.awaitTasks(); err != nil {
				return err
			}
		}
	}
	return nil
}

// awaitTasks pauses receiving while the connection has too many tasks. It
// stands between requests, where no admission is held: a parked task may be
// waiting for a transition that waits for admissions.
func (c *conn) awaitTasks() error {
	c.flush()
	for c.tasks.Load() >= maxTasks {
		if !c.awaitRoom() {
			return errGone
		}
	}
	return nil
}

// largePayload receives a payload that does not fit the input buffer and
// executes its request.
func (c *conn) largePayload(r *Request) error {
	if r.Op != OpWrite {
		if err := c.skip(r.Payload); err != nil {
			return err
		}
		return c.execute(r, nil)
	}
	t, ok := c.newTask(r, r.Payload)
	if !ok {
		return errGone
	}
	c.flush() // the client may wait for these before it sends the rest
	p := t.buf.payload(r.Payload)
	have := copy(p, c.in.raw[c.r:c.w])
	c.r += have
	for have < len(p) {
		n, err := c.t.recv(p[have:], c.inPayload)
		c.payloadSince.Store(0)
		if err != nil && err != errAgain {
			t.free()
			return unexpected(err)
		}
		have += n
	}
	c.writeLarge(r, t)
	return nil
}

// skip consumes n bytes of the stream.
func (c *conn) skip(n int64) error {
	c.flush() // the client may wait for these before it sends the rest
	for {
		k := min(n, int64(c.w-c.r))
		c.r += int(k)
		if n -= k; n == 0 {
			return nil
		}
		c.r, c.w = 0, 0
		got, err := c.t.recv(c.in.raw[:inputSize], c.inPayload)
		c.payloadSince.Store(0)
		if err != nil && err != errAgain {
			return unexpected(err)
		}
		c.w = got
	}
}

// unexpected is err for a stream that ends inside a request.
func unexpected(err error) error {
	if err == io.EOF {
		return fmt.Errorf("client vanished in the middle of a payload: %w", io.ErrUnexpectedEOF)
	}
	return err
}

// flush sends the replies collected so far.
func (c *conn) flush() {
	c.batch.addTo(&c.disk.counts)
	if c.filled == 0 {
		return
	}
	t := taskOf(c, c.reply)
	seg := segment{b: c.reply.raw[:c.filled], task: t}
	c.filled = 0
	c.held.Add(t.lease.n)
	c.unsent.Add(1)
	if c.out.sendOwn(seg) {
		c.held.Add(-t.lease.n)
		c.unsent.Add(-1)
		t.buf = nil
		t.recycle()
		return
	}
	c.reply = nil // it belongs to the queue now
}

func (b *batch) addTo(d *counts) {
	if *b == (batch{}) {
		return
	}
	d.reads.Add(b.reads)
	d.writes.Add(b.writes)
	d.bytesRead.Add(b.bytesRead)
	d.bytesWritten.Add(b.bytesWritten)
	d.refused.Add(b.refused)
	d.errors.Add(b.errors)
	*b = batch{}
}

// space makes room for n more bytes of replies. It may wait for the client: see
// takeReply.
func (c *conn) space(n int) []byte {
	if c.reply != nil && c.filled+n > len(c.reply.raw) {
		c.flush()
	}
	if c.reply == nil {
		c.takeReply()
	}
	return c.reply.raw[:c.filled]
}

// replyDone and replyError answer inline.
func (c *conn) replyDone(r *Request) {
	c.filled = len(c.codec.AppendDone(c.space(MaxHeader), r))
}

func (c *conn) replyError(r *Request, err error) {
	c.batch.count(err)
	c.filled = len(c.codec.AppendError(c.space(maxErrorReply), r, err))
}

// maxErrorReply bounds AppendError.
const maxErrorReply = MaxHeader + 4096

func (b *batch) count(err error) {
	if errors.Is(err, state.ErrInactive) || errors.Is(err, state.ErrStopping) {
		b.refused++
	} else {
		b.errors++
	}
}
