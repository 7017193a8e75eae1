package ioloop

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// pipeSlots is how many pieces of pages a pipe holds unless it is told
	// otherwise.
	pipeSlots = 16
	// mostPipes bounds those of an engine; each takes two descriptors.
	mostPipes = 16
	// headsSize is a pipe's memory for what lies between pages, in bytes.
	headsSize = 64 << 10
)

// pipe is what pages go through from a map to a socket. It belongs to one sender
// at a time.
type pipe struct {
	r, w int
	held int // bytes in it
	// heads is for what lies between the pages. It is spliced with them, so what was
	// written stays as it is: at the end the memory's pages are changed for new
	// ones, and the old ones live on as long as a socket has them.
	heads []byte
	used  int // of heads

	// Arguments and results of spliceOnce.
	iov  []unix.Iovec
	long bool
	sent int
	err  error
	fn   func(fd uintptr) bool // spliceOnce, bound once: that would be an allocation for each
}

func newPipe() (*pipe, error) {
	heads, err := unix.Mmap(-1, 0, headsSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	p := &pipe{heads: heads}
	p.fn = p.spliceOnce
	if err := p.open(); err != nil {
		_ = unix.Munmap(heads)
		return nil, err
	}
	return p, nil
}

// canSplice reports whether the system has what pipes are for.
var canSplice = sync.OnceValue(func() bool { return splicesMany() && maySplice() })

// splicesMany reports whether splice gives a socket many pages at once, which it
// does since Linux 6.5; before, each was a send of its own.
func splicesMany() bool {
	var u unix.Utsname
	var major, minor int
	if unix.Uname(&u) != nil {
		return false
	}
	_, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 5)
}

// maySplice reports whether no filter of system calls, such as seccomp's, forbids
// them: otherwise they find out that -1 is no descriptor.
func maySplice() bool {
	const none = ^uintptr(0)
	_, _, filling := syscall.RawSyscall6(unix.SYS_VMSPLICE, none, 0, 0, 0, 0, 0)
	_, _, draining := syscall.RawSyscall6(unix.SYS_SPLICE, none, 0, none, 0, 1, 0)
	return filling == unix.EBADF && draining == unix.EBADF
}

var errSmallPipe = errors.New("the user has too many pipes")

func (p *pipe) open() error {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return os.NewSyscallError("pipe2", err)
	}
	p.r, p.w, p.held = fds[0], fds[1], 0
	// A user who has many gets smaller ones: pipe-user-pages-soft.
	if size, err := unix.FcntlInt(uintptr(p.w), unix.F_GETPIPE_SZ, 0); err != nil || size < pipeSlots*os.Getpagesize() {
		p.closeFds()
		return errSmallPipe
	}
	return nil
}

func (p *pipe) closeFds() {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

func (p *pipe) close() {
	p.closeFds()
	_ = unix.Munmap(p.heads)
}

// room makes room for n bytes of heads; false if there is none.
func (p *pipe) room(n int) bool {
	if n <= len(p.heads)-p.used {
		return true
	}
	if n > len(p.heads) || unix.Madvise(p.heads, unix.MADV_DONTNEED) != nil {
		return false
	}
	p.used = 0
	return true
}

// keep copies b, which is not empty, into heads, which have room for it.
func (p *pipe) keep(b []byte) *byte {
	at := p.used
	p.used += copy(p.heads[at:], b)
	return &p.heads[at]
}

// splice gives the socket what iov refers to, as far as that takes it without
// waiting; the rest stays in the pipe. errAgain and errFault are as of pageSender;
// errFault says also that the pipe did not take the pages for another reason.
// iov is used up. long says that its pages may have to come from a disk.
func (p *pipe) splice(rc syscall.RawConn, iov []unix.Iovec, long bool) (int, error) {
	p.iov, p.long, p.sent, p.err = iov, long, 0, nil
	err := rc.Write(p.fn)
	p.iov = nil
	if err != nil {
		return 0, err
	}
	return p.sent, p.err
}

func (p *pipe) spliceOnce(fd uintptr) bool {
	for p.err == nil && (p.held > 0 || len(p.iov) > 0) {
		var n int
		var errno syscall.Errno
		if p.held > 0 {
			if n, errno = p.drain(fd); n > 0 {
				p.sent += n
				p.held -= n
				continue
			}
		} else if n, errno = p.fill(); n > 0 {
			p.held = n
			p.advance(n)
			continue
		}
		switch errno {
		case unix.EINTR:
		case 0, unix.EAGAIN:
			p.err = errAgain
		default:
			if p.err = errno; p.held == 0 {
				p.err = errFault // it was not the socket that failed
			}
		}
	}
	return true
}

// fill puts as much of iov into the pipe as that holds.
func (p *pipe) fill() (int, syscall.Errno) {
	call := syscall.RawSyscall6
	if p.long {
		call = syscall.Syscall6
	}
	n, _, errno := call(unix.SYS_VMSPLICE, uintptr(p.w), uintptr(unsafe.Pointer(&p.iov[0])), uintptr(len(p.iov)), unix.SPLICE_F_NONBLOCK, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// drain moves what is in the pipe to the socket fd.
func (p *pipe) drain(fd uintptr) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(p.r), 0, fd, 0, uintptr(p.held), unix.SPLICE_F_NONBLOCK)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// advance takes n bytes off the front of iov.
func (p *pipe) advance(n int) {
	for n > 0 {
		v := &p.iov[0]
		size := int(v.Len)
		if n < size {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.SetLen(size - n)
			return
		}
		n -= size
		p.iov = p.iov[1:]
	}
}

// lackPause is how long no pipe is made after there was none to be had.
const lackPause = time.Second

// pipes are an engine's, made as they are needed. Each is used within one send, by
// a thread that runs, so there are never more than those.
type pipes struct {
	off  atomic.Bool // there will be none
	mu   sync.Mutex  // leaf
	free []*pipe
	open int
	next time.Duration // by clock, when one may be made: descriptors, for example, were used up
}

// get takes an empty pipe, which is to be given back; nil if there is none.
func (s *pipes) get() *pipe {
	if s.off.Load() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.free); n > 0 {
		p := s.free[n-1]
		s.free = s.free[:n-1]
		return p
	}
	if s.open >= min(runtime.GOMAXPROCS(0), mostPipes) || clock() < s.next {
		return nil
	}
	if !canSplice() {
		s.off.Store(true)
		return nil
	}
	p, err := newPipe()
	if err != nil {
		s.next = clock() + lackPause
		return nil
	}
	s.open++
	return p
}

// put gives p back. What the socket did not take of it is forgotten.
func (s *pipes) put(p *pipe) {
	lost := false
	if p.held > 0 {
		p.closeFds()
		if lost = p.open() != nil; lost {
			_ = unix.Munmap(p.heads)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if lost {
		s.open--
		return
	}
	s.free = append(s.free, p)
}

// close is called when no connection is left, and may be called again.
func (s *pipes) close() {
	s.off.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.free {
		p.close()
	}
	s.open -= len(s.free)
	s.free = nil
}
