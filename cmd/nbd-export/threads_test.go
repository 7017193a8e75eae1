package main

import (
	"runtime"
	"testing"

	"github.com/nbd-export/nbd-export/backend"
)

func TestSpareThreads(t *testing.T) {
	before, more := runtime.GOMAXPROCS(0), threads.more
	threads.more = 0
	t.Cleanup(func() { runtime.GOMAXPROCS(before); threads.more = more })
	for _, tt := range []struct {
		name, env string
		img       backend.Info
		portable  bool
		want      int // more than before
	}{
		{"in memory", "", backend.Info{InMemory: true}, true, 0},
		{"past the page cache, by an io_uring", "", backend.Info{}, false, 0},
		{"set by the user", "3", backend.Info{Cached: true}, true, 0},
		{"cached", "", backend.Info{Cached: true}, false, besideRing},
		{"another", "", backend.Info{Cached: true, ReadOnly: true}, false, besideRing},
		{"without io_uring", "", backend.Info{}, true, withoutRing},
		{"one that needs fewer", "", backend.Info{Cached: true}, false, withoutRing},
	} {
		t.Setenv("GOMAXPROCS", tt.env)
		spareThreads(tt.img, tt.portable)
		if got := runtime.GOMAXPROCS(0) - before; got != tt.want {
			t.Errorf("%s: %d more, want %d", tt.name, got, tt.want)
		}
	}
}
