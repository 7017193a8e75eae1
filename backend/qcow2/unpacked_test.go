package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// packed is an image of compressed clusters, and what its disk holds.
func packed(t *testing.T, size int, options string) (*memfile.File, []byte) {
	t.Helper()
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "packed.qcow2")
	disk := make([]byte, size)
	for i := range disk {
		disk[i] = byte(i/1000) | 1
	}
	if err := os.WriteFile(raw, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
	return loaded(t, path), disk
}

// A cluster that is read in pieces is decompressed once, and what takes its place
// is seen at once.
func TestCompressedClustersInPieces(t *testing.T) {
	const cluster, piece = 64 << 10, 4 << 10
	f, disk := packed(t, 40*cluster, "cluster_size=64k")
	im := begun(t, f, Options{})
	p, reads := make([]byte, piece), 0
	readAll := func() {
		t.Helper()
		for off := 0; off < len(disk); off += piece {
			if err := im.readAt(p, int64(off)); err != nil || !bytes.Equal(p, disk[off:off+piece]) {
				t.Fatalf("at %d: %v", off, err)
			}
		}
	}
	readAll() // the tables too
	f.FailRead = func(int64, int64) error { reads++; return nil }
	readAll()
	if reads != 40 {
		t.Errorf("40 clusters were read %d times", reads)
	}
	if kept := len(im.unpacked.all) * cluster; kept != unpackedKept {
		t.Errorf("%d bytes are kept", kept)
	}
	f.FailRead = nil

	// Written in part, discarded, written as a whole; and what is freed is used.
	last := int64(39 * cluster)
	copy(disk[last+100:], "new")
	copy(disk[last-cluster:], bytes.Repeat([]byte{9}, cluster))
	err := errors.Join(im.writeAt([]byte("new"), last+100), im.writeAt(disk[last-cluster:last], last-cluster),
		im.Zero(last-2*cluster, cluster, false), im.Flush(), im.Flush())
	clear(disk[last-2*cluster : last-cluster])
	for off := 0; off < 10*cluster && err == nil; off += cluster {
		copy(disk[off:], bytes.Repeat([]byte{byte(off/cluster) + 50}, cluster))
		err = im.writeAt(disk[off:off+cluster], int64(off))
	}
	if err != nil {
		t.Fatal(err)
	}
	readAll()
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	readAll()
	checked(t, f.Bytes(), true)
}

// Those who come while a cluster is decompressed get the same, its error too.
func TestCompressedClustersForMany(t *testing.T) {
	for _, cluster := range []int{4 << 10, 64 << 10, 2 << 20} {
		t.Run(fmt.Sprint(cluster), func(t *testing.T) {
			f, disk := packed(t, 3*cluster+min(17*cluster, 2<<20), fmt.Sprint("cluster_size=", cluster))
			im := opened(t, f, Options{})
			var wg sync.WaitGroup
			for i := range 8 {
				rng := rand.New(rand.NewPCG(uint64(i), 3))
				wg.Go(func() {
					p := make([]byte, 1000)
					for range min(500, 4<<20/cluster) {
						off := rng.Int64N(int64(len(disk) - len(p)))
						if err := im.readAt(p, off); err != nil || !bytes.Equal(p, disk[off:off+1000]) {
							t.Errorf("at %d: %v", off, err)
							return
						}
					}
				})
			}
			wg.Wait()
			for _, c := range im.unpacked.all {
				if c.users != 0 {
					t.Errorf("a cluster has %d users", c.users)
				}
			}
			p := make([]byte, 100)
			im = opened(t, f, Options{})
			if err := im.readAt(p, int64(len(disk)-len(p))); err != nil { // the tables
				t.Fatal(err)
			}
			f.FailRead = func(int64, int64) error { return unix.EIO }
			if err := im.readAt(p, 5); !errors.Is(err, unix.EIO) {
				t.Errorf("a failed read: %v", err)
			}
			f.FailRead = nil
			if err := im.readAt(p, 5); err != nil || !bytes.Equal(p, disk[5:105]) {
				t.Errorf("after an error: %v", err)
			}
		})
	}
}
