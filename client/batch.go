package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/internal/turns"
)

// Never is the wait of a Source that has nothing to send before the next reply.
const Never = time.Duration(1<<63 - 1)

// MaxDepth is the most requests a Batch keeps in flight.
const MaxDepth = 1 << 12

// Source says what a Batch sends and hears how it went. Its methods are called
// on the goroutine of Run, never at the same time, and must not block.
type Source interface {
	// Next fills in the next request: Cmd, Flags, Offset, Length and Data are
	// zero, Start is now and may be set to an earlier intended time, Slot is set,
	// Tag is the Source's own. more false ends the sending. Otherwise
	// wait 0 means send it, and a positive wait means that there is nothing to
	// send yet: Next is called again after that time or the next reply.
	Next(op *Op, now int64) (wait time.Duration, more bool)

	// Done hears of an answered request, and that the last of its reply was received
	// now; op is valid until it returns.
	Done(op *Op, now int64)
}

var epoch = time.Now()

// Now is the clock of Op.Start, in nanoseconds; only differences mean something.
func Now() int64 { return int64(time.Since(epoch)) }

// Batch is one connection kept busy by one goroutine: up to depth requests are
// in flight, all that can be sent leave in one system call, and as many replies
// as have come are taken in one. It does not allocate per request.
type Batch struct {
	link
	raw syscall.RawConn
	dec decoder

	slots []Op
	free  []int // indices of idle slots
	seq   uint64
	in    receiver
	out   sender

	src    Source
	more   bool  // src has more to send
	wakeAt int64 // src is to be asked again then; 0: after the next reply
	now    int64 // when what is being fed came, or what is sent was looked at
	turn   int64 // when the present turn began; 0 after a wait
	err    error
	park   parking

	// Of the current Run.
	ctx      context.Context
	deadline time.Time
	exact    bool

	onRead, onWrite func(fd uintptr) bool // step and flush, bound once
	onPoll          func(fd uintptr)
}

// turnLength is how long a Batch that has not had to wait keeps others of the process
// from being looked after, see turns. Without an end to it one of three connections
// with 1M reads at depth 16 waited for 0.3 to 1.5 s although its replies had come, and
// with it, p99 and the most are 22 to 24 ms and 32 to 37 instead of 201 to 339 and 258
// to 426; loads of 4k reads are as quick.
const turnLength = 200 * time.Microsecond

var (
	running atomic.Int32 // Batches in Run
	others  turns.Yielder
)

// parking is what a Batch waits for.
type parking uint8

const (
	parkReadable parking = iota // a reply
	parkWritable                // room for requests; replies can wait
	parkBoth                    // either, or the time
	parkNone                    // it is done
)

// DialBatch connects and negotiates as Dial does, for up to depth requests in
// flight (1 to MaxDepth).
func DialBatch(ctx context.Context, uri string, opt Options, depth int) (*Batch, error) {
	if depth < 1 || depth > MaxDepth {
		return nil, fmt.Errorf("depth %d: want 1 to %d", depth, MaxDepth)
	}
	l, err := dial(ctx, uri, opt)
	if err != nil {
		return nil, err
	}
	raw, err := l.nc.(syscall.Conn).SyscallConn()
	if err != nil {
		_ = l.nc.Close()
		return nil, err
	}
	b := &Batch{link: *l, raw: raw, slots: make([]Op, depth)}
	b.dec = b.decoder((*batchRequests)(b))
	b.in.init()
	if opt.Discard {
		if b.in.drain, err = openDrain(nullDevice); err != nil {
			_ = l.nc.Close()
			return nil, err
		}
		b.dec.discardFrom = discardFrom
	}
	b.out.init(depth)
	for i := range b.slots {
		b.slots[i].Slot = i
		b.free = append(b.free, depth-1-i)
	}
	b.onRead, b.onWrite, b.onPoll = b.step, b.flush, b.poll
	return b, nil
}

// Info is what was negotiated.
func (b *Batch) Info() Info { return b.info }

// InFlight is the number of requests not yet answered.
func (b *Batch) InFlight() int { return len(b.slots) - len(b.free) }

// Close says DISC if the connection still works, waits up to a second for the
// server to close it, and closes it. Run must not be running.
func (b *Batch) Close() error {
	b.in.drain.close()
	if b.err == nil {
		_ = b.nc.SetDeadline(time.Now().Add(partTime))
		b.part()
		_, _ = io.Copy(io.Discard, b.nc)
	}
	return b.nc.Close()
}

// Run sends what src gives until it has no more, and returns when all of it is
// answered. Errors the server reports are src's business (Op.Err); Run fails
// when ctx ends, on a broken connection, on a protocol violation, and when
// requests are unanswered at the deadline (zero: none). After an error the
// Batch can only be closed; otherwise Run may be called again.
// exact makes waits for a time precise to some microseconds, at the cost of a
// thread of its own.
func (b *Batch) Run(ctx context.Context, src Source, deadline time.Time, exact bool) error {
	if b.err != nil {
		return b.err
	}
	b.src, b.more, b.wakeAt = src, true, 0
	b.ctx, b.deadline, b.exact = ctx, deadline, exact
	if err := b.nc.SetDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = b.nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if exact {
		defer preciseThread()()
	}
	running.Add(1)
	b.loop()
	running.Add(-1)
	if errors.Is(b.err, os.ErrDeadlineExceeded) {
		if b.err = context.Cause(ctx); b.err == nil {
			b.err = fmt.Errorf("no answer from the server: %d requests unanswered", b.InFlight())
		}
	}
	return b.err
}

func (b *Batch) loop() {
	b.park = parkReadable
	for b.err == nil && b.park != parkNone {
		b.turn = 0
		var err error
		switch b.park {
		case parkReadable:
			err = b.raw.Read(b.onRead)
		case parkWritable:
			err = b.raw.Write(b.onWrite)
		case parkBoth:
			err = b.raw.Control(b.onPoll)
			b.park = parkReadable
		}
		if b.err == nil {
			b.err = err
		}
	}
}

// step sends and receives until there is nothing to do but wait. It returns
// false to wait for a reply in the netpoller; otherwise b.park says what is next.
func (b *Batch) step(fd uintptr) bool {
	for {
		b.now = Now()
		blocked := b.fill(fd)
		if b.err != nil || b.done() {
			b.park = parkNone
			return true
		}
		n := b.receive(fd)
		if b.err != nil {
			return true
		}
		if n > 0 {
			b.giveWay()
			continue
		}
		b.turn = 0
		switch {
		case blocked && b.repliesFit():
			b.park = parkWritable
			return true
		case blocked || b.wakeAt != 0 || b.exact:
			b.park = parkBoth
			return true
		}
		b.park = parkReadable
		return false
	}
}

// giveWay ends the turn if it has been long enough and there are others.
func (b *Batch) giveWay() {
	switch {
	case b.turn == 0:
		b.turn = b.now
	case b.now-b.turn >= int64(turnLength) && running.Load() > 1:
		others.Give()
		b.turn = Now()
	}
}

// flush sends while the connection takes more, and receives what has come. It
// returns false to wait for room.
func (b *Batch) flush(fd uintptr) bool {
	b.park = parkWritable
	for {
		b.now = Now()
		if blocked := b.fill(fd); b.err != nil || !blocked || !b.repliesFit() {
			b.park = parkReadable
			return true
		}
		if b.receive(fd) == 0 {
			return b.err != nil
		}
	}
}

// done says whether everything is sent and answered.
func (b *Batch) done() bool { return !b.more && b.InFlight() == 0 }

// repliesFit says whether what the server owes us surely fits into the socket's
// buffers: then it cannot be held up by our not reading while we wait to send.
func (b *Batch) repliesFit() bool {
	const room, perReply = 64 << 10, 1 << 10
	owed := b.InFlight() * perReply
	if owed > room {
		return false
	}
	for i := range b.slots {
		if op := &b.slots[i]; op.busy && op.Cmd == wire.CmdRead {
			if owed += int(op.Length); owed > room {
				return false
			}
		}
	}
	return true
}

// fill gives every idle slot a request and sends. It says whether requests
// remain unsent for want of room.
func (b *Batch) fill(fd uintptr) (blocked bool) {
	b.wakeAt = 0
	for b.more && len(b.free) > 0 && b.out.room() {
		op := &b.slots[b.free[len(b.free)-1]]
		op.reset()
		op.Start = b.now
		wait, more := b.src.Next(op, b.now)
		if !more {
			b.more = false
			break
		}
		if wait > 0 {
			if wait != Never {
				b.wakeAt = b.now + int64(wait)
			}
			break
		}
		b.free = b.free[:len(b.free)-1]
		b.seq++
		op.cookie, op.busy = b.seq<<16|uint64(op.Slot), true
		if b.dec.unwanted(op) {
			b.in.unwanted++
		}
		b.out.add(op)
	}
	blocked, err := b.out.send(fd)
	if err != nil {
		// What the server said before it closed may tell more.
		for b.receive(fd) > 0 && b.err == nil {
		}
		if !errors.Is(b.err, ErrProtocol) {
			b.err = err
		}
	}
	return blocked
}

// receive takes what has come, if anything: n is 0 if nothing has.
func (b *Batch) receive(fd uintptr) (n int) {
	n, b.err = b.in.receive(fd, &b.dec)
	return n
}

// batchRequests is Batch as its decoder sees it.
type batchRequests Batch

func (b *batchRequests) lookup(cookie uint64) *Op {
	if i := cookie & (1<<16 - 1); i < uint64(len(b.slots)) {
		if op := &b.slots[i]; op.busy && op.cookie == cookie {
			return op
		}
	}
	return nil
}

func (b *batchRequests) done(op *Op) {
	if b.dec.unwanted(op) {
		b.in.unwanted--
	}
	b.src.Done(op, b.in.at)
	op.busy = false
	b.free = append(b.free, op.Slot)
}
