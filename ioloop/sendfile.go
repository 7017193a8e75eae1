package ioloop

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

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
	case s.room.Load() < 4*n || !more && s.unsent.Load() == 0:
		return notAsFile
	case s.takesFiles(n) && !s.fits(n):
		return whenItFits
	}
	return asFile
}

// takesFiles: a smaller socket is soon empty after its client has woken the writer,
// and they work in turns. Operations/s without waiting and with it, where
// net.core.wmem_max is 208 KiB (Linux long had that), 64k at depth 16 58k and 51k, at
// 32 70k and 53k; 1 MiB, 256k at depth 16 17k and 14k.
func (s *socket) takesFiles(n int64) bool {
	room := s.room.Load()
	return s.unix && n >= fileMin && room >= 4*n && room >= s.leastRoom
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
