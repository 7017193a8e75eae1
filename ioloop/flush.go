package ioloop

import (
	"sync"

	"github.com/nbd-export/nbd-export/backend"
)

// flushes lets one worker sync for all flushes of a disk: those that arrive
// while it does are answered by its next sync. So a slow sync holds up one
// worker, however many flushes wait for it, and not what else needs workers.
type flushes struct {
	mu      sync.Mutex // leaf
	running bool
	waiting []*task // admitted
}

// run answers the admitted flush t, and on the way those that came meanwhile;
// or it leaves t to the worker that is at it.
func (f *flushes) run(t *task, img backend.Image) {
	f.mu.Lock()
	if f.running {
		f.waiting = append(f.waiting, t)
		f.mu.Unlock()
		return
	}
	f.running = true
	f.mu.Unlock()
	for batch := []*task{t}; len(batch) > 0; {
		err := img.Flush()
		for _, t := range batch {
			t.leave(err)
		}
		f.mu.Lock()
		batch, f.waiting = f.waiting, nil
		f.running = len(batch) > 0
		f.mu.Unlock()
	}
}
