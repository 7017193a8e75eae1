package ioloop

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

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
//	    reply is appended to the reply buffer (inline.go), or sent from the page
//	    cache (pages.go, refer.go). Everything else becomes a task for the ring
//	    (taskring.go) or a worker (taskrun.go), or is parked while the gate
//	    holds (park.go, hold.go). Writes that go better together are put off to
//	    the end of the batch, and payloads whose place in the file is in memory
//	    are received there at once (putoff.go, inplace.go).
//	 4. When the input has no complete request left, or the replies reach what
//	    is sent at once, they go out in one send (conn.flush). What the socket
//	    does not take is queued (outgoing.go); receiving goes on until the
//	    connection's share of the memory is used up. Between two batches others
//	    get their turn (yield.go).
//
// An admission is held from the gate's verdict to the end of the storage I/O,
// and never across a wait for memory or for a client. Nor is memory that
// others may wait for held by who waits for more of it.
const (
	inputSize    = 64 << 10  // bytes of one receive; 256 KiB is slower for 4k writes, the client idles
	replySize    = 64 << 10  // bytes of replies sent at once
	flushAt      = 48 << 10  // from here on they are sent, if they were copied
	deepReply    = 256 << 10 // of replies by reference, see filledUp
	flushRoom    = 20 << 10  // a reply buffer with replies by reference and no more room goes out
	staysDeep    = 64        // reply buffers after one that was deep
	smallPayload = 32 << 10  // larger payloads are received apart
	inlineRead   = 32 << 10  // larger reads get a buffer of their own
	inlineLarge  = 256 << 10 // larger ones always a worker: copying them here would hold up the connection
	findHolesAt  = 64 << 10  // reads from this size are asked for holes
	maxTasks     = 1024      // of one connection, queued, running or parked

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
	pace  *Pace // the disk's
	lane  *state.Lane
	out   outgoing
	room  chan struct{} // a task or memory was freed; capacity 1

	atRest, inPayload func() (released bool)

	done chan struct{} // closed when serve returns

	// held is what tasks and queued replies have of the budget, in bytes: what
	// others give back without the receiving goroutine.
	held atomic.Int64
	// unsent counts the reply buffers among them.
	unsent atomic.Int64
	// owes is what the client has to send of a request that it has begun.
	owes stall
	// stopping: the engine shuts down and has interrupted the receiving.
	stopping atomic.Bool

	// Of the receiving goroutine only:
	in       *buffer  // nil while idle
	r, w     int      // unread bytes of in.raw
	peeker   peeker   // the transport, if it is one
	spin     *spinner // its; nil where nothing spins
	next     look     // at what comes
	peeked   bool     // what in.raw has from taken on was only looked at
	taken    int
	puts     *puts // nil while nothing was put off
	one      [1]unix.Iovec
	aloof    bool    // large payloads have no place to be received into
	reply    *buffer // nil while there is nothing in it
	filled   int     // bytes in reply.raw
	req      Request
	since    state.Arrival // of req, from admit
	plan     backend.Plan
	batch    batch
	sequence sequence
	busyFrom time.Duration // when the present turn began, by clock; 0 after a wait
	single   int           // reads in a row that were the only request: see startRead
	deep     int           // how many more reply buffers are to be deep ones
	gaps     []gap         // of the reply buffer
	spliced  toSplice      // the gaps
	pinned   []pinnedRead  // the first pins of them have gaps
	pins     int

	ring     *Uring  // nil in the portable engine
	prepared []*task // for the ring, not yet submitted
	onRing   int     // operations; Uring.mu
	holding  bool    // the reaper's: it is the sender

	turn    turn    // scheduler.mu
	waiters waiters // Pace.mu

	// waited: the client's requests have had to wait for memory.
	waited atomic.Bool

	received atomic.Uint64 // receives that brought something
	counted  uint64        // received, at the last count; Engine.mu

	// tasks counts those queued, running and parked.
	tasks atomic.Int64

	// mu comes before the budget's, and is a leaf otherwise.
	mu struct {
		sync.Mutex
		first, last *task // of tasks, oldest first, until their I/O has ended
		parked      []*task
		held        []*task       // see hold.go
		releasing   bool          // a task that was held is on its way
		expiry      *time.Timer   // of held; nil before the first
		leaving     bool          // the client has said so; held tasks are refused
		dead        bool          // nobody is left to answer; parked and held tasks are dropped
		idle        chan struct{} // closed when tasks is 0, for who waits
	}
}

func newConn(e *Engine, nc net.Conn, codec Codec, d *Disk) *conn {
	c := &conn{
		e: e, nc: nc, t: newTransport(nc), codec: codec, disk: d, pace: d.pace,
		room: make(chan struct{}, 1), done: make(chan struct{}),
	}
	if a := nc.RemoteAddr(); a != nil {
		c.name = a.String()
	}
	c.peeker, _ = c.t.(peeker)
	c.atRest, c.inPayload = c.onRest, c.onPayload
	c.out.init(c.t)
	if s, ok := c.t.(*socket); ok && spins() {
		s.spin.may, s.spin.clock = c.maySpin, clock
		c.spin = &s.spin
	}
	c.ring = e.ring
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
			c.yield()
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
	if cause == errDisconnect {
		c.refuseHeld() // to wait for the activation may take long
	}
	if cause == errDisconnect || cause == errShutdown {
		select {
		case <-c.tasksDone():
		case <-c.out.broken:
		}
	}
	c.drop() // parked writes were not acknowledged
	<-c.tasksDone()
	c.out.farewell()
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

// drop forgets parked and held tasks and lets no more be kept.
func (c *conn) drop() {
	c.mu.Lock()
	c.mu.dead = true
	parked := append(c.takeHeldLocked(len(c.mu.held)), c.mu.parked...)
	c.mu.parked = nil
	c.mu.Unlock()
	for _, t := range parked {
		t.forget()
	}
	c.pace.drop(c)
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
