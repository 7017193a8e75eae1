package ioloop

import (
	"slices"
	"sync"
	"sync/atomic"
)

// segment is a piece of outgoing bytes.
type segment struct {
	b []byte
	// task is freed once b is sent or dropped; nil if nothing is to be freed.
	task *task
	// later: task is a read whose reply is to be made here, see later.go.
	later bool
}

// outgoing queues and sends one connection's replies. Anyone may send; who
// finds nobody sending becomes the sender and takes along what others queue
// meanwhile. When the socket is full a writer goroutine takes over, so that
// neither the receiving side nor a worker ever waits for a client.
//
// Only the sender takes anything off the queue or gives up the role, also when
// the connection breaks: the bytes it is sending must not be used for anything
// else before its system call has returned.
type outgoing struct {
	t      transport
	pages  pageSender    // t, if it can
	broken chan struct{} // closed by fail

	mu      sync.Mutex // leaf
	queue   []segment
	sending bool          // somebody is the sender; implied by a non-empty queue
	err     error         // the connection is broken; everything is dropped
	idle    chan struct{} // closed when nobody is the sender, for who waits

	// owes is what the client has to take. Only the sender changes it, and stalledSince.
	owes stall
	// untaken is what the client had to take, when that was last looked at, of what
	// the socket has, in bytes.
	untaken atomic.Int64

	scratch [maxSegments][]byte // of the sender
	writer  func()              // write, bound once: that would be an allocation for each
}

func (o *outgoing) init(t transport) {
	o.t, o.broken, o.writer = t, make(chan struct{}), o.write
	o.pages, _ = t.(pageSender)
}

// sendOwn sends seg for the receiving goroutine, which may reuse it if the
// answer is true; otherwise it is queued, and its task freed when it is sent
// or dropped. It never waits for the client.
func (o *outgoing) sendOwn(seg segment) bool {
	o.mu.Lock()
	if o.err != nil {
		o.mu.Unlock()
		return true
	}
	if o.sending {
		o.queue = append(o.queue, seg)
		o.mu.Unlock()
		return false
	}
	o.sending = true
	o.mu.Unlock()

	o.scratch[0] = seg.b
	n, err := o.t.trySend(o.scratch[:1])
	o.scratch[0] = nil
	if err != nil && err != errAgain {
		o.fail(err)
		n = len(seg.b)
	}
	if n == len(seg.b) {
		o.pump()
		return true
	}
	seg.b = seg.b[n:]
	o.precede(seg)
	go o.writer()
	return false
}

// precede puts what is left of what the caller, the sender, has begun to send
// before what others have queued.
func (o *outgoing) precede(segs ...segment) {
	o.mu.Lock()
	o.queue = slices.Insert(o.queue, 0, segs...)
	o.mu.Unlock()
}

// longSend is from where on a send is told to the scheduler, in bytes. To tell it
// of each takes a fifth of the operations of 4k reads at depth 32: 367k @1.3
// instead of 471k @1.2 (tmpfs, Unix socket, operations/s and microseconds of the
// server's processor time).
const longSend = 264 << 10

// longFile is longSend for sendFile, which takes 60 us for 1 MiB since it copies
// nothing. Microseconds of the server's processor time, told and not, of 1M reads
// at depth 4 58 to 63 and 57 to 59, at depth 1 57 to 62 and 53 to 56; and p99 of 4k
// reads beside those at depth 16 141 us and 85.
const longFile = 1 << 20

// sendPages sends what the socket takes of segs, total bytes in all, without
// waiting for it. The caller is the sender. It returns how much was sent: all,
// if the connection is broken; less also if there are pages that cannot be
// read. waits says that a page may have to come from a disk.
func (o *outgoing) sendPages(segs [][]byte, total int, waits bool) int {
	n, err := o.pages.sendPages(segs, waits || total > longSend)
	return o.pagesSent(n, total, err)
}

// splicePages is sendPages by way of p.
func (o *outgoing) splicePages(p *pipe, segs [][]byte, total int, waits bool) int {
	n, err := o.pages.splicePages(p, segs, waits || total > longSend)
	return o.pagesSent(n, total, err)
}

// sendFile is sendPages of head and n bytes of a file.
func (o *outgoing) sendFile(head []byte, fd int, off, n int64, waits bool) int {
	sent, err := o.pages.sendFile(head, fd, off, n, waits || n > longFile)
	return o.pagesSent(sent, len(head)+int(n), err)
}

func (o *outgoing) pagesSent(n, total int, err error) int {
	if err != nil && err != errAgain && err != errFault {
		o.fail(err)
		return total
	}
	return n
}

// resume is precede and pump.
func (o *outgoing) resume(segs ...segment) {
	o.precede(segs...)
	o.pump()
}

// enqueue hands segments over. It never waits for the client.
func (o *outgoing) enqueue(segs ...segment) {
	o.mu.Lock()
	if o.err != nil {
		o.mu.Unlock()
		freeSegments(segs)
		return
	}
	o.queue = append(o.queue, segs...)
	if o.sending {
		o.mu.Unlock()
		return
	}
	o.sending = true
	o.mu.Unlock()
	o.pump()
}

// hold makes the caller the sender unless there is one, so that what is
// enqueued until it calls pump goes out together.
func (o *outgoing) hold() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sending {
		return false
	}
	o.sending = true
	return true
}

// pump sends what is queued until nothing is left, or hands over to a writer.
// The caller is the sender.
func (o *outgoing) pump() {
	if !o.drain(false) {
		go o.writer()
	}
}

// write is the writer goroutine: pump, but waiting for the client.
func (o *outgoing) write() {
	o.drain(true)
}

// drain sends until the queue is empty or the connection broken; then the
// sender's role has ended. Unless wait is set it stops, and answers false,
// when the socket is full or a read's reply is to be made; the role is then still
// the caller's.
func (o *outgoing) drain(wait bool) bool {
	for {
		o.mu.Lock()
		if o.err != nil && len(o.queue) > 0 {
			dropped := o.queue
			o.queue = nil
			o.mu.Unlock()
			freeSegments(dropped)
			continue
		}
		n := o.readyLocked()
		if len(o.queue) == 0 {
			o.sending = false
			o.owes.settled()
			if o.idle != nil {
				close(o.idle)
				o.idle = nil
			}
			o.mu.Unlock()
			return true
		}
		if n == 0 {
			t := o.queue[0].task
			o.mu.Unlock()
			if !wait {
				return false
			}
			o.sendLater(t)
			continue
		}
		for i := range n {
			o.scratch[i] = o.queue[i].b
		}
		o.mu.Unlock()

		var sent int
		var err error
		if wait {
			o.wait()
			sent, err = o.t.send(o.scratch[:n])
			o.owes.move(sent)
		} else {
			sent, err = o.t.trySend(o.scratch[:n])
		}
		clear(o.scratch[:n])
		if err == errAgain {
			return false
		}
		if err != nil {
			o.fail(err)
			continue
		}
		o.sent(sent)
	}
}

// wait precedes waiting for the client. The caller is the sender.
func (o *outgoing) wait() {
	if o.owes.begun.Load() == 0 {
		o.untaken.Store(o.t.untaken())
	}
	o.owes.wait()
}

// stalledSince is when the client last took enough, in Unix nanoseconds; 0 if it is
// not waited for. A socket that was full tells the sender that the client takes
// something only when much of it is free, of 4 MiB 3; a slow client needs long for that.
func (o *outgoing) stalledSince() int64 {
	since := o.owes.since.Load()
	if since == 0 {
		return 0
	}
	left := o.t.untaken()
	if o.untaken.Load()-left < leastMove {
		return since
	}
	if o.owes.restart(since) {
		o.untaken.Store(left)
	}
	return o.owes.since.Load()
}

// sent takes n bytes off the front of the queue.
func (o *outgoing) sent(n int) {
	o.mu.Lock()
	k := 0
	for k < len(o.queue) && !o.queue[k].later && n >= len(o.queue[k].b) {
		n -= len(o.queue[k].b)
		k++
	}
	var inline [maxSegments]segment
	done := append(inline[:0], o.queue[:k]...)
	rest := copy(o.queue, o.queue[k:])
	clear(o.queue[rest:])
	o.queue = o.queue[:rest]
	if n > 0 {
		o.queue[0].b = o.queue[0].b[n:]
	}
	o.mu.Unlock()
	freeSegments(done)
}

// fail breaks the connection: nothing is sent any more. What is queued is
// dropped by the sender, which closing the transport wakes, and the receiving
// side with it.
func (o *outgoing) fail(err error) {
	o.mu.Lock()
	if o.err == nil {
		o.err = err
		close(o.broken)
	}
	o.mu.Unlock()
	_ = o.t.close()
}

// cause is why the connection is broken, or otherwise if it is not.
func (o *outgoing) cause(otherwise error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil {
		return o.err
	}
	return otherwise
}

func freeSegments(segs []segment) {
	for i := range segs {
		if t := segs[i].task; t != nil {
			t.free()
		}
	}
}

// flushed is closed when everything queued so far is sent, or dropped, and its
// buffers are given back.
func (o *outgoing) flushed() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.sending {
		return closed
	}
	if o.idle == nil {
		o.idle = make(chan struct{})
	}
	return o.idle
}

// closed is for who need not wait.
var closed = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()
