// Package turns lets goroutines that never wait give way.
//
// Go's scheduler asks its netpoller who is ready when a thread has nothing to run. A
// goroutine that makes raw system calls on a socket which always has something for it
// keeps its thread, and as long as every thread that is awake has one like it nobody
// asks: the runtime's monitor does after 10 ms, unless it sleeps. runtime.Gosched does
// not help, since the goroutine is then what there is to run.
package turns

import (
	"os"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Yielder is what any number of goroutines give way with, by one descriptor, at the
// same time too. The zero value is ready for use.
type Yielder struct {
	mu     sync.Mutex // leaf
	back   sync.Cond  // of mu: waits is false again
	waits  bool       // somebody does, in the netpoller
	rounds uint64     // how often somebody has
	event  *os.File   // an eventfd; nil before the first round

	// Of who waits:
	rc    syscall.RawConn
	wrote bool
	fn    func(fd uintptr) bool // once, bound: that would be an allocation for each
}

// Give waits in the netpoller for what is there already: a thread that has nothing
// else to run then asks it, and finds who else is ready. Who finds somebody waiting
// there waits with him. Without a descriptor to spare it returns at once.
func (y *Yielder) Give() {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.waits {
		for n := y.rounds; n == y.rounds; {
			y.back.Wait()
		}
		return
	}
	if y.event == nil && !y.openLocked() {
		return
	}
	y.waits, y.wrote = true, false
	y.mu.Unlock()
	_ = y.rc.Read(y.fn)
	y.mu.Lock()
	y.waits = false
	y.rounds++
	y.back.Broadcast()
}

// Rounds is how often somebody has waited.
func (y *Yielder) Rounds() uint64 {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.rounds
}

func (y *Yielder) openLocked() bool {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return false
	}
	event := os.NewFile(uintptr(fd), "eventfd")
	if y.rc, err = event.SyscallConn(); err != nil {
		_ = event.Close()
		return false
	}
	y.event, y.back.L, y.fn = event, &y.mu, y.once
	return true
}

// once makes the descriptor readable and is called again when the netpoller has
// found it to be.
func (y *Yielder) once(fd uintptr) (done bool) {
	n := uint64(1)
	trap := uintptr(unix.SYS_WRITE)
	if y.wrote {
		trap = unix.SYS_READ
	}
	_, _, _ = syscall.RawSyscall(trap, fd, uintptr(unsafe.Pointer(&n)), unsafe.Sizeof(n))
	done, y.wrote = y.wrote, true
	return done
}

// Close gives the descriptor back. It is for when nobody gives way any more, and may
// be called again.
func (y *Yielder) Close() {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.event != nil {
		_ = y.event.Close()
		y.event = nil
	}
}
