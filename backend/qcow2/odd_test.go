package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

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
		// Overwritten, they would give the header's cluster away, or that of refcounts.
		"compressed":               entryCompressed,
		"compressed, two clusters": entryCompressed | uint64(h.RefcountOffset-512) | 1<<(62-(h.ClusterBits-8)),
	} {
		b := f.Bytes()
		copy(b[l2:], be64(entry))
		bad := memfile.New("bad", b)
		im := opened(t, bad, Options{Warn: func(string) {}})
		p, whole := make([]byte, 512), make([]byte, 4096)
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
		if err := im.writeAt(whole, 0); !errors.Is(err, unix.EIO) {
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

// longFile is as long as it says: where it has no bytes it is a hole.
type longFile struct {
	*memfile.File
	length int64
}

func (f longFile) Length() int64 { return f.length }

func (f longFile) ReadAt(p []byte, off int64) error {
	clear(p)
	if have := f.File.Length() - off; have > 0 {
		return f.File.ReadAt(p[:min(int64(len(p)), have)], off)
	}
	return nil
}

// Snapshots may say that their tables fill a file that is all holes.
func TestTablesOfSnapshotsWithoutEnd(t *testing.T) {
	const snapshots, entry = 10, 40 + 16
	f := memfile.New("image", nil)
	if err := errors.Join(Create(f, nil, CreateOptions{Size: 1 << 20, ClusterSize: 512}), f.Resize(1<<20)); err != nil {
		t.Fatal(err)
	}
	const at = 512 << 10
	b, be := f.Bytes(), binary.BigEndian
	be.PutUint32(b[60:], snapshots)
	be.PutUint64(b[64:], at)
	for i := range int64(snapshots) {
		e := b[at+entry*i:]
		be.PutUint64(e, uint64(1+i)<<36)
		be.PutUint32(e[8:], 1<<32-1)
		be.PutUint32(e[36:], 16)
	}
	im := opened(t, longFile{memfile.New("image", b), 1 << 40}, Options{})
	if err := im.Begin(nil); !errors.Is(err, unix.EFBIG) {
		t.Error(err)
	}
}

func TestClusterSetOfRanges(t *testing.T) {
	for first := range int64(130) {
		for last := first; last < 200; last++ {
			s := make(clusterSet)
			if !s.addRange(first, last) || s.addRange(last, last+5) || s.addRange(max(first-3, 0), first) {
				t.Fatalf("%d to %d: what was a member", first, last)
			}
			for c := range int64(300) {
				if s.has(c) != (c >= first-3 && c <= last+5) {
					t.Fatalf("%d to %d: %d", first, last, c)
				}
			}
		}
	}
}

// TestOddPlaceInDataFile: a guest's cluster is where the guest has it; anywhere else
// is another one's place.
func TestOddPlaceInDataFile(t *testing.T) {
	for _, options := range []string{"cluster_size=4k", "cluster_size=16k,extended_l2=on"} {
		dir := t.TempDir()
		path, dataPath := filepath.Join(dir, "d.qcow2"), filepath.Join(dir, "data")
		qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options+",data_file="+dataPath, path, "200M")
		f, data := loaded(t, path), loaded(t, dataPath)
		im := begun(t, f, Options{Data: data})
		// Past the first table and the first slice, whose places are to be right.
		off := 3*im.g.L2Coverage() + 700*im.g.ClusterSize()
		whole := make([]byte, im.g.ClusterSize())
		if err := errors.Join(im.writeAt(whole, off), im.Settle()); err != nil {
			t.Fatal(err)
		}
		if err := begun(t, memfile.New("good", f.Bytes()), Options{Data: data}).readAt(whole, off); err != nil {
			t.Errorf("%s: %v", options, err)
		}
		b := f.Bytes()
		entry := hostOffset(im.l1[off>>im.l1Shift]) + im.g.L2Index(off)*im.g.EntrySize()
		copy(b[entry:], be64(uint64(off-im.g.ClusterSize())|entryCopied))
		if err := opened(t, memfile.New("bad", b), Options{Data: data}).readAt(whole, off); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: read from another's place: %v", options, err)
		}
		bad := begun(t, memfile.New("bad", b), Options{Data: data, Warn: func(string) {}})
		if err := bad.writeAt(whole, off); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: write to another's place: %v", options, err)
		}
	}
}
