package ioloop

import (
	"bytes"
	"os"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSequence(t *testing.T) {
	var s sequence
	read := func(off, n int64, missed bool) int64 {
		r := &Request{Op: OpRead, Offset: off, Length: n}
		s.note(r)
		if !missed {
			return 0
		}
		return s.missed(r)
	}
	for i, step := range []struct {
		off, n int64
		missed bool
		want   int64
	}{
		{0, 4096, true, 0}, // the first proves nothing
		{4096, 4096, true, leastAhead},
		{8192, 4096, true, 0}, // is on its way
		{12288, leastAhead - 8192, false, 0},
		{leastAhead + 4096, 4096, true, 2 * leastAhead},
		{1 << 30, 4096, true, 0}, // somewhere else
		{1<<30 + 4096, 4096, false, 0},
		{1<<30 + 8192, 4096, true, leastAhead},
		{1<<30 + 12288, longRead, true, 0},
	} {
		if got := read(step.off, step.n, step.missed); got != step.want {
			t.Fatalf("step %d: %d bytes ahead, want %d", i, got, step.want)
		}
	}
	off := int64(1 << 40)
	read(off, 4096, true)
	var last int64
	for range 10 { // each at the end of what was read ahead
		off += 4096
		last = read(off, 4096, true)
		for off+4096 < s.to {
			off += 4096
			read(off, 4096, false)
		}
	}
	if last != mostAhead {
		t.Errorf("the window ends at %d", last)
	}
}

// A cold file that is read from its start is read ahead, to its end and no
// further.
func TestReadsAhead(t *testing.T) {
	r := newRig(t, rigConfig{content: contents})
	var mu sync.Mutex
	var asked []int64
	r.img.set(func(h *hooked) {
		h.caching = func(off, n int64) {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, off, n)
		}
	})
	f, err := os.Open(r.path)
	must(t, err)
	defer f.Close()
	must(t, f.Sync())
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	c := r.connect(&testCodec{})
	const n = 64 << 10
	for off := int64(0); off < r.size; off += n {
		if a := c.ok(OpRead, 0, off, n, nil); !bytes.Equal(a.data, contents[off:off+n]) {
			t.Fatalf("other bytes at %d", off)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(asked) == 0 || !slices.Equal(asked[:2], []int64{n, leastAhead}) {
		t.Fatalf("asked for %d", asked)
	}
	if k := len(asked) - 2; asked[k]+asked[k+1] > r.size {
		t.Errorf("asked for %d+%d of %d", asked[k], asked[k+1], r.size)
	}
}
