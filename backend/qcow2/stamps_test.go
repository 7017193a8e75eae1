package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// Every sector that is written says where it belongs and which write it was, so
// that a reader who gets another block's bytes sees it, whatever runs beside it.
func stamped(sector int64, number uint64) []byte {
	b := make([]byte, 512)
	for i := 0; i < len(b); i += 16 {
		binary.BigEndian.PutUint64(b[i:], uint64(sector)+1)
		binary.BigEndian.PutUint64(b[i+8:], number)
	}
	return b
}

// foreign says what is wrong with a sector, "" if it is zeros or its own.
func foreign(b []byte, sector int64) string {
	if b[7] == 0 && bytes.Equal(b, make([]byte, 512)) {
		return ""
	}
	for i := 0; i < len(b); i += 16 {
		if got := binary.BigEndian.Uint64(b[i:]); got != uint64(sector)+1 {
			return fmt.Sprintf("byte %d of sector %d holds bytes of sector %d", i, sector, int64(got)-1)
		}
	}
	return ""
}

// racer changes sectors that nobody else changes, and knows what they hold.
type racer struct {
	im     *Image
	rng    *rand.Rand
	mine   func(sector int64) bool
	whole  func(cluster int64) bool // all of the cluster is its own
	holds  map[int64]uint64         // number of the last write, 0 for zeros
	number *atomic.Uint64
}

func (r *racer) write(sector int64) error {
	n := r.number.Add(1)
	if err := r.im.writeAt(stamped(sector, n), sector*512); err != nil {
		return err
	}
	r.holds[sector] = n
	return nil
}

func (r *racer) check(sector int64) error {
	n, ok := r.holds[sector]
	if !ok {
		return nil
	}
	b := make([]byte, 512)
	if err := r.im.readAt(b, sector*512); err != nil {
		return err
	}
	want := make([]byte, 512)
	if n > 0 {
		want = stamped(sector, n)
	}
	if !bytes.Equal(b, want) {
		return fmt.Errorf("sector %d does not hold write %d, but %d of sector %d", sector, n,
			binary.BigEndian.Uint64(b[8:]), int64(binary.BigEndian.Uint64(b))-1)
	}
	return nil
}

func (r *racer) step() error {
	sectors, per := r.im.Size()/512, max(r.im.g.ClusterSize()/512, 1)
	s := r.rng.Int64N(sectors)
	c := s / per
	switch k := r.rng.IntN(8); {
	case k == 0 && r.whole(c) && (c+1)*per <= sectors:
		var err error
		if r.rng.IntN(2) == 0 {
			err = r.im.Zero(c*per*512, per*512, r.rng.IntN(2) == 0)
		} else if r.im.opts.Backing == nil && r.im.h.Autoclear&DataFileRaw == 0 || r.im.g.Version >= 3 {
			err = r.im.Discard(c*per*512, per*512)
		} else {
			return nil
		}
		for i := range per {
			r.holds[c*per+i] = 0
		}
		return err
	case k == 1 && r.whole(c) && (c+1)*per <= sectors:
		var all []byte
		n := r.number.Add(1)
		for i := range per {
			all = append(all, stamped(c*per+i, n)...)
			r.holds[c*per+i] = n
		}
		return r.im.writeAt(all, c*per*512)
	case k < 5 && r.mine(s):
		return r.write(s)
	case r.mine(s):
		return r.check(s)
	}
	return nil
}

// look reads any range, late, and checks that nothing foreign is in it.
func look(im *Image, rng *rand.Rand) error {
	sectors := im.Size() / 512
	s := rng.Int64N(sectors)
	n := 1 + rng.Int64N(min(sectors-s, 3*im.g.ClusterSize()/512+2))
	var p Plan
	if err := im.Map(&p, s*512, n*512, MayBlock); err != nil {
		return err
	}
	defer im.Unmap(&p)
	for range rng.IntN(20) {
		runtime.Gosched()
	}
	got := make([]byte, n*512)
	rest := got
	for i, e := range p.Extents {
		var err error
		switch e.Kind {
		case Data:
			err = e.File.ReadAt(rest[:e.Length], e.Offset)
		case Compressed:
			err = im.ReadCompressed(&p, i, 0, rest[:e.Length])
		}
		if err != nil {
			return err
		}
		rest = rest[e.Length:]
	}
	for i := range n {
		if what := foreign(got[i*512:][:512], s+i); what != "" {
			return errors.New(what)
		}
	}
	return nil
}

// raced runs writers, readers and flushes beside each other.
func raced(t *testing.T, im *Image, seed uint64, steps int) {
	t.Helper()
	const writers = 6
	per := max(im.g.ClusterSize()/512, 1)
	var number atomic.Uint64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	fail := func(err error) {
		if err != nil {
			t.Error(err)
		}
	}
	all := make([]*racer, writers)
	for w := range all {
		// Of four clusters one belongs to a single writer, and the sectors of the
		// others to all in turn.
		whole := func(c int64) bool { return c%4 == 0 && c/4%writers == int64(w) }
		all[w] = &racer{im: im, rng: rand.New(rand.NewPCG(seed, uint64(w))), number: &number, whole: whole,
			mine:  func(s int64) bool { return whole(s/per) || s/per%4 != 0 && s%writers == int64(w) },
			holds: make(map[int64]uint64)}
		wg.Go(func() {
			for range steps {
				if err := all[w].step(); err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
			}
		})
	}
	var beside sync.WaitGroup
	for k := range 3 {
		beside.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(100+k)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				if k < 2 {
					fail(look(im, rng))
				} else {
					fail(im.Flush())
				}
				runtime.Gosched()
				if t.Failed() {
					return
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	beside.Wait()
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	for _, r := range all {
		for s := range r.holds {
			fail(r.check(s))
		}
	}
}

func TestNobodySeesForeignSectors(t *testing.T) {
	kinds := map[string]func(t *testing.T, rng *rand.Rand) (*Image, *memfile.File){
		"512": func(t *testing.T, _ *rand.Rand) (*Image, *memfile.File) {
			f := made(t, "1M", "cluster_size=512")
			return begun(t, f, Options{L2Cache: 1}), f
		},
		"4k": func(t *testing.T, _ *rand.Rand) (*Image, *memfile.File) {
			f := made(t, "1M", "cluster_size=4k")
			return begun(t, f, Options{}), f
		},
		"4k, space kept": func(t *testing.T, _ *rand.Rand) (*Image, *memfile.File) {
			f := made(t, "300k", "cluster_size=4k")
			return begun(t, f, Options{KeepSpace: true}), f
		},
		"extended": func(t *testing.T, _ *rand.Rand) (*Image, *memfile.File) {
			f := made(t, "1M", "cluster_size=16k", "extended_l2=on")
			return begun(t, f, Options{}), f
		},
		"backing": func(t *testing.T, _ *rand.Rand) (*Image, *memfile.File) {
			f := made(t, "500k", "cluster_size=4k")
			return begun(t, f, Options{Backing: NewRawBacking(memfile.New("base", sectors(400<<10)))}), f
		},
		"compressed and in a snapshot": func(t *testing.T, _ *rand.Rand) (*Image, *memfile.File) {
			dir := t.TempDir()
			raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "c.qcow2")
			if err := os.WriteFile(raw, sectors(500<<10), 0o600); err != nil {
				t.Fatal(err)
			}
			qemuImg(t, "convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
			qemuImg(t, "snapshot", "-c", "s", path)
			f := loaded(t, path)
			return begun(t, f, Options{}), f
		},
		"snapshot": func(t *testing.T, _ *rand.Rand) (*Image, *memfile.File) {
			dir := t.TempDir()
			raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "c.qcow2")
			if err := os.WriteFile(raw, sectors(500<<10), 0o600); err != nil {
				t.Fatal(err)
			}
			qemuImg(t, "convert", "-O", "qcow2", "-o", "cluster_size=512", raw, path)
			qemuImg(t, "snapshot", "-c", "s", path)
			f := loaded(t, path)
			return begun(t, f, Options{L2Cache: 1}), f
		},
	}
	for name, open := range kinds {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(2) {
				im, f := open(t, rand.New(rand.NewPCG(seed, 3)))
				raced(t, im, seed, 1500)
				checked(t, f.Bytes(), true)
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

// sectors is a disk of n bytes that are all there.
func sectors(n int64) []byte {
	var b []byte
	for s := range n / 512 {
		b = append(b, stamped(s, 0)...)
	}
	return b
}
