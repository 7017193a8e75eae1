package qcow2

import (
	"testing"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// A part is as long as it is all alike, over clusters, tables and where there
// is none.
func TestPart(t *testing.T) {
	const cluster = 512
	o := CreateOptions{Size: 100 * cluster * 64, ClusterSize: cluster, DataFile: "data", DataFileRaw: true}
	f, data := memfile.New("image", nil), memfile.New("data", nil)
	if err := Create(f, data, o); err != nil {
		t.Fatal(err)
	}
	im := opened(t, f, Options{Data: data})
	l, err := im.Part(1000, o.Size-1000)
	if want := (Part{Length: o.Size - 1000, Data: true, Offset: 1000}); err != nil || l != want {
		t.Errorf("%+v, %v; want %+v", l, err, want)
	}

	o = CreateOptions{Size: o.Size, ClusterSize: cluster}
	f = memfile.New("image", nil)
	if err := Create(f, nil, o); err != nil {
		t.Fatal(err)
	}
	im = begun(t, f, Options{})
	// Three clusters of data across the end of an L2 table, one of zeros that
	// keeps its place.
	if err := im.writeAt(make([]byte, 4*cluster), 62*cluster); err != nil {
		t.Fatal(err)
	}
	if err := im.Zero(65*cluster, cluster, true); err != nil {
		t.Fatal(err)
	}
	first, err := im.Part(0, o.Size)
	if err != nil || first.Data || first.Zero || first.Offset != -1 || first.Length != 62*cluster {
		t.Errorf("%+v, %v", first, err)
	}
	second, err := im.Part(62*cluster, o.Size-62*cluster)
	if err != nil || !second.Data || second.Offset <= 0 || second.Length > 3*cluster {
		t.Errorf("%+v, %v", second, err)
	}
	third, err := im.Part(65*cluster, o.Size-65*cluster)
	if err != nil || !third.Zero || third.Data || third.Offset <= 0 || third.Length != cluster {
		t.Errorf("%+v, %v", third, err)
	}
	last, err := im.Part(66*cluster, o.Size-66*cluster)
	if want := (Part{Length: o.Size - 66*cluster, Offset: -1}); err != nil || last != want {
		t.Errorf("%+v, %v; want %+v", last, err, want)
	}
}

// An image with more clusters in use than the file has space for is one whose
// clusters may be holes.
func TestPreallocated(t *testing.T) {
	for width := 1; width <= 64; width *= 2 {
		o := CreateOptions{Size: 1 << 20, ClusterSize: 4096, RefcountBits: width, DataFile: "data", DataFileRaw: true}
		f := memfile.New("image", nil)
		if err := Create(f, memfile.New("data", nil), o); err != nil {
			t.Fatal(err)
		}
		h, err := ReadHeader(f)
		if err != nil {
			t.Fatal(err)
		}
		for allocated, want := range map[int64]bool{0: true, 4096: true, f.Length(): false, 1 << 40: false} {
			if got, err := Preallocated(f, h, allocated); got != want || err != nil {
				t.Errorf("%d bits, %d of %d bytes allocated: %t, %v", width, allocated, f.Length(), got, err)
			}
		}
		// What is past what refcounts can count is not looked at, or it would take years.
		if got, err := Preallocated(longFile{f, 1 << 62}, h, 1<<40); got || err != nil {
			t.Errorf("%d bits, a long file: %t, %v", width, got, err)
		}
	}
}
