package qcow2

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// TestCrashStatesOfSeveralFiles is for images beside which there is another
// file, or which bring something to Begin or Settle. What a crash leaves of two
// files is cut at the same moment.
func TestCrashStatesOfSeveralFiles(t *testing.T) {
	base := func() []byte {
		var b []byte
		for s := range int64(150) {
			b = append(b, sectorOf(uint64(s/8+1000), s)...)
		}
		return b
	}()
	runs := uint64(2)
	if os.Getenv("NBD_EXPORT_SOAK") != "" {
		runs = 20
	}
	type files struct{ image, data *memfile.File }
	external := func(options ...string) func(t *testing.T) files {
		return func(t *testing.T) files {
			dir := t.TempDir()
			path, data := filepath.Join(dir, "q.qcow2"), filepath.Join(dir, "data")
			args := []string{"create", "-q", "-f", "qcow2", "-o", "data_file=" + data}
			for _, o := range options {
				args = append(args, "-o", o)
			}
			qemuImg(t, append(args, path, "120k")...)
			return files{loaded(t, path), loaded(t, data)}
		}
	}
	for name, c := range map[string]struct {
		make    func(t *testing.T) files
		backing bool
	}{
		"data file":                 {external("cluster_size=4k"), false},
		"data file and 512":         {external("cluster_size=512"), true},
		"data file and subclusters": {external("cluster_size=16k", "extended_l2=on"), true},
		"raw data file":             {external("cluster_size=4k", "data_file_raw=on"), false},
		"backing file": {func(t *testing.T) files {
			return files{image: made(t, "120k", "cluster_size=4k")}
		}, true},
		"backing file, subclusters": {func(t *testing.T) files {
			return files{image: made(t, "120k", "cluster_size=16k", "extended_l2=on")}
		}, true},
		"preallocated": {func(t *testing.T) files {
			return files{image: made(t, "120k", "cluster_size=1k", "preallocation=metadata")}
		}, false},
		"bitmap": {func(t *testing.T) files {
			path := filepath.Join(t.TempDir(), "b.qcow2")
			if err := os.WriteFile(path, withSectors(t, "", "cluster_size=512").Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			qemuImg(t, "bitmap", "--add", "-g", "512", path, "b")
			return files{image: loaded(t, path)}
		}, false},
		// One died that had lazy refcounts: nothing is counted of what it wrote.
		"dirty": {func(t *testing.T) files {
			f := withSectors(t, "", "cluster_size=1k", "lazy_refcounts=on")
			h, err := ReadHeader(f)
			if err != nil {
				t.Fatal(err)
			}
			b := f.Bytes()
			b[offIncompatible+7] |= Dirty
			block := int64(binary.BigEndian.Uint64(b[h.RefcountOffset:]))
			clear(b[block+2*8 : block+2*60])
			return files{image: memfile.New("dirty", b)}
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range runs {
				rng := rand.New(rand.NewPCG(seed, 21))
				x := c.make(t)
				var clock atomic.Int64
				x.image.Clock = &clock
				o := Options{L2Cache: 1, Warn: func(string) {}}
				if c.backing {
					o.Backing = NewRawBacking(memfile.New("base", base))
				}
				if x.data != nil {
					x.data.Clock = &clock
					o.Data = x.data
				}
				im := opened(t, x.image, o)
				h := newHistory(t, im, func() int { return int(clock.Load()) })
				h.next = 5000
				im.alloc.least = 0
				x.image.Record()
				if x.data != nil {
					x.data.Record()
				}
				if err := im.Begin(nil); err != nil {
					t.Fatal(err)
				}
				several(t, h, seed)
				if err := errors.Join(im.Settle(), h.flush()); err != nil {
					t.Fatal(err)
				}
				im.Close()
				for at := range clock.Load() + 1 {
					for try := range 3 {
						chance := rng
						if try == 0 {
							chance = nil
						}
						crashedAt(t, h, x.image, x.data, o, at, chance, nil)
					}
				}
			}
		})
	}
}

// several has writers of sectors of their own, flushes, and zeros, at once.
func several(t *testing.T, h *history, seed uint64) {
	const writers = 4
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w)+30))
			for range 25 {
				first := (rng.Int64N(int64(len(h.sectors))/2/writers)*writers + int64(w)) * 2
				var err error
				switch rng.IntN(6) {
				case 0:
					err = h.zero(first, 2, rng.IntN(2) == 0)
				case 1:
					err = h.flush()
				default:
					err = h.put(first, 1+rng.Int64N(2), rng.IntN(4) == 0)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// crashedAt judges what a crash after the moment at may leave. So does more, if it
// is not nil, with what the disk holds then, and once again when the image has been
// written.
func crashedAt(t *testing.T, h *history, image, data *memfile.File, o Options, at int64, rng *rand.Rand, more func(im *Image, disk []byte) error) {
	t.Helper()
	left := func(f *memfile.File) *memfile.File {
		from, events := f.Events()
		n := sort.Search(len(events), func(i int) bool { return events[i].At > at })
		return memfile.New(f.Path(), memfile.Crash(from, events, n, rng))
	}
	state := left(image)
	if data != nil {
		o.Data = left(data)
	}
	hd, err := ReadHeader(state)
	if err != nil {
		t.Fatalf("at %d: %v", at, err)
	}
	// Until a dirty image is mended its refcounts may be wrong.
	if hd.Incompatible&Dirty == 0 {
		r, err := Check(state, hd, nil)
		if err != nil || r.Corruptions > 0 {
			t.Fatalf("at %d: %v %v", at, err, r.Findings)
		}
	}
	im := opened(t, state, o)
	disk := readAll(t, im)
	if err := h.judge(disk, int(at)); err != nil {
		t.Fatalf("at %d: %v", at, err)
	}
	if more != nil {
		if err := more(im, disk); err != nil {
			t.Fatalf("at %d: %v", at, err)
		}
	}
	// And it goes on from there.
	if at%7 != 0 {
		return
	}
	if err := im.Begin(nil); err != nil {
		t.Fatalf("at %d: %v", at, err)
	}
	defer im.Close()
	p := sectorOf(9999, 3)
	copy(disk[3*512:], p)
	if err := errors.Join(im.writeAt(p, 3*512), im.Settle()); err != nil {
		t.Fatalf("at %d: %v", at, err)
	}
	if i := differs(readAll(t, im), disk); i >= 0 {
		t.Fatalf("at %d: begun again it differs at %d", at, i)
	}
	hd, err = ReadHeader(state)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := Check(state, hd, nil); err != nil || r.Corruptions > 0 {
		t.Fatalf("at %d: begun again: %v %v", at, err, r.Findings)
	}
	if more != nil {
		if err := more(opened(t, state, o), disk); err != nil {
			t.Fatalf("at %d: begun again: %v", at, err)
		}
	}
}
