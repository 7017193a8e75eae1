package client

import (
	"os"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/export/wire"
)

// The socket is nonblocking and in Go's netpoller, so these calls return at
// once and go past the scheduler's bookkeeping for calls that may block.

// receiver takes replies from the socket and feeds them to a decoder.
type receiver struct {
	buf  []byte
	have int // bytes of buf not yet parsed, at its beginning

	// at is when what is being fed was received, on the clock of Now. Replies often
	// come in the turn that sent their requests, so the time of the turn is not enough.
	at int64

	drain    *drain // nil: everything is received
	unwanted int    // reads in flight whose payloads the drain is for

	iov [2]unix.Iovec
	msg unix.Msghdr
}

// receiveSize is how much is received at most in one call: as many replies as
// there are while it stays in the processor's cache.
const receiveSize = 256 << 10

// directFrom is how much payload must be outstanding to be received straight
// into its place.
const directFrom = 16 << 10

func (r *receiver) init() { r.buf = make([]byte, receiveSize) }

// receive makes one call and feeds what it brought. n is 0 if there is nothing.
func (r *receiver) receive(fd uintptr, d *decoder) (n int, err error) {
	if dst := d.direct(); len(dst) >= directFrom {
		return r.receiveInto(fd, d, dst)
	}
	if left := d.discards(); left > 0 {
		return r.discard(fd, d, left)
	}
	n, err = systemCall("recv").result(syscall.RawSyscall6(unix.SYS_RECVFROM, fd,
		uintptr(unsafe.Pointer(&r.buf[r.have])), uintptr(r.room()), unix.MSG_DONTWAIT, 0, 0))
	if n <= 0 {
		return n, err
	}
	r.at = Now()
	return n, r.feed(d, n)
}

// room is how much to receive into the buffer.
func (r *receiver) room() int {
	if r.unwanted > 0 {
		return headsSize
	}
	return len(r.buf) - r.have
}

// receiveInto receives a payload into its place, and what comes behind it into
// the buffer, which is empty while a payload is outstanding.
func (r *receiver) receiveInto(fd uintptr, d *decoder, dst []byte) (n int, err error) {
	r.iov[0].Base = &dst[0]
	r.iov[0].SetLen(len(dst))
	r.iov[1].Base = &r.buf[0]
	r.iov[1].SetLen(r.room())
	r.msg.Iov = &r.iov[0]
	r.msg.SetIovlen(2)
	n, err = systemCall("recvmsg").result(syscall.RawSyscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&r.msg)), unix.MSG_DONTWAIT))
	if n <= 0 {
		return n, err
	}
	r.at = Now()
	if err := d.wrote(min(n, len(dst))); err != nil || n <= len(dst) {
		return n, err
	}
	return n, r.feed(d, n-len(dst))
}

// discard throws away what has come of a payload, left bytes of it at most.
func (r *receiver) discard(fd uintptr, d *decoder, left int) (n int, err error) {
	n, err = r.drain.take(fd, left)
	if n <= 0 {
		return n, err
	}
	r.at = Now()
	if err := r.drain.empty(n); err != nil {
		return n, err
	}
	return n, d.wrote(n)
}

func (r *receiver) feed(d *decoder, n int) error {
	n += r.have
	used, err := d.feed(r.buf[:n])
	r.have = copy(r.buf, r.buf[used:n])
	return err
}

// systemCall is the name of one that receives.
type systemCall string

// result is the outcome of a receive: n 0 and no error if there is nothing.
func (c systemCall) result(r, _ uintptr, errno syscall.Errno) (n int, err error) {
	switch {
	case errno == syscall.EAGAIN || errno == syscall.EINTR:
		return 0, nil
	case errno != 0:
		return 0, eof(os.NewSyscallError(string(c), errno))
	case r == 0:
		return 0, ErrServerClosed
	}
	return int(r), nil
}

// sender collects requests and sends them in as few calls as possible.
type sender struct {
	heads []byte       // headers of requests not yet sent
	iov   []unix.Iovec // [sent:] is to be sent
	sent  int
	msg   unix.Msghdr
}

func (s *sender) init(depth int) {
	s.heads = make([]byte, 0, 4*depth*wire.RequestSize)
	s.iov = make([]unix.Iovec, 0, min(8*depth, maxIov))
}

// maxIov is the most pieces sendmsg takes.
const maxIov = 1024

// room says whether another request can be added.
func (s *sender) room() bool {
	return cap(s.heads)-len(s.heads) >= wire.RequestSize && cap(s.iov)-len(s.iov) >= 2
}

// add queues a request. Its Data must not change until it is answered.
func (s *sender) add(op *Op) {
	at := len(s.heads)
	s.heads = s.heads[:at+wire.RequestSize]
	putRequest(s.heads[at:], op.Cmd, op.Flags, op.cookie, op.Offset, op.Length)
	if n := len(s.iov); n > s.sent && at > 0 && adjoins(&s.iov[n-1], &s.heads[at]) {
		s.iov[n-1].SetLen(int(s.iov[n-1].Len) + wire.RequestSize)
	} else {
		s.push(s.heads[at:])
	}
	if op.Cmd == wire.CmdWrite && len(op.Data) > 0 {
		s.push(op.Data)
	}
}

func (s *sender) push(p []byte) {
	s.iov = append(s.iov, unix.Iovec{Base: &p[0]})
	s.iov[len(s.iov)-1].SetLen(len(p))
}

// adjoins says whether p follows what v describes.
func adjoins(v *unix.Iovec, p *byte) bool {
	return uintptr(unsafe.Pointer(v.Base))+uintptr(v.Len) == uintptr(unsafe.Pointer(p))
}

// send sends what is queued. It says whether some of it remains for want of room.
func (s *sender) send(fd uintptr) (blocked bool, err error) {
	for s.sent < len(s.iov) {
		s.msg.Iov = &s.iov[s.sent]
		s.msg.SetIovlen(len(s.iov) - s.sent)
		n, _, errno := syscall.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&s.msg)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
			s.advance(int(n))
		case syscall.EAGAIN:
			return true, nil
		case syscall.EINTR:
		default:
			return false, eof(os.NewSyscallError("send", errno))
		}
	}
	s.iov, s.heads, s.sent = s.iov[:0], s.heads[:0], 0
	return false, nil
}

// advance forgets the first n bytes of the queue.
func (s *sender) advance(n int) {
	for n > 0 {
		v := &s.iov[s.sent]
		if n < int(v.Len) {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.SetLen(int(v.Len) - n)
			return
		}
		n -= int(v.Len)
		s.sent++
	}
}

// poll waits for replies, for room if something is unsent, and for wakeAt. It
// may block the thread.
func (b *Batch) poll(fd uintptr) {
	const slice = 100 * time.Millisecond // how late the end of ctx may be seen
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if b.out.sent < len(b.out.iov) {
		fds[0].Events |= unix.POLLOUT
	}
	for {
		if b.ctx.Err() != nil || (!b.deadline.IsZero() && time.Now().After(b.deadline)) {
			b.err = os.ErrDeadlineExceeded
			return
		}
		wait := slice
		if b.wakeAt != 0 {
			if wait = min(wait, time.Duration(b.wakeAt-Now())); wait <= 0 {
				return
			}
		}
		ts := unix.NsecToTimespec(int64(wait))
		n, err := unix.Ppoll(fds[:], &ts, nil)
		if err != nil && err != syscall.EINTR {
			b.err = os.NewSyscallError("ppoll", err)
			return
		}
		if n > 0 {
			return
		}
	}
}

// preciseThread keeps the goroutine on a thread whose timers are not rounded,
// until the returned function is called.
func preciseThread() (undo func()) {
	runtime.LockOSThread()
	old, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	return func() {
		if err == nil {
			_ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(old), 0, 0, 0)
		}
		runtime.UnlockOSThread()
	}
}
