package client

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// With Options.Discard payloads that nobody wants are not copied out of the
// socket: splice moves their pages into a pipe, and from there to /dev/null, which
// lets go of them. Copying is most of what large reads cost a client, so a load of
// them says more about the client than about the server. Operations/s from tmpfs
// over a Unix socket, and cores busy of client and server (nbd-export bench):
//
//	              copied                 discarded
//	1M, depth 4   6.2k, 0.93 and 0.47    14k, 0.52 and 0.93
//	1M, depth 1   4.1k, 0.78 and 0.38    15k, 0.56 and 0.93
//	64k, depth 8   91k, 0.91 and 0.90   115k, 0.63 and 0.86

const (
	// discardFrom is the least length of a read that is worth the two system calls.
	discardFrom = 64 << 10
	// headsSize is how much is received in one call while such reads are in flight:
	// some headers. What comes behind a header is a payload, and would be copied.
	headsSize = 512
	// drainSize is the most that one splice moves, as long as the user may have
	// pipes of that size.
	drainSize = 1 << 20
	// nullDevice takes what is thrown away.
	nullDevice = "/dev/null"
)

// drain throws away what it takes from a socket. Its pipe is empty between calls.
type drain struct {
	in, out int // the pipe: where bytes go in, and come out
	null    int
}

// openDrain opens a drain that ends in device.
func openDrain(device string) (*drain, error) {
	null, err := unix.Open(device, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("discarding payloads: %w", &os.PathError{Op: "open", Path: device, Err: err})
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		_ = unix.Close(null)
		return nil, fmt.Errorf("discarding payloads: %w", os.NewSyscallError("pipe2", err))
	}
	// A user with many pipes gets no larger ones. A small one only takes more calls.
	_, _ = unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, drainSize)
	return &drain{in: p[1], out: p[0], null: null}, nil
}

// close may be called again, and on nil.
func (d *drain) close() {
	if d == nil || d.null < 0 {
		return
	}
	for _, fd := range []int{d.in, d.out, d.null} {
		_ = unix.Close(fd)
	}
	d.null = -1
}

// take moves up to most bytes from the socket fd into the pipe. n is 0 if there
// are none. They are to be emptied out before the next call.
func (d *drain) take(fd uintptr, most int) (n int, err error) {
	return systemCall("splice").result(syscall.RawSyscall6(unix.SYS_SPLICE, fd, 0, uintptr(d.in), 0,
		uintptr(most), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE))
}

// empty throws away the n bytes that are in the pipe.
func (d *drain) empty(n int) error {
	for n > 0 {
		r, _, errno := syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(d.out), 0, uintptr(d.null), 0,
			uintptr(n), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		switch {
		case errno == syscall.EINTR:
			continue
		case errno != 0:
			return fmt.Errorf("discarding payloads: %w", os.NewSyscallError("splice", errno))
		case r == 0:
			return fmt.Errorf("discarding payloads: the pipe lacks %d bytes", n)
		}
		n -= int(r)
	}
	return nil
}
