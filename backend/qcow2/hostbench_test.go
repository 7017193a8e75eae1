package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

// hostFile is a File on the host, as plain as it can be.
type hostFile struct {
	f      *os.File
	length int64
}

func openHost(t testing.TB, path string) *hostFile {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return &hostFile{f, st.Size()}
}

func (h *hostFile) Path() string  { return h.f.Name() }
func (h *hostFile) Length() int64 { return h.length }

func (h *hostFile) Resize(n int64) error {
	h.length = n
	return h.f.Truncate(n)
}

func (h *hostFile) ReadAt(p []byte, off int64) error {
	_, err := h.f.ReadAt(p, off)
	return err
}

func (h *hostFile) WriteAt(p []byte, off int64, _ bool) error {
	_, err := h.f.WriteAt(p, off)
	return err
}

func (h *hostFile) Punch(off, n int64) error {
	return unix.Fallocate(int(h.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (h *hostFile) ZeroAt(off, n int64) error { return h.Punch(off, n) }
func (h *hostFile) Sync() error               { return unix.Fdatasync(int(h.f.Fd())) }

// inMemory is a path on tmpfs for an image that qemu-img made.
func inMemory(t testing.TB, size string, options ...string) string {
	t.Helper()
	path := filepath.Join(testfs.Memory(t), "b.qcow2")
	args := []string{"create", "-q", "-f", "qcow2"}
	for _, o := range options {
		args = append(args, "-o", o)
	}
	qemuImg(t, append(args, path, size)...)
	return path
}

// BenchmarkAllocate writes to random clusters that are not there, with the bytes
// and without.
func BenchmarkAllocate(b *testing.B) {
	for _, data := range []bool{false, true} {
		for _, with := range []int{1, 4} {
			b.Run(fmt.Sprintf("data=%v/goroutines=%d", data, with), func(b *testing.B) {
				var im *Image
				var order []int
				buf := make([]byte, 4096)
				left := 0
				b.ResetTimer()
				for n := 0; n < b.N; n += 1 << 14 {
					b.StopTimer()
					if left == 0 {
						im = begun(b, openHost(b, inMemory(b, "8G")), Options{})
						order = rand.New(rand.NewPCG(1, 1)).Perm(8 << 14)
						left = len(order)
					}
					part := order[:1<<14]
					order, left = order[1<<14:], left-1<<14
					b.StartTimer()
					done := make(chan error, with)
					for g := range with {
						go func() {
							var p Plan
							for i := g; i < len(part); i += with {
								off := int64(part[i]) << 16
								err := im.Prepare(&p, off, 4096, 0)
								if err == ErrWait {
									err = im.Prepare(&p, off, 4096, MayBlock)
								}
								if err != nil {
									done <- err
									return
								}
								if data {
									if err := im.f.WriteAt(buf, p.Extents[0].Offset, false); err != nil {
										done <- err
										return
									}
								}
								im.Commit(&p)
							}
							done <- nil
						}()
					}
					for range with {
						if err := <-done; err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}

// TestFullTebibyte is a fully mapped image: what opening takes, and the memory of a map of
// all of it.
func TestFullTebibyte(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t.qcow2")
	writeFull(t, path, 1<<40)
	f := openHost(t, path)
	h, err := ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	im, err := New(f, h, Options{L2Cache: 160 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.Begin(nil); err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	took := time.Since(began)
	var was, is runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&was)
	var p Plan
	for off := int64(0); off < im.Size(); off += 1 << 20 {
		if err := im.Map(&p, off, 4096, MayBlock); err != nil {
			t.Fatal(err)
		}
		im.Unmap(&p)
	}
	mapped := time.Since(began) - took
	runtime.ReadMemStats(&is)
	t.Logf("opened in %v, all of it mapped in %v; heap %d MiB more, %d MiB of garbage", took, mapped,
		(is.HeapInuse-was.HeapInuse)>>20, (is.TotalAlloc-was.TotalAlloc-(is.HeapAlloc-was.HeapAlloc))>>20)
	if got := is.HeapInuse - was.HeapInuse; got > 150<<20 {
		t.Errorf("a map of all of it takes %d MiB", got>>20)
	}
}

// writeFull makes an image with clusters of 64 KiB of which every one is
// mapped.
func writeFull(t *testing.T, path string, size int64) {
	t.Helper()
	qemuImg(t, "create", "-q", "-f", "qcow2", path, fmt.Sprint(size))
	f := openHost(t, path)
	im := begun(t, f, Options{})
	// The metadata goes first, the guest's clusters follow it.
	const cluster = 1 << 16
	tables := im.g.L1Needed(size)
	total := tables + size/cluster
	per := im.g.refcountsPerBlock()
	blocks := (total + total/per + 64) / per
	first := im.alloc.end
	end := first + tables + blocks + 1 + size/cluster
	raw := make([]byte, cluster)
	if err := f.Resize(end * cluster); err != nil {
		t.Fatal(err)
	}
	host := first + blocks + 1 + tables
	for i := range tables {
		at := (first + blocks + 1 + i) * cluster
		for k := range int64(8192) {
			binary.BigEndian.PutUint64(raw[8*k:], uint64(host*cluster)|entryCopied)
			host++
		}
		if err := f.WriteAt(raw, at, false); err != nil {
			t.Fatal(err)
		}
		if err := f.WriteAt(be64(uint64(at)|entryCopied), im.h.L1Offset+8*i, false); err != nil {
			t.Fatal(err)
		}
	}
	for i := range blocks + 1 {
		for k := range per {
			v := uint64(0)
			if i*per+k < end {
				v = 1
			}
			im.g.setRefcount(raw, k, v)
		}
		at := (first + i) * cluster
		if i == 0 {
			at = int64(im.refs.table[0])
		}
		if err := f.WriteAt(raw, at, false); err != nil {
			t.Fatal(err)
		}
		if err := f.WriteAt(be64(uint64(at)), im.h.RefcountOffset+8*i, false); err != nil {
			t.Fatal(err)
		}
	}
}
