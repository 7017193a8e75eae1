// Package testfs gives tests places of which they know what they are. A place
// that cannot be had fails the test and says what is missing.
package testfs

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Memory is a directory on tmpfs, removed when the test ends.
func Memory(t testing.TB) string {
	t.Helper()
	return temp(t, "/dev/shm")
}

// Disk is a directory that is not on tmpfs, as /tmp is on many systems,
// removed when the test ends. It looks in the usual place for temporary files,
// in /var/tmp and in the current directory, which for a test is its package's.
func Disk(t testing.TB) string {
	t.Helper()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	places := []string{os.TempDir(), "/var/tmp", here}
	for _, place := range places {
		if !InMemory(t, place) {
			return temp(t, place)
		}
	}
	t.Fatalf("%q are all in memory, and this test needs a disk: name a directory on one in TMPDIR", places)
	panic("unreachable")
}

// InMemory tells whether path lies on tmpfs.
func InMemory(t testing.TB, path string) bool {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC
}

func temp(t testing.TB, place string) string {
	t.Helper()
	dir, err := os.MkdirTemp(place, ".nbd-export-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// KeepCached reads the file at path into the page cache and keeps it there
// until release, whatever else goes on on the machine.
func KeepCached(t testing.TB, path string) (release func()) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err == nil {
		err = unix.Mlock(m)
	}
	if err != nil {
		t.Fatalf("%d bytes cannot be kept in memory: %v; allow more with ulimit -l", st.Size(), err)
	}
	return func() { _ = unix.Munmap(m) }
}
