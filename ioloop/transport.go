package ioloop

import (
	"errors"
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// errAgain: the socket takes or has nothing now.
var errAgain = errors.New("would block")

// maxSegments is how many pieces one send carries.
const maxSegments = 128

// transport is a connection's byte stream. recv is called by the receiving
// goroutine only, the send methods by one goroutine at a time.
type transport interface {
	// recv reads at least one byte into p. With idle not nil it calls that
	// once before it waits. If idle says that p was released, recv touches p
	// no more and returns errAgain as soon as there is something to read: so
	// that a connection at rest holds no buffer. idle must neither wait nor
	// close the transport: close waits for the call it is in.
	recv(p []byte, idle func() (released bool)) (int, error)
	// trySend sends what the socket takes without waiting; errAgain if
	// nothing.
	trySend(segs [][]byte) (int, error)
	// send sends at least one byte, waiting for the socket.
	send(segs [][]byte) (int, error)
	// untaken is how many bytes of what was sent the client has not taken, as far
	// as that is known. It is for any goroutine.
	untaken() int64
	// close ends the calls under way, and waits for them.
	close() error
}

// peeker is a transport that shows bytes before it hands them over. Its methods
// are for the receiving goroutine.
type peeker interface {
	// peek is recv, but what it read stays to be received.
	peek(p []byte, idle func() (released bool)) (int, error)
	// take receives into iov what is there already; EFAULT if the first bytes
	// cannot be put there. It works also after the deadline for receiving.
	take(iov []unix.Iovec) (int, error)
	// pending is how many bytes are there to be received.
	pending() int
}

func newTransport(nc net.Conn) transport {
	if sc, ok := nc.(syscall.Conn); ok {
		if rc, err := sc.SyscallConn(); err == nil {
			return newSocket(nc, rc)
		}
	}
	s := &stream{nc: nc}
	if over, ok := nc.(interface{ NetConn() net.Conn }); ok {
		s.below, _ = newTransport(over.NetConn()).(*socket)
	}
	return s
}

// socket works on the descriptor itself, which Go keeps in non-blocking mode
// in its netpoller. The calls are raw: they never block, and telling the
// scheduler about each would cost more than they do.
type socket struct {
	nc   net.Conn
	rc   syscall.RawConn
	unix bool
	spin spinner
	// room is how many bytes of replies the socket takes before the client
	// does; 0 before it was asked. Unix sockets only. The sender sets it.
	room atomic.Int64
	// leastRoom is from where on replies wait until they fit: 2*sendBuffer, but for
	// tests.
	leastRoom int64
	// unsent is what the client had not taken when it was last asked.
	unsent    atomic.Int64
	askUnsent func(fd uintptr)

	// Arguments and results of the callbacks below, which are made once:
	// a closure per call would allocate.
	in struct {
		p     []byte
		flags uintptr
		n     int
		err   error
		idle  func() (released bool)
		fn    func(fd uintptr) bool
	}
	took struct {
		msg   unix.Msghdr
		n     int
		err   error
		fn    func(fd uintptr)
		there int32
		ask   func(fd uintptr)
	}
	out struct {
		msg  unix.Msghdr
		iov  [maxSegments]unix.Iovec
		wait bool // for the socket
		// call is made through a variable, so what it points to must not be on
		// the stack.
		call func(trap, a1, a2, a3, a4, a5, a6 uintptr) (r1, r2 uintptr, err syscall.Errno)
		n    int
		err  error
		fn   func(fd uintptr) bool
	}
	file struct {
		head   []byte
		fd     int
		off, n int64
		at     int64 // of the present call
		fn     func(fd uintptr) bool
		ask    func(fd uintptr)
		wanted int64
		wait   func(fd uintptr) bool
	}
}

func newSocket(nc net.Conn, rc syscall.RawConn) *socket {
	s := &socket{nc: nc, rc: rc, leastRoom: 2 * sendBuffer}
	_, s.unix = nc.(*net.UnixConn)
	s.in.fn, s.out.fn = s.recvOnce, s.sendOnce
	s.took.fn, s.took.ask = s.takeOnce, s.askPending
	s.file.fn, s.file.ask, s.file.wait = s.sendFileOnce, s.askRoom, s.fitsWanted
	s.askUnsent = s.findUnsent
	return s
}

func (s *socket) recv(p []byte, idle func() (released bool)) (int, error) {
	return s.receive(p, idle, unix.MSG_DONTWAIT)
}

func (s *socket) peek(p []byte, idle func() (released bool)) (int, error) {
	return s.receive(p, idle, unix.MSG_DONTWAIT|unix.MSG_PEEK)
}

func (s *socket) receive(p []byte, idle func() (released bool), flags uintptr) (int, error) {
	s.in.p, s.in.n, s.in.err, s.in.idle, s.in.flags = p, 0, nil, idle, flags
	err := s.rc.Read(s.in.fn)
	s.in.p, s.in.idle = nil, nil
	if err != nil {
		return 0, err
	}
	if s.in.n > 0 {
		s.spin.got()
	}
	return s.in.n, s.in.err
}

func (s *socket) recvOnce(fd uintptr) bool {
	if s.in.p == nil { // woken after it was released: there is something to read
		s.in.err = errAgain
		return true
	}
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_RECVFROM, fd,
			uintptr(unsafe.Pointer(unsafe.SliceData(s.in.p))), uintptr(len(s.in.p)), s.in.flags, 0, 0)
		switch errno {
		case 0:
			s.in.n = int(n)
			if n == 0 {
				s.in.err = io.EOF
			}
			return true
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			if s.spin.again() {
				continue
			}
			if s.in.idle != nil {
				if s.in.idle() {
					s.in.p = nil
				}
				s.in.idle = nil
			}
			return false // the netpoller wakes us
		default:
			s.in.err = errno
			return true
		}
	}
}

// longTake is from where on a take is told to the scheduler, in bytes: it goes on
// for as long as copying them does.
const longTake = 1 << 20

func (s *socket) take(iov []unix.Iovec) (int, error) {
	s.took.msg.Iov = &iov[0]
	s.took.msg.SetIovlen(len(iov))
	s.took.n, s.took.err = 0, nil
	err := s.rc.Control(s.took.fn)
	s.took.msg.Iov = nil
	if err != nil {
		return 0, err
	}
	return s.took.n, s.took.err
}

func (s *socket) takeOnce(fd uintptr) {
	call := syscall.RawSyscall
	if s.took.msg.Iovlen == 1 && s.took.msg.Iov.Len >= longTake {
		call = syscall.Syscall
	}
	for {
		n, _, errno := call(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&s.took.msg)), unix.MSG_DONTWAIT)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			s.took.err = errAgain
		case errno != 0:
			s.took.err = errno
		case n == 0:
			s.took.err = io.EOF
		default:
			s.took.n = int(n)
		}
		return
	}
}

func (s *socket) pending() int {
	s.took.there = 0
	if s.rc.Control(s.took.ask) != nil {
		return 0
	}
	return int(s.took.there)
}

func (s *socket) askPending(fd uintptr) {
	_, _, errno := syscall.RawSyscall(unix.SYS_IOCTL, fd, unix.SIOCINQ, uintptr(unsafe.Pointer(&s.took.there)))
	if errno != 0 {
		s.took.there = 0
	}
}

func (s *socket) trySend(segs [][]byte) (int, error) { return s.transmit(segs, false, false) }
func (s *socket) send(segs [][]byte) (int, error)    { return s.transmit(segs, true, false) }

func (s *socket) sendPages(segs [][]byte, long bool) (int, error) {
	return s.transmit(segs, false, long)
}

func (s *socket) transmit(segs [][]byte, wait, long bool) (int, error) {
	o := &s.out
	n := min(len(segs), maxSegments)
	for i, seg := range segs[:n] {
		o.iov[i].Base = unsafe.SliceData(seg)
		o.iov[i].SetLen(len(seg))
	}
	o.msg.Iov = &o.iov[0]
	o.msg.SetIovlen(n)
	o.wait, o.call, o.n, o.err = wait, syscall.RawSyscall6, 0, nil
	if long {
		o.call = syscall.Syscall6
	}
	err := s.rc.Write(o.fn)
	runtime.KeepAlive(segs)
	clear(o.iov[:n]) // hold on to no buffer
	if err != nil {
		return 0, err
	}
	return o.n, o.err
}

func (s *socket) sendOnce(fd uintptr) bool {
	o := &s.out
	for {
		n, _, errno := o.call(unix.SYS_SENDMSG, fd,
			uintptr(unsafe.Pointer(&o.msg)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0, 0)
		switch errno {
		case 0:
			o.n = int(n)
			return true
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			if o.wait {
				return false
			}
			o.err = errAgain
			return true
		default:
			o.err = errno
			return true
		}
	}
}

func (s *socket) untaken() int64 {
	_ = s.rc.Control(s.askUnsent)
	return s.unsent.Load()
}

func (s *socket) findUnsent(fd uintptr) {
	n, _ := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
	s.unsent.Store(int64(n))
}

func (s *socket) close() error { return s.nc.Close() }

// stream serves any net.Conn that is no plain socket (TLS, pipes of tests).
type stream struct {
	nc    net.Conn
	below *socket // nil if there is none, or it is not known
	ahead []byte  // received while there was no buffer; part of first
	first [1]byte
}

// recv cannot know whether it will wait, so it always calls idle.
func (s *stream) recv(p []byte, idle func() (released bool)) (int, error) {
	if len(s.ahead) > 0 {
		n := copy(p, s.ahead)
		s.ahead = s.ahead[n:]
		return n, nil
	}
	if idle == nil || !idle() {
		n, err := s.nc.Read(p)
		if n > 0 {
			err = nil // TLS tells the end with the last bytes, and again
		}
		return n, err
	}
	n, err := s.nc.Read(s.first[:])
	s.ahead = s.first[:n]
	if n > 0 {
		return 0, errAgain
	}
	return 0, err
}

// trySend cannot know what would block, so everything goes to the writer.
func (s *stream) trySend([][]byte) (int, error) { return 0, errAgain }

// send sends little enough at once for a slow client to be seen to move.
func (s *stream) send(segs [][]byte) (int, error) {
	return s.nc.Write(segs[0][:min(len(segs[0]), leastMove)])
}

func (s *stream) untaken() int64 {
	if s.below == nil {
		return 0
	}
	return s.below.untaken()
}

func (s *stream) close() error { return s.nc.Close() }
