package qcow2

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// TestEachFailureOnce runs one history again and again, each time with the next
// call of the file failing. What failed is tried again; then the disk is as it
// should be and nothing is leaked.
func TestEachFailureOnce(t *testing.T) {
	for name, make := range map[string]func(t *testing.T) *memfile.File{
		"512":      func(t *testing.T) *memfile.File { return made(t, "100k", "cluster_size=512", "refcount_bits=64") },
		"extended": func(t *testing.T) *memfile.File { return made(t, "100k", "cluster_size=16k", "extended_l2=on") },
		"snapshot": func(t *testing.T) *memfile.File { return snapshotted(t, withSectors(t, "-c", "cluster_size=512")) },
	} {
		t.Run(name, func(t *testing.T) {
			start := make(t).Bytes()
			for _, errno := range []unix.Errno{unix.ENOSPC, unix.EIO} {
				for n := 0; ; n++ {
					f := memfile.New("faulty", bytes.Clone(start))
					calls, failed := 0, memfile.Op(255)
					f.Fail = func(op memfile.Op, off, length int64) error {
						if op == memfile.Sync {
							return nil
						}
						calls++
						if calls-1 == n {
							failed = op
							return errno
						}
						return nil
					}
					if !failOnce(t, f, errno) {
						t.Fatalf("failure %d (op %d, %v)", n, failed, errno)
					}
					if failed == 255 {
						break
					}
				}
			}
		})
	}
}

// failOnce runs the history. A punch may fail without a word; what it warns of
// is an error that was injected.
func failOnce(t *testing.T, f *memfile.File, errno unix.Errno) bool {
	im := opened(t, f, Options{L2Cache: 1, Warn: func(string) {}})
	im.alloc.least = 0
	again := func(do func() error) error {
		err := do()
		if errors.Is(err, errno) {
			err = do()
		}
		return err
	}
	if err := again(func() error { return im.Begin(nil) }); err != nil {
		t.Error(err)
		return false
	}
	defer im.Close()
	shadow := make([]byte, im.Size())
	if err := im.readAt(shadow, 0); err != nil {
		t.Error(err)
		return false
	}
	rng := rand.New(rand.NewPCG(1, 17))
	for i := range 25 {
		off := rng.Int64N(im.Size())
		n := 1 + rng.Int64N(min(im.Size()-off, 20000))
		var err error
		switch i % 5 {
		case 1:
			clear(shadow[off : off+n])
			err = again(func() error { return im.Zero(off, n, i%2 == 0) })
		case 3:
			err = again(im.Flush)
		default:
			p := noise(rng, n)
			copy(shadow[off:], p)
			err = again(func() error { return im.writeAt(p, off) })
		}
		if err != nil {
			t.Errorf("step %d: %v", i, err)
			return false
		}
	}
	if err := again(im.Settle); err != nil {
		t.Error(err)
		return false
	}
	h, err := ReadHeader(f)
	if err != nil {
		t.Error(err)
		return false
	}
	if r, err := Check(f, h, nil); err != nil || !r.Clean() {
		t.Errorf("%v %v", err, r.Findings)
		return false
	}
	if i := differs(readAll(t, opened(t, f, Options{})), shadow); i >= 0 {
		t.Errorf("the disk differs at %d", i)
		return false
	}
	return true
}

// TestFailedSyncStays: the kernel tells of lost pages once.
func TestFailedSyncStays(t *testing.T) {
	f := made(t, "1M")
	im := opened(t, f, Options{Warn: func(string) {}})
	if err := im.Begin(nil); err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if err := im.writeAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	f.Fail = func(op memfile.Op, _, _ int64) error {
		if op == memfile.Sync {
			return unix.EIO
		}
		return nil
	}
	for range 2 {
		if err := im.Flush(); !errors.Is(err, unix.EIO) {
			t.Fatal(err)
		}
		f.Fail = nil
	}
	if err := im.Settle(); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
}

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
	} {
		b := f.Bytes()
		copy(b[l2:], be64(entry))
		bad := memfile.New("bad", b)
		im := opened(t, bad, Options{Warn: func(string) {}})
		p := make([]byte, 512)
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
		if err := im.writeAt(p, 0); !errors.Is(err, unix.EIO) {
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
