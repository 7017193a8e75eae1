package ioloop

import (
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/turns"
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
	// More threads than cores (spareThreads in cmd/nbd-export) stand in each other's way
	// as well: p99 of reads beside four connections that write to ext4, with 6 and 10
	// threads 9 to 13 ms, and 4 to 5 if connections give way there too.
	if c.e.crowd() >= min(runtime.GOMAXPROCS(0), runtime.NumCPU()) {
		c.e.yielder.Give()
		c.e.yielder.offerCore(now)
	}
}

// yielder is what the connections of an engine give way with. They share one, which
// has one descriptor: if each had its own there would be none left for handing over,
// for which a quarter is kept (export.mostConnections).
type yielder struct {
	turns.Yielder
	offer atomic.Int64 // when the core was offered last, by clock
}

// offerCore lets other threads have this core if that is due.
func (y *yielder) offerCore(now time.Duration) {
	if last := y.offer.Load(); int64(now)-last >= int64(coreTurn) && y.offer.CompareAndSwap(last, int64(now)) {
		yieldCore()
	}
}

// giveWay is called after n bytes were moved by this thread. Where cores are
// scarce the kernel lets a busy thread go on for milliseconds while another
// connection's small request waits. p99 of 4k reads at depth 1 beside 1M reads at
// depth 16, two cores, without and so: 5 to 9 ms and 0.25 to 1.4, in one round
// of twelve 3.9; the 1M reads are as fast.
func giveWay(n int64) {
	if n >= inlineLarge {
		yieldCore()
	}
}

// yieldCore lets other threads that want this core have it first.
func yieldCore() { _, _, _ = syscall.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }
