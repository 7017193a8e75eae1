package backend

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

func sparse(t *testing.T, dir string, size int64, data ...int64) string {
	path := writeFile(t, dir, nil)
	must(t, os.Truncate(path, size))
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	for i := 0; i < len(data); i += 2 {
		_, err := f.WriteAt(pattern(int(data[i+1]), 1), data[i])
		must(t, err)
	}
	return path
}

func shape(p *Plan) (s string) {
	for _, e := range p.Extents {
		s += fmt.Sprintf("%c%d ", "DZO"[e.Kind], e.Length>>10)
	}
	return strings.TrimSpace(s)
}

func TestMapHoles(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := sparse(t, dir, 2<<20, 256<<10, 64<<10, 1<<20, 1<<20)
		r := openImage(t, Options{Path: path}, nil)
		tmpfs := r.cur.Load().file.traits.Tmpfs
		var p Plan
		check := func(off, n int64, mode Mode, want string) {
			t.Helper()
			must(t, r.Map(&p, off, n, mode))
			if got := shape(&p); got != want {
				t.Errorf("%d+%d: %s, want %s", off, n, got, want)
			}
			r.Unmap(&p)
			if got := shape(&p); got != want {
				t.Errorf("unreadable after Unmap: %s", got)
			}
		}
		check(0, 2<<20, 0, "D2048")
		check(0, 4096, FindHoles, "D4")
		if !tmpfs {
			if err := r.Map(&p, 0, 2<<20, FindHoles); err != ErrWait {
				t.Errorf("without MayBlock: %v", err)
			}
		} else {
			check(0, 2<<20, FindHoles, "Z256 D64 Z704 D1024")
		}
		check(0, 2<<20, FindHoles|MayBlock, "Z256 D64 Z704 D1024")
		check(300<<10, 64<<10, FindHoles|MayBlock, "D20 Z44")
		check(1<<20, 1<<20, FindHoles, "D1024") // known by now
		must(t, activate(r, false))
		check(1<<20, 1<<20, FindHoles|MayBlock, "D1024")
		must(t, r.Discard(1<<20, 128<<10))
		check(1<<20, 1<<20, FindHoles|MayBlock, "Z128 D896")
		must(t, write(r, 1<<20, make([]byte, 128<<10), false))
		check(1<<20, 1<<20, FindHoles|MayBlock, "D1024")
		wantErrno(t, r.Map(&p, 2<<20, 1, 0), unix.EIO)
	})
}

func TestMapManyHoles(t *testing.T) {
	var data []int64
	for i := range int64(200) {
		data = append(data, i*16<<10, 4096)
	}
	path := sparse(t, testfs.Memory(t), 4<<20, data...)
	r := openImage(t, Options{Path: path}, nil)
	var p Plan
	must(t, r.Map(&p, 0, 4<<20, FindHoles))
	var sum int64
	for _, e := range p.Extents {
		sum += e.Length
	}
	if len(p.Extents) > maxHoles || sum != 4<<20 {
		t.Errorf("%d extents, %d bytes", len(p.Extents), sum)
	}
	got := make([]byte, 4<<20)
	must(t, read(r, 0, got))
	if !bytes.Equal(got, contentOf(t, path)) {
		t.Error("the bytes differ")
	}
}

// Reading a hole leaves it one.
func TestReadingHolesAllocatesNothing(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := sparse(t, dir, 8<<20, 4<<20, 4096)
		r := openImage(t, Options{Path: path}, nil)
		before := statOf(t, path).Blocks
		for _, n := range []int{4096, 1 << 20, 8 << 20} {
			for off := int64(0); off+int64(n) <= 8<<20; off += int64(n) {
				must(t, read(r, off, make([]byte, n)))
			}
		}
		_, err := r.Status(nil, 0, 8<<20, 10)
		must(t, err)
		must(t, r.Cache(0, 8<<20))
		if after := statOf(t, path).Blocks; after != before {
			t.Errorf("%d blocks, before %d", after, before)
		}
	})
}

func TestStatus(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := sparse(t, dir, 2<<20, 256<<10, 64<<10, 1<<20, 1<<20)
		r := openImage(t, Options{Path: path}, nil)
		const hz = StatusHole | StatusZero
		all := []Status{{256 << 10, hz}, {64 << 10, 0}, {704 << 10, hz}, {1 << 20, 0}}
		for _, c := range []struct {
			off, n int64
			max    int
			want   []Status
		}{
			{0, 2 << 20, 100, all},
			{0, 2 << 20, 4, all},
			{0, 2 << 20, 2, all[:2]},
			{0, 2 << 20, 1, all[:1]},
			{300 << 10, 100 << 10, 9, []Status{{20 << 10, 0}, {80 << 10, hz}}},
			{5, 7, 9, []Status{{7, hz}}},
		} {
			had := []Status{{1, 0}}
			got, err := r.Status(had, c.off, c.n, c.max)
			must(t, err)
			if fmt.Sprint(got[1:]) != fmt.Sprint(c.want) {
				t.Errorf("%d+%d max %d: %v, want %v", c.off, c.n, c.max, got[1:], c.want)
			}
		}
	})
}

func TestFull(t *testing.T) {
	f := newFull(100 << 20)
	if f.chunk != fullMin {
		t.Fatal(f.chunk)
	}
	f.add(1, 300<<10)
	for _, c := range []struct {
		off, n int64
		want   bool
	}{{0, 1, false}, {64 << 10, 192 << 10, true}, {64 << 10, 193 << 10, false}, {100 << 10, 1, true}, {256 << 10, 1, false}, {1 << 40, 1, false}} {
		if got := f.has(c.off, c.n); got != c.want {
			t.Errorf("has(%d, %d) = %v", c.off, c.n, got)
		}
	}
	f.remove(130<<10, 1)
	if f.has(128<<10, 1) || !f.has(127<<10, 1) {
		t.Error("remove")
	}
	f.add(0, 1<<40)
	f.remove(0, 1<<40)
	if f.has(5<<20, 1) {
		t.Error("remove all")
	}
	if big := newFull(1 << 50); len(big.bits)*8 > 2<<20 {
		t.Errorf("%d bytes", len(big.bits)*8)
	}
}

// A guest cannot turn a disk that was guessed to be raw into something else,
// in one step or in several at once.
func TestGuard(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 4096))
		r := openImage(t, Options{Path: path, Format: "auto"}, nil)
		must(t, activate(r, false))
		var p Plan
		if err := r.Prepare(&p, 511, []byte{1}, 0); err != ErrWait {
			t.Fatalf("without MayBlock: %v", err)
		}
		must(t, r.Prepare(&p, 512, []byte("QFI\xfb"), 0))
		r.Commit(&p)

		err := write(r, 0, []byte("QFI\xfb"), false)
		wantErrno(t, err, unix.EPERM)
		if !strings.Contains(err.Error(), "-f raw") || !strings.Contains(err.Error(), "qcow2") {
			t.Error(err)
		}
		must(t, write(r, 1, []byte("FI\xfb"), false))
		wantErrno(t, write(r, 0, []byte("Q"), false), unix.EPERM)
		must(t, write(r, 0, []byte("R"), false))

		// Zeroing completes a header, too.
		must(t, write(r, 0, []byte("QEDx"), false))
		wantErrno(t, r.Zero(3, 10, 0), unix.EPERM)
		wantErrno(t, r.Discard(3, 4000), unix.EPERM)
		must(t, r.Zero(0, 512, 0))
		wantContent(t, path, append(make([]byte, 512), append([]byte{}, contentOf(t, path)[512:]...)...))

		// The two halves of a magic at once.
		for range 30 {
			must(t, write(r, 0, make([]byte, 8), false))
			var wg sync.WaitGroup
			errs := make([]error, 2)
			wg.Go(func() { errs[0] = write(r, 0, []byte("QF"), false) })
			wg.Go(func() { errs[1] = write(r, 2, []byte("I\xfb"), false) })
			wg.Wait()
			if (errs[0] == nil) == (errs[1] == nil) || Probe(contentOf(t, path)) != "" {
				t.Fatal(errs, contentOf(t, path)[:4])
			}
		}

		// An aborted write gives the guard back.
		must(t, r.Prepare(&p, 0, []byte{9}, MayBlock))
		r.Abort(&p)
		must(t, write(r, 0, []byte("y"), false))

		// Somebody else may have made it one while we were inactive.
		must(t, inactivate(r))
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		must(t, err)
		f.WriteAt([]byte("QFI\xfb"), 0)
		f.Close()
		wantErrno(t, activate(r, false), unix.EOPNOTSUPP)

		given := openImage(t, Options{Path: path, Format: "raw"}, nil)
		must(t, activate(given, false))
		must(t, given.Prepare(&p, 0, []byte("QFI\xfb"), 0))
		given.Commit(&p)
		must(t, write(given, 0, []byte("QFI\xfb"), false))
	})
}

// Who acknowledges a request flushes; a sync here would be a second one.
func TestWriteThroughLeavesSyncToCaller(t *testing.T) {
	h := new(failing)
	r := openImage(t, Options{Path: writeFile(t, t.TempDir(), make([]byte, 1<<20)), Cache: CacheWritethrough}, h.hook)
	must(t, activate(r, false))
	n := h.count(opSync)
	must(t, r.Zero(0, 4096, 0))
	must(t, r.Discard(0, 4096))
	if got := h.count(opSync) - n; got != 0 {
		t.Errorf("%d syncs", got)
	}
	must(t, r.Flush())
	if got := h.count(opSync) - n; got != 1 {
		t.Errorf("%d syncs of a flush", got)
	}
}

// Discarding may do nothing, and zeroing may not.
func TestDiscardUnsupported(t *testing.T) {
	h := new(failing)
	path := writeFile(t, t.TempDir(), pattern(8192, 1))
	r := openImage(t, Options{Path: path}, h.hook)
	must(t, activate(r, false))
	h.set(opPunch, unix.EOPNOTSUPP)
	must(t, r.Discard(0, 4096))
	wantContent(t, path, pattern(8192, 1))
	h.set(opZeroRange, unix.EOPNOTSUPP)
	wantErrno(t, r.Zero(0, 4096, FastZero), unix.EOPNOTSUPP)
	wantContent(t, path, pattern(8192, 1))
	must(t, r.Zero(0, 4096, 0))
	wantContent(t, path, append(make([]byte, 4096), pattern(8192, 1)[4096:]...))
}

// A write while inactive is a mistake of the caller that the kernel would
// stop; it does not come so far.
func TestInactiveRefusesChanges(t *testing.T) {
	path := writeFile(t, t.TempDir(), pattern(8192, 1))
	for _, ro := range []bool{false, true} {
		r := openImage(t, Options{Path: path, ReadOnly: ro}, nil)
		if ro {
			must(t, activate(r, false))
		}
		var p Plan
		wantErrno(t, r.Prepare(&p, 0, make([]byte, 10), MayBlock), unix.EPERM)
		wantErrno(t, r.Discard(0, 10), unix.EPERM)
		wantErrno(t, r.Zero(0, 10, 0), unix.EPERM)
		must(t, r.Flush())
		must(t, read(r, 0, make([]byte, 8192)))
		wantErrno(t, r.cur.Load().file.WriteAt(make([]byte, 10), 0, false), unix.EBADF)
	}
	wantContent(t, path, pattern(8192, 1))
}

func TestDropCache(t *testing.T) {
	path := writeFile(t, t.TempDir(), pattern(1<<20, 1))
	f := openTest(t, path, openHow{})
	must(t, f.fdatasync())
	must(t, f.ReadAt(make([]byte, 1<<20), 0))
	for mode, wantDrop := range map[DropCacheMode]bool{DropCacheOn: true, DropCacheOff: false} {
		h := new(failing)
		r := openImage(t, Options{Path: path, DropCache: mode}, h.hook)
		must(t, activate(r, false))
		if got := h.count(opAdvise) > 0; got != wantDrop {
			t.Errorf("%s: %v", mode, got)
		}
		must(t, inactivate(r))
		h.set(opAdvise, unix.EIO)
		if err := activate(r, false); (err != nil) != wantDrop {
			t.Errorf("%s: %v", mode, err)
		}
		r.Close()
	}
	left, err := f.dropCache(100, func(int) { time.Sleep(time.Millisecond) })
	must(t, err)
	if left != 0 {
		t.Errorf("%d pages left", left)
	}
	if !f.traits.coherent {
		t.Fatalf("%s is not a local file system; name a directory on ext4 or xfs in TMPDIR", f.traits.FS)
	}
	h := new(failing)
	must(t, activate(openImage(t, Options{Path: path}, h.hook), false))
	if h.count(opAdvise) != 0 {
		t.Error("auto drops a coherent cache")
	}
}

// Pages that stay are told.
func TestDropCacheIncomplete(t *testing.T) {
	path := writeFile(t, testfs.Disk(t), pattern(1<<20, 1))
	defer testfs.KeepCached(t, path)()
	var warned []string
	r := openImage(t, Options{Path: path, DropCache: DropCacheOn, Warn: func(s string) { warned = append(warned, s) }}, nil)
	must(t, activate(r, false))
	if len(warned) == 0 {
		if err := unix.Cachestat(0, &unix.CachestatRange{}, new(unix.Cachestat_t), 0); err == unix.ENOSYS {
			t.Skip("before Linux 6.5 nobody can tell")
		}
		t.Error("nothing is told")
	}
}
