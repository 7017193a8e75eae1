package backend

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

// A new size is there for reads, writes and the next owner, and the locks stay.
func TestResize(t *testing.T) {
	modes(t, func(t *testing.T, dir string, o Options) {
		o.Path = writeFile(t, dir, pattern(10000, 1))
		r := openImage(t, o, nil)
		wantErrno(t, r.Resize(1), unix.EPERM)
		must(t, activate(r, false))
		if o.ReadOnly {
			wantErrno(t, r.Resize(1), unix.EPERM)
			return
		}
		locks := procLocks(t, o.Path)
		for _, size := range []int64{20000, 4096, 0, 12345, 8192} {
			must(t, r.Resize(size))
			if r.Size() != size || statOf(t, o.Path).Size != size {
				t.Fatalf("size %d of %d", r.Size(), size)
			}
			if size == 0 {
				continue
			}
			last := []byte{7}
			must(t, write(r, size-1, last, true))
			must(t, read(r, size-1, last))
			if last[0] != 7 {
				t.Errorf("read %d at %d", last[0], size-1)
			}
			wantErrno(t, write(r, size, last, false), unix.EIO)
		}
		if now := procLocks(t, o.Path); len(now) < len(locks) {
			t.Errorf("locks %v, before %v", now, locks)
		}
		must(t, inactivate(r))
		if r.Size() != 8192 {
			t.Errorf("size %d when inactive", r.Size())
		}
	})
}

func TestResizeFails(t *testing.T) {
	path := writeFile(t, t.TempDir(), pattern(4096, 1))
	var f failing
	r := openImage(t, Options{Path: path}, f.hook)
	must(t, activate(r, false))
	f.set(opTruncate, unix.ENOSPC)
	wantErrno(t, r.Resize(8192), unix.ENOSPC)
	if r.Size() != 4096 {
		t.Errorf("size %d", r.Size())
	}
}

// With IgnoreDiscard a discard does nothing and zeroing keeps the space.
func TestIgnoreDiscard(t *testing.T) {
	path := writeFile(t, t.TempDir(), pattern(1<<20, 1))
	r := openImage(t, Options{Path: path, IgnoreDiscard: true}, nil)
	must(t, activate(r, false))
	blocks := statOf(t, path).Blocks
	must(t, r.Discard(0, 64<<10))
	must(t, r.Zero(64<<10, 64<<10, 0))
	must(t, r.Flush())
	got := contentOf(t, path)
	want := pattern(1<<20, 1)
	clear(want[64<<10 : 128<<10])
	if !bytes.Equal(got, want) {
		t.Error("content differs")
	}
	if now := statOf(t, path).Blocks; now < blocks {
		t.Errorf("%d blocks, before %d", now, blocks)
	}
}
