package qcow2

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// TestOddMetadata: before Begin it is staleness, after it the image is marked
// corrupt.
func TestOddMetadata(t *testing.T) {
	f := made(t, "1M", "cluster_size=4k")
	im := begun(t, f, Options{})
	if err := errors.Join(im.writeAt([]byte("abc"), 0), im.Settle()); err != nil {
		t.Fatal(err)
	}
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	l2 := hostOffset(im.l1[0])
	for name, entry := range map[string]uint64{
		"reserved bits": entryCopied | uint64(h.Geometry().ClusterSize())*8 | 1<<57,
		"metadata":      entryCopied | uint64(h.RefcountOffset),
		// Overwritten, they would give the header's cluster away, or that of refcounts.
		"compressed":               entryCompressed,
		"compressed, two clusters": entryCompressed | uint64(h.RefcountOffset-512) | 1<<(62-(h.ClusterBits-8)),
	} {
		b := f.Bytes()
		copy(b[l2:], be64(entry))
		bad := memfile.New("bad", b)
		im := opened(t, bad, Options{Warn: func(string) {}})
		p, whole := make([]byte, 512), make([]byte, 4096)
		if err := im.readAt(p, 0); name == "reserved bits" && !errors.Is(err, unix.EIO) {
			t.Errorf("%s, not begun: %v", name, err)
		}
		if !bytes.Equal(b, bad.Bytes()) {
			t.Errorf("%s: an image that was not begun has changed", name)
		}
		im = opened(t, bad, Options{Warn: func(string) {}})
		if err := im.Begin(nil); err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		if err := im.writeAt(whole, 0); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: write: %v", name, err)
		}
		if err := im.writeAt(p, 512<<10); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: write elsewhere: %v", name, err)
		}
		if h, err := ReadHeader(bad); err != nil || h.Incompatible&Corrupt == 0 {
			t.Errorf("%s: not marked corrupt: %v", name, err)
		}
		if err := opened(t, bad, Options{}).Begin(nil); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: begun again: %v", name, err)
		}
	}
}
