package ioloop

import (
	"bytes"
	"net"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
)

func TestBasics(t *testing.T) {
	for name, link := range links {
		for _, chunked := range []bool{false, true} {
			for _, tmpfs := range []bool{false, true} {
				if !tmpfs && name != "unix" {
					continue
				}
				t.Run(name, func(t *testing.T) { testBasics(t, link, chunked, tmpfs) })
			}
		}
	}
}

func testBasics(t *testing.T, link func(testing.TB) (a, b net.Conn), chunked, tmpfs bool) {
	r := newRig(t, rigConfig{tmpfs: tmpfs})
	c := r.connectOver(&testCodec{chunked: chunked}, link)
	for _, n := range []int64{1, 511, 4096, 32 << 10, 32<<10 + 1, 64 << 10, 100_000, 256 << 10, 1 << 20, 3 << 20} {
		p := pattern(int(n), uint64(n))
		c.ok(OpWrite, 0, 4096, n, p)
		if a := c.ok(OpRead, 0, 4096, n, nil); !bytes.Equal(a.data, p) {
			t.Fatalf("%d bytes: what was read is not what was written", n)
		}
		if a := c.ok(OpRead, 0, 4095, n+1, nil); !bytes.Equal(a.data[1:], p) {
			t.Fatalf("%d bytes, unaligned: what was read is not what was written", n)
		}
		c.ok(OpWrite, FUA, 4096, n, p)
		c.ok(OpFlush, 0, 0, 0, nil)
		c.ok(OpCache, 0, 4096, n, nil)
		if a := c.ok(OpStatus, 0, 0, r.size, nil); len(a.status) == 0 {
			t.Fatal("no status")
		}
		c.ok(OpDiscard, 0, 4096, n, nil)
		c.ok(OpZero, FUA, 4096, n, nil)
		if a := c.ok(OpRead, 0, 4096, n, nil); !bytes.Equal(a.data, make([]byte, n)) {
			t.Fatalf("%d bytes: not zero", n)
		}
	}
	for _, op := range []Op{OpRead, OpWrite, OpDiscard, OpZero, OpCache, OpStatus} {
		if a := c.ok(op, 0, 77, 0, nil); a.kind != kindDone {
			t.Fatalf("%v of nothing: %+v", op, a)
		}
	}
	for _, n := range []int64{0, 1, 4096, 100_000, 300_000} {
		if a := c.do(OpReject, 0, 0, n, make([]byte, n)); a.errno != unix.EINVAL {
			t.Fatalf("rejected request with %d bytes: %v", n, a.errno)
		}
	}
	if a := c.do(OpRead, 0, r.size-1, 2, nil); a.errno != unix.EINVAL {
		t.Fatalf("read past the end: %v", a.errno)
	}
	if a := c.do(OpWrite, 0, r.size-1, 2, make([]byte, 2)); a.errno != unix.ENOSPC {
		t.Fatalf("write past the end: %v", a.errno)
	}
	c.send(OpDisconnect, 0, 0, 0, nil)
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
}

// withBitmap has a dirty bitmap of which a quarter is dirty.
type withBitmap struct{ backend.Image }

func (w withBitmap) BitmapStatus(dst []backend.Status, bitmap string, off, n int64, max int) ([]backend.Status, error) {
	if bitmap != "b" {
		return dst, unix.EINVAL
	}
	return append(dst, backend.Status{Length: n / 4, Flags: backend.StatusDirty}, backend.Status{Length: n - n/4})[:len(dst)+min(max, 2)], nil
}

func TestStatusOfSeveralContexts(t *testing.T) {
	r := newRig(t, rigConfig{})
	r.d.Image = withBitmap{r.d.Image}
	c := r.connect(&testCodec{contexts: []string{"b", "", "b"}})
	dirty, clean := backend.Status{Length: 1 << 10, Flags: backend.StatusDirty}, backend.Status{Length: 3 << 10}
	all := backend.Status{Length: 4 << 10, Flags: backend.StatusHole | backend.StatusZero}
	for range 3 {
		if got, want := c.ok(OpStatus, 0, 0, 4<<10, nil).status, []backend.Status{dirty, clean, all, dirty, clean}; !slices.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
		if got, want := c.ok(OpStatus, OneExtent, 0, 4<<10, nil).status, []backend.Status{dirty, all, dirty}; !slices.Equal(got, want) {
			t.Errorf("one extent: %v, want %v", got, want)
		}
	}
	c = r.connect(&testCodec{contexts: []string{"", "none"}})
	if a := c.do(OpStatus, 0, 0, 4<<10, nil); a.errno != unix.EINVAL || len(a.status) != 0 {
		t.Errorf("a context that fails: %+v", a)
	}
}
