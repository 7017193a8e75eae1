package backend

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ownership is what package state asks of an image.
type ownership interface {
	Key() (dev, ino uint64)
	Name() string
	SyncAhead(ctx context.Context) error
	Settle() error
	Unsettle() error
	PublishInactive()
	Release() error
	Acquire() error
	Load(ifUnchanged bool) error
	Claim(own uint64) (uint64, error)
	PublishActive()
	Withdraw()
	Retire()
	Check() error
	Abandon() error
	Close() error
}

var _ ownership = (*Owned)(nil)

// onEach runs fn in a directory of the disk and in one of tmpfs.
func onEach(t *testing.T, fn func(t *testing.T, dir string)) {
	t.Run("disk", func(t *testing.T) { fn(t, testfs.Disk(t)) })
	t.Run("tmpfs", func(t *testing.T) { fn(t, testfs.Memory(t)) })
}

// smallFS is a tmpfs of 64 KiB.
func smallFS(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatalf("cannot mount a small file system: %v; run this as root, or do without with -skip %s", err, t.Name())
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func pattern(n int, seed uint64) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

func writeFile(t testing.TB, dir string, content []byte) string {
	path := filepath.Join(dir, "disk.img")
	must(t, os.WriteFile(path, content, 0o644))
	return path
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErrno(t testing.TB, err error, want error) {
	t.Helper()
	if err == nil || !isErrno(err, want.(unix.Errno)) {
		t.Fatalf("got error %v, want %v", err, want)
	}
}

// openTest opens a File and closes it at the end of the test.
func openTest(t testing.TB, path string, how openHow) *File {
	t.Helper()
	f, err := openFile(path, how)
	if how.direct {
		skipWithoutDirect(t, path, err)
	}
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// skipWithoutDirect skips the test if err is that of O_DIRECT on tmpfs before
// Linux 6.6.
func skipWithoutDirect(t testing.TB, path string, err error) {
	t.Helper()
	if isErrno(err, unix.EINVAL) && testfs.InMemory(t, path) {
		t.Skip(err)
	}
}

// asOnNetwork has nothing taken for granted that was found of the image's file,
// nor its inactive description kept, as on a network file system.
func asOnNetwork(r *Owned) { r.cur.Load().file.traits.coherent, r.record.near = false, false }

func openImage(t testing.TB, o Options, h faults) *Owned {
	t.Helper()
	if o.Format == "" {
		o.Format = "raw"
	}
	if o.Warn == nil {
		o.Warn = func(s string) { t.Log(s) }
	}
	r, err := open(o, h)
	if o.Cache == CacheNone {
		skipWithoutDirect(t, o.Path, err)
	}
	must(t, err)
	t.Cleanup(func() { r.Close() })
	return r
}

func activate(r *Owned, ifUnchanged bool) error {
	if err := r.Acquire(); err != nil {
		return err
	}
	if err := r.Load(ifUnchanged); err != nil {
		r.Withdraw()
		return err
	}
	if _, err := r.Claim(0); err != nil {
		r.Withdraw()
		return err
	}
	r.PublishActive()
	r.Retire()
	return nil
}

func inactivate(r *Owned) error {
	if err := r.SyncAhead(context.Background()); err != nil {
		return err
	}
	if err := r.Settle(); err != nil {
		return err
	}
	r.PublishInactive()
	return r.Release()
}

// write does what the ioloop does.
func write(r *Owned, off int64, b []byte, durable bool) error {
	var p Plan
	if err := r.Prepare(&p, off, b, MayBlock); err != nil {
		return err
	}
	for _, e := range p.Extents {
		n, err := 0, ErrWait
		if !durable {
			n, err = e.File.TryWriteAt(b[:e.Length], e.Offset)
		}
		if err == ErrWait {
			err = e.File.WriteAt(b[n:e.Length], e.Offset+int64(n), durable)
		}
		if err != nil {
			r.Abort(&p)
			return err
		}
		b = b[e.Length:]
	}
	if mapped := r.Commit(&p); durable && !mapped {
		return r.Flush()
	}
	return nil
}

func read(r *Owned, off int64, b []byte) error {
	var p Plan
	mode := FindHoles
	err := r.Map(&p, off, int64(len(b)), mode)
	if err == ErrWait {
		err = r.Map(&p, off, int64(len(b)), mode|MayBlock)
	}
	if err != nil {
		return err
	}
	defer r.Unmap(&p)
	for _, e := range p.Extents {
		part := b[:e.Length]
		b = b[e.Length:]
		if e.Kind == Zero {
			clear(part)
			continue
		}
		n, err := e.File.TryReadAt(part, e.Offset)
		if err == ErrWait {
			err = e.File.ReadAt(part[n:], e.Offset+int64(n))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// failing makes chosen system calls fail.
type failing struct {
	mu    sync.Mutex
	errs  map[sysop]error
	calls map[sysop]int
}

func (f *failing) hook(op sysop, _ int64, n int) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.calls == nil {
		f.calls = map[sysop]int{}
	}
	f.calls[op]++
	return n, f.errs[op]
}

func (f *failing) set(op sysop, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.errs == nil {
		f.errs = map[sysop]error{}
	}
	f.errs[op] = err
}

func (f *failing) count(op sysop) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[op]
}

// flaky interrupts many calls and cuts many transfers short, in pieces of
// align bytes.
func flaky(align int) faults {
	var mu sync.Mutex
	rnd := rand.New(rand.NewPCG(1, 2))
	return func(op sysop, _ int64, n int) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case rnd.IntN(4) == 0 && op != opClose:
			return 0, unix.EINTR
		case rnd.IntN(2) == 0 && n > align:
			return (1 + rnd.IntN(n/align)) * align, nil
		}
		return n, nil
	}
}

func statOf(t testing.TB, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	return st
}

func contentOf(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

func wantContent(t testing.TB, path string, want []byte) {
	t.Helper()
	if got := contentOf(t, path); !bytes.Equal(got, want) {
		i := 0
		for i < min(len(got), len(want)) && got[i] == want[i] {
			i++
		}
		t.Fatalf("%s: %d bytes, want %d; first difference at %d", path, len(got), len(want), i)
	}
}

// descriptors counts this process's open descriptions of path, all and those
// that can write, by /proc/self/fd and fdinfo.
func descriptors(t testing.TB, path string) (all, writable int) {
	t.Helper()
	want := statOf(t, path)
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, e := range fds {
		var st unix.Stat_t
		if unix.Stat("/proc/self/fd/"+e.Name(), &st) != nil || st.Ino != want.Ino || st.Dev != want.Dev {
			continue
		}
		info, err := os.ReadFile("/proc/self/fdinfo/" + e.Name())
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(info)) {
			var flags int
			if _, err := fmt.Sscanf(line, "flags: %o", &flags); err == nil {
				all++
				if flags&unix.O_ACCMODE != unix.O_RDONLY {
					writable++
				}
			}
		}
	}
	return all, writable
}

// procLocks lists the locks on path as "OFDLCK ADVISORY READ 100".
func procLocks(t testing.TB, path string) []string {
	t.Helper()
	st := statOf(t, path)
	id := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	var locks []string
	for line := range strings.Lines(allLocks(t)) {
		// 1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 103
		f := strings.Fields(line)
		if len(f) < 8 || f[5] != id {
			continue
		}
		var from, to int
		fmt.Sscan(f[6], &from)
		fmt.Sscan(f[7], &to)
		for b := from; b <= to; b++ {
			locks = append(locks, fmt.Sprintf("%s %s %s %d", f[1], f[2], f[3], b))
		}
	}
	slices.Sort(locks)
	return locks
}

// allLocks is /proc/locks. The kernel gives that a page at a time, and a lock of
// any process that comes or goes between two pages moves what follows: lines
// are left out, or told twice. So it is read until it is the same twice running.
func allLocks(t testing.TB) string {
	t.Helper()
	var last []byte
	for range 10000 {
		now, err := os.ReadFile("/proc/locks")
		must(t, err)
		if last != nil && bytes.Equal(now, last) {
			return string(now)
		}
		last = now
	}
	t.Fatal("/proc/locks is never the same twice: too many programs lock files here")
	panic("unreachable")
}
