package main

import (
	"os"
	"runtime"
	"sync"

	"github.com/nbd-export/nbd-export/backend"
)

// extraThreads is how many more goroutines may run at once than there are processors,
// where system calls may sleep without our doing: writes into the page cache of a
// disk, and the sync of it. Each keeps one of Go's places to run (GOMAXPROCS) while it
// sleeps, for up to 20 ms; with none left nobody is served. What they are worth is told
// in backend/file_slots.go. They are not free: reads at depth 1 of four connections on
// tmpfs were 11 to 15 % fewer with them, so where nothing sleeps there are none.
const extraThreads = 2

var threadsOnce sync.Once

// spareThreads is called for each image. Who has set GOMAXPROCS is left alone.
func spareThreads(img backend.Info) {
	if os.Getenv("GOMAXPROCS") != "" || !img.Cached || img.ReadOnly {
		return
	}
	threadsOnce.Do(func() { runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + extraThreads) })
}
