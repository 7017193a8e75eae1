package ioloop

import (
	"bytes"
	"os"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
)

func TestSequence(t *testing.T) {
	var s sequence
	read := func(off, n int64, missed bool) span {
		r := &Request{Op: OpRead, Offset: off, Length: n}
		s.note(r)
		a := s.ahead(r, false)
		if a.n == 0 && missed {
			a = s.ahead(r, true)
		}
		return a
	}
	const far, page = 1 << 30, 4096
	for i, step := range []struct {
		off, n int64
		missed bool
		want   span
	}{
		{0, page, true, span{}}, // the first proves nothing
		{page, page, true, span{2 * page, leastAhead}},
		{2 * page, page, true, span{}}, // is on its way
		{3 * page, leastAhead / 4, false, span{2*page + leastAhead, leastAhead + page + leastAhead/4}}, // a quarter is used
		{3*page + leastAhead/4, page, false, span{}},
		{far, page, true, span{}}, // somewhere else
		{far + page, page, false, span{}},
		{far + 2*page, page, true, span{far + 3*page, leastAhead}},
		{far + 3*page, 1 << 20, true, span{far + 3*page + 1<<20, 2 << 20}}, // longer than the window
		{far + 3*page + 1<<20, 6 << 20, true, span{far + 3*page + 7<<20, mostAhead}},
	} {
		if got := read(step.off, step.n, step.missed); got != step.want {
			t.Fatalf("step %d: %d ahead, want %d", i, got, step.want)
		}
	}
	// One after the other: all is read ahead once, and before it is needed.
	off, to := int64(1<<40), int64(1<<40+2*page)
	read(off, page, true)
	for first := true; off < 1<<40+4*mostAhead; first = false {
		off += page
		a := read(off, page, first)
		switch {
		case a.n == 0:
		case a.off != to:
			t.Fatalf("ahead from %d, want %d", a.off, to)
		case a.off+a.n > off+page+mostAhead:
			t.Fatalf("%d ahead at %d", a, off)
		}
		if to += a.n; off+page > to {
			t.Fatalf("%d is not read ahead", off)
		}
	}
	if s.window != mostAhead {
		t.Errorf("the window ends at %d", s.window)
	}
}

// A cold file that is read from its start is read ahead, to its end and no
// further.
func TestReadsAhead(t *testing.T) {
	r := newRig(t, rigConfig{content: contents})
	var mu sync.Mutex
	var asked []span
	r.img.set(func(h *hooked) {
		h.caching = func(off, n int64) {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, span{off, n})
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
	await(t, c.conn.tasksDone(), "what is read ahead")
	mu.Lock()
	defer mu.Unlock()
	if !slices.Contains(asked, span{2 * n, leastAhead}) {
		t.Errorf("asked for %d", asked)
	}
	for _, a := range asked {
		if a.off+a.n > r.size {
			t.Errorf("asked for %d of %d", a, r.size)
		}
	}
}

// What is read ahead is asked for in pieces that the kernel takes whole.
func TestReadsAheadInPieces(t *testing.T) {
	r := newRig(t, rigConfig{size: 16 << 20})
	var mu sync.Mutex
	var to, most int64
	r.img.set(func(h *hooked) {
		h.caching = func(off, n int64) {
			mu.Lock()
			defer mu.Unlock()
			if to != 0 && off != to {
				t.Errorf("%d bytes at %d follow what ended at %d", n, off, to)
			}
			to, most = off+n, max(most, n)
		}
	})
	c := r.connect(&testCodec{})
	// The last task has ended before the next read comes: so they keep their order.
	for off := int64(0); off < r.size; off += 512 << 10 {
		c.conn.sequence.note(&Request{Offset: off, Length: 512 << 10})
		c.conn.readAhead(&Request{Offset: off, Length: 512 << 10}, true)
		await(t, c.conn.tasksDone(), "what is read ahead")
	}
	mu.Lock()
	defer mu.Unlock()
	if to != r.size || most > aheadPiece {
		t.Errorf("read ahead to %d of %d, at most %d bytes at once", to, r.size, most)
	}
}

// Reads of what is in the page cache wait for no memory to read ahead, however
// much their connection and others hold.
func TestReadAheadWaitsForNoMemory(t *testing.T) {
	const page, all = 4096, 64 << 20
	r := newRig(t, rigConfig{content: contents})
	slow := newBlocker()
	r.img.set(func(h *hooked) {
		h.mapping = func(off, _ int64, mode backend.Mode) error {
			switch {
			case off == page && mode&backend.MayBlock == 0:
				return backend.ErrWait
			case off == 2*page:
				return slow.mode(mode)
			}
			return nil
		}
	})
	c := r.connect(&testCodec{})
	c.ok(OpRead, 0, 0, page, nil)
	c.ok(OpRead, 0, page, page, nil)
	held := c.send(OpRead, 0, 2*page, page, nil)
	await(t, slow.entered, "a worker")
	r.e.budget.takeFloor(4 * all)
	for off := int64(3 * page); off < leastAhead; off += page {
		c.send(OpRead, 0, off, page, nil)
		if a := c.next(); a.cookie == held || !bytes.Equal(a.data, contents[off:off+page]) {
			t.Fatalf("at %d: the reply to %d of %d bytes", off, a.cookie, len(a.data))
		}
	}
	r.e.budget.takeFloor(-4 * all)
	close(slow.leave)
	if a := c.next(); a.cookie != held {
		t.Fatalf("reply to %d, want %d", a.cookie, held)
	}
	// What was not read ahead then is now.
	asked := make(chan span, 16)
	r.img.set(func(h *hooked) { h.caching = func(off, n int64) { asked <- span{off, n} } })
	c.ok(OpRead, 0, leastAhead, page, nil)
	if a := await(t, asked, "reading ahead"); a.off != 2*page+leastAhead {
		t.Errorf("%d, want it from %d", a, 2*page+leastAhead)
	}
}
