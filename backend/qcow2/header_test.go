package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// osFile is a File for reading.
type osFile struct {
	File
	f *os.File
}

func (o osFile) Path() string { return o.f.Name() }

func (o osFile) Length() int64 {
	st, err := o.f.Stat()
	if err != nil {
		return 0
	}
	return st.Size()
}

func (o osFile) ReadAt(p []byte, off int64) error {
	_, err := o.f.ReadAt(p, off)
	return err
}

func openImage(t *testing.T, path string) osFile {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return osFile{f: f}
}

// qemuImg runs qemu-img, which "make peers" installs.
func qemuImg(t testing.TB, args ...string) string {
	t.Helper()
	out, code := qemuImgCode(t, args...)
	if code != 0 {
		t.Fatalf("qemu-img %s exits with %d:\n%s", strings.Join(args, " "), code, out)
	}
	return out
}

// qemuImgCode also returns the exit code.
func qemuImgCode(t testing.TB, args ...string) (out string, code int) {
	t.Helper()
	return program(t, "qemu-img", args...)
}

// program runs one of the peers, and returns what it printed and its exit code,
// -1 if a signal ended it.
func program(t testing.TB, name string, args ...string) (out string, code int) {
	t.Helper()
	b, err := exec.Command(name, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v (package qemu-utils)", name, err)
	}
	if exit != nil {
		code = exit.ExitCode()
	}
	return string(b), code
}

func TestReadHeaderOfQEMUsImages(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base.raw")
	qemuImg(t, "create", "-q", "-f", "raw", base, "8M")
	for name, c := range map[string]struct {
		args  []string
		check func(h *Header) bool
	}{
		"v2": {[]string{"-o", "compat=0.10", "1G"}, func(h *Header) bool {
			return h.Version == 2 && h.Length == 72 && h.RefcountOrder == 4 && h.Size == 1<<30
		}},
		"v3": {[]string{"-o", "cluster_size=2M,refcount_bits=1", "10G"}, func(h *Header) bool {
			return h.Version == 3 && h.ClusterBits == 21 && h.RefcountOrder == 0
		}},
		"small clusters": {[]string{"-o", "cluster_size=512,refcount_bits=64", "1000000"}, func(h *Header) bool {
			return h.ClusterBits == 9 && h.RefcountOrder == 6 && h.Size == 1000448
		}},
		"extended": {[]string{"-o", "extended_l2=on,compression_type=zstd,lazy_refcounts=on", "1G"}, func(h *Header) bool {
			return h.Geometry().Extended && h.CompressionType == Zstd && h.Compatible&LazyRefcounts != 0
		}},
		"data file": {[]string{"-o", "data_file=" + filepath.Join(dir, "data") + ",data_file_raw=on", "1G"}, func(h *Header) bool {
			return h.Geometry().External && h.Autoclear&DataFileRaw != 0 && h.DataFileName == filepath.Join(dir, "data")
		}},
		"backing": {[]string{"-b", base, "-F", "raw", "16M"}, func(h *Header) bool {
			return h.Backing == base && h.BackingFormat == "raw" && h.Size == 16<<20
		}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(name, " ", "-")+".qcow2")
			qemuImg(t, append([]string{"create", "-q", "-f", "qcow2", path}, c.args...)...)
			h, err := ReadHeader(openImage(t, path))
			if err != nil {
				t.Fatal(err)
			}
			if !c.check(h) {
				t.Errorf("%+v", h)
			}
			if h.ClusterBits > 9 && h.Version == 3 && h.FeatureNames[0] != "dirty bit" {
				t.Errorf("feature names %v", h.FeatureNames)
			}
		})
	}
}

// A header of which the first 4 KiB do not hold all: extensions that end at, or go
// on beyond them, and a backing file's name that lies there.
func TestReadHeaderThatIsLong(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", path, "1G")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	be := binary.BigEndian
	extension := func(b []byte, typ uint32, data []byte) []byte {
		b = be.AppendUint32(be.AppendUint32(b, typ), uint32(len(data)))
		return append(append(b, data...), make([]byte, (8-len(data)%8)%8)...)
	}
	for _, filler := range []int{1, 3000, headerGuess - headerLength3 - 24, headerGuess - headerLength3 - 8, headerGuess, 20000} {
		b := append([]byte(nil), good[:headerLength3]...)
		be.PutUint32(b[100:], headerLength3)
		b = extension(b, 0x12345678, bytes.Repeat([]byte{7}, filler))
		b = extension(b, extBackingFormat, []byte("raw"))
		b = extension(b, extBitmaps, be.AppendUint64(be.AppendUint64(be.AppendUint64(nil, 1<<32), 32), 0x50000))
		b = extension(b, extEnd, nil)
		be.PutUint64(b[8:], uint64(len(b)))
		be.PutUint32(b[16:], 8)
		b = append(b, "base.raw"...)
		h, err := ReadHeader(memfile.New("long", append(b, good[len(b):]...)))
		if err != nil {
			t.Fatal(err)
		}
		if h.Backing != "base.raw" || h.BackingFormat != "raw" || h.Bitmaps == nil || h.Bitmaps.DirectoryOffset != 0x50000 {
			t.Errorf("with %d bytes before: %+v", filler, h)
		}
	}
}

func TestReadHeaderRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", path, "1G")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		off         int
		b           []byte
		text        string
		unsupported bool
	}{
		"magic":            {0, []byte("QFJ"), "magic number", false},
		"version":          {4, []byte{0, 0, 0, 4}, "version 4", true},
		"cluster size":     {20, []byte{0, 0, 0, 22}, "cluster size 2^22", false},
		"size":             {24, []byte{0xff}, "too large", false},
		"LUKS":             {32, []byte{0, 0, 0, 2}, "LUKS", true},
		"L1 too small":     {36, []byte{0, 0, 0, 1}, "L1 table has 1 entries", false},
		"L1 too large":     {36, []byte{1, 0, 0, 0}, "too large", false},
		"L1 offset":        {47, []byte{1}, "L1 table's offset", false},
		"snapshots":        {60, []byte{0, 2, 0, 0}, "snapshots are too many", false},
		"named feature":    {72, []byte{0x80}, "bit 63", true},
		"refcount order":   {99, []byte{7}, "wider than 64", false},
		"length":           {100, []byte{0, 0, 0, 96}, "header of 96 bytes", false},
		"compression type": {104, []byte{2}, "compression type 2", true},
		"backing name":     {8, []byte{0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 9}, "backing file's name", false},
		"extension":        {116, []byte{0x7f}, "reaches past the header", false},
	} {
		t.Run(name, func(t *testing.T) {
			bad := append([]byte(nil), good...)
			copy(bad[c.off:], c.b)
			path := filepath.Join(t.TempDir(), "bad.qcow2")
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := ReadHeader(openImage(t, path))
			var fe *FormatError
			if !errors.As(err, &fe) || !strings.Contains(err.Error(), c.text) || fe.Unsupported != c.unsupported {
				t.Fatalf("%v, unsupported %v", err, fe)
			}
			want := unix.EIO
			if c.unsupported {
				want = unix.EOPNOTSUPP
			}
			if !errors.Is(err, want) {
				t.Errorf("%v is not %v", err, want)
			}
		})
	}
}

func TestRefcountsOfEachWidth(t *testing.T) {
	for order := range 7 {
		g := Geometry{ClusterBits: 9, RefcountOrder: order}
		b := make([]byte, 512)
		n := g.refcountsPerBlock()
		for i := range n {
			g.setRefcount(b, i, uint64(i*7)&g.maxRefcount())
		}
		for i := range n {
			if got, want := g.refcount(b, i), uint64(i*7)&g.maxRefcount(); got != want {
				t.Fatalf("order %d, number %d: %d, want %d", order, i, got, want)
			}
		}
	}
}
