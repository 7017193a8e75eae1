package main

import (
	"runtime"
	"sync"
	"testing"

	"github.com/nbd-export/nbd-export/backend"
)

func TestSpareThreads(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	t.Cleanup(func() { runtime.GOMAXPROCS(before); threadsOnce = sync.Once{} })
	for _, tt := range []struct {
		name, env string
		img       backend.Info
		want      int // more than before
	}{
		{"in memory, or past the page cache", "", backend.Info{}, 0},
		{"read-only", "", backend.Info{Cached: true, ReadOnly: true}, 0},
		{"set by the user", "3", backend.Info{Cached: true}, 0},
		{"on disk", "", backend.Info{Cached: true}, extraThreads},
		{"another", "", backend.Info{Cached: true}, extraThreads},
	} {
		t.Setenv("GOMAXPROCS", tt.env)
		spareThreads(tt.img)
		if got := runtime.GOMAXPROCS(0) - before; got != tt.want {
			t.Errorf("%s: %d more, want %d", tt.name, got, tt.want)
		}
	}
}
