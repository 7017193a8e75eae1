package backend

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Who owns a file on tmpfs can have bytes put into it by a system call; where
// the file has become shorter that fails, and says so.
func TestPlace(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		const size = 3<<20 + 1234
		path := writeFile(t, dir, pattern(size, 1))
		f := openTest(t, path, openHow{write: true})
		if !f.Traits().Tmpfs {
			if f.Place(0, 4096) != nil {
				t.Error("a place in the page cache of a disk")
			}
			return
		}
		for _, bad := range [][2]int64{{-1, 1}, {0, 0}, {0, -1}, {0, size + 1}, {size, 1}, {1, size}, {1 << 62, 1 << 62}} {
			if f.Place(bad[0], bad[1]) != nil {
				t.Errorf("%d+%d", bad[0], bad[1])
			}
		}
		src, err := unix.MemfdCreate("news", unix.MFD_CLOEXEC)
		must(t, err)
		defer unix.Close(src)
		_, err = unix.Write(src, []byte("news"))
		must(t, err)
		_, err = unix.Pread(src, f.Place(size-4, 4), 0)
		must(t, err)
		f.thinPlace()
		b, err := os.ReadFile(path)
		must(t, err)
		if string(b[size-4:]) != "news" {
			t.Errorf("%q", b[size-4:])
		}
		must(t, os.Truncate(path, 8192))
		_, err = unix.Pread(src, f.Place(size-4, 4), 0)
		if err != unix.EFAULT {
			t.Errorf("%v, want EFAULT", err)
		}
		wantErrno(t, f.WriteAfterFault([]byte("news"), size-4), unix.EIO)
		wantErrno(t, f.WriteAfterFault([]byte("news"), 8190), unix.EIO)
		must(t, f.WriteAfterFault([]byte("news"), 8188))
		if st := statOf(t, path); st.Size != 8192 {
			t.Errorf("it was grown back to %d", st.Size)
		}
		if f := openTest(t, path, openHow{}); f.Place(0, 1) != nil {
			t.Error("a place in a file that is not open for writing")
		}
	})
}
