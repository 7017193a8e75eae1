package control

import (
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// laterBy is how much later: whoever was waiting for an order has gone on by then.
const laterBy = 5 * time.Millisecond

// Later runs what an order leaves to be done and nobody waits for, when the order
// has long been answered. A go statement in the middle of one wakes a thread on
// another core, which took 14 us each; and unmapping what was read, 0.1 ms and
// more, kept the core from who waited for the answer. Setting a timer of the runtime
// wakes a thread as well, so the kernel keeps this one. Its methods may be called
// concurrently.
type Later struct {
	timer *os.File // a timerfd
	rc    syscall.RawConn

	mu      sync.Mutex // a leaf
	waiting []func()
	closed  bool
}

// NewLater makes a Later; without a descriptor to spare, one that runs everything
// at once.
func NewLater() *Later {
	l := &Later{}
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		l.closed = true
		return l
	}
	l.timer = os.NewFile(uintptr(fd), "timerfd")
	if l.rc, err = l.timer.SyscallConn(); err != nil {
		l.Close()
		return l
	}
	go l.run()
	return l
}

// Do has f run on a goroutine of its own. It never waits.
func (l *Later) Do(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		go f()
		return
	}
	l.waiting = append(l.waiting, f)
	if len(l.waiting) > 1 {
		return
	}
	at := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(laterBy))}
	_ = l.rc.Control(func(fd uintptr) {
		// Raw, since it never blocks: the scheduler would wake its monitor for it.
		_, _, _ = syscall.RawSyscall6(unix.SYS_TIMERFD_SETTIME, fd, 0, uintptr(unsafe.Pointer(&at)), 0, 0, 0)
	})
}

func (l *Later) run() {
	for l.rc.Read(func(fd uintptr) bool {
		var times uint64
		_, _, errno := syscall.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&times)), unsafe.Sizeof(times))
		return errno != unix.EAGAIN && errno != unix.EINTR
	}) == nil {
		l.start()
	}
}

func (l *Later) start() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.waiting {
		go f()
	}
	l.waiting = nil
}

// Close has what waits run at once, and whatever comes.
func (l *Later) Close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.start()
	if l.timer != nil {
		_ = l.timer.Close()
	}
}
