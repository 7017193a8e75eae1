package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// noise is n bytes of which none is zero.
func noise(rng *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32() | 1)
	}
	return p
}

func TestCopyOnWriteFromBackingFiles(t *testing.T) {
	const size = 300 << 10
	for name, c := range map[string]struct {
		base    int64
		options []string
	}{
		"raw, equal":             {size, []string{"cluster_size=4k"}},
		"raw, shorter":           {100<<10 + 512, []string{"cluster_size=4k"}},
		"raw, longer":            {400 << 10, []string{"cluster_size=4k"}},
		"extended":               {100<<10 + 512, []string{"cluster_size=16k", "extended_l2=on"}},
		"version 2":              {100<<10 + 512, []string{"cluster_size=4k", "compat=0.10"}},
		"qcow2 between, of 512":  {100<<10 + 512, []string{"cluster_size=64k"}},
		"qcow2 between, shorter": {100<<10 + 512, []string{"cluster_size=4k"}},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(4) {
				rng := rand.New(rand.NewPCG(seed, 8))
				base := memfile.New("base", noise(rng, c.base))
				shadow := make([]byte, size)
				copy(shadow, base.Bytes())
				b := NewRawBacking(base)
				if strings.HasPrefix(name, "qcow2") {
					middle := int64(size)
					if strings.HasSuffix(name, "shorter") {
						middle = 80 << 10
					}
					clear(shadow[min(middle, size):])
					f := made(t, fmt.Sprint(middle), "cluster_size=512")
					im := begun(t, f, Options{Backing: b})
					p := noise(rng, 9000)
					copy(shadow[3000:], p)
					if err := errors.Join(im.writeAt(p, 3000), im.Settle()); err != nil {
						t.Fatal(err)
					}
					b = opened(t, f, Options{Backing: b}).AsBacking()
				}
				f := made(t, fmt.Sprint(size), c.options...)
				im := begun(t, f, Options{Backing: b})
				shadowed(t, im, shadow, rng, 300)
				checked(t, f.Bytes(), true)
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

func TestCompressedClusters(t *testing.T) {
	for _, typ := range []string{"zlib", "zstd"} {
		for _, cluster := range []string{"4k", "64k", "2M"} {
			for _, extended := range []string{"off", "on"} {
				if extended == "on" && cluster == "4k" {
					continue
				}
				t.Run(typ+" "+cluster+" "+extended, func(t *testing.T) {
					rng := rand.New(rand.NewPCG(1, 9))
					dir := t.TempDir()
					// Compressible, and not.
					disk := bytes.Repeat(noise(rng, 37), 1<<20/37)
					copy(disk[100<<10:], noise(rng, 300<<10))
					disk = append(disk, make([]byte, 1<<20-len(disk)+512)...)
					raw, path := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "c.qcow2")
					if err := os.WriteFile(raw, disk, 0o600); err != nil {
						t.Fatal(err)
					}
					qemuImg(t, "convert", "-c", "-O", "qcow2", "-o", "compression_type="+typ+",extended_l2="+extended+",cluster_size="+cluster, raw, path)
					f := loaded(t, path)
					p := make([]byte, len(disk))
					if err := opened(t, f, Options{}).readAt(p, 0); err != nil || !bytes.Equal(p, disk) {
						t.Fatalf("read: %v, differs at %d", err, differs(p, disk))
					}
					im := begun(t, f, Options{})
					shadowed(t, im, disk, rng, 200)
					checked(t, f.Bytes(), true)
				})
			}
		}
	}
}

func TestDamagedCompressedCluster(t *testing.T) {
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "c.qcow2")
	if err := os.WriteFile(raw, bytes.Repeat([]byte("abc"), 100000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, typ := range []string{"zlib", "zstd"} {
		qemuImg(t, "convert", "-c", "-O", "qcow2", "-o", "compression_type="+typ, raw, path)
		f := loaded(t, path)
		var p Plan
		im := opened(t, f, Options{})
		if err := im.Map(&p, 0, 4096, MayBlock); err != nil {
			t.Fatal(err)
		}
		off, _ := im.g.compressed(p.Extents[0].Entry)
		if err := f.WriteAt(bytes.Repeat([]byte{0xff}, 40), off, false); err != nil {
			t.Fatal(err)
		}
		err := im.ReadCompressed(&p, 0, 0, make([]byte, 4096))
		if !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "cannot be decompressed") {
			t.Errorf("%s: %v", typ, err)
		}
	}
}

func TestInternalSnapshots(t *testing.T) {
	for _, options := range []string{"cluster_size=4k", "cluster_size=16k,extended_l2=on", "cluster_size=64k", "compat=0.10"} {
		t.Run(options, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(2, 9))
			path := filepath.Join(t.TempDir(), "s.qcow2")
			const size = 500 << 10
			qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(size))
			disk := make([]byte, size)
			for i := range 3 {
				f := loaded(t, path)
				im := begun(t, f, Options{})
				shadowed(t, im, disk, rng, 60)
				if err := os.WriteFile(path, f.Bytes(), 0o600); err != nil {
					t.Fatal(err)
				}
				qemuImg(t, "snapshot", "-c", fmt.Sprintf("snap%d", i), path)
				was := bytes.Clone(disk)

				f = loaded(t, path)
				im = begun(t, f, Options{})
				shadowed(t, im, disk, rng, 150)
				checked(t, f.Bytes(), true)
				s, err := im.Snapshot(fmt.Sprintf("snap%d", i))
				if err != nil {
					t.Fatal(err)
				}
				p := make([]byte, size)
				if err := s.readAt(p, 0); err != nil || !bytes.Equal(p, was) {
					t.Fatalf("the snapshot has changed: %v, at %d", err, differs(p, was))
				}
				if err := os.WriteFile(path, f.Bytes(), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := opened(t, loaded(t, path), Options{}).Snapshot("none"); !errors.Is(err, unix.ENOENT) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestExternalDataFile(t *testing.T) {
	for _, raw := range []bool{false, true} {
		for _, options := range []string{"cluster_size=4k", "cluster_size=16k,extended_l2=on"} {
			t.Run(fmt.Sprintf("%s-%v", strings.ReplaceAll(options, ",", "-"), raw), func(t *testing.T) {
				for seed := range uint64(4) {
					rng := rand.New(rand.NewPCG(seed, 10))
					dir := t.TempDir()
					path, dataPath := filepath.Join(dir, "d.qcow2"), filepath.Join(dir, "data")
					o := options + ",data_file=" + dataPath
					if raw {
						o += ",data_file_raw=on"
					}
					size := int64(300<<10 + 512)
					qemuImg(t, "create", "-q", "-f", "qcow2", "-o", o, path, fmt.Sprint(size))
					f, data := loaded(t, path), loaded(t, dataPath)
					im := begun(t, f, Options{Data: data})
					shadow := make([]byte, size)
					shadowed(t, im, shadow, rng, 300)
					if err := os.WriteFile(dataPath, data.Bytes(), 0o600); err != nil {
						t.Fatal(err)
					}
					checked(t, f.Bytes(), true)
					if raw && !bytes.Equal(data.Bytes()[:size], shadow) {
						t.Errorf("the data file does not read as the disk")
					}
				}
			})
		}
	}
}

func TestResize(t *testing.T) {
	for _, options := range []string{"cluster_size=512", "cluster_size=64k", "cluster_size=16k,extended_l2=on"} {
		rng := rand.New(rand.NewPCG(3, 9))
		base := memfile.New("base", noise(rng, 400<<10))
		f := made(t, "100k", options)
		im := begun(t, f, Options{Backing: NewRawBacking(base)})
		shadow := make([]byte, 100<<10)
		copy(shadow, base.Bytes())
		shadowed(t, im, shadow, rng, 100)
		if err := im.Resize(50 << 10); !errors.Is(err, unix.EOPNOTSUPP) {
			t.Errorf("smaller: %v", err)
		}
		if err := im.Resize(5 << 20); err != nil {
			t.Fatal(err)
		}
		shadow = append(shadow, make([]byte, 5<<20-len(shadow))...)
		shadowed(t, im, shadow, rng, 200)
		checked(t, f.Bytes(), true)
		if h, err := ReadHeader(f); err != nil || h.Size != 5<<20 {
			t.Errorf("%v %+v", err, h)
		}
	}
}

// A data file that is to be readable as the disk may have been longer than it: a
// block device is.
func TestResizeIntoRawDataFile(t *testing.T) {
	const old, size = 100<<10 + 512, 300 << 10
	f, data := memfile.New("image", nil), memfile.New("data", nil)
	if err := Create(f, data, CreateOptions{Size: old, ClusterSize: 4096, DataFile: "data", DataFileRaw: true}); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(5, 5))
	data = memfile.New("data", noise(rng, 400<<10))
	want := data.Bytes()
	clear(want[old:size])
	im := begun(t, f, Options{Data: data})
	if err := im.Resize(size); err != nil {
		t.Fatal(err)
	}
	if i := differs(data.Bytes(), want); i >= 0 {
		t.Errorf("the data file has other bytes at %d", i)
	}
	if i := differs(readAll(t, im), want[:size]); i >= 0 {
		t.Errorf("the disk has other bytes at %d", i)
	}
	if l, err := im.Part(0, size); err != nil || !l.Data || l.Length != size {
		t.Errorf("it does not show what is written to the data file: %+v, %v", l, err)
	}
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	if r, err := Check(f, im.h, nil); err != nil || !r.Clean() {
		t.Errorf("%v %+v", err, r)
	}
}

// A disk without a byte has no L1 table that its first one could replace.
func TestResizeOfNothing(t *testing.T) {
	for _, options := range []string{"compat=0.10", "cluster_size=512", "cluster_size=64k"} {
		f := made(t, "0", options)
		im := begun(t, f, Options{})
		shadow := make([]byte, 5<<20)
		for _, size := range []int64{1 << 20, 5 << 20} {
			if err := im.Resize(size); err != nil {
				t.Fatal(err)
			}
			shadowed(t, im, shadow[:size], rand.New(rand.NewPCG(3, uint64(size))), 20)
		}
		if err := im.Settle(); err != nil {
			t.Fatal(err)
		}
		checked(t, f.Bytes(), true)
		if got := readAll(t, opened(t, f, Options{})); !bytes.Equal(got, shadow) {
			t.Errorf("%s: it reads other bytes at %d", options, differs(got, shadow))
		}
	}
}

// TestL1ThatMayBeInTheFile: a write of the header has failed, and may be in the file
// all the same. Whichever L1 table that names stays one.
func TestL1ThatMayBeInTheFile(t *testing.T) {
	f := &lying{withSectors(t, "", "cluster_size=512"), offL1Size}
	im := begun(t, f, Options{Warn: func(string) {}})
	shadow := readAll(t, im)
	rng := rand.New(rand.NewPCG(2, 7))
	for range 2 {
		if err := im.Resize(300 << 20); !errors.Is(err, unix.EIO) {
			t.Fatalf("%v", err)
		}
		// None of this takes the table's place.
		for off := int64(0); off < im.Size(); off += 512 {
			p := noise(rng, 512)
			copy(shadow[off:], p)
			if err := im.writeAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		if err := im.Flush(); !errors.Is(err, unix.EIO) {
			t.Fatalf("flushed, although the header may name another table: %v", err)
		}
		checked(t, f.Bytes(), false)
	}
	f.at = -1
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	checked(t, f.Bytes(), true)
	if i := differs(readAll(t, opened(t, f, Options{})), shadow); i >= 0 {
		t.Errorf("the disk has other bytes at %d", i)
	}
}

// TestResizeWithManyTables: the new L1 table is longer than what one refcount
// block counts. Whatever a crash leaves is the disk of before, of one of the
// sizes.
func TestResizeWithManyTables(t *testing.T) {
	for _, bits := range []string{"1", "16", "64"} {
		t.Run(bits, func(t *testing.T) {
			f := withSectors(t, "", "cluster_size=512", "refcount_bits="+bits)
			was := readAll(t, opened(t, f, Options{}))
			f.Record()
			im := begun(t, f, Options{})
			sizes := []int64{im.Size(), 160 << 20, 700 << 20, 9 << 30}
			for i, size := range sizes[1:] {
				p := noise(rand.New(rand.NewPCG(1, uint64(i))), 1000)
				if err := errors.Join(im.Resize(size), im.writeAt(p, size-1000), im.Flush()); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, 1000)
				if err := im.readAt(got, size-1000); err != nil || !bytes.Equal(got, p) {
					t.Fatalf("%v, or it reads other bytes at the end of %d", err, size)
				}
			}
			if err := im.Settle(); err != nil {
				t.Fatal(err)
			}
			checked(t, f.Bytes(), true)
			from, events := f.Events()
			rng := rand.New(rand.NewPCG(2, 2))
			seen := make(map[int64]bool)
			for n := 0; n <= len(events); n += stride {
				for try := range 3 {
					chance := rng
					if try == 0 {
						chance = nil
					}
					b := memfile.Crash(from, events, n, chance)
					state := memfile.New("crashed", b)
					im := opened(t, state, Options{})
					r, err := Check(state, im.h, nil)
					if err != nil || r.Corruptions > 0 {
						t.Fatalf("after %d of %d events, the last %s: %v %v", n, len(events), last(events[:n]), err, r.Findings)
					}
					if rng.IntN(len(events)) < 3 {
						checked(t, b, false)
					}
					is := make([]byte, len(was))
					if err := im.readAt(is, 0); err != nil || !bytes.Equal(is, was) {
						t.Fatalf("after %d of %d events, the last %s: %v, or it reads other bytes", n, len(events), last(events[:n]), err)
					}
					seen[im.Size()] = true
				}
			}
			if !slices.Equal(slices.Sorted(maps.Keys(seen)), sizes) {
				t.Errorf("seen: %v", seen)
			}
		})
	}
}
