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

// pageSender is a transport that can send pages of files: see backend.File.Pages.
type pageSender interface {
	// sendPages is trySend, but errFault if the first byte to send is in a
	// page that cannot be read. long says that it may have to wait for a disk,
	// or takes as long.
	sendPages(segs [][]byte, long bool) (int, error)
	// splicePages is sendPages of segs of which the second, the fourth and so on are
	// not copied: they stay pages of the file until the client takes them. p has
	// room for the others, and keeps what the socket does not take.
	splicePages(p *pipe, segs [][]byte, long bool) (int, error)
	// prefersSplice reports whether splicePages is the faster way for n bytes of
	// pages. inTurns says that it is one send of several to a client that has
	// nothing else to do.
	prefersSplice(n int64, inTurns bool) bool
	// sendFile is sendPages of head and n bytes at off of the file fd, which
	// are not copied: they stay pages of the file until the client takes them.
	sendFile(head []byte, fd int, off, n int64, long bool) (int, error)
	// fileWay says whether sendFile is the faster way for n bytes, and when. more
	// says that other requests have come.
	fileWay(n int64, more bool) fileWay
	// takesFiles is whether fileWay may be whenItFits for n bytes. It is for any
	// goroutine.
	takesFiles(n int64) bool
	// waitToFit waits until fileWay is not whenItFits for n bytes.
	waitToFit(n int64) error
}

// fileWay: see pageSender.
type fileWay uint8

const (
	notAsFile  fileWay = iota
	asFile             // now
	whenItFits         // the socket has no room for all of it
)

// errFault: see pageSender.
const errFault = unix.EFAULT

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
	s := &socket{nc: nc, rc: rc}
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

// Replies of fileMin bytes and more are worth sendFile, on Unix sockets that
// have room for four of them and while the client is not waiting: the kernel
// sends 64 KiB at a time, waking a client that waits with each. Operations/s and
// server's processor time in microseconds, tmpfs, by sendPages and by sendFile
// (nbd-export bench, two cores): 64k at depth 8 40k @25 and 57k @12, 1M at depth 4
// 3.5k @300 and 4.8k @107. On TCP it was slower at 1M (2.1k @480 against 3.6k
// @278) and no faster at 64k.
const fileMin = 64 << 10

// sendBuffer is asked of the system for Unix sockets with such replies, in
// bytes; it gives up to twice that. (TCP finds its own size, unless it is told.)
const sendBuffer = 2 << 20

func (s *socket) fileWay(n int64, more bool) fileWay {
	switch {
	case !s.unix || n < fileMin || s.rc.Control(s.file.ask) != nil:
		return notAsFile
	case !s.takesFiles(n) || !more && s.unsent.Load() == 0:
		return notAsFile
	case !s.fits(n):
		return whenItFits
	}
	return asFile
}

func (s *socket) takesFiles(n int64) bool {
	return s.unix && n >= fileMin && s.room.Load() >= 4*n
}

// fits is whether the socket takes n bytes of pages and what it needs to know of
// them, as far as its room is known: if not, what it does not take is copied.
func (s *socket) fits(n int64) bool { return s.unsent.Load()+n+n/32 <= s.room.Load() }

// askRoom makes room for replies, once, and finds how much of what was sent
// the client has not taken.
func (s *socket) askRoom(fd uintptr) {
	if s.room.Load() == 0 {
		room, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF)
		if room >= 2*fileMin { // otherwise somebody wants it small
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, max(sendBuffer, room/2))
			room, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF)
		}
		s.room.Store(int64(room))
	}
	s.findUnsent(fd)
}

// waitToFit: what does not fit although it is a quarter of the room at most leaves
// more than half of it taken, and a Unix socket says that it can be written to when
// three quarters are free, so there is an edge for the netpoller to come.
func (s *socket) waitToFit(n int64) error {
	s.file.wanted = n
	return s.rc.Write(s.file.wait)
}

func (s *socket) fitsWanted(fd uintptr) bool {
	s.askRoom(fd)
	return s.fits(s.file.wanted)
}

func (s *socket) sendFile(head []byte, fd int, off, n int64, long bool) (int, error) {
	f, o := &s.file, &s.out
	f.head, f.fd, f.off, f.n = head, fd, off, n
	o.call, o.n, o.err = syscall.RawSyscall6, 0, nil
	if long {
		o.call = syscall.Syscall6
	}
	err := s.rc.Write(f.fn)
	f.head = nil
	if err != nil {
		return 0, err
	}
	return o.n, o.err
}

func (s *socket) sendFileOnce(fd uintptr) bool {
	f, o := &s.file, &s.out
	for {
		var n uintptr
		var errno syscall.Errno
		if left := f.n - int64(o.n-len(f.head)); o.n < len(f.head) {
			p := f.head[o.n:]
			n, _, errno = syscall.RawSyscall6(unix.SYS_SENDTO, fd,
				uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL|unix.MSG_MORE, 0, 0)
		} else if left == 0 {
			return true
		} else {
			f.at = f.off + f.n - left
			n, _, errno = o.call(unix.SYS_SENDFILE, fd, uintptr(f.fd), uintptr(unsafe.Pointer(&f.at)), uintptr(left), 0, 0)
			if n == 0 && errno != unix.EAGAIN && errno != unix.EINTR {
				errno = errFault // past the end of the file, or its disk fails; or the socket, as the next send will see
			}
		}
		switch errno {
		case 0:
			o.n += int(n)
		case unix.EINTR:
		case unix.EAGAIN:
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
