package ioloop

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A connection whose client keeps its socket full never waits, and as long as
// every thread has one like it to run Go does not ask the netpoller who else has
// something to do: its monitor does so after 10 ms. A small read of another
// connection, or an order on the control socket, waited for 5 ms in the middle and
// for 30 at worst. So where there are as many busy connections as threads, each
// waits after a turn, in the netpoller itself, for what is there already: a thread
// that has nothing else to run then asks it.
//
// Four connections that write without a pause and a reader at depth 1, tmpfs, two
// cores, three runs before and after: 397k, 368k, 428k writes/s and 429k, 434k,
// 375k; the longest read took 15 to 78 ms and 1.6 to 11. With turns of 50, 100 and
// 200 us p99.9 of the reads was 4.4 to 5.3 ms, 1.2 to 2.3 and 0.8 to 0.9, and
// writes/s 448k to 463k, 464k to 486k and 444k to 493k.
const turnLength = 200 * time.Microsecond

// coreTurn is how often the processor is offered to other programs' threads then,
// in all. The kernel lets a busy thread go on until its tick, 4 ms here, while a
// client that waits for the answer it has got does not run. While four connections
// write without a pause and the image is handed over (bench/compare, 170 times) reads
// take 9.5 ms at p99 and 24 at most, and with this 5.7 and 8.2; orders 13 and 9.7 ms
// at p99; writes as many. Offered by each connection in each turn reads at depth 1 are
// fewer by a third.
const coreTurn = time.Millisecond

// yield ends the turn if it has been long enough and others may want the thread.
func (c *conn) yield() {
	now := clock()
	if c.busyFrom == 0 {
		c.busyFrom = now
		return
	}
	if now-c.busyFrom < turnLength {
		return
	}
	c.busyFrom = now
	if c.e.crowd() >= runtime.GOMAXPROCS(0) {
		c.e.yielder.give()
		c.e.yielder.offerCore(now)
	}
}

// yielder is what the connections of an engine give way with. They share a
// descriptor: if each had its own there would be none left for handing over, for
// which a quarter is kept (export.mostConnections).
type yielder struct {
	mu     sync.Mutex   // leaf
	back   sync.Cond    // of mu: waits is false again
	waits  bool         // somebody does, in the netpoller
	rounds uint64       // how often somebody has
	offer  atomic.Int64 // when the core was offered last, by clock
	event  *os.File     // an eventfd; nil before the first round

	// Of who waits:
	rc    syscall.RawConn
	wrote bool
	fn    func(fd uintptr) bool // once, bound: that would be an allocation for each
}

// give lets who is ready have the thread. Who finds somebody waiting in the
// netpoller waits with him. Without a descriptor to spare it is as if there were no
// turns.
func (y *yielder) give() {
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

// offerCore lets other threads have this core if that is due.
func (y *yielder) offerCore(now time.Duration) {
	if last := y.offer.Load(); int64(now)-last >= int64(coreTurn) && y.offer.CompareAndSwap(last, int64(now)) {
		yieldCore()
	}
}

func (y *yielder) openLocked() bool {
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
func (y *yielder) once(fd uintptr) (done bool) {
	n := uint64(1)
	trap := uintptr(unix.SYS_WRITE)
	if y.wrote {
		trap = unix.SYS_READ
	}
	_, _, _ = syscall.RawSyscall(trap, fd, uintptr(unsafe.Pointer(&n)), unsafe.Sizeof(n))
	done, y.wrote = y.wrote, true
	return done
}

// close is called when no connection is left, and may be called again.
func (y *yielder) close() {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.event != nil {
		_ = y.event.Close()
		y.event = nil
	}
}
