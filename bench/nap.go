package bench

import (
	"fmt"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// napper sleeps to 0.1 ms. With nothing else to do the runtime waits for whole
// milliseconds, which is longer than what is measured; and who sleeps in a system
// call keeps the processor's place that an answer needs to be received, for up to
// as long as he sleeps. It belongs to one goroutine at a time.
type napper struct {
	timer *os.File // a timerfd
	rc    syscall.RawConn
	fn    func(fd uintptr) bool // expired, bound once
}

func newNapper() (*napper, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("timerfd: %w", err)
	}
	n := &napper{timer: os.NewFile(uintptr(fd), "timerfd"), fn: expired}
	if n.rc, err = n.timer.SyscallConn(); err != nil {
		return nil, fmt.Errorf("timerfd: %w", err)
	}
	return n, nil
}

// nap sleeps for d, which is positive.
func (n *napper) nap(d time.Duration) error {
	at := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(d))}
	err := n.rc.Control(func(fd uintptr) { _ = unix.TimerfdSettime(int(fd), 0, &at, nil) })
	if err != nil {
		return err
	}
	return n.rc.Read(n.fn)
}

// expired takes the timer's end, and is called again when there may be one.
func expired(fd uintptr) bool {
	var times uint64
	_, _, errno := syscall.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&times)), unsafe.Sizeof(times))
	return errno != unix.EAGAIN && errno != unix.EINTR
}

func (n *napper) close() { _ = n.timer.Close() }
