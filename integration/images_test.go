package integration

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// sparseImage makes an image of only a hole.
func sparseImage(t testing.TB, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "disk.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

// randomBytes are the same for the same seed.
func randomBytes(seed, n int64) []byte {
	b := make([]byte, n)
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	rand.NewChaCha8(key).Read(b)
	return b
}

// randomImage makes an image full of data.
func randomImage(t testing.TB, dir string, seed, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(path, randomBytes(seed, size), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// patchyImage makes an image with data and holes in turn, each run a multiple
// of 64 KiB, beginning with data and ending with a hole.
func patchyImage(t testing.TB, dir string, size int64) string {
	t.Helper()
	path := sparseImage(t, dir, size)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i, off := int64(1), int64(0); off+2*i*64*kib <= size; i++ {
		if _, err := f.WriteAt(randomBytes(i, i*64*kib), off); err != nil {
			t.Fatal(err)
		}
		off += 2 * i * 64 * kib
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return path
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// fileAt reads n bytes of a file.
func fileAt(t testing.TB, path string, off, n int64) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := io.ReadFull(io.NewSectionReader(f, off, n), b); err != nil {
		t.Fatal(err)
	}
	return b
}

// snapshot is all that an inactive exporter must not change of an image.
type snapshot struct {
	sha256       string
	size, blocks int64
	mtime, ctime time.Time
	inode        uint64
}

func snap(t testing.TB, path string) snapshot {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return snapshot{
		sha256: fmt.Sprintf("%x", h.Sum(nil)), size: st.Size, blocks: st.Blocks,
		mtime: time.Unix(st.Mtim.Unix()), ctime: time.Unix(st.Ctim.Unix()), inode: st.Ino,
	}
}

// sameSnap requires that the image is what it was.
func sameSnap(t testing.TB, path string, before snapshot) {
	t.Helper()
	if after := snap(t, path); after != before {
		t.Errorf("the image changed:\nbefore %+v\nafter  %+v", before, after)
	}
}

func sum(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// sameBytes compares without printing megabytes.
func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Errorf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Errorf("%s: first difference at byte %d: %#x, want %#x", what, i, got[i], want[i])
			return
		}
	}
}
