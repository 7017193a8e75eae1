package qcow2

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// makeImage makes an image and gives its bytes.
func makeImage(t *testing.T, o CreateOptions) []byte {
	t.Helper()
	f, data := memfile.New("new", nil), memfile.New("data", nil)
	if err := Create(f, data, o); err != nil {
		t.Fatalf("%+v: %v", o, err)
	}
	if want := (o.Size + 511) &^ 511; o.DataFile != "" && data.Length() != want {
		t.Errorf("%+v: the data file has %d bytes", o, data.Length())
	}
	return f.Bytes()
}

// What is made is what was asked for, to us and to QEMU, which finds nothing
// wrong and reads zeros.
func TestCreateAnything(t *testing.T) {
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 60 {
		o := CreateOptions{
			ClusterSize: 512 << rng.IntN(13), RefcountBits: 1 << rng.IntN(7), LazyRefcounts: rng.IntN(2) == 0,
			ExtendedL2: rng.IntN(2) == 0, CompressionType: uint8(rng.IntN(2)),
			Size: rng.Int64N(1 << (1 + rng.IntN(31))),
		}
		if o.ExtendedL2 {
			o.ClusterSize = max(o.ClusterSize, 16<<10)
		}
		path := filepath.Join(dir, fmt.Sprint(i))
		switch rng.IntN(4) {
		case 0:
			o = CreateOptions{Version: 2, ClusterSize: o.ClusterSize, Size: o.Size}
		case 1:
			o.DataFile, o.DataFileRaw = path+".data", rng.IntN(2) == 0
			o.Size = min(o.Size, 64<<20)
		case 2:
			o.Backing, o.BackingFormat = path+".base", "raw"
			if err := os.WriteFile(o.Backing, make([]byte, 4096), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if o.Size < 16<<20 && (o.Backing == "" || o.ExtendedL2) {
			o.Preallocation = Preallocation(rng.IntN(4))
		}
		b := makeImage(t, o)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if o.DataFile != "" {
			if err := os.WriteFile(o.DataFile, make([]byte, (o.Size+511)&^511), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		h, err := ReadHeader(memfile.New(path, b))
		if err != nil {
			t.Fatalf("%+v: %v", o, err)
		}
		got := CreateOptions{
			Size: o.Size, Version: h.Version, ClusterSize: 1 << h.ClusterBits, RefcountBits: 1 << h.RefcountOrder,
			LazyRefcounts: h.Compatible&LazyRefcounts != 0, ExtendedL2: h.Incompatible&ExtendedL2 != 0, CompressionType: h.CompressionType,
			Backing: h.Backing, BackingFormat: h.BackingFormat, DataFile: h.DataFileName, DataFileRaw: h.Autoclear&DataFileRaw != 0,
			Preallocation: o.Preallocation, // which no header tells
		}
		want := o
		want.Version = max(h.Version, 2)
		if o.Version == 2 {
			want.RefcountBits = 16
		}
		if got != want || h.Size != (o.Size+511)&^511 {
			t.Errorf("made %+v\nof   %+v", got, want)
		}
		qemuImg(t, "check", "-q", "-f", "qcow2", path)
		var mapped []struct {
			Zero bool
			Data bool
		}
		if err := json.Unmarshal([]byte(qemuImg(t, "map", "--output=json", "-f", "qcow2", path)), &mapped); err != nil {
			t.Fatal(err)
		}
		for _, e := range mapped {
			// Subclusters of clusters that have their places are not allocated.
			data := o.DataFileRaw || o.Preallocation != PreallocateNothing && !o.ExtendedL2
			if o.Backing == "" && o.Size > 0 && e.Data != data {
				t.Errorf("%+v: %+v", o, mapped)
				break
			}
		}
	}
}

func TestCreateRefuses(t *testing.T) {
	for _, c := range []struct {
		o      CreateOptions
		option string
	}{
		{CreateOptions{Version: 4}, "compat"},
		{CreateOptions{ClusterSize: 256}, "cluster_size"},
		{CreateOptions{ClusterSize: 4 << 20}, "cluster_size"},
		{CreateOptions{ClusterSize: 65537}, "cluster_size"},
		{CreateOptions{ClusterSize: 512, Backing: strings.Repeat("b", 500), BackingFormat: "raw"}, "cluster_size"},
		{CreateOptions{RefcountBits: 12}, "refcount_bits"},
		{CreateOptions{RefcountBits: 128}, "refcount_bits"},
		{CreateOptions{Version: 2, RefcountBits: 8}, "refcount_bits"},
		{CreateOptions{Version: 2, LazyRefcounts: true}, "lazy_refcounts"},
		{CreateOptions{Version: 2, ExtendedL2: true}, "extended_l2"},
		{CreateOptions{ClusterSize: 8192, ExtendedL2: true}, "extended_l2"},
		{CreateOptions{CompressionType: 2}, "compression_type"},
		{CreateOptions{Version: 2, CompressionType: Zstd}, "compression_type"},
		{CreateOptions{Version: 2, DataFile: "x"}, "data_file"},
		{CreateOptions{DataFileRaw: true}, "data_file_raw"},
		{CreateOptions{DataFile: "x", DataFileRaw: true, Backing: "y", BackingFormat: "raw"}, "data_file_raw"},
		{CreateOptions{Backing: "y"}, "backing_fmt"},
		{CreateOptions{Backing: strings.Repeat("b", 1024), BackingFormat: "raw"}, "backing_file"},
		{CreateOptions{Size: -1}, "size"},
		{CreateOptions{Size: 1<<63 - 1}, "size"},
		{CreateOptions{Size: 1<<37 + 1, ClusterSize: 512}, "size"},
	} {
		err := CheckCreate(c.o)
		if e, ok := errors.AsType[*OptionError](err); !ok || e.Option != c.option || !errors.Is(err, unix.EINVAL) {
			t.Errorf("%+v: %v; want an error of %s", c.o, err, c.option)
		}
	}
	err := Create(memfile.New("full", []byte("x")), nil, CreateOptions{Size: 1 << 20})
	if !errors.Is(err, unix.EEXIST) {
		t.Error(err)
	}
}

// Until all is written, and whatever is lost, it is an image or none.
func TestCreateHalf(t *testing.T) {
	o := CreateOptions{Size: 1 << 20, ClusterSize: 4096, DataFile: "data", DataFileRaw: true}
	f := memfile.New("new", nil)
	f.Record()
	if err := Create(f, memfile.New("data", nil), o); err != nil {
		t.Fatal(err)
	}
	whole := f.Bytes()
	from, events := f.Events()
	rng := rand.New(rand.NewPCG(3, 4))
	for n := range len(events) + 1 {
		for range 20 {
			b := memfile.Crash(from, events, n, rng)
			if _, err := ReadHeader(memfile.New("crashed", b)); err == nil && string(b) != string(whole) {
				t.Fatalf("after %d of %d calls it is an image, and not the one to be made", n, len(events))
			}
		}
	}
	// Every call that fails is told.
	for n := range events {
		f, calls := memfile.New("new", nil), 0
		f.Fail = func(memfile.Op, int64, int64) error {
			if calls++; calls == n+1 {
				return unix.ENOSPC
			}
			return nil
		}
		if err := Create(f, memfile.New("data", nil), o); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("call %d: %v", n, err)
		}
	}
}
