package main

import (
	"os"
	"runtime"
	"sync"

	"github.com/nbd-export/nbd-export/backend"
)

// A goroutine in a system call that sleeps keeps one of Go's places to run in
// (GOMAXPROCS, as many as processors), until Go's monitor takes that away after 20 us
// to 20 ms. With all of them asleep nobody is served. So where images are not in memory
// there are more of them.
//
// They are not free: reads at depth 1 of four connections on tmpfs were 11 to 15 % fewer
// with one or two more. Where everything is in memory there are none.
const (
	// besideRing: with an io_uring writes into the page cache and syncs sleep. What two are
	// worth is told in backend/file_slots.go. Past the page cache few calls do: 4 KiB
	// O_DIRECT reads of four connections at depth 32 took 10 to 15 % more processor time.
	besideRing = 2
	// withoutRing: everything that waits for a device does so in a system call. 4 KiB
	// O_DIRECT reads at depth 32, virtual disk, two cores, with no more, 2, 4, 6 and 8:
	// 22k, 44k, 62k, 69k and 71k/s (io_uring 68k), with 14 and more 65k. Writes 20k, 42k,
	// with 6 63k. Other loads do not differ.
	withoutRing = 8
)

// threads is how many more places there are.
var threads struct {
	sync.Mutex
	more int
}

// spareThreads is called for each image; portable says that there is no io_uring. Who
// has set GOMAXPROCS is left alone. From then on Go does not follow changes of the
// process's limit of processor time.
func spareThreads(img backend.Info, portable bool) {
	more := besideRing
	switch {
	case img.InMemory, os.Getenv("GOMAXPROCS") != "", !img.Cached && !portable:
		return
	case portable:
		more = withoutRing
	}
	threads.Lock()
	defer threads.Unlock()
	if more > threads.more {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + more - threads.more)
		threads.more = more
	}
}
