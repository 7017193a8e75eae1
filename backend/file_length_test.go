package backend

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A file grows and shrinks, to lengths of any alignment, while it is read and
// written: all bytes are where they belong, with O_DIRECT too, where the tail
// moves.
func TestResizeFile(t *testing.T) {
	for _, direct := range []bool{false, true} {
		onEach(t, func(t *testing.T, dir string) {
			want := pattern(10000, 1)
			f := openTest(t, writeFile(t, dir, want), openHow{write: true, direct: direct})
			rnd := rand.New(rand.NewPCG(1, 2))
			for i := range 200 {
				n := int64(rnd.IntN(100000))
				if i%3 == 0 {
					n &^= 4095
				}
				must(t, f.Resize(n))
				want = append(want, make([]byte, max(0, n-int64(len(want))))...)[:n]
				if f.Length() != n {
					t.Fatalf("%d bytes, want %d", f.Length(), n)
				}
				for range 5 {
					if n == 0 {
						break
					}
					off := rnd.Int64N(n)
					p := pattern(int(min(n-off, rnd.Int64N(9000))), uint64(i))
					must(t, f.WriteAt(p, off, rnd.IntN(5) == 0))
					copy(want[off:], p)
				}
				wantErrno(t, f.WriteAt([]byte{1}, n, false), unix.EIO)
				got := make([]byte, n)
				must(t, f.ReadAt(got, 0))
				if !bytes.Equal(got, want) {
					t.Fatalf("step %d: the contents differ", i)
				}
			}
			wantContent(t, f.path, want)
		})
	}
}

// While one resizes, what others write inside the shorter length stays.
func TestResizeBesideWrites(t *testing.T) {
	for _, direct := range []bool{false, true} {
		onEach(t, func(t *testing.T, dir string) {
			const kept = 64<<10 + 100
			f := openTest(t, writeFile(t, dir, make([]byte, kept)), openHow{write: true, direct: direct})
			want := make([]byte, kept)
			var all sync.WaitGroup
			const part = kept / 4
			for k := range 4 {
				all.Go(func() {
					rnd := rand.New(rand.NewPCG(3, uint64(k)))
					for i := range 100 {
						off := k*part + rnd.IntN(part-3000)
						p := pattern(rnd.IntN(3000), uint64(i))
						if err := f.WriteAt(p, int64(off), false); err != nil {
							t.Error(err)
						}
						copy(want[off:], p)
						got := make([]byte, len(p))
						if err := f.ReadAt(got, int64(off)); err != nil || !bytes.Equal(got, p) {
							t.Errorf("%d bytes at %d: %v", len(p), off, err)
						}
					}
				})
			}
			all.Go(func() {
				rnd := rand.New(rand.NewPCG(4, 1))
				for range 100 {
					if err := f.Resize(kept + int64(rnd.IntN(20000))); err != nil {
						t.Error(err)
					}
				}
			})
			all.Wait()
			must(t, f.Resize(kept))
			wantContent(t, f.path, want)
		})
	}
}

// A file that somebody else made shorter is not made longer again.
func TestResizeShrunkFile(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 100000))
	f := openTest(t, path, openHow{write: true})
	must(t, unix.Truncate(path, 50000))
	size, length, _, err := f.remeasure()
	if err != nil || size != 50000 || length != 100000 {
		t.Fatal(size, length, err)
	}
	wantErrno(t, f.Resize(200000), unix.EIO)
	wantErrno(t, f.WriteAt([]byte{1}, 60000, false), unix.EIO)
	if f.Length() != 50000 || statOf(t, path).Size != 50000 {
		t.Error(f.Length())
	}
	// A resize that fails changes nothing.
	h := new(failing)
	g := openTest(t, filepath.Join(filepath.Dir(path), "disk.img"), openHow{write: true, faults: h.hook})
	h.set(opTruncate, unix.ENOSPC)
	wantErrno(t, g.Resize(100000), unix.ENOSPC)
	must(t, g.WriteAt([]byte{1}, 49999, false))
}
