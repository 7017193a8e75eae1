package qcow2

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFullDeviceTakesWhatWasDiscarded fills an image that cannot become longer,
// and writes where it was discarded, without a flush between.
func TestFullDeviceTakesWhatWasDiscarded(t *testing.T) {
	f := made(t, "8m", "cluster_size=64k")
	if err := f.Resize(4 << 20); err != nil {
		t.Fatal(err)
	}
	im := begun(t, f, Options{Fixed: true})
	defer im.Close()
	p := bytes.Repeat([]byte{1}, 64<<10)
	off, err := int64(0), error(nil)
	for ; err == nil; off += 64 << 10 {
		err = im.writeAt(p, off)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	full := off - 64<<10
	if err := im.Discard(0, full); err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < full; off += 64 << 10 {
		if err := im.writeAt(p, off); err != nil {
			t.Fatalf("after a discard: %v", err)
		}
	}
	if err := im.writeAt(p, full); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("it is full again: %v", err)
	}
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	checked(t, f.Bytes(), true)
}
