package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// A history is what was done to a disk whose sectors say who wrote them. Each
// write has a number, and every sector of it holds that number and where it
// belongs; so a crash state shows at a glance whether a sector holds another
// block's bytes, and how old they are.
type history struct {
	im     *Image
	events func() int // of all files so far

	mu sync.Mutex
	// per sector, the writes in order; number 0 is zeros
	sectors [][]stamp
	next    uint64
}

type stamp struct {
	number  uint64
	began   int  // events when the write was begun
	acked   bool // it was answered
	durable int  // events when a flush that began after that had ended; -1 for never
}

func sectorOf(number uint64, sector int64) []byte {
	b := make([]byte, 512)
	if number == 0 {
		return b
	}
	for i := 0; i < 512; i += 16 {
		binary.BigEndian.PutUint64(b[i:], number)
		binary.BigEndian.PutUint64(b[i+8:], uint64(sector))
	}
	return b
}

// newHistory begins with what is on the disk already.
func newHistory(t *testing.T, im *Image, events func() int) *history {
	t.Helper()
	h := &history{im: im, events: events, sectors: make([][]stamp, im.Size()/512)}
	disk := readAll(t, im)
	for s := range h.sectors {
		number := binary.BigEndian.Uint64(disk[s*512:])
		h.sectors[s] = []stamp{{number: number, acked: true}}
		h.next = max(h.next, number)
	}
	return h
}

// note enters a change of sectors and returns its number, 0 if it is zeros.
func (h *history) note(first, n int64, zeros bool) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	number := uint64(0)
	if !zeros {
		h.next++
		number = h.next
	}
	now := h.events()
	for s := first; s < first+n; s++ {
		h.sectors[s] = append(h.sectors[s], stamp{number, now, false, -1})
	}
	return number
}

func (h *history) write(first, n int64) error { return h.put(first, n, false) }

// put is write, with fua so that it is durable when it returns.
func (h *history) put(first, n int64, fua bool) error {
	number := h.note(first, n, false)
	var p []byte
	for s := first; s < first+n; s++ {
		p = append(p, sectorOf(number, s)...)
	}
	err := h.im.put(p, first*512, fua)
	h.acknowledge(first, n)
	if fua && err == nil {
		h.durable(first, n)
	}
	return err
}

// durable notes that the latest change of sectors, which nobody else changes, is.
func (h *history) durable(first, n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := first; s < first+n; s++ {
		if w := &h.sectors[s][len(h.sectors[s])-1]; w.durable < 0 {
			w.durable = h.events()
		}
	}
}

// acknowledge notes that the latest change of sectors was answered. Nobody else
// changes these.
func (h *history) acknowledge(first, n int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := first; s < first+n; s++ {
		h.sectors[s][len(h.sectors[s])-1].acked = true
	}
}

func (h *history) zero(first, n int64, keep bool) error {
	h.note(first, n, true)
	err := h.im.Zero(first*512, n*512, keep)
	h.acknowledge(first, n)
	return err
}

// flush makes durable what has been acknowledged.
func (h *history) flush() error {
	h.mu.Lock()
	var now [][2]int
	for s, all := range h.sectors {
		for i := range all {
			if all[i].durable < 0 && all[i].acked {
				now = append(now, [2]int{s, i})
			}
		}
	}
	h.mu.Unlock()
	if err := h.im.Flush(); err != nil {
		return err
	}
	h.mu.Lock()
	at := h.events()
	for _, x := range now {
		if w := &h.sectors[x[0]][x[1]]; w.durable < 0 {
			w.durable = at
		}
	}
	h.mu.Unlock()
	return nil
}

// judge looks at what a crash after n events has left.
func (h *history) judge(disk []byte, n int) error {
	for s, all := range h.sectors {
		got := disk[s*512:][:512]
		oldest := 0
		for i, w := range all {
			if w.durable >= 0 && w.durable <= n {
				oldest = i
			}
		}
		ok := false
		for _, w := range all[oldest:] {
			if w.began <= n && bytes.Equal(got, sectorOf(w.number, int64(s))) {
				ok = true
				break
			}
		}
		// The sector of a write that was not flushed may be mapped before its
		// bytes have come; then it is what a new cluster is.
		if !ok && oldest < len(all)-1 && bytes.Equal(got, make([]byte, 512)) {
			ok = all[oldest].number == 0
		}
		if !ok {
			number, sector := binary.BigEndian.Uint64(got), binary.BigEndian.Uint64(got[8:])
			return fmt.Errorf("sector %d holds write %d of sector %d; since the last flush it may hold %v", s, number, sector, all[oldest:])
		}
	}
	return nil
}

// stride is how many of the places at which a history can be cut off, or can
// fail, are passed over for one that is looked at. It is more than 1 with the
// race detector, which makes all ten times as slow: there is one goroutine, so
// it has nothing to find there.
var stride = 1

// crashes looks at crash states of a history: some after every event, with
// what was not synced lost in many ways.
func crashes(t *testing.T, h *history, f *memfile.File, o Options, rng *rand.Rand, perEvent int) {
	t.Helper()
	from, events := f.Events()
	withQEMU := 0
	for n := 0; n <= len(events); n += stride {
		for try := range perEvent {
			chance := rng
			if try == 0 {
				chance = nil
			}
			b := memfile.Crash(from, events, n, chance)
			state := memfile.New("crashed", b)
			hd, err := ReadHeader(state)
			if err != nil {
				t.Fatalf("after %d of %d events: %v", n, len(events), err)
			}
			r, err := Check(state, hd, nil)
			if err != nil || r.Corruptions > 0 {
				t.Fatalf("after %d of %d events, the last %v: %v %v", n, len(events), last(events[:n]), err, r.Findings)
			}
			if withQEMU < 20 && rng.IntN(len(events)) < 3 {
				checked(t, b, false)
				withQEMU++
			}
			disk := make([]byte, hd.Size)
			if err := opened(t, state, o).readAt(disk, 0); err != nil {
				t.Fatalf("after %d of %d events: %v", n, len(events), err)
			}
			if err := h.judge(disk, n); err != nil {
				t.Fatalf("after %d of %d events, the last %v: %v", n, len(events), last(events[:n]), err)
			}
		}
	}
}

func last(events []memfile.Event) string {
	if len(events) == 0 {
		return "none"
	}
	e := events[len(events)-1]
	return fmt.Sprintf("op %d at %#x+%d", e.Op, e.Off, e.N)
}

func TestCrashStates(t *testing.T) {
	kinds := map[string]func(t *testing.T) *memfile.File{
		"512":      func(t *testing.T) *memfile.File { return made(t, "160k", "cluster_size=512") },
		"1 bit":    func(t *testing.T) *memfile.File { return made(t, "160k", "cluster_size=512", "refcount_bits=1") },
		"4k":       func(t *testing.T) *memfile.File { return made(t, "200k", "cluster_size=4k") },
		"extended": func(t *testing.T) *memfile.File { return made(t, "200k", "cluster_size=16k", "extended_l2=on") },
		"v2":       func(t *testing.T) *memfile.File { return made(t, "100k", "cluster_size=1k", "compat=0.10") },
		// Its refcount table has to grow.
		"growth": func(t *testing.T) *memfile.File {
			return made(t, "2304k", "cluster_size=512", "refcount_bits=64")
		},
		// The same on a device, which is full of other bytes.
		"device growth": func(t *testing.T) *memfile.File {
			f := made(t, "2304k", "cluster_size=512", "refcount_bits=64")
			was := f.Length()
			if err := errors.Join(f.Resize(6<<20), f.WriteAt(bytes.Repeat([]byte{0xee}, int(6<<20-was)), was, false)); err != nil {
				t.Fatal(err)
			}
			return f
		},
		"compressed": func(t *testing.T) *memfile.File { return withSectors(t, "-c", "cluster_size=4k") },
		"snapshot": func(t *testing.T) *memfile.File {
			return snapshotted(t, withSectors(t, "", "cluster_size=512"))
		},
		"compressed snapshot": func(t *testing.T) *memfile.File {
			return snapshotted(t, withSectors(t, "-c", "cluster_size=16k", "extended_l2=on"))
		},
	}
	runs := uint64(2)
	if testing.Short() {
		runs = 1
	}
	for name, make := range kinds {
		t.Run(name, func(t *testing.T) {
			for seed := range runs {
				rng := rand.New(rand.NewPCG(seed, 11))
				f := make(t)
				im := opened(t, f, Options{L2Cache: 1, Fixed: name == "device growth"})
				h := newHistory(t, im, func() int { _, e := f.Events(); return len(e) })
				im.alloc.least = 0 // so that what is freed is used again soon
				f.Record()
				if err := im.Begin(nil); err != nil {
					t.Fatal(err)
				}
				steps := 50
				if strings.HasSuffix(name, "growth") {
					steps = 25
				}
				for range steps {
					sectors := int64(len(h.sectors))
					first := rng.Int64N(sectors)
					n := 1 + rng.Int64N(min(sectors-first, 20))
					if strings.HasSuffix(name, "growth") {
						n = 1 + rng.Int64N(min(sectors-first, 400))
					}
					var err error
					switch rng.IntN(8) {
					case 0, 1, 2:
						err = h.write(first, n)
					case 3:
						err = h.put(first, n, true)
					case 4:
						err = h.zero(first, n, rng.IntN(2) == 0)
					case 5:
						// Whole clusters, so that space is given back and used again.
						c := im.g.ClusterSize() / 512
						first = first / c * c
						err = h.zero(first, min(sectors-first, 3*c), false)
					default:
						err = h.flush()
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				if err := errors.Join(im.Settle(), h.flush()); err != nil {
					t.Fatal(err)
				}
				im.Close()
				crashes(t, h, f, Options{Warn: func(string) {}}, rng, 4)
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

// TestCrashStatesOfManyWriters has writers with sectors of their own, of which
// many lie in one cluster, while others flush.
func TestCrashStatesOfManyWriters(t *testing.T) {
	for name, make := range map[string]func(t *testing.T) *memfile.File{
		"512":      func(t *testing.T) *memfile.File { return made(t, "120k", "cluster_size=512") },
		"4k":       func(t *testing.T) *memfile.File { return made(t, "120k", "cluster_size=4k") },
		"extended": func(t *testing.T) *memfile.File { return made(t, "120k", "cluster_size=16k", "extended_l2=on") },
		// The same on a device, which is full of other bytes.
		"device growth": func(t *testing.T) *memfile.File {
			f := made(t, "2304k", "cluster_size=512", "refcount_bits=64")
			was := f.Length()
			if err := errors.Join(f.Resize(6<<20), f.WriteAt(bytes.Repeat([]byte{0xee}, int(6<<20-was)), was, false)); err != nil {
				t.Fatal(err)
			}
			return f
		},
		"compressed": func(t *testing.T) *memfile.File { return withSectors(t, "-c", "cluster_size=4k") },
		"snapshot":   func(t *testing.T) *memfile.File { return snapshotted(t, withSectors(t, "", "cluster_size=4k")) },
	} {
		t.Run(name, func(t *testing.T) {
			f := make(t)
			im := opened(t, f, Options{L2Cache: 1})
			h := newHistory(t, im, func() int { _, e := f.Events(); return len(e) })
			im.alloc.least = 0
			f.Record()
			if err := im.Begin(nil); err != nil {
				t.Fatal(err)
			}
			const writers = 6
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), 15))
					for range 40 {
						// Pairs of sectors in turn.
						first := (rng.Int64N(int64(len(h.sectors))/2/writers)*writers + int64(w)) * 2
						var err error
						switch rng.IntN(6) {
						case 0:
							err = h.zero(first, 2, rng.IntN(2) == 0)
						case 1, 2:
							err = h.flush()
						default:
							err = h.put(first, 1+rng.Int64N(2), rng.IntN(3) == 0)
						}
						if err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			if err := errors.Join(im.Settle(), h.flush()); err != nil {
				t.Fatal(err)
			}
			im.Close()
			crashes(t, h, f, Options{Warn: func(string) {}}, rand.New(rand.NewPCG(1, 16)), 3)
		})
	}
}

func readAll(t *testing.T, im *Image) []byte {
	t.Helper()
	disk := make([]byte, im.Size())
	if err := im.readAt(disk, 0); err != nil {
		t.Fatal(err)
	}
	return disk
}

// withSectors makes an image of 120 KiB whose sectors say who wrote them, as
// qemu-img convert writes it.
func withSectors(t *testing.T, flag string, options ...string) *memfile.File {
	t.Helper()
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "q.qcow2")
	var disk []byte
	for s := range int64(240) {
		number := uint64(s/16 + 1)
		if s%48 < 8 {
			number = 0
		}
		disk = append(disk, sectorOf(number, s)...)
	}
	if err := os.WriteFile(raw, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"convert", "-O", "qcow2"}
	if flag != "" {
		args = append(args, flag)
	}
	for _, o := range options {
		args = append(args, "-o", o)
	}
	qemuImg(t, append(args, raw, path)...)
	return loaded(t, path)
}

func snapshotted(t *testing.T, f *memfile.File) *memfile.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s.qcow2")
	if err := os.WriteFile(path, f.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "snapshot", "-c", "s", path)
	return loaded(t, path)
}
