package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/bench"
)

// Two limit servers hand over what they have in common, refuse writes while they are
// inactive, and change nothing.
func TestLimitOwner(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	content := bytes.Repeat([]byte("x"), 1<<20)
	if err := os.WriteFile(image, content, 0o600); err != nil {
		t.Fatal(err)
	}
	x := newExporters(programLimit, self(t), dir, image, formatRaw)
	defer x.stop()
	if err := x.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := x.order(t.Context(), 0, true); err != nil {
		t.Fatal(err)
	}
	load, err := bench.Follow(t.Context(), bench.FollowConfig{
		URIs: [2]string{x.procs[0].uri(), x.procs[1].uri()}, Conns: 2, Depth: 2, BlockSize: 4096, Size: 1 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	for n := range 4 {
		to := 1 - n%2
		if took, err := x.orders(1-to, to); err != nil || took <= 0 {
			t.Fatal(took, err)
		}
		if _, err := load.WriteGap(t.Context(), to); err != nil {
			t.Fatal(err)
		}
		if !locked(t, image) {
			t.Error("nobody has locked the image")
		}
	}
	if err := load.Close(); err != nil {
		t.Error(err)
	}
	if err := x.order(t.Context(), 0, false); err != nil {
		t.Fatal(err)
	}
	if locked(t, image) {
		t.Error("the image stays locked")
	}
	if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the image has changed: %v", err)
	}
	if err := os.Remove(image); err != nil {
		t.Fatal(err)
	}
	if err := x.order(t.Context(), 1, true); err == nil {
		t.Error("no error for an image that is gone")
	}
}

func locked(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: limitLocks[0], Len: 104}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		t.Fatal(err)
	}
	return l.Type != unix.F_UNLCK
}
