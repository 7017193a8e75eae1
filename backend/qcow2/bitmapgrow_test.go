package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// grow is Resize: what is new is clean.
func (m *dirtyModel) grow(size int64) {
	m.dirty = append(m.dirty, newDirtyModel(m.granularity, size).dirty[len(m.dirty):]...)
	m.size = size
}

func TestBitmapsGrow(t *testing.T) {
	for _, c := range []struct {
		options     string
		size, large int64
		granularity int
	}{
		{"cluster_size=512", 1 << 20, 1<<20 + 512, 9},     // no more clusters
		{"cluster_size=512", 1 << 20, 5 << 20, 9},         // more clusters of bits
		{"cluster_size=512", 100 << 20, 300<<20 + 512, 9}, // more clusters of the table
		{"cluster_size=4k", 300<<10 + 512, 301 << 10, 12}, // less than a bit
		{"cluster_size=64k", 5 << 20, 50 << 30, 16},
		{"cluster_size=16k,extended_l2=on", 2<<20 + 512, 1 << 30, 14},
		{"cluster_size=64k,preallocation=metadata", 3<<20 + 4096, 64 << 20, 9},
		{"data", 1<<20 + 512, 9 << 20, 9},
		{"backing", 1<<20 + 512, 9 << 20, 9}, // the backing file is larger
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			dir := t.TempDir()
			data, base := filepath.Join(dir, "data"), filepath.Join(dir, "base")
			options := c.options
			switch options {
			case "data":
				options = "cluster_size=512,data_file=" + data
			case "backing":
				qemuImg(t, "create", "-q", "-f", "raw", base, "4M")
				program(t, "qemu-io", "-f", "raw", "-c", "write -P 7 0 4M", base)
				options = "cluster_size=4k,backing_fmt=raw,backing_file=" + base
			}
			path := withBitmaps(t, c.size, c.granularity, options)
			var o Options
			if c.options == "backing" {
				o.Backing = NewRawBacking(loaded(t, base))
			}
			open := func() *memfile.File {
				if c.options == "data" {
					o.Data = loaded(t, data)
				}
				return loaded(t, path)
			}
			store := func(f *memfile.File) {
				stored(t, path, f)
				if c.options == "data" {
					stored(t, data, o.Data.(*memfile.File))
				}
			}
			rng := rand.New(rand.NewPCG(2, uint64(c.large)))
			m := newDirtyModel(c.granularity, c.size)
			f := open()
			im := begun(t, f, o)
			changes(t, im, m, rng, 10)
			// The last bit of the disk, and all of an entry of the table.
			for _, x := range [][2]int64{{c.size - 512, 512}, {0, min(c.size, 10<<20)}} {
				m.mark(x[0], x[1])
				if err := im.Zero(x[0], x[1], false); err != nil {
					t.Fatal(err)
				}
			}
			if err := im.Settle(); err != nil {
				t.Fatal(err)
			}
			im.Close()
			store(f)
			qemuImg(t, "bitmap", "--merge", "on", path, "off")
			off := newDirtyModel(16, c.size)
			for _, run := range m.runs() {
				if run.Dirty {
					off.mark(run.Offset, run.Length)
				}
			}

			f = open()
			im = begun(t, f, o)
			changes(t, im, m, rng, 5)
			if err := im.Resize(c.large); err != nil {
				t.Fatal(err)
			}
			m.grow(c.large)
			off.grow(c.large)
			compare := func(when string, got, want []dirtyRun) {
				t.Helper()
				if !slices.Equal(got, want) {
					t.Fatalf("%s: %v, want %v", when, got, want)
				}
			}
			// They are stored with the new size, and go on from there.
			if r, err := Check(f, opened(t, f, o).h, nil); err != nil || r.Corruptions > 0 {
				t.Fatalf("%v %v", err, r.Findings)
			}
			compare("in the file", runsOf(t, opened(t, f, o), "on"), m.runs())
			compare("in the file", runsOf(t, opened(t, f, o), "off"), off.runs())
			compare("in memory", runsOf(t, im, "on"), m.runs())
			changes(t, im, m, rng, 10)
			if err := im.writeAt(noise(rng, 512), c.large-512); err != nil {
				t.Fatal(err)
			}
			m.mark(c.large-512, 512)
			if err := im.Settle(); err != nil {
				t.Fatal(err)
			}
			im.Close()
			store(f)
			qemuImg(t, "check", path)
			compare("QEMU reads", qemuRuns(t, path, "on"), m.runs())
			compare("QEMU reads", qemuRuns(t, path, "off"), off.runs())

			// And the other way round.
			larger := c.large + 3<<20
			qemuImg(t, "resize", "-q", path, fmt.Sprint(larger))
			m.grow(larger)
			off.grow(larger)
			im = opened(t, open(), o)
			compare("grown by QEMU", runsOf(t, im, "on"), m.runs())
			compare("grown by QEMU", runsOf(t, im, "off"), off.runs())
		})
	}
}

func TestBitmapsThatCannotGrow(t *testing.T) {
	refuses := func(f *memfile.File, size int64, errno unix.Errno, text string) {
		t.Helper()
		im := begun(t, f, Options{})
		before := f.Bytes()
		if err := im.Resize(size); !errors.Is(err, errno) || !strings.Contains(err.Error(), text) {
			t.Errorf("%v", err)
		}
		if !bytes.Equal(f.Bytes(), before) || im.Size() != 1<<20 {
			t.Error("a refused resize has changed something")
		}
	}
	path := withBitmaps(t, 1<<20, 9, "cluster_size=64k")
	// 512 MiB of bits for 512 bytes each.
	refuses(loaded(t, path), 2<<40+512, unix.EFBIG, `bitmap "on" cannot have a bit for every 512 bytes`)
	for i := range 2 {
		qemuImg(t, "bitmap", "--add", "-g", "512", path, fmt.Sprint(i))
	}
	refuses(loaded(t, path), 2<<40, unix.EFBIG, "together")
	refuses(loaded(t, path), 1<<62, unix.EFBIG, `bitmap "on" cannot have`)

	path = withBitmaps(t, 1<<20, 9, "cluster_size=64k")
	f := loaded(t, path)
	im := begun(t, f, Options{})
	if err := im.writeAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	im.Close()
	refuses(f, 2<<20, unix.EINVAL, `bitmap "on" is inconsistent`)
}

// TestBitmapsAreToldWhileTheyGrow is for the race detector.
func TestBitmapsAreToldWhileTheyGrow(t *testing.T) {
	im := begun(t, loaded(t, withBitmaps(t, 1<<20, 9, "cluster_size=512")), Options{})
	var wg sync.WaitGroup
	enough := make(chan struct{})
	wg.Go(func() {
		for {
			if infos, err := im.BitmapInfos(); err != nil || len(infos) != 2 || infos[0].Dirty > 20*512 {
				t.Errorf("%v %+v", err, infos)
			}
			select {
			case <-enough:
				return
			default:
			}
		}
	})
	for i := range int64(20) {
		if err := errors.Join(im.writeAt(make([]byte, 512), im.Size()-512), im.Resize((2+i)<<20)); err != nil {
			t.Error(err)
			break
		}
	}
	close(enough)
	wg.Wait()
}

// TestBitmapsThatNobodyTrusts keep nothing from growing.
func TestBitmapsThatNobodyTrusts(t *testing.T) {
	b := loaded(t, withBitmaps(t, 1<<20, 9, "cluster_size=4k")).Bytes()
	b[offAutoclear+7] &^= BitmapsConsistent
	f := memfile.New("b", b)
	im := begun(t, f, Options{Warn: func(string) {}})
	if err := errors.Join(im.Resize(100<<20), im.Settle()); err != nil {
		t.Fatal(err)
	}
	if infos, err := opened(t, f, Options{}).BitmapInfos(); err != nil || infos != nil {
		t.Errorf("%v %+v", err, infos)
	}
	checked(t, f.Bytes(), false)
}

// TestCrashStatesOfGrowingBitmaps: whatever a crash leaves, the image can be
// opened here and by QEMU, and a bitmap that says it is consistent fits the disk
// and tells of every change.
func TestCrashStatesOfGrowingBitmaps(t *testing.T) {
	for _, c := range []struct {
		options string
		sizes   []int64 // the first is that of the new image
	}{
		{"cluster_size=512", []int64{1<<20 + 512, 5 << 20, 6 << 20}},
		{"cluster_size=4k", []int64{200 << 10, 201 << 10, 10 << 20}},
	} {
		t.Run(c.options, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(uint64(c.sizes[0]), 22))
			path := withBitmaps(t, c.sizes[0], 9, c.options)
			program(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 90k 1k", path)
			qemuImg(t, "bitmap", "--merge", "on", path, "off")
			f := loaded(t, path)
			f.Record()
			im := begun(t, f, Options{})
			m := newDirtyModel(9, im.Size())
			for i, size := range c.sizes {
				if i > 0 {
					if err := im.Resize(size); err != nil {
						t.Fatal(err)
					}
				}
				m.grow(size)
				changes(t, im, m, rng, 3)
				if i == 1 {
					continue // grown again before they are settled
				}
				if err := im.Settle(); err != nil {
					t.Fatal(err)
				}
			}
			im.Close()
			from, events := f.Events()
			was := readAll(t, opened(t, memfile.New("from", from), Options{}))
			was = append(was, make([]byte, c.sizes[len(c.sizes)-1]-int64(len(was)))...)
			trusted, inUse := map[int64]int{}, map[int64]int{}
			for n := 0; n <= len(events); n += stride {
				for try := range 4 {
					chance := rng
					if try == 0 {
						chance = nil
					}
					b := memfile.Crash(from, events, n, chance)
					growingCrash(t, b, was, rng.IntN(len(events)) < 3, trusted, inUse)
					if t.Failed() {
						t.Fatalf("after %d of %d events, the last %s", n, len(events), last(events[:n]))
					}
				}
			}
			for _, size := range c.sizes {
				if trusted[size] == 0 || inUse[size] == 0 {
					t.Errorf("of %d bytes: %d states with bitmaps that can be trusted, %d with others", size, trusted[size], inUse[size])
				}
			}
		})
	}
}

// growingCrash judges the image b. Its disk began as was.
func growingCrash(t *testing.T, b, was []byte, qemu bool, trusted, inUse map[int64]int) {
	t.Helper()
	state := memfile.New("crashed", b)
	im := opened(t, state, Options{})
	r, err := Check(state, im.h, nil)
	if err != nil || r.Corruptions > 0 {
		t.Errorf("%v %v", err, r.Findings)
	}
	if qemu {
		checked(t, b, false)
		path := filepath.Join(t.TempDir(), "crashed.qcow2")
		stored(t, path, state)
		program(t, "qemu-io", "-f", "qcow2", "-c", "write 0 512", path) // loads them
	}
	infos, err := im.BitmapInfos()
	if err != nil {
		t.Error(err)
		return
	}
	is := readAll(t, im)
	for _, i := range infos {
		if i.Inconsistent {
			inUse[im.Size()]++
			continue
		}
		trusted[im.Size()]++
		for _, run := range runsOf(t, im, i.Name) {
			if i.Auto && !run.Dirty && !bytes.Equal(is[run.Offset:][:run.Length], was[run.Offset:][:run.Length]) {
				t.Errorf("%v has changed", run)
			}
			if !i.Auto && run.Dirty && run != (dirtyRun{64 << 10, 64 << 10, true}) {
				t.Errorf("the disabled one: %v", run)
			}
		}
	}
	im = opened(t, state, Options{})
	if err := im.Begin(nil); err != nil {
		t.Error(err)
		return
	}
	defer im.Close()
	if err := errors.Join(im.writeAt(make([]byte, 512), im.Size()-512), im.Settle()); err != nil {
		t.Error(err)
	}
}

// lying is a file of which a write fails that has been done.
type lying struct {
	*memfile.File
	at int64 // -1 for none
}

func (l *lying) WriteAt(p []byte, off int64, durable bool) error {
	if err := l.File.WriteAt(p, off, durable); err != nil || off != l.at {
		return err
	}
	return unix.EIO
}

// TestGrowingBitmapsAfterEachFailure fails every call of Resize in turn.
// The image stays as usable as before, and can be grown later.
func TestGrowingBitmapsAfterEachFailure(t *testing.T) {
	const size = 1<<20 + 512
	for _, c := range []struct {
		options string
		large   int64
		settle  bool // before it is grown again
	}{
		{"cluster_size=512", 5 << 20, false},
		{"cluster_size=512", 5 << 20, true},
		// Its L1 table is longer than what one refcount block counts.
		{"cluster_size=512,refcount_bits=64", 160 << 20, true},
	} {
		path, large := withBitmaps(t, size, 9, c.options), c.large
		for k := 0; ; k++ {
			f := loaded(t, path)
			warned := 0
			im := begun(t, f, Options{Warn: func(string) { warned++ }})
			m := newDirtyModel(9, size)
			rng := rand.New(rand.NewPCG(uint64(k), 1))
			changes(t, im, m, rng, 5)
			failed, err := failingCall(f, k, func() error { return im.Resize(large) })
			if failed != (err != nil || warned > 0) {
				t.Fatalf("call %d: %v, %d warnings", k, err, warned)
			}
			if err == nil {
				m.grow(large)
			}
			if im.Size() != m.size {
				t.Fatalf("call %d: %v: the disk has %d bytes", k, err, im.Size())
			}
			now := opened(t, memfile.New("now", f.Bytes()), Options{})
			if infos, err := now.BitmapInfos(); err != nil {
				t.Fatal(err)
			} else if !infos[0].Inconsistent && !slices.Equal(runsOf(t, now, "on"), m.runs()) {
				t.Fatalf("call %d: the bitmap in the file is wrong and trusted", k)
			}
			checked(t, f.Bytes(), false)
			changes(t, im, m, rng, 5)
			if c.settle {
				if err := im.Settle(); err != nil {
					t.Fatal(err)
				}
				checked(t, f.Bytes(), true)
			}
			if err := im.Resize(large); err != nil {
				t.Fatalf("call %d: again: %v", k, err)
			}
			m.grow(large)
			changes(t, im, m, rng, 5)
			if err := im.Settle(); err != nil {
				t.Fatal(err)
			}
			im.Close()
			checked(t, f.Bytes(), true)
			if got := runsOf(t, opened(t, f, Options{}), "on"); !slices.Equal(got, m.runs()) {
				t.Fatalf("call %d: %v, want %v", k, got, m.runs())
			}
			if !failed {
				if k < 10 {
					t.Fatalf("only %d calls were failed", k)
				}
				break
			}
		}
	}
}

// TestSizeThatMayBeInTheFile: where it is not known which size the header has,
// bitmaps are not said to be consistent with one.
func TestSizeThatMayBeInTheFile(t *testing.T) {
	f := &lying{loaded(t, withBitmaps(t, 1<<20, 9, "cluster_size=512")), offSize}
	im := begun(t, f, Options{})
	m := newDirtyModel(9, 1<<20)
	changes(t, im, m, rand.New(rand.NewPCG(1, 1)), 5)
	if err := im.Resize(5 << 20); !errors.Is(err, unix.EIO) {
		t.Fatalf("%v", err)
	}
	if err := im.Settle(); !errors.Is(err, unix.EIO) {
		t.Fatalf("%v", err)
	}
	checked(t, f.Bytes(), false)
	if infos, err := opened(t, f, Options{}).BitmapInfos(); err != nil || !infos[0].Inconsistent {
		t.Errorf("%v %+v", err, infos)
	}
	f.at = -1
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	im = opened(t, f, Options{})
	if got := runsOf(t, im, "on"); im.Size() != 1<<20 || !slices.Equal(got, m.runs()) {
		t.Errorf("%d bytes, %v, want %v", im.Size(), got, m.runs())
	}
	checked(t, f.Bytes(), true)
}
