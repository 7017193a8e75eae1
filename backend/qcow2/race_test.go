package qcow2

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// TestManyWritersAgainstShadow has writers with stripes of their own, of which
// many lie in one cluster, so that they meet in tables, in allocations and in
// what is freed.
func TestManyWritersAgainstShadow(t *testing.T) {
	for _, options := range []string{"cluster_size=512", "cluster_size=4k", "cluster_size=16k,extended_l2=on"} {
		const size, writers = 512 << 10, 8
		f := made(t, "512k", options)
		base := memfile.New("base", noise(rand.New(rand.NewPCG(1, 1)), size/2))
		im := opened(t, f, Options{L2Cache: 1, Backing: NewRawBacking(base)})
		im.alloc.least = 0
		if err := im.Begin(nil); err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		shadow := make([]byte, size)
		copy(shadow, base.Bytes())
		var wg sync.WaitGroup
		var stop atomic.Bool
		wg.Go(func() {
			for !stop.Load() {
				if err := im.Flush(); err != nil {
					t.Error(err)
					return
				}
			}
		})
		var work sync.WaitGroup
		for w := range writers {
			work.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(w), 12))
				stripe := func() (off, n int64) {
					// Stripes of 1 KiB in turn, so that neighbours share clusters.
					off = (rng.Int64N(size/1024/writers)*writers + int64(w)) * 1024
					return off + rng.Int64N(512), 1 + rng.Int64N(512)
				}
				for range 400 {
					off, n := stripe()
					var err error
					switch rng.IntN(5) {
					case 0, 1:
						p := noise(rng, n)
						copy(shadow[off:], p)
						err = im.writeAt(p, off)
					case 2:
						clear(shadow[off : off+n])
						err = im.Zero(off, n, rng.IntN(2) == 0)
					default:
						p := make([]byte, n)
						if err = im.readAt(p, off); err == nil && !bytes.Equal(p, shadow[off:off+n]) {
							t.Errorf("%s: read of %d+%d differs at %d", options, off, n, off+int64(differs(p, shadow[off:off+n])))
							return
						}
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		work.Wait()
		stop.Store(true)
		wg.Wait()
		if err := im.Settle(); err != nil {
			t.Fatal(err)
		}
		if i := differs(readAll(t, im), shadow); i >= 0 {
			t.Errorf("%s: the disk differs at %d", options, i)
		}
		checked(t, f.Bytes(), true)
	}
}

// TestFreedClustersAreNotSeen has writers that replace whole clusters while
// readers look at them: a reader must see the bytes of its own cluster, old or
// new, and never those of another one.
func TestFreedClustersAreNotSeen(t *testing.T) {
	const cluster, clusters = 4096, 32
	f := made(t, "128k", "cluster_size=4k")
	im := opened(t, f, Options{L2Cache: 1})
	im.alloc.least = 0
	if err := im.Begin(nil); err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	var work, readers sync.WaitGroup
	var stop atomic.Bool
	for w := range 4 {
		work.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 13))
			for range 300 {
				// Each has clusters of its own.
				c := rng.Int64N(clusters/4)*4 + int64(w)
				p := bytes.Repeat([]byte{byte(c + 1)}, cluster)
				var err error
				switch rng.IntN(3) {
				case 0:
					err = im.Discard(c*cluster, cluster)
				case 1:
					err = im.Flush()
				default:
					err = im.writeAt(p, c*cluster)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 14))
			p := make([]byte, cluster)
			for !stop.Load() {
				c := rng.Int64N(clusters)
				if err := im.readAt(p, c*cluster); err != nil {
					t.Error(err)
					return
				}
				for _, b := range p {
					if b != 0 && b != byte(c+1) {
						t.Errorf("cluster %d shows byte %d", c, b)
						return
					}
				}
			}
		})
	}
	work.Wait()
	stop.Store(true)
	readers.Wait()
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	checked(t, f.Bytes(), true)
}

// TestPinnedClusterIsNotUsedAgain is the same with the order made by hand: a
// read is mapped, its cluster discarded, the drop flushed, and everything
// written anew; then the read takes place.
func TestPinnedClusterIsNotUsedAgain(t *testing.T) {
	const cluster = 4096
	f := made(t, "1M", "cluster_size=4k")
	im := opened(t, f, Options{})
	im.alloc.least = 0
	if err := im.Begin(nil); err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	old := bytes.Repeat([]byte{1}, cluster)
	if err := im.writeAt(old, 0); err != nil {
		t.Fatal(err)
	}
	var p Plan
	if err := im.Map(&p, 0, cluster, MayBlock); err != nil {
		t.Fatal(err)
	}
	if err := im.Discard(0, cluster); err != nil {
		t.Fatal(err)
	}
	for c := int64(1); c < 256; c++ {
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
		if err := im.writeAt(bytes.Repeat([]byte{2}, cluster), c*cluster); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, cluster)
	if err := p.Extents[0].File.ReadAt(got, p.Extents[0].Offset); err != nil || !bytes.Equal(got, old) {
		t.Fatalf("the late read sees %d: %v", got[0], err)
	}
	im.Unmap(&p)
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	if err := f.ReadAt(got, p.Extents[0].Offset); err == nil && bytes.Equal(got, old) {
		t.Error("the cluster was not given back when nobody used it any more")
	}
	checked(t, f.Bytes(), true)
}
