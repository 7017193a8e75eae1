package backend

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

// bytesOf is what a system call finds in b, which this process may not touch.
func bytesOf(t *testing.T, b []byte) ([]byte, error) {
	t.Helper()
	fd, err := unix.MemfdCreate("bytes", unix.MFD_CLOEXEC)
	must(t, err)
	defer unix.Close(fd)
	if n, err := unix.Write(fd, b); err != nil || n != len(b) {
		return nil, fmt.Errorf("%d bytes of %d: %w", n, len(b), err)
	}
	got := make([]byte, len(b))
	_, err = unix.Pread(fd, got, 0)
	must(t, err)
	return got, nil
}

// mapped counts this process's maps of the file at path, and the pages in them
// in bytes.
func mapped(t *testing.T, path string) (maps int, resident int64) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/smaps")
	must(t, err)
	ours := false
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case len(f) >= 5 && strings.Contains(f[0], "-"):
			// Of the owner's writable map: TestNoPlaceWhileInactive of ioloop.
			if ours = f[len(f)-1] == path && f[1] != "rw-s"; ours {
				maps++
				if f[1] != "r--s" {
					t.Errorf("a map with %s", f[1])
				}
			}
		case ours && f[0] == "Rss:":
			n, err := strconv.ParseInt(f[1], 10, 64)
			must(t, err)
			resident += n << 10
		}
	}
	return maps, resident
}

// withoutCachestat runs fn with either way to find what is in the cache.
func withoutCachestat(t *testing.T, fn func(t *testing.T)) {
	for _, no := range []bool{false, true} {
		t.Run(fmt.Sprintf("mincore=%v", no), func(t *testing.T) {
			noCachestat.Store(no)
			defer noCachestat.Store(false)
			fn(t)
			if noCachestat.Load() != no {
				t.Log("this kernel has no cachestat")
			}
		})
	}
}

func TestPages(t *testing.T) {
	withoutCachestat(t, func(t *testing.T) {
		onEach(t, func(t *testing.T, dir string) {
			const size = 3<<20 + 1234
			want := pattern(size, 1)
			path := writeFile(t, dir, want)
			release := testfs.KeepCached(t, path)
			f := openTest(t, path, openHow{write: true, pages: true})
			rnd := rand.New(rand.NewPCG(1, 2))
			for range 200 {
				off := rnd.Int64N(size)
				n := 1 + rnd.Int64N(min(size-off, 1+int64(1)<<rnd.IntN(22)))
				p := f.Pages(off, n)
				if p == nil {
					t.Fatalf("%d+%d, which is in the cache, is not found there", off, n)
				}
				if got, err := bytesOf(t, p); err != nil || !bytes.Equal(got, want[off:off+n]) {
					t.Fatalf("%d+%d: other bytes (%v)", off, n, err)
				}
			}
			for _, bad := range [][2]int64{{-1, 1}, {0, 0}, {0, -1}, {0, size + 8192}, {size + 4096, 1}, {1, size + 4096}, {1 << 62, 1 << 62}} {
				if f.Pages(bad[0], bad[1]) != nil {
					t.Errorf("%d+%d", bad[0], bad[1])
				}
			}
			// What is written shows.
			must(t, f.WriteAt([]byte("news"), 5000, false))
			if got, err := bytesOf(t, f.Pages(4999, 6)); err != nil || string(got[1:5]) != "news" {
				t.Errorf("%q, %v", got, err)
			}
			if _, n := mapped(t, path); n == 0 {
				t.Error("nothing is in the map")
			}
			release()
			f.trimPages()
			if maps, n := mapped(t, path); maps != 1 || n != 0 && !f.traits.Tmpfs {
				t.Errorf("%d maps with %d bytes after trimming", maps, n)
			}
			release = testfs.KeepCached(t, path)
			if got, err := bytesOf(t, f.Pages(0, 4096)); err != nil || !bytes.Equal(got, want[:4096]) {
				t.Errorf("other bytes after trimming: %v", err)
			}
			release()
			must(t, f.Close())
			if maps, _ := mapped(t, path); maps != 0 {
				t.Errorf("%d maps after Close", maps)
			}
		})
	})
}

// Looking for pages fills no hole, and finds none in one.
func TestPagesOfHoles(t *testing.T) {
	withoutCachestat(t, func(t *testing.T) {
		for _, write := range []bool{true, false} {
			pagesOfHoles(t, write)
		}
	})
}

func pagesOfHoles(t *testing.T, write bool) {
	path := filepath.Join(testfs.Memory(t), "sparse")
	f, err := os.Create(path)
	must(t, err)
	must(t, f.Truncate(4<<20))
	for i := range int64(16) { // data and holes in turn, 64 KiB each
		_, err := f.WriteAt(pattern(64<<10, uint64(i)), i*128<<10)
		must(t, err)
	}
	must(t, f.Close())
	before := statOf(t, path).Blocks
	file := openTest(t, path, openHow{write: write, pages: true})
	for off := int64(0); off < 4<<20; off += 4096 {
		for _, n := range []int64{1, 4096, 8192, 64 << 10, 1 << 20} {
			n = min(n, 4<<20-off)
			data := off < 2<<20 && off/(64<<10)%2 == 0 && (off+n-1)/(64<<10) == off/(64<<10)
			p := file.Pages(off, n)
			if (p != nil) != data {
				t.Fatalf("%d+%d: data %v, but pages %v", off, n, data, p != nil)
			}
			if p != nil {
				_, err := bytesOf(t, p)
				must(t, err)
			}
		}
	}
	if after := statOf(t, path).Blocks; after != before {
		t.Errorf("%d blocks, %d before", after, before)
	}
}

// What is not in the cache is not referred to, and not read.
func TestPagesOfTheCold(t *testing.T) {
	withoutCachestat(t, func(t *testing.T) {
		path := writeFile(t, testfs.Disk(t), pattern(1<<20, 1))
		f := openTest(t, path, openHow{write: true, pages: true})
		must(t, f.Sync())
		must(t, f.fadvise(0, 0, unix.FADV_DONTNEED))
		if f.Pages(0, 1<<20) != nil || f.Pages(4096, 4096) != nil {
			t.Error("pages that were dropped")
		}
		defer testfs.KeepCached(t, path)()
		if f.Pages(0, 1<<20) == nil {
			t.Error("no pages, although they are in the cache")
		}
	})
}

// Where the file has become shorter the system call says EFAULT, and Reaches
// no; the process lives.
func TestPagesPastTheEnd(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, pattern(64<<10, 1))
		f := openTest(t, path, openHow{write: true, pages: true})
		p := f.Pages(0, 64<<10)
		if p == nil || !f.Reaches(64<<10) || f.Reaches(64<<10+1) {
			t.Fatal("not as it was made")
		}
		must(t, os.Truncate(path, 10_000))
		if f.Reaches(10_001) || !f.Reaches(10_000) {
			t.Error("the new end is not seen")
		}
		if got, err := bytesOf(t, p[:12288]); err != nil || !bytes.Equal(got[10_000:], make([]byte, 2288)) {
			t.Errorf("the last page: %v", err)
		}
		if _, err := bytesOf(t, p[12288:]); err == nil || !strings.Contains(err.Error(), unix.EFAULT.Error()) {
			t.Errorf("%v, want EFAULT", err)
		}
	})
}

// What a file has grown by is there as well.
func TestPagesOfAGrowingFile(t *testing.T) {
	withoutCachestat(t, func(t *testing.T) {
		path := writeFile(t, testfs.Memory(t), pattern(5000, 1))
		f := openTest(t, path, openHow{write: true, pages: true})
		if f.Pages(0, 5000) == nil || f.Pages(8192, 4096) != nil {
			t.Fatal("not as it was made")
		}
		want := pattern(1<<20, 2)
		must(t, os.WriteFile(path, want, 0o600))
		for off := int64(0); off < 1<<20; off += 64 << 10 {
			if got, err := bytesOf(t, f.Pages(off, 64<<10)); err != nil || !bytes.Equal(got, want[off:off+64<<10]) {
				t.Fatalf("at %d: other bytes (%v)", off, err)
			}
		}
		if f.Pages(1<<20, 1) != nil || f.Pages(f.pages.length, 1) != nil {
			t.Error("pages past the end")
		}
	})
}

// Only an owner maps, of the description with the locks, and never O_DIRECT.
func TestPagesAreTheOwners(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, readOnly := range []bool{false, true} {
			path := writeFile(t, dir, pattern(1<<20, 1))
			r := openImage(t, Options{Path: path, Format: "raw", ReadOnly: readOnly}, nil)
			pages := func() bool {
				var p Plan
				must(t, r.Map(&p, 0, 4096, 0))
				defer r.Unmap(&p)
				b := p.Extents[0].File.Pages(0, 4096)
				if b != nil {
					_, err := bytesOf(t, b)
					must(t, err)
				}
				return b != nil
			}
			for range 2 {
				if pages() {
					t.Error("an inactive image is mapped")
				}
				must(t, activate(r, false))
				if !pages() {
					t.Error("an active image is not mapped")
				}
				must(t, r.SyncAhead(context.Background()))
				if _, n := mapped(t, path); n != 0 && !r.cur.Load().file.traits.Tmpfs {
					t.Errorf("%d bytes in the map after syncing ahead", n)
				}
				pages()
				must(t, inactivate(r))
				r.unmapping.Wait()
				if maps, _ := mapped(t, path); maps != 0 {
					t.Errorf("%d maps of an inactive image", maps)
				}
			}
			must(t, r.Close())
		}
		path := writeFile(t, dir, pattern(1<<20, 1))
		f := openTest(t, path, openHow{write: true, direct: true, pages: true})
		if f.Traits().Direct && f.Pages(0, 4096) != nil {
			t.Error("pages of O_DIRECT")
		}
	})
}

func TestPagesAllocations(t *testing.T) {
	withoutCachestat(t, func(t *testing.T) {
		path := writeFile(t, testfs.Memory(t), pattern(1<<20, 1))
		f := openTest(t, path, openHow{write: true, pages: true})
		if n := testing.AllocsPerRun(100, func() {
			if f.Pages(4096, 8192) == nil || !f.Reaches(1<<20) {
				t.Fatal("no pages")
			}
		}); n != 0 {
			t.Errorf("%v allocations", n)
		}
	})
}

// A file that grows stays in reach of its map, and what was referred to stays
// where it was.
func TestPagesOfGrowingFile(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, pattern(64<<10, 1))
		f := openTest(t, path, openHow{write: true, pages: true})
		first := f.Pages(0, 4096)
		if first == nil {
			t.Fatal("not mapped")
		}
		for size := int64(64 << 10); size < 8<<20; size += 64 << 10 {
			must(t, f.Resize(size+64<<10))
			want := pattern(64<<10, uint64(size))
			must(t, f.WriteAt(want, size, false))
			if got, err := bytesOf(t, f.Pages(size, 64<<10)); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("at %d: other bytes (%v)", size, err)
			}
		}
		if maps, _ := mapped(t, path); maps != 1 {
			t.Errorf("%d maps", maps)
		}
		if got, err := bytesOf(t, first); err != nil || !bytes.Equal(got, pattern(64<<10, 1)[:4096]) {
			t.Errorf("what was mapped first: other bytes (%v)", err)
		}
		must(t, f.Close())
		if maps, _ := mapped(t, path); maps != 0 {
			t.Errorf("%d maps of a closed file", maps)
		}
	})
}

// What cachestat is refused for is one file, not all: see File.cached.
func TestCachestatOfOneFile(t *testing.T) {
	path := writeFile(t, t.TempDir(), pattern(1<<20, 1))
	ours := openTest(t, path, openHow{write: true, pages: true})
	const foreign = "/etc/passwd" // everybody may read it, and only root write it
	theirs := openTest(t, foreign, openHow{pages: true})
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // which ends with the goroutine, and its identity with it
		if err := unix.Setfsuid(65534); err != nil {
			t.Error(err)
			return
		}
		var cs unix.Cachestat_t
		refused := unix.Cachestat(uint(theirs.fd), &unix.CachestatRange{Len: 1}, &cs, 0) != nil
		theirs.Pages(0, 1)
		if got := theirs.pages.uncounted.Load(); got != refused {
			t.Errorf("%s is refused: %v; and remembered as such: %v", foreign, refused, got)
		}
		if ours.Pages(0, 4096) == nil || ours.pages.uncounted.Load() {
			t.Error("what was written a moment ago is not found in the page cache")
		}
	}()
	<-done
	if none := unix.Cachestat(uint(ours.fd), &unix.CachestatRange{}, &unix.Cachestat_t{}, 0) == unix.ENOSYS; noCachestat.Load() != none {
		t.Errorf("cachestat is turned off for all files; the kernel lacks it: %v", none)
	}
}

// Pages that may wait in a socket are not those of a cache that activation
// drops.
func TestFixedOnlyWhereTheCacheStays(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, drop := range []DropCacheMode{DropCacheAuto, DropCacheOn, DropCacheOff} {
			path := writeFile(t, dir, pattern(1<<20, 1))
			r := openImage(t, Options{Path: path, Format: "raw", DropCache: drop}, nil)
			must(t, activate(r, false))
			var p Plan
			must(t, r.Map(&p, 0, 128<<10, FindHoles|MayBlock))
			if got, want := p.Extents[0].Fixed, !r.dropsCache(r.cur.Load().file); got != want {
				t.Errorf("--drop-cache %s: fixed %v", drop, got)
			}
			r.Unmap(&p)
			must(t, inactivate(r))
			must(t, r.Close())
		}
	})
}
