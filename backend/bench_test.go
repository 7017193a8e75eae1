package backend

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

func benchFile(b *testing.B, dir string) *File {
	f, err := openFile(writeFile(b, dir, make([]byte, 16<<20)), openHow{write: true})
	must(b, err)
	b.Cleanup(func() { f.Close() })
	buf := make([]byte, 1<<20)
	for off := int64(0); off < 16<<20; off += 1 << 20 {
		must(b, f.ReadAt(buf, off))
	}
	b.SetBytes(4096)
	b.ReportAllocs()
	return f
}

func benchDirs(b *testing.B, fn func(b *testing.B, f *File, p []byte, off func(i int) int64)) {
	off := func(i int) int64 { return int64(uint32(i)*2654435761%4096) * 4096 }
	for name, dir := range map[string]string{"disk": testfs.Disk(b), "tmpfs": testfs.Memory(b)} {
		b.Run(name, func(b *testing.B) {
			f := benchFile(b, dir)
			p := make([]byte, 4096)
			b.ResetTimer()
			fn(b, f, p, off)
		})
	}
}

func BenchmarkTryReadAt(b *testing.B) {
	benchDirs(b, func(b *testing.B, f *File, p []byte, off func(int) int64) {
		i := 0
		for b.Loop() {
			if n, err := f.TryReadAt(p, off(i)); n != len(p) || err != nil {
				b.Fatal(n, err)
			}
			i++
		}
	})
}

// What TryReadAt would cost with the scheduler told of each call.
func BenchmarkReadSyscall(b *testing.B) {
	benchDirs(b, func(b *testing.B, f *File, p []byte, off func(int) int64) {
		i := 0
		for b.Loop() {
			if f.traits.InlineReads {
				if n, err := unix.Pread(f.fd, p, off(i)); n != len(p) || err != nil {
					b.Fatal(n, err)
				}
			} else {
				iov := unix.Iovec{Base: &p[0], Len: uint64(len(p))}
				n, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(f.fd), uintptr(unsafe.Pointer(&iov)), 1, uintptr(off(i)), 0, unix.RWF_NOWAIT)
				if int(n) != len(p) || errno != 0 {
					b.Fatal(n, errno)
				}
			}
			i++
		}
	})
}

func BenchmarkTryWriteAt(b *testing.B) {
	benchDirs(b, func(b *testing.B, f *File, p []byte, off func(int) int64) {
		i := 0
		for b.Loop() {
			if n, err := f.TryWriteAt(p, off(i)); n != len(p) || err != nil {
				b.Fatal(n, err)
			}
			i++
		}
	})
}

// What TryWriteAt would cost with Syscall on tmpfs and RawSyscall elsewhere.
func BenchmarkWriteOtherSyscall(b *testing.B) {
	benchDirs(b, func(b *testing.B, f *File, p []byte, off func(int) int64) {
		i := 0
		for b.Loop() {
			if f.traits.Tmpfs {
				if n, err := unix.Pwrite(f.fd, p, off(i)); n != len(p) || err != nil {
					b.Fatal(n, err)
				}
			} else if n, errno := rawPwrite(f.fd, p, off(i)); n != len(p) || errno != 0 {
				b.Fatal(n, errno)
			}
			i++
		}
	})
}

// A whole cached read and write as requests make them.
func BenchmarkRawMap(b *testing.B) {
	r, err := Open(Options{Path: writeFile(b, testfs.Memory(b), make([]byte, 16<<20)), Format: "raw"})
	must(b, err)
	defer r.Close()
	must(b, activate(r, false))
	payload := make([]byte, 4096)
	b.Run("map", func(b *testing.B) {
		b.ReportAllocs()
		var p Plan
		for b.Loop() {
			if err := r.Map(&p, 4096, 4096, FindHoles); err != nil {
				b.Fatal(err)
			}
			r.Unmap(&p)
		}
	})
	b.Run("prepare", func(b *testing.B) {
		b.ReportAllocs()
		var p Plan
		for b.Loop() {
			if err := r.Prepare(&p, 4096, payload, 0); err != nil {
				b.Fatal(err)
			}
			r.Commit(&p)
		}
	})
}

// The fast paths allocate nothing.
func TestNoAllocations(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		r, err := Open(Options{Path: writeFile(t, dir, make([]byte, 1<<20)), Format: "raw"})
		must(t, err)
		defer r.Close()
		must(t, activate(r, false))
		f := r.cur.Load().file
		b := make([]byte, 4096)
		must(t, f.ReadAt(b, 0))
		must(t, r.Flush())
		var p Plan
		must(t, r.Map(&p, 0, 4096, 0))
		for name, fn := range map[string]func(){
			"TryReadAt":  func() { f.TryReadAt(b, 0) },
			"TryWriteAt": func() { f.TryWriteAt(b, 0) },
			"ReadAt":     func() { f.ReadAt(b, 0) },
			"WriteAt":    func() { f.WriteAt(b, 0, false) },
			"durable":    func() { f.WriteAt(b, 0, f.traits.Tmpfs) },
			"Map":        func() { r.Map(&p, 0, 4096, FindHoles); r.Unmap(&p) },
			"Prepare":    func() { r.Prepare(&p, 0, b, 0); r.Commit(&p) },
			"Punch":      func() { f.Punch(0, 4096) },
		} {
			if n := testing.AllocsPerRun(50, fn); n != 0 {
				t.Errorf("%s: %v allocations", name, n)
			}
		}
	})
}

// BenchmarkOwnership is an image that is taken, written and let go, by format.
func BenchmarkOwnership(b *testing.B) {
	dir := testfs.Memory(b)
	raw := writeFile(b, dir, pattern(64<<20, 1))
	images := map[string]string{"raw": raw, "qcow2": dir + "/q"}
	qemuImg(b, "convert", "-f", "raw", "-O", "qcow2", raw, images["qcow2"])
	p := make([]byte, 4096)
	for format, path := range images {
		b.Run(format, func(b *testing.B) {
			o, err := Open(Options{Path: path, Format: format})
			must(b, err)
			defer o.Close()
			b.ReportAllocs()
			for b.Loop() {
				must(b, activate(o, false))
				must(b, write(o, 4096, p, false))
				must(b, inactivate(o))
			}
		})
	}
}
