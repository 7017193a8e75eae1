package qcow2

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// qemuReport is what "qemu-img check --output=json" says.
type qemuReport struct {
	Corruptions int64 `json:"corruptions"`
	Leaks       int64 `json:"leaks"`
	CheckErrors int64 `json:"check-errors"`
	EndOffset   int64 `json:"image-end-offset"`
	Total       int64 `json:"total-clusters"`
	Allocated   int64 `json:"allocated-clusters"`
	Fragmented  int64 `json:"fragmented-clusters"`
	Compressed  int64 `json:"compressed-clusters"`
}

func qemuCheck(t *testing.T, b []byte) qemuReport {
	t.Helper()
	path := filepath.Join(t.TempDir(), "checked.qcow2")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	out, _ := qemuImgCode(t, "check", "-f", "qcow2", "--output=json", path)
	var r qemuReport
	if i := bytes.IndexByte([]byte(out), '{'); i < 0 || json.Unmarshal([]byte(out)[i:], &r) != nil {
		t.Fatalf("qemu-img check says %s", out)
	}
	return r
}

// manyFeatured makes an image with data, holes, zeros, compressed clusters and a
// snapshot.
func manyFeatured(t *testing.T, rng *rand.Rand, options string) *memfile.File {
	t.Helper()
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "q.qcow2")
	disk := make([]byte, 600<<10)
	copy(disk[50<<10:], bytes.Repeat([]byte("nbd"), 50<<10))
	copy(disk[400<<10:], noise(rng, 90<<10))
	if err := os.WriteFile(raw, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "convert", "-c", "-O", "qcow2", "-o", options, raw, path)
	qemuImg(t, "snapshot", "-c", "one", path)
	f := loaded(t, path)
	im := begun(t, f, Options{})
	shadowed(t, im, disk, rng, 40)
	return f
}

func TestCheckAgreesWithQEMU(t *testing.T) {
	for _, options := range []string{"cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=16k,extended_l2=on", "compat=0.10"} {
		rng := rand.New(rand.NewPCG(4, 4))
		f := manyFeatured(t, rng, options)
		h, err := ReadHeader(f)
		if err != nil {
			t.Fatal(err)
		}
		r, err := Check(f, h, nil)
		if err != nil {
			t.Fatal(err)
		}
		want := qemuCheck(t, f.Bytes())
		got := qemuReport{r.Corruptions, r.Leaks, 0, r.EndOffset, r.Total, r.Allocated, r.Fragmented, r.Compressed}
		if got != want {
			t.Errorf("%s: %+v, qemu-img says %+v\n%v", options, got, want, r.Findings)
		}
	}
}

// TestCheckAndMendDamagedImages damages refcounts and flags, where what is
// wrong is beyond doubt, and then anything.
func TestCheckAndMendDamagedImages(t *testing.T) {
	for _, options := range []string{"cluster_size=512", "cluster_size=4k", "cluster_size=16k,extended_l2=on"} {
		rng := rand.New(rand.NewPCG(5, 4))
		good := manyFeatured(t, rng, options).Bytes()
		h, err := ReadHeader(memfile.New("good", good))
		if err != nil {
			t.Fatal(err)
		}
		probe := newChecker(memfile.New("good", good), h, nil)
		if err := probe.run(); err != nil || !probe.r.Clean() {
			t.Fatal(err, probe.r.Findings)
		}
		for seed := range uint64(24) {
			rng := rand.New(rand.NewPCG(seed, 5))
			bad := bytes.Clone(good)
			for range 1 + rng.IntN(4) {
				switch seed % 3 {
				case 0: // a refcount
					var blocks []uint64
					for _, e := range probe.table {
						if e != 0 {
							blocks = append(blocks, e)
						}
					}
					e := blocks[rng.IntN(len(blocks))]
					n := min(h.Geometry().refcountsPerBlock(), probe.counts.end())
					h.Geometry().setRefcount(bad[e:int64(e)+h.Geometry().ClusterSize()], rng.Int64N(n), uint64(rng.IntN(4)))
				case 1: // a COPIED flag
					l1 := probe.h.L1Offset + 8*rng.Int64N(int64(probe.h.L1Entries))
					if bad[l1+7]|bad[l1+6]|bad[l1+5] != 0 {
						bad[l1] ^= 0x80
					}
				case 2: // the refcount table
					at := h.RefcountOffset + rng.Int64N(min(64, h.RefcountLength<<h.ClusterBits))
					bad[at] = byte(rng.IntN(3))
				}
			}
			f := memfile.New("bad", bytes.Clone(bad))
			h := *h
			r, err := Check(f, &h, nil)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			want := qemuCheck(t, bad)
			if (r.Corruptions > 0) != (want.Corruptions+want.CheckErrors > 0) || seed%3 == 0 && (r.Leaks != want.Leaks || r.Corruptions != want.Corruptions) {
				t.Errorf("%s, seed %d: %d corruptions and %d leaks, qemu-img says %+v\n%v", options, seed, r.Corruptions, r.Leaks, want, r.Findings)
			}
			if _, after, err := Mend(f, &h, RepairAll, nil); err != nil || !after.Clean() {
				t.Fatalf("%s, seed %d: %v %+v", options, seed, err, after)
			}
			if left := qemuCheck(t, f.Bytes()); left.Corruptions+left.Leaks+left.CheckErrors != 0 {
				t.Errorf("%s, seed %d: qemu-img still says %+v", options, seed, left)
			}
			a, b := make([]byte, h.Size), make([]byte, h.Size)
			if err := opened(t, f, Options{}).readAt(a, 0); err != nil {
				t.Fatal(err)
			}
			if err := opened(t, memfile.New("good", good), Options{}).readAt(b, 0); err != nil || !bytes.Equal(a, b) {
				t.Errorf("%s, seed %d: the disk has changed: %v", options, seed, err)
			}
		}
	}
}

func TestBeginRepairsDirtyImage(t *testing.T) {
	for _, options := range []string{"cluster_size=512,lazy_refcounts=on", "cluster_size=64k,lazy_refcounts=on"} {
		path := filepath.Join(t.TempDir(), "lazy.qcow2")
		qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, "1M")
		// It dies without a word, as it is told to.
		program(t, "qemu-io", "-c", "write -P 7 100k 300k", "-c", "flush", "-c", "abort", path)
		f := loaded(t, path)
		h, err := ReadHeader(f)
		if err != nil || h.Incompatible&Dirty == 0 {
			t.Fatalf("qemu-io left no dirty image: %v %+v", err, h)
		}
		before := f.Bytes()
		p := make([]byte, 300<<10)
		if err := opened(t, f, Options{}).readAt(p, 100<<10); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{7}, len(p))) {
			t.Fatalf("read of the dirty image: %v", err)
		}
		if err := opened(t, f, Options{NoRepair: true}).Begin(nil); err == nil {
			t.Error("it was begun without a repair")
		}
		if !bytes.Equal(before, f.Bytes()) {
			t.Error("an image that was not begun has changed")
		}
		told, of := int64(0), int64(0)
		im := opened(t, f, Options{})
		if err := im.Begin(func(done, total int64) { told, of = done, total }); err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		if told == 0 || told != of {
			t.Errorf("progress of %d of %d bytes", told, of)
		}
		shadow := make([]byte, 1<<20)
		copy(shadow[100<<10:], p)
		shadowed(t, im, shadow, rand.New(rand.NewPCG(6, 6)), 50)
		checked(t, f.Bytes(), true)
		if h, err := ReadHeader(f); err != nil || h.Incompatible != 0 {
			t.Errorf("%v %+v", err, h)
		}
	}
}

func TestCheckOfHostileSizes(t *testing.T) {
	f := made(t, fmt.Sprint(1<<40))
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, h.L1Offset, h.RefcountOffset} {
		b := f.Bytes()
		for i := range int64(64) {
			if off > 0 {
				b[off+i] = 0xfe
			}
		}
		h := *h
		if _, err := Check(memfile.New("hostile", b), &h, nil); err != nil {
			t.Error(err)
		}
	}
}

// Where the snapshots are not known nothing is free, and nothing is changed.
func TestMendKeepsWhatSnapshotsMayHave(t *testing.T) {
	rng := rand.New(rand.NewPCG(6, 4))
	f := manyFeatured(t, rng, "cluster_size=4k")
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.WriteAt([]byte{0xff, 0xff, 0xff, 0xff}, h.SnapshotsOffset+36, false); err != nil { // length of extra data
		t.Fatal(err)
	}
	bad := f.Bytes()
	for _, what := range []Repair{RepairLeaks, RepairAll} {
		before, after, err := Mend(f, h, what, nil)
		if err != nil || before.Corruptions == 0 || after.Corruptions != before.Corruptions || !bytes.Equal(f.Bytes(), bad) {
			t.Errorf("%+v, %+v, %v", before, after, err)
		}
	}
}

// A table to which everything leads is read once, and counted as often as it is
// named, as QEMU does.
func TestCheckOfSharedTables(t *testing.T) {
	f := memfile.New("shared", nil)
	if err := Create(f, nil, CreateOptions{Size: 100 << 20, ClusterSize: 512}); err != nil {
		t.Fatal(err)
	}
	im := begun(t, f, Options{})
	if err := im.writeAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	h := im.Header()
	first := make([]byte, 8)
	if err := f.ReadAt(first, h.L1Offset); err != nil {
		t.Fatal(err)
	}
	for i := range h.L1Entries {
		if err := f.WriteAt(first, h.L1Offset+8*int64(i), false); err != nil {
			t.Fatal(err)
		}
	}
	reads := 0
	f.FailRead = func(int64, int64) error { reads++; return nil }
	r, err := Check(f, h, nil)
	if err != nil {
		t.Fatal(err)
	}
	if reads > 100 {
		t.Errorf("%d reads for %d entries that name one table", reads, h.L1Entries)
	}
	want := qemuCheck(t, f.Bytes())
	if got := (qemuReport{r.Corruptions, r.Leaks, 0, r.EndOffset, r.Total, r.Allocated, r.Fragmented, r.Compressed}); got != want {
		t.Errorf("%+v, qemu-img says %+v\n%v", got, want, r.Findings)
	}
}

// Entries of a data file have the flag too.
func TestCheckOfDataFile(t *testing.T) {
	f := memfile.New("image", nil)
	if err := Create(f, memfile.New("data", nil), CreateOptions{Size: 1 << 20, DataFile: "data", DataFileRaw: true}); err != nil {
		t.Fatal(err)
	}
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	l1 := make([]byte, 8)
	if err := f.ReadAt(l1, h.L1Offset); err != nil {
		t.Fatal(err)
	}
	l2 := hostOffset(binary.BigEndian.Uint64(l1))
	if err := f.WriteAt(be64(3<<16), l2+24, false); err != nil { // as it was, without the flag
		t.Fatal(err)
	}
	before, after, err := Mend(f, h, RepairAll, nil)
	if err != nil || before.Corruptions != 1 || !after.Clean() {
		t.Errorf("%+v, %+v, %v", before, after, err)
	}
	if err := f.ReadAt(l1, l2+24); err != nil || binary.BigEndian.Uint64(l1) != 3<<16|entryCopied {
		t.Errorf("the entry is %x, %v", l1, err)
	}
}

// What reads as zeros anyway needs no cluster, and no refcount table is as good as
// one that is broken.
func TestMendWithoutLoss(t *testing.T) {
	for name, c := range map[string]struct {
		options string
		damage  func(t *testing.T, f *memfile.File, h *Header)
	}{
		"a zero entry at an odd offset": {"cluster_size=4k", func(t *testing.T, f *memfile.File, h *Header) {
			oddEntry(t, f, h, cell{entry: entryZero})
		}},
		"zero subclusters at an odd offset": {"cluster_size=16k,extended_l2=on", func(t *testing.T, f *memfile.File, h *Header) {
			oddEntry(t, f, h, cell{bits: allZero})
		}},
		"no refcount table": {"cluster_size=4k", func(t *testing.T, f *memfile.File, h *Header) {
			if err := f.WriteAt(make([]byte, 4), offRefcountTable+8, false); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			f := made(t, "1M", c.options)
			im := begun(t, f, Options{})
			data := bytes.Repeat([]byte{7}, 64<<10)
			if err := errors.Join(im.writeAt(data, 0), im.Zero(0, 32<<10, true), im.Settle()); err != nil {
				t.Fatal(err)
			}
			c.damage(t, f, im.Header())
			h, err := ReadHeader(f)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := New(f, h, Options{}); (err != nil) != (h.RefcountLength == 0) {
				t.Errorf("opened: %v", err)
			}
			before, after, err := Mend(f, h, RepairAll, nil)
			if err != nil || before.Corruptions == 0 || !after.Clean() || after.CorruptionsFixed == 0 {
				t.Fatalf("%+v, %+v, %v", before, after, err)
			}
			checked(t, f.Bytes(), true)
			clear(data[:32<<10])
			p := make([]byte, len(data))
			if err := opened(t, f, Options{}).readAt(p, 0); err != nil || !bytes.Equal(p, data) {
				t.Errorf("the disk differs at %d: %v", differs(p, data), err)
			}
		})
	}
}

// oddEntry gives the first L2 entry a host offset within a cluster.
func oddEntry(t *testing.T, f *memfile.File, h *Header, want cell) {
	t.Helper()
	word := func(off int64) uint64 {
		p := make([]byte, 8)
		if err := f.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		return binary.BigEndian.Uint64(p)
	}
	l2 := hostOffset(word(h.L1Offset))
	e := cell{entry: word(l2)}
	if h.Geometry().Extended {
		e.bits = word(l2 + 8)
	}
	if e.entry&entryZero != want.entry || e.bits != want.bits || hostOffset(e.entry) == 0 {
		t.Fatalf("the entry is %x", e)
	}
	if err := f.WriteAt(be64(e.entry+512), l2, false); err != nil {
		t.Fatal(err)
	}
}
