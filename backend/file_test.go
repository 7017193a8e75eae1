package backend

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

// Reads and writes at any offset and length, in every mode, with files of odd
// sizes, interrupted and cut short, against a copy in memory.
func TestFileReadWrite(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, direct := range []bool{false, true} {
			for _, size := range []int{0, 1, 511, 512, 4095, 4096, 4097, 70000, 300<<10 + 13} {
				for name, h := range map[string]func(int) faults{"plain": func(int) faults { return nil }, "flaky": flaky} {
					t.Run(fmt.Sprintf("direct=%v/size=%d/%s", direct, size, name), func(t *testing.T) {
						align := 1
						if direct {
							align = pageSize
						}
						readWrite(t, dir, size, openHow{write: true, direct: direct, faults: h(align)})
					})
				}
			}
		}
	})
}

func readWrite(t *testing.T, dir string, size int, how openHow) {
	want := pattern(size, 1)
	path := writeFile(t, dir, want)
	f := openTest(t, path, how)
	rnd := rand.New(rand.NewPCG(3, uint64(size)))
	rounds := 60
	if how.direct {
		rounds = 25
	}
	for i := range rounds {
		off := rnd.IntN(size + 1)
		n := rnd.IntN(size - off + 1)
		if i%3 == 0 {
			n = min(n, 1+rnd.IntN(600))
		}
		switch b := pattern(n, uint64(i)); i % 2 {
		case 0:
			must(t, f.WriteAt(b, int64(off), i%10 == 0))
			copy(want[off:], b)
		default:
			must(t, f.ReadAt(b, int64(off)))
			if !bytes.Equal(b, want[off:off+n]) {
				t.Fatalf("read of %d at %d differs", n, off)
			}
		}
	}
	all := make([]byte, size)
	must(t, f.ReadAt(all, 0))
	if !bytes.Equal(all, want) {
		t.Fatal("the whole differs")
	}
	must(t, f.Sync())
	wantContent(t, path, want)

	wantErrno(t, f.ReadAt(make([]byte, 2), int64(size)-1), unix.EIO)
	wantErrno(t, f.WriteAt(make([]byte, 2), int64(size)-1, false), unix.EIO)
	wantContent(t, path, want)
}

func TestTryRead(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		want := pattern(20000, 1)
		path := writeFile(t, dir, want)
		f := openTest(t, path, openHow{})
		if !f.traits.InlineReads && !f.traits.NowaitReads {
			t.Fatalf("no reads without waiting on %s; name a directory on ext4 or xfs in TMPDIR", f.traits.FS)
		}
		b := make([]byte, len(want))
		must(t, f.ReadAt(b, 0))
		clear(b)
		if n, err := f.TryReadAt(b, 0); n != len(b) || err != nil || !bytes.Equal(b, want) {
			t.Fatalf("cached: %d, %v", n, err)
		}
		if n, err := f.TryReadAt(b, 5); n != len(b)-5 || err != ErrWait || !bytes.Equal(b[:n], want[5:]) {
			t.Fatalf("past the end: %d, %v", n, err)
		}
		if n, err := f.TryReadAt(nil, 5); n != 0 || err != nil {
			t.Fatalf("empty: %d, %v", n, err)
		}
		if f.traits.Tmpfs {
			return
		}
		must(t, f.fdatasync())
		// The kernel begins to read ahead what is not there, and a quick disk may
		// have brought it by the time it looks: then once more.
		for try := 0; ; try++ {
			if left, err := f.dropCache(10000, func(int) { time.Sleep(time.Millisecond) }); err != nil || left != 0 {
				t.Fatalf("the page cache stays: %d, %v", left, err)
			}
			clear(b)
			n, err := f.TryReadAt(b, 0)
			if n == 0 && err == ErrWait {
				break
			}
			if try == 20 || err != nil || !bytes.Equal(b, want) {
				t.Fatalf("not cached: %d, %v", n, err)
			}
		}
		d := openTest(t, path, openHow{direct: true})
		if n, err := d.TryReadAt(b[:4096], 0); n != 0 || err != ErrWait {
			t.Fatalf("direct: %d, %v", n, err)
		}
	})
}

func TestTryWrite(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 1<<20))
		f := openTest(t, path, openHow{write: true})
		tmpfs := f.traits.Tmpfs
		if !tmpfs && !f.traits.inlineWrites {
			t.Fatalf("%s is not a local file system; name a directory on ext4 or xfs in TMPDIR", f.traits.FS)
		}
		for _, c := range []struct {
			off  int64
			n    int
			want bool
		}{
			{0, 4096, true},
			{1, 4096, tmpfs},
			{4096, 100, tmpfs},
			{0, 64 << 10, true},
			{0, 68 << 10, tmpfs},
			{0, 256 << 10, tmpfs},
			{0, 260 << 10, false},
		} {
			if got := f.InlineWrite(c.off, c.n); got != c.want {
				t.Errorf("InlineWrite(%d, %d) = %v", c.off, c.n, got)
			}
			n, err := f.TryWriteAt(pattern(c.n, 7), c.off)
			if c.want && (n != c.n || err != nil) || !c.want && (n != 0 || err != ErrWait) {
				t.Errorf("TryWriteAt(%d, %d) = %d, %v", c.off, c.n, n, err)
			}
		}
		if n, err := f.TryWriteAt(make([]byte, 8192), 1<<20-4096); n != 0 || err != ErrWait {
			t.Errorf("past the end: %d, %v", n, err)
		}
		if st := statOf(t, path); st.Size != 1<<20 {
			t.Errorf("the file has grown to %d", st.Size)
		}
		ro := openTest(t, path, openHow{})
		if n, err := ro.TryWriteAt(make([]byte, 4096), 0); n != 0 || err != ErrWait {
			t.Errorf("read-only: %d, %v", n, err)
		}
	})
}

// A short transfer of the fast path leaves the rest to the slow one.
func TestTryShort(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, pattern(8192, 1))
		f := openTest(t, path, openHow{write: true})
		must(t, f.ReadAt(make([]byte, 8192), 0))
		f.faults = func(op sysop, _ int64, n int) (int, error) { return n / 2, nil }
		b := make([]byte, 8192)
		if n, err := f.TryReadAt(b, 0); n != 4096 || err != ErrWait {
			t.Fatalf("%d, %v", n, err)
		}
		if n, err := f.TryWriteAt(b, 0); n != 4096 || err != ErrWait {
			t.Fatalf("%d, %v", n, err)
		}
		for _, errno := range []error{unix.EIO, unix.ENOSPC, unix.EAGAIN} {
			f.faults = func(op sysop, _ int64, n int) (int, error) { return 0, errno }
			if n, err := f.TryReadAt(b, 0); n != 0 || err != ErrWait {
				t.Fatalf("%d, %v", n, err)
			}
			if n, err := f.TryWriteAt(b, 0); n != 0 || err != ErrWait {
				t.Fatalf("%d, %v", n, err)
			}
		}
	})
}

func TestFileErrors(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprintf("direct=%v", direct), func(t *testing.T) {
			path := writeFile(t, t.TempDir(), make([]byte, 64<<10+5))
			h := new(failing)
			f := openTest(t, path, openHow{write: true, direct: direct, faults: h.hook})
			b := make([]byte, 10)
			for _, c := range []struct {
				op sysop
				fn func() error
			}{
				{opRead, func() error { return f.ReadAt(b, 100) }},
				{opWrite, func() error { return f.WriteAt(b, 100, false) }},
				{opWrite, func() error { return f.WriteAt(b, 64<<10-5, false) }},
				{opPunch, func() error { return f.Punch(0, 4096) }},
				{opPunch, func() error { return f.Zero(0, 4096, 0) }},
				{opZeroRange, func() error { return f.Zero(0, 4096, NoHole) }},
			} {
				for _, errno := range []error{unix.EIO, unix.ENOSPC} {
					h.set(c.op, errno)
					wantErrno(t, c.fn(), errno)
					h.set(c.op, nil)
					must(t, c.fn())
				}
			}
		})
	}
}

// A file that shrinks underneath gives EIO where there is nothing any more,
// and never grows again once that is seen.
func TestShrink(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, cache := range []CacheMode{CacheWriteback, CacheNone} {
			for _, size := range []int64{0, 1, 511, 512, 4095, 4096, 5000, 8191, 65535, 65536, 100000} {
				t.Run(fmt.Sprintf("%s/%d", cache, size), func(t *testing.T) {
					const was = 100001
					path := writeFile(t, dir, pattern(was, 1))
					warned := 0
					r := openImage(t, Options{Path: path, Cache: cache, Warn: func(string) { warned++ }}, nil)
					must(t, activate(r, false))
					warned = 0 // of an owner before
					must(t, os.Truncate(path, size))
					must(t, r.Flush())
					align, tail := int64(r.cur.Load().file.traits.Align), r.cur.Load().file.tail.Load()
					if warned != 1 {
						t.Errorf("%d warnings", warned)
					}
					b := make([]byte, 3000)
					offs := []int64{max(size-3000, 0), max(size-2999, 0)}
					for off := int64(0); off+3000 <= was; off += 4 * 997 {
						offs = append(offs, off)
					}
					for _, off := range offs {
						for name, err := range map[string]error{
							"write":   write(r, off, b, false),
							"durable": write(r, off, b, true),
							"read":    read(r, off, b),
							"zero":    r.Zero(off, 3000, 0),
							"discard": r.Discard(off, 3000),
						} {
							end := size
							if (name == "write" || name == "durable") && size < tail {
								end -= end % align // no part of a block is written directly
							}
							if off+3000 <= end && err != nil {
								t.Fatalf("%s at %d: %v", name, off, err)
							} else if off+3000 > end && !isErrno(err, unix.EIO) {
								t.Fatalf("%s at %d: %v, want EIO", name, off, err)
							}
						}
					}
					big := make([]byte, was)
					wantErrno(t, read(r, 0, big), unix.EIO)
					if st := statOf(t, path); st.Size != size {
						t.Fatalf("the size is %d", st.Size)
					}
					ext, err := r.Status(nil, 0, was, 100)
					must(t, err)
					var sum int64
					for _, e := range ext {
						if sum+e.Length > size+4095 && e.Flags&StatusZero != 0 {
							t.Fatalf("zeros past the end: %v", ext)
						}
						sum += e.Length
					}
					if sum != was {
						t.Fatalf("status covers %d", sum)
					}
					if r.Size() != was {
						t.Fatal("the size changed under clients")
					}
					must(t, inactivate(r))
					must(t, activate(r, false))
					if r.Size() != size {
						t.Fatalf("after activation the size is %d", r.Size())
					}
				})
			}
		}
	})
}

// Truncating at any moment under readers and writers does no harm.
func TestShrinkRace(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		const size = 1 << 20
		path := writeFile(t, dir, make([]byte, size))
		r := openImage(t, Options{Path: path, Warn: func(string) {}}, nil)
		must(t, activate(r, false))
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				b := make([]byte, 100000)
				for i := int64(0); ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					off := (i * 7919) % (size - 100000)
					var err error
					switch (int(i) + g) % 4 {
					case 0, 1:
						err = read(r, off, b)
					case 2:
						err = r.Check()
					case 3:
						_, err = r.Status(nil, off, 100000, 10)
					}
					if err != nil && !isErrno(err, unix.EIO) {
						t.Error(err)
						return
					}
				}
			})
		}
		for i := range 200 {
			must(t, os.Truncate(path, int64(i*4567)%size))
		}
		close(stop)
		wg.Wait()
	})
}

func TestSyncShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := writeFile(t, testfs.Memory(t), make([]byte, 10))
		entered, let := make(chan struct{}), make(chan struct{})
		var syncs int
		f := openTest(t, path, openHow{write: true, faults: func(op sysop, _ int64, n int) (int, error) {
			if op == opSync {
				syncs++ // one at a time: the race detector would tell
				entered <- struct{}{}
				<-let
			}
			return n, nil
		}})
		var wg sync.WaitGroup
		sync := func() {
			if err := f.Sync(); err != nil {
				t.Error(err)
			}
		}
		wg.Go(sync)
		<-entered
		for range 50 {
			wg.Go(sync)
		}
		synctest.Wait()
		let <- struct{}{}
		<-entered // the second is for all who came meanwhile
		tooLate := make(chan struct{})
		wg.Go(func() { sync(); close(tooLate) })
		synctest.Wait()
		let <- struct{}{}
		select {
		case <-entered: // and a third for who came when that had begun
		case <-tooLate:
			t.Error("joined a sync that had begun before")
		}
		let <- struct{}{}
		wg.Wait()
		if syncs != 3 {
			t.Errorf("%d syncs for 1, 50 and 1 callers", syncs)
		}
	})
}

// A durable write that fails while a sync runs may have been told what the
// sync should have been told.
func TestSyncBesideFailure(t *testing.T) {
	f := openTest(t, writeFile(t, testfs.Memory(t), make([]byte, 10)), openHow{write: true})
	f.faults = func(op sysop, _ int64, n int) (int, error) {
		f.syncer.fail(f.path, unix.EIO)
		return n, nil
	}
	if err := f.Sync(); !SyncFailed(err) {
		t.Error(err)
	}
}

func TestSyncFailureSticks(t *testing.T) {
	h := new(failing)
	f := openTest(t, writeFile(t, t.TempDir(), make([]byte, 8192)), openHow{write: true, faults: h.hook})
	must(t, f.Sync())
	h.set(opSync, unix.EIO)
	err := f.Sync()
	wantErrno(t, err, unix.EIO)
	if !SyncFailed(err) || !SyncFailed(fmt.Errorf("x: %w", err)) {
		t.Errorf("%v does not say that a sync failed", err)
	}
	h.set(opSync, nil)
	if err := f.Sync(); !SyncFailed(err) {
		t.Errorf("the second sync: %v", err)
	}
	if err := f.WriteAt(make([]byte, 1), 0, true); !SyncFailed(err) {
		t.Errorf("a durable write: %v", err)
	}
	must(t, f.WriteAt(make([]byte, 1), 0, false))
	if SyncFailed(nil) || SyncFailed(unix.EIO) {
		t.Error("SyncFailed is too easily pleased")
	}
}

func TestDurable(t *testing.T) {
	setup := func(t *testing.T) (*File, *failing) {
		h := new(failing)
		return openTest(t, writeFile(t, t.TempDir(), make([]byte, 8192)), openHow{write: true, faults: h.hook}), h
	}
	b := make([]byte, 100)
	t.Run("plain", func(t *testing.T) {
		f, h := setup(t)
		must(t, f.WriteAt(b, 0, true))
		if h.count(opWriteDsync) != 1 || h.count(opSync) != 0 {
			t.Error(h.calls)
		}
	})
	t.Run("not supported", func(t *testing.T) {
		f, h := setup(t)
		h.set(opWriteDsync, unix.EOPNOTSUPP)
		must(t, f.WriteAt(b, 0, true))
		must(t, f.WriteAt(b, 0, true))
		if h.count(opWriteDsync) != 1 || h.count(opSync) != 2 || h.count(opWrite) != 2 {
			t.Error(h.calls)
		}
	})
	t.Run("EIO", func(t *testing.T) {
		f, h := setup(t)
		h.set(opWriteDsync, unix.EIO)
		if err := f.WriteAt(b, 0, true); !SyncFailed(err) || !errors.Is(err, unix.EIO) {
			t.Error(err)
		}
		if err := f.Sync(); !SyncFailed(err) {
			t.Error(err)
		}
	})
	t.Run("EIO in writing as well", func(t *testing.T) {
		f, h := setup(t)
		h.set(opWriteDsync, unix.EIO)
		h.set(opWrite, unix.EIO)
		if err := f.WriteAt(b, 0, true); !SyncFailed(err) {
			t.Error(err)
		}
	})
	t.Run("no space in writing", func(t *testing.T) {
		f, h := setup(t)
		h.set(opWriteDsync, unix.ENOSPC)
		h.set(opWrite, unix.ENOSPC)
		if err := f.WriteAt(b, 0, true); SyncFailed(err) || !errors.Is(err, unix.ENOSPC) {
			t.Error(err)
		}
		must(t, f.Sync())
	})
	t.Run("no space in syncing", func(t *testing.T) {
		f, h := setup(t)
		h.set(opWriteDsync, unix.ENOSPC)
		if err := f.WriteAt(b, 0, true); !SyncFailed(err) || !errors.Is(err, unix.ENOSPC) {
			t.Error(err)
		}
	})
	// Once there was no space it may come and go from call to call.
	for _, errno := range []unix.Errno{unix.ENOSPC, unix.EDQUOT} {
		for _, durable := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v before, durable %v", errno, durable), func(t *testing.T) {
				f, h := setup(t)
				h.set(opWriteDsync, errno)
				h.set(opWrite, errno)
				wantErrno(t, f.WriteAt(b, 0, durable), errno)
				h.set(opWrite, nil)
				must(t, f.WriteAt(b, 0, true))
				if h.count(opSync) != 1 {
					t.Error(h.calls)
				}
			})
		}
	}
}

// In memory there is nothing to sync that could fail.
func TestDurableInMemory(t *testing.T) {
	h := new(failing)
	f := openTest(t, writeFile(t, testfs.Memory(t), make([]byte, 8192)), openHow{write: true, faults: h.hook})
	h.set(opWriteDsync, unix.ENOSPC)
	must(t, f.WriteAt(make([]byte, 100), 0, true))
}

// A real file system without space: the client hears of it, nothing sticks.
func TestNoSpace(t *testing.T) {
	path := writeFile(t, smallFS(t), nil)
	must(t, os.Truncate(path, 1<<20))
	r := openImage(t, Options{Path: path}, nil)
	must(t, activate(r, false))
	b := pattern(16<<10, 1)
	var err error
	for off := int64(0); err == nil && off < 1<<20; off += 16 << 10 {
		err = write(r, off, b, false)
	}
	wantErrno(t, err, unix.ENOSPC)
	wantErrno(t, r.Zero(512<<10, 256<<10, NoHole), unix.ENOSPC)
	must(t, r.Flush())
	must(t, r.Discard(0, 64<<10))
	must(t, write(r, 0, b, true))
	must(t, inactivate(r))
	must(t, activate(r, true))
}

func TestOpenClosesOnFailure(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 5000))
	for _, direct := range []bool{false, true} {
		for op := opOpen; op <= opTestLock; op++ {
			if op == opClose {
				continue
			}
			h := new(failing)
			h.set(op, unix.EIO)
			if f, err := openFile(path, openHow{write: true, direct: direct, faults: h.hook}); err == nil {
				f.Close()
			}
			if n, _ := descriptors(t, path); n != 0 {
				t.Fatalf("op %d: %d descriptors left", op, n)
			}
		}
	}
}
