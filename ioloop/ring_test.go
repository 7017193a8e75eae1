package ioloop

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func newTestRing(t *testing.T, entries, completions uint32) *ring {
	t.Helper()
	r, err := openRing(entries, completions)
	must(t, err)
	t.Cleanup(func() { must(t, r.close()) })
	return r
}

// collect waits for n completions.
func (r *ring) collect(t *testing.T, n int) (all []completion) {
	t.Helper()
	var got [7]completion
	done := background(func() {
		_ = r.wait(func() bool {
			for k := r.reap(got[:]); k > 0; k = r.reap(got[:]) {
				all = append(all, got[:k]...)
			}
			return len(all) >= n
		})
	})
	await(t, done, "the completions")
	if len(all) != n {
		t.Fatalf("%d completions, want %d", len(all), n)
	}
	return all
}

func ringIO(op uint8, f *os.File, p []byte, off int64, user uint64) ringEntry {
	return ringEntry{op: op, fd: int32(f.Fd()), off: uint64(off), addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))), length: uint32(len(p)), user: user}
}

func TestRingMovesBytes(t *testing.T) {
	r := newTestRing(t, 8, 16)
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	must(t, err)
	defer f.Close()
	want := pattern(64<<10, 1)
	buf := make([]byte, len(want)+1)
	r.push(ringIO(ringOpWrite, f, want, 512, 7))
	n, err := r.submit()
	if n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if c := r.collect(t, 1); c[0].user != 7 || int(c[0].res) != len(want) {
		t.Fatalf("%+v", c)
	}
	// One byte more than there is.
	r.push(ringIO(ringOpRead, f, buf, 512, 8))
	_, err = r.submit()
	must(t, err)
	if c := r.collect(t, 1); c[0].user != 8 || int(c[0].res) != len(want) || string(buf[:len(want)]) != string(want) {
		t.Fatalf("%+v", c)
	}
	runtime.KeepAlive(buf)
}

// Results are errnos, operation by operation, and a bad one keeps none after
// it back.
func TestRingErrors(t *testing.T) {
	r := newTestRing(t, 8, 16)
	r.push(ringEntry{op: ringOpRead, fd: -1, user: 1})
	r.push(ringEntry{op: 250, user: 2})
	r.push(ringEntry{op: ringOpNop, user: 3})
	if n, err := r.submit(); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	want := map[uint64]unix.Errno{1: unix.EBADF, 2: unix.EINVAL, 3: 0}
	for _, c := range r.collect(t, 3) {
		if unix.Errno(-c.res) != want[c.user] {
			t.Errorf("%d: %d, want %d", c.user, -c.res, want[c.user])
		}
	}
}

func TestRingFull(t *testing.T) {
	r := newTestRing(t, 4, 8)
	for round := range uint64(100) { // the indices wrap around
		for i := range uint64(4) {
			if !r.push(ringEntry{op: ringOpNop, user: round*4 + i}) {
				t.Fatal("full too early")
			}
		}
		if r.push(ringEntry{op: ringOpNop}) {
			t.Fatal("a fifth of four")
		}
		if n, err := r.submit(); n != 4 || err != nil {
			t.Fatal(n, err)
		}
		for i, c := range r.collect(t, 4) {
			if c.user != round*4+uint64(i) {
				t.Fatalf("%d in place of %d", c.user, round*4+uint64(i))
			}
		}
	}
}

// More completions than fit are kept by the kernel, and come.
func TestRingOverflow(t *testing.T) {
	r := newTestRing(t, 4, 8)
	for range 10 {
		for range 4 {
			r.push(ringEntry{op: ringOpNop})
		}
		_, err := r.submit()
		must(t, err)
	}
	r.collect(t, 40)
}

// What the kernel does not take is the caller's again.
func TestRingRefuses(t *testing.T) {
	r := newTestRing(t, 4, 8)
	good := r.fd
	r.fd = -1
	r.push(ringEntry{op: ringOpNop, user: 1})
	r.push(ringEntry{op: ringOpNop, user: 2})
	n, err := r.submit()
	r.fd = good
	if n != 0 || err != unix.EBADF {
		t.Fatal(n, err)
	}
	r.push(ringEntry{op: ringOpNop, user: 3})
	if n, err = r.submit(); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if c := r.collect(t, 1); c[0].user != 3 {
		t.Fatalf("%+v", c)
	}
}

func TestRingStop(t *testing.T) {
	r, err := openRing(4, 8)
	must(t, err)
	waits := make(chan struct{}, 1)
	ended := background(func() {
		if r.wait(func() bool { waits <- struct{}{}; return false }) == nil {
			t.Error("wait ended without an error")
		}
	})
	await(t, waits, "wait to begin")
	r.stop()
	await(t, ended, "wait to end")
	must(t, r.close())
	maps, err := os.ReadFile("/proc/self/maps")
	must(t, err)
	if strings.Contains(string(maps), "io_uring") {
		t.Error("a ring is still mapped")
	}
}

func TestNoRing(t *testing.T) {
	for errno, text := range map[unix.Errno]string{
		unix.ENOSYS: "seccomp", unix.EPERM: "forbidden", unix.ENOMEM: "ulimit", unix.EMFILE: "cannot",
	} {
		if err := noRing(errno); !errors.Is(err, errno) || !strings.Contains(err.Error(), text) {
			t.Errorf("%v: %v", errno, err)
		}
	}
	if _, err := openRing(0, 0); !errors.Is(err, unix.EINVAL) {
		t.Error(err)
	}
}
