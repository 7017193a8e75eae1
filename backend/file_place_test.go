package backend

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2"
	"github.com/nbd-export/nbd-export/internal/testfs"
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

// What is synced ahead gives back what the maps of all its files have gathered, so that
// nobody waits for that when the image is let go.
func TestSyncAheadThinsPlaces(t *testing.T) {
	dir := testfs.Memory(t)
	path, data := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "data")
	must(t, CreateQcow2(path, qcow2.CreateOptions{Size: 8 << 20, DataFile: data}))
	r := openImage(t, Options{Path: path, Format: "qcow2"}, nil)
	must(t, activate(r, false))
	content := pattern(1<<20, 1)
	must(t, write(r, 0, content, false)) // so that there are clusters
	src, err := unix.MemfdCreate("news", unix.MFD_CLOEXEC)
	must(t, err)
	defer unix.Close(src)
	_, err = unix.Write(src, content)
	must(t, err)
	var p Plan
	must(t, r.PrepareUnseen(&p, 0, 64<<10))
	e := p.Extents[0]
	_, err = unix.Pread(src, e.File.Place(e.Offset, 64<<10), 0)
	must(t, err)
	r.Commit(&p)
	if e.File.path != data {
		t.Fatalf("the data lies in %s", e.File.path)
	}
	if gathered(t, data) == 0 {
		t.Fatal("nothing was gathered")
	}
	must(t, r.SyncAhead(t.Context()))
	if n := gathered(t, data); n != 0 {
		t.Errorf("%d kB stay in the map", n)
	}
}

// gathered is how much of a file is in its writable map, in kB.
func gathered(t *testing.T, path string) (kb int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/smaps")
	must(t, err)
	found := false
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case strings.Contains(f[0], "-"):
			found = len(f) > 5 && f[5] == path && strings.Contains(f[1], "w")
		case found && f[0] == "Rss:":
			n, err := strconv.Atoi(f[1])
			must(t, err)
			kb += n
		}
	}
	return kb
}
