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
		{"set by the user", "3", backend.Info{}, true, 0},
		{"on disk", "", backend.Info{}, false, besideRing},
		{"another", "", backend.Info{}, false, besideRing},
		{"without io_uring", "", backend.Info{ReadOnly: true}, true, withoutRing},
		{"one that needs fewer", "", backend.Info{}, false, withoutRing},
	} {
		t.Setenv("GOMAXPROCS", tt.env)
		spareThreads(tt.img, tt.portable)
		if got := runtime.GOMAXPROCS(0) - before; got != tt.want {
			t.Errorf("%s: %d more, want %d", tt.name, got, tt.want)
		}
	}
}
