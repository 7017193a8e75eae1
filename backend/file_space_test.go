package backend

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestZero(t *testing.T) {
	const size = 256 << 10
	unsup := map[sysop]error{opPunch: unix.EOPNOTSUPP, opZeroRange: unix.EOPNOTSUPP, opAllocate: unix.EOPNOTSUPP}
	only := func(ops ...sysop) map[sysop]error {
		m := map[sysop]error{opPunch: unix.EOPNOTSUPP, opZeroRange: unix.EOPNOTSUPP, opAllocate: unix.EOPNOTSUPP}
		for _, op := range ops {
			delete(m, op)
		}
		return m
	}
	onEach(t, func(t *testing.T, dir string) {
		for _, direct := range []bool{false, true} {
			for name, errs := range map[string]map[sysop]error{
				"all":            nil,
				"none":           unsup,
				"punch":          only(opPunch),
				"zero range":     only(opZeroRange),
				"punch+allocate": only(opPunch, opAllocate),
			} {
				for _, flags := range []ZeroFlags{0, NoHole, FastZero, NoHole | FastZero} {
					for _, r := range [][2]int64{{0, size}, {4096, 65536}, {1, 99999}, {777, 10}, {size - 5000, 5000}} {
						t.Run(fmt.Sprintf("direct=%v/%s/flags=%d/%d+%d", direct, name, flags, r[0], r[1]), func(t *testing.T) {
							want := pattern(size, 1)
							path := writeFile(t, dir, want)
							h := &failing{errs: errs}
							f := openTest(t, path, openHow{write: true, direct: direct, faults: h.hook})
							if f.traits.Tmpfs && name == "punch" && flags == NoHole|FastZero {
								return // tmpfs can always allocate
							}
							err := f.Zero(r[0], r[1], flags)
							tmpfs, known := f.traits.Tmpfs, f.traits.fastZeros
							fast := map[string]bool{
								"all":        known,
								"punch":      known && flags&NoHole == 0,
								"zero range": known && !tmpfs,
							}[name]
							if flags&FastZero == 0 || fast {
								must(t, err)
							} else if name == "none" {
								wantErrno(t, err, unix.EOPNOTSUPP)
							}
							if err == nil {
								clear(want[r[0] : r[0]+r[1]])
							} else {
								wantErrno(t, err, unix.EOPNOTSUPP)
							}
							got := make([]byte, size)
							must(t, f.ReadAt(got, 0))
							if !bytes.Equal(got, want) {
								t.Fatal("the bytes are wrong")
							}
							st := statOf(t, path)
							if st.Size != size {
								t.Fatalf("the size is %d", st.Size)
							}
							if flags&NoHole != 0 && st.Blocks*512 < size {
								t.Errorf("%d bytes are allocated", st.Blocks*512)
							}
							if name == "all" && flags == 0 && r[1] == size && st.Blocks*512 > 64<<10 {
								t.Errorf("%d bytes are still allocated", st.Blocks*512)
							}
						})
					}
				}
			}
		}
	})
}

// A zeroed hole with NoHole is allocated.
func TestZeroAllocates(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, nil)
		must(t, os.Truncate(path, 8<<20))
		f := openTest(t, path, openHow{write: true})
		must(t, f.Zero(1<<20, 2<<20, NoHole))
		if st := statOf(t, path); st.Blocks*512 < 2<<20 {
			t.Errorf("%d bytes are allocated", st.Blocks*512)
		}
		must(t, f.Punch(0, 8<<20))
		if st := statOf(t, path); st.Blocks*512 > 64<<10 {
			t.Errorf("%d bytes are allocated after punching", st.Blocks*512)
		}
	})
}

func TestExtents(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, nil)
		must(t, os.Truncate(path, 1<<20+100))
		w := openTest(t, path, openHow{write: true})
		must(t, w.WriteAt(pattern(64<<10, 1), 256<<10, false))
		f := openTest(t, path, openHow{})
		for _, c := range []struct {
			off, end, next int64
			hole           bool
		}{
			{0, 1 << 20, 256 << 10, true},
			{100, 2000, 2000, true},
			{256 << 10, 1 << 20, 320 << 10, false},
			{300 << 10, 310 << 10, 310 << 10, false},
			{320 << 10, 1<<20 + 100, 1<<20 + 100, true},
			{320 << 10, 2 << 20, 1<<20 + 100, true},
			{1<<20 + 100, 2 << 20, 2 << 20, false}, // past the end is no hole
		} {
			if next, hole := f.extent(c.off, c.end); next != c.next || hole != c.hole {
				t.Errorf("extent(%d, %d) = %d, %v; want %d, %v", c.off, c.end, next, hole, c.next, c.hole)
			}
		}
		f.faults = func(sysop, int64, int) (int, error) { return 0, unix.EINVAL }
		if next, hole := f.extent(0, 1000); next != 1000 || hole {
			t.Errorf("without SEEK_DATA: %d, %v", next, hole)
		}
	})
}

func TestReadahead(t *testing.T) {
	path := writeFile(t, t.TempDir(), pattern(1<<20, 1))
	must(t, openTest(t, path, openHow{}).readahead(1000, 100000))
	must(t, openTest(t, path, openHow{direct: true}).readahead(1000, 100000))
	f := openTest(t, path, openHow{faults: func(op sysop, _ int64, n int) (int, error) {
		if op == opAdvise {
			return 0, unix.EIO
		}
		return n, nil
	}})
	wantErrno(t, f.readahead(0, 10), unix.EIO)
}

// loopDevice makes a block device over a sparse file of size bytes.
func loopDevice(t *testing.T, size int64, options ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backing")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	out, err := exec.Command("losetup", append(options, "--find", "--show", path)...).Output()
	if err != nil {
		t.Fatalf("cannot make a loop device: %v; run this as root, or do without with -skip %s", err, t.Name())
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "--detach", dev).Run(); err != nil {
			t.Error(err)
		}
	})
	return dev
}

func TestBlockDevice(t *testing.T) {
	const size = 4<<20 + 512
	dev := loopDevice(t, size)
	for _, cache := range []CacheMode{CacheWriteback, CacheNone} {
		t.Run(string(cache), func(t *testing.T) {
			var warned []string
			r := openImage(t, Options{Path: dev, Cache: cache, Warn: func(s string) { warned = append(warned, s) }}, nil)
			if r.Size() != size {
				t.Fatalf("size %d", r.Size())
			}
			if r.LockScope() != "host-local" || r.Info().Format != "raw" {
				t.Errorf("%s %+v", r.LockScope(), r.Info())
			}
			must(t, activate(r, false))
			if len(warned) == 0 || !strings.Contains(warned[0], "other host") {
				t.Errorf("warnings: %q", warned)
			}
			want := pattern(size, 1)
			must(t, write(r, 0, want, false))
			for i, z := range [][2]int64{{100, 5}, {1000, 10000}, {1 << 20, 1 << 20}, {size - 700, 700}} {
				must(t, r.Zero(z[0], z[1], ZeroFlags(i%2)*NoHole))
				clear(want[z[0] : z[0]+z[1]])
			}
			before := bytes.Clone(want[5000:105000])
			err := r.Zero(5000, 100000, FastZero)
			if err == nil {
				clear(want[5000:105000])
			} else {
				wantErrno(t, err, unix.EOPNOTSUPP)
				copy(want[5000:], before)
			}
			wantErrno(t, r.Zero(5000, 100000, FastZero|NoHole), unix.EOPNOTSUPP)
			must(t, r.Discard(2<<20+1, 300000))
			clear(want[2<<20+1 : 2<<20+1+300000])
			got := make([]byte, size)
			must(t, read(r, 0, got))
			// A discard leaves the edges as they were.
			copy(got[2<<20:2<<20+512], want[2<<20:])
			end := 2<<20 + 1 + 300000
			copy(got[end&^511:end], want[end&^511:])
			if !bytes.Equal(got, want) {
				t.Fatal("the bytes are wrong")
			}
			if ext, err := r.Status(nil, 0, size, 9); err != nil || len(ext) != 1 || ext[0] != (Status{Length: size}) {
				t.Errorf("status %v, %v", ext, err)
			}
			var p Plan
			must(t, r.Map(&p, 0, size, FindHoles))
			if len(p.Extents) != 1 || p.Extents[0].Kind != Data {
				t.Errorf("map %v", p.Extents)
			}
			other := openImage(t, Options{Path: dev, Cache: cache}, nil)
			if err := activate(other, false); err == nil {
				t.Error("two are active")
			}
			must(t, r.Check())
			must(t, inactivate(r))
			must(t, activate(other, false))
			must(t, inactivate(other))
			must(t, activate(r, true))
		})
	}
}
