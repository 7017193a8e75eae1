package qcow2

import (
	"math/rand/v2"
	"testing"
)

// full is an image of which every cluster was written.
func full(b *testing.B) *Image {
	f := made(b, "64M")
	im := begun(b, f, Options{})
	p := make([]byte, 1<<20)
	for off := int64(0); off < im.Size(); off += int64(len(p)) {
		if err := im.writeAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	if err := im.Flush(); err != nil {
		b.Fatal(err)
	}
	return im
}

func BenchmarkMap(b *testing.B) {
	im := full(b)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		var p Plan
		rng := rand.New(rand.NewPCG(1, 1))
		for pb.Next() {
			if err := im.Map(&p, rng.Int64N(im.Size()/4096)*4096, 4096, 0); err != nil {
				b.Fatal(err)
			}
			im.Unmap(&p)
		}
	})
}

func BenchmarkOverwrite(b *testing.B) {
	im := full(b)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		var p Plan
		rng := rand.New(rand.NewPCG(1, 1))
		for pb.Next() {
			if err := im.Prepare(&p, rng.Int64N(im.Size()/4096)*4096, 4096, 0); err != nil {
				b.Fatal(err)
			}
			im.Commit(&p)
		}
	})
}
