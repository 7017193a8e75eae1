package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// made is an image that qemu-img made, in memory.
func made(t testing.TB, size string, options ...string) *memfile.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "made.qcow2")
	args := []string{"create", "-q", "-f", "qcow2"}
	if len(options) > 0 {
		args = append(args, "-o", strings.Join(options, ","))
	}
	qemuImg(t, append(args, path, size)...)
	return loaded(t, path)
}

func loaded(t testing.TB, path string) *memfile.File {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return memfile.New(path, b)
}

// begun is an image ready for writing.
func begun(t testing.TB, f File, o Options) *Image {
	t.Helper()
	im := opened(t, f, o)
	if err := im.Begin(nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(im.Close)
	return im
}

func opened(t testing.TB, f File, o Options) *Image {
	t.Helper()
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	if o.Warn == nil {
		o.Warn = func(s string) { t.Errorf("warned: %s", s) }
	}
	im, err := New(f, h, o)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// readAt reads through Map.
func (im *Image) readAt(p []byte, off int64) error {
	var plan Plan
	err := im.Map(&plan, off, int64(len(p)), 0)
	if err == ErrWait {
		err = im.Map(&plan, off, int64(len(p)), MayBlock)
	}
	if err != nil {
		return err
	}
	defer im.Unmap(&plan)
	for i := range plan.Extents {
		e := &plan.Extents[i]
		part := p[:e.Length]
		p = p[e.Length:]
		switch e.Kind {
		case Zero:
			clear(part)
		case Compressed:
			err = im.ReadCompressed(&plan, i, 0, part)
		default:
			err = e.File.ReadAt(part, e.Offset)
		}
		if err != nil {
			return err
		}
	}
	if len(p) > 0 {
		return fmt.Errorf("%d bytes are not mapped", len(p))
	}
	return nil
}

// writeAt writes through Prepare and Commit.
func (im *Image) writeAt(p []byte, off int64) error { return im.put(p, off, false) }

// put is writeAt, with fua so that the bytes survive power loss.
func (im *Image) put(p []byte, off int64, fua bool) error {
	var plan Plan
	err := im.Prepare(&plan, off, int64(len(p)), 0)
	if err == ErrWait {
		err = im.Prepare(&plan, off, int64(len(p)), MayBlock)
	}
	if err != nil {
		return err
	}
	for i := range plan.Extents {
		e := &plan.Extents[i]
		if err := e.File.WriteAt(p[:e.Length], e.Offset, fua); err != nil {
			im.Abort(&plan)
			return err
		}
		p = p[e.Length:]
	}
	if durable := im.Commit(&plan); fua && !durable {
		err = im.Flush()
	}
	if len(p) > 0 {
		return fmt.Errorf("%d bytes are not planned", len(p))
	}
	return err
}

// checked has qemu-img check the contents, leaks counting as errors too if
// clean is set.
func checked(t testing.TB, b []byte, clean bool) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "checked.qcow2")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	out, code := qemuImgCode(t, "check", "-f", "qcow2", path)
	if code == 0 || code == 3 && !clean {
		return
	}
	t.Fatalf("qemu-img check exits with %d:\n%s", code, out)
}

// shadowed runs random operations on an image and a plain copy of the disk.
func shadowed(t *testing.T, im *Image, shadow []byte, rng *rand.Rand, steps int) {
	t.Helper()
	size := im.Size()
	largest := min(size, 3*im.g.ClusterSize()+1000)
	for range steps {
		off := rng.Int64N(size)
		n := 1 + rng.Int64N(min(size-off, largest))
		if rng.IntN(3) == 0 {
			off &^= im.g.ClusterSize() - 1
			n = min(size-off, im.g.ClusterSize()*(1+rng.Int64N(3)))
		}
		var err error
		switch rng.IntN(10) {
		case 0, 1, 2, 3:
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(rng.Uint32() | 1)
			}
			copy(shadow[off:], p)
			err = im.writeAt(p, off)
		case 4, 5:
			p := make([]byte, n)
			if err = im.readAt(p, off); err == nil && !bytes.Equal(p, shadow[off:off+n]) {
				t.Fatalf("read of %d+%d differs at %d", off, n, off+int64(differs(p, shadow[off:off+n])))
			}
		case 6:
			keep := rng.IntN(2) == 0
			clear(shadow[off : off+n])
			err = im.Zero(off, n, keep)
		case 7:
			if err = im.Discard(off, n); err == nil {
				p := shadow[off : off+n]
				old := bytes.Clone(p)
				if err = im.readAt(p, off); err == nil {
					for i := range p {
						if p[i] != 0 && p[i] != old[i] {
							t.Fatalf("discard of %d+%d left %#x at %d, where %#x was", off, n, p[i], off+int64(i), old[i])
						}
					}
				}
			}
		case 8:
			err = im.Flush()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, size)
	if err := im.readAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if i := differs(p, shadow); i >= 0 {
		t.Fatalf("the disk differs at %d", i)
	}
}

func differs(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func TestRandomOperationsAgainstShadow(t *testing.T) {
	for name, options := range map[string][]string{
		"small":       {"cluster_size=512", "refcount_bits=16"},
		"1 bit":       {"cluster_size=512", "refcount_bits=1"},
		"64 bits":     {"cluster_size=512", "refcount_bits=64"},
		"4k":          {"cluster_size=4k"},
		"usual":       {},
		"extended":    {"cluster_size=16k", "extended_l2=on"},
		"version 2":   {"cluster_size=1k", "compat=0.10"},
		"lazy":        {"cluster_size=1k", "lazy_refcounts=on"},
		"preallocate": {"cluster_size=4k", "preallocation=metadata"},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(6) {
				rng := rand.New(rand.NewPCG(seed, 7))
				size := (1 + rng.Int64N(3000)) * 512
				if seed == 5 {
					size = 20 << 20
				}
				f := made(t, fmt.Sprint(size), options...)
				im := begun(t, f, Options{L2Cache: 1, KeepSpace: seed == 1})
				shadowed(t, im, make([]byte, size), rng, 300)
				checked(t, f.Bytes(), true)
				again := opened(t, f, Options{})
				a, b := make([]byte, size), make([]byte, size)
				if err := errors.Join(im.readAt(a, 0), again.readAt(b, 0)); err != nil || !bytes.Equal(a, b) {
					t.Fatalf("seed %d: opened anew it differs: %v", seed, err)
				}
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}
