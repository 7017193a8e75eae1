package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// What a hostile image may cost. An L1 table, a refcount table and a snapshot
// table are as long as QEMU allows at most, but lie in the file, which is small
// here, so that memory follows the file's length.
const (
	hostileMemory = 256 << 20 // bytes allocated while one image is looked at
	hostileCalls  = 200000    // of the file's methods
	hostileTime   = 10 * time.Second
	hostileLength = 8 << 20 // how long the file may become
)

// guarded is a file that nobody may reach outside of, or call without end.
type guarded struct {
	*memfile.File
	fault string
	calls int
	began bool // writing is allowed
}

func (g *guarded) use(what string, off, n int64, writes bool) {
	g.calls++
	switch {
	case g.fault != "":
	case off < 0 || n < 0 || off > g.Length()-n:
		g.fault = fmt.Sprintf("%s of %d+%d outside of %d bytes", what, off, n, g.Length())
	case writes && !g.began:
		g.fault = fmt.Sprintf("%s of %d+%d of an image that is only read", what, off, n)
	case g.calls > hostileCalls:
		panic("no end of calls")
	}
}

func (g *guarded) ReadAt(p []byte, off int64) error {
	g.use("read", off, int64(len(p)), false)
	return g.File.ReadAt(p, off)
}

func (g *guarded) WriteAt(p []byte, off int64, durable bool) error {
	g.use("write", off, int64(len(p)), true)
	return g.File.WriteAt(p, off, durable)
}

func (g *guarded) Punch(off, n int64) error {
	g.use("punch", off, n, true)
	return g.File.Punch(off, n)
}

func (g *guarded) ZeroAt(off, n int64) error {
	g.use("zero", off, n, true)
	return g.File.ZeroAt(off, n)
}

func (g *guarded) Resize(n int64) error {
	g.use("resize", 0, 0, true)
	if n > hostileLength {
		return fmt.Errorf("%s: %w", g.Path(), unix.ENOSPC)
	}
	return g.File.Resize(n)
}

// hostile does with an image all that can be done with one.
func hostile(t *testing.T, b []byte) {
	watchdog := time.AfterFunc(hostileTime, func() { panic("no end") })
	defer watchdog.Stop()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	defer func() {
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > hostileMemory {
			t.Errorf("an image of %d bytes took %d MiB of memory", len(b), n>>20)
		}
	}()
	wellFormed := func(what string, err error) {
		var errno unix.Errno
		if err != nil && !errors.As(err, &errno) {
			t.Errorf("%s: %v has no errno", what, err)
		}
	}
	g := &guarded{File: memfile.New("hostile", bytes.Clone(b))}
	defer func() {
		if g.fault != "" {
			t.Error(g.fault)
		}
	}()
	h, err := ReadHeader(g)
	wellFormed("header", err)
	if err != nil {
		return
	}
	o := Options{L2Cache: 8 << 10, Warn: func(string) {}}
	var data *guarded
	if h.Incompatible&DataFile != 0 {
		data = &guarded{File: memfile.New("data", make([]byte, 64<<10))}
		o.Data = data
	}
	if h.Backing != "" {
		o.Backing = NewRawBacking(memfile.New("base", bytes.Repeat([]byte{3}, 40<<10)))
	}
	_, err = Snapshots(g, h)
	wellFormed("snapshots", err)
	_, err = Bitmaps(g, h)
	wellFormed("bitmaps", err)
	if h.Size <= 1<<40 { // a check takes time for each MiB
		_, err = Check(g, h, nil)
		wellFormed("check", err)
	}
	im, err := New(g, h, o)
	wellFormed("open", err)
	if err != nil {
		return
	}
	places := func(size int64) (all [][2]int64) {
		for _, off := range []int64{0, 512, 5000, 33000, size / 2, size - 3000, size - 1} {
			if n := min(size-off, 9000); off >= 0 && n > 0 {
				all = append(all, [2]int64{off, n})
			}
		}
		return all
	}
	look := func(im *Image) {
		for _, x := range places(im.Size()) {
			wellFormed("read", im.readAt(make([]byte, x[1]), x[0]))
		}
		_, err := im.Status(nil, 0, min(im.Size(), 1<<20))
		wellFormed("status", err)
	}
	look(im)
	if all, err := Snapshots(g, h); err == nil {
		for _, s := range all[:min(len(all), 2)] {
			view, err := im.Snapshot(s.ID)
			wellFormed("snapshot", err)
			if err == nil {
				look(view)
			}
		}
	}
	if g.began = true; data != nil {
		data.began = true
	}
	wellFormed("begin", im.Begin(nil))
	defer im.Close()
	for i, x := range places(im.Size()) {
		var err error
		switch i % 4 {
		case 0:
			err = im.writeAt(bytes.Repeat([]byte{7}, int(x[1])), x[0])
		case 1:
			err = im.Discard(x[0], x[1])
		case 2:
			err = im.Zero(x[0], x[1], i&1 == 0)
		case 3:
			// One sector is what it was written, whatever else is wrong.
			p := bytes.Repeat([]byte{9}, int(min(x[1], 512)))
			if err = im.writeAt(p, x[0]); err == nil {
				got := make([]byte, len(p))
				if im.readAt(got, x[0]) == nil && !bytes.Equal(got, p) {
					t.Errorf("the write at %d is not there", x[0])
				}
			}
		}
		wellFormed("change", err)
		if i == 3 {
			wellFormed("flush", im.Flush())
		}
	}
	wellFormed("settle", im.Settle())
	look(im)
	if h.Size <= 1<<40 && h.Incompatible&DataFile == 0 {
		if h, err := ReadHeader(g); err == nil {
			_, _, err := Mend(g, h, RepairAll, nil)
			wellFormed("mend", err)
		}
	}
}

// hostileSeeds are small images of all features.
func hostileSeeds(t testing.TB) [][]byte {
	t.Helper()
	dir := t.TempDir()
	raw, path, base, data := filepath.Join(dir, "raw"), filepath.Join(dir, "q"), filepath.Join(dir, "base"), filepath.Join(dir, "data")
	disk := make([]byte, 32<<10)
	for s := range int64(24) {
		copy(disk[s*512:], sectorOf(uint64(s+1), s))
	}
	if err := errors.Join(os.WriteFile(raw, disk, 0o600), os.WriteFile(base, disk[:20<<10], 0o600)); err != nil {
		t.Fatal(err)
	}
	var seeds [][]byte
	add := func() {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		seeds = append(seeds, b)
	}
	for _, options := range []string{
		"cluster_size=512", "cluster_size=512,refcount_bits=1", "cluster_size=512,refcount_bits=64", "cluster_size=1k,compat=0.10",
		"cluster_size=1k,lazy_refcounts=on", "cluster_size=16k,extended_l2=on", "cluster_size=512,preallocation=metadata",
		"cluster_size=512,data_file=" + data, "cluster_size=512,data_file_raw=on,data_file=" + data,
	} {
		qemuImg(t, "convert", "-O", "qcow2", "-o", options, raw, path)
		add()
		if strings.Contains(options, "data_file") || strings.Contains(options, "preallocation") {
			continue
		}
		if !strings.Contains(options, "bits=1") {
			qemuImg(t, "snapshot", "-c", "s", path)
			add()
		}
		if !strings.Contains(options, "compat") {
			qemuImg(t, "bitmap", "--add", "-g", "512", path, "b")
			add()
		}
	}
	for _, options := range []string{"cluster_size=512", "cluster_size=2k,compression_type=zstd", "cluster_size=16k,extended_l2=on"} {
		qemuImg(t, "convert", "-c", "-O", "qcow2", "-o", options, raw, path)
		add()
	}
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", base, "-F", "raw", path)
	add()
	// Dirty, as one who died leaves an image with lazy refcounts.
	dirty := bytes.Clone(seeds[0])
	dirty[offIncompatible+7] |= Dirty
	// An L1 table that begins less than a cluster past the end of the file.
	cut := bytes.Clone(seeds[0][:1033])
	copy(cut[offL1Offset:], be64(1536))
	return append(seeds, dirty, cut)
}

// FuzzImage takes any bytes as an image.
func FuzzImage(f *testing.F) {
	for _, b := range hostileSeeds(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) <= 1<<20 {
			hostile(t, b)
		}
	})
}

// FuzzMetadata changes numbers in the metadata of good images: each patch is the
// place of a number in the file, in units of 4 bytes, and the number.
func FuzzMetadata(f *testing.F) {
	seeds := hostileSeeds(f)
	for i := range seeds {
		f.Add(uint8(i), []byte{})
		f.Add(uint8(i), binary.BigEndian.AppendUint64([]byte{0, offL1Offset / 4}, 512))
		f.Add(uint8(i), binary.BigEndian.AppendUint64([]byte{0, offRefcountTable / 4}, 1<<62))
	}
	f.Fuzz(func(t *testing.T, seed uint8, patches []byte) {
		b := bytes.Clone(seeds[int(seed)%len(seeds)])
		for len(patches) >= 10 {
			at := 4 * int64(binary.BigEndian.Uint16(patches))
			if at <= int64(len(b))-8 {
				copy(b[at:], patches[2:10])
			}
			patches = patches[10:]
		}
		hostile(t, b)
	})
}
