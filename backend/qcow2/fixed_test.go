package qcow2

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
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

// TestDeviceLargerThanRefcountTable fills an image on a device of which its
// refcount table counts a part.
func TestDeviceLargerThanRefcountTable(t *testing.T) {
	for name, options := range map[string][]string{
		"16 bits":           {"cluster_size=512"},                     // the table counts 8 MiB
		"64 bits":           {"cluster_size=512", "refcount_bits=64"}, // 2 MiB
		"larger than needs": {"cluster_size=64k"},
	} {
		t.Run(name, func(t *testing.T) {
			const size = 20 << 20
			f := made(t, "30m", options...)
			if err := f.Resize(size + 300); err != nil {
				t.Fatal(err)
			}
			im := begun(t, f, Options{Fixed: true})
			p, wrote := noise(rand.New(rand.NewPCG(1, 1)), 100<<10), int64(0)
			for {
				err := im.writeAt(p, wrote)
				if errors.Is(err, unix.ENOSPC) {
					break
				}
				if err == nil && wrote%(1<<20) < int64(len(p)) {
					err = im.Flush()
				}
				if err != nil {
					t.Fatal(err)
				}
				wrote += int64(len(p))
			}
			if wrote < size*9/10 {
				t.Errorf("it is full after %d of %d bytes", wrote, size)
			}
			if err := im.Settle(); err != nil {
				t.Fatal(err)
			}
			if f.Length() != size+300 {
				t.Errorf("the device has %d bytes", f.Length())
			}
			checked(t, f.Bytes(), false)
			again, q := opened(t, f, Options{}), make([]byte, len(p))
			for off := int64(0); off < wrote; off += int64(len(p)) {
				if err := again.readAt(q, off); err != nil || !bytes.Equal(p, q) {
					t.Fatalf("at %d: %v", off, err)
				}
			}
		})
	}
}

// Refcounts are made anew on a device that has room for them, and whatever is cut
// off there the image is no worse.
func TestMendMakesRefcountsAnewOnDevice(t *testing.T) {
	for _, options := range []string{"cluster_size=512", "cluster_size=4k", "cluster_size=64k"} {
		rng := rand.New(rand.NewPCG(7, 7))
		f := manyFeatured(t, rng, options)
		h, err := ReadHeader(f)
		if err != nil {
			t.Fatal(err)
		}
		block := make([]byte, 8)
		if err := errors.Join(f.Resize(8<<20), f.ReadAt(block, h.RefcountOffset)); err != nil {
			t.Fatal(err)
		}
		block[7] |= 1 // reserved
		if err := f.WriteAt(block, h.RefcountOffset, false); err != nil {
			t.Fatal(err)
		}
		disk := readAll(t, opened(t, f, Options{}))
		f.Fail = func(op memfile.Op, _, _ int64) error {
			if op == memfile.Resize {
				return unix.ENOSPC
			}
			return nil
		}
		f.Record()
		before, after, err := Mend(f, h, RepairAll, nil)
		if err != nil || before.Corruptions == 0 || !after.Clean() || f.Length() != 8<<20 {
			t.Fatalf("%s: %+v, %+v, %v", options, before, after, err)
		}
		checked(t, f.Bytes(), true)
		from, events := f.Events()
		for n := 0; n <= len(events); n += stride {
			state := memfile.New("cut off", memfile.Crash(from, events, n, rng))
			h, err := ReadHeader(state)
			if err != nil {
				t.Fatal(err)
			}
			r, err := Check(state, h, nil)
			if err != nil || r.Corruptions > before.Corruptions {
				t.Fatalf("%s, after %d of %d events: %v %+v", options, n, len(events), err, r)
			}
			if !bytes.Equal(readAll(t, opened(t, state, Options{})), disk) {
				t.Fatalf("%s, after %d of %d events: the disk differs", options, n, len(events))
			}
		}
	}
}
