package qcow2

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// dirtyModel is a bitmap as it should be, a byte for each bit.
type dirtyModel struct {
	granularity int
	size        int64
	dirty       []bool
}

func newDirtyModel(granularity int, size int64) *dirtyModel {
	return &dirtyModel{granularity, size, make([]bool, (size+1<<granularity-1)>>granularity)}
}

func (m *dirtyModel) mark(off, n int64) {
	for i := off >> m.granularity; i <= (off+n-1)>>m.granularity; i++ {
		m.dirty[i] = true
	}
}

type dirtyRun struct {
	Offset, Length int64
	Dirty          bool
}

func (m *dirtyModel) runs() (runs []dirtyRun) {
	for i, d := range m.dirty {
		off := int64(i) << m.granularity
		n := min(1<<m.granularity, m.size-off)
		if k := len(runs) - 1; k >= 0 && runs[k].Dirty == d {
			runs[k].Length += n
		} else {
			runs = append(runs, dirtyRun{off, n, d})
		}
	}
	return runs
}

// runsOf is a whole bitmap as the image tells it.
func runsOf(t testing.TB, im *Image, name string) (runs []dirtyRun) {
	t.Helper()
	off := int64(0)
	err := im.DirtyRuns(name, 0, im.Size(), func(n int64, dirty bool) bool {
		runs = append(runs, dirtyRun{off, n, dirty})
		off += n
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return runs
}

// qemuRuns is a bitmap as QEMU tells it.
func qemuRuns(t testing.TB, path, name string) (runs []dirtyRun) {
	t.Helper()
	out, code := program(t, "nbdinfo", "--map=qemu:dirty-bitmap:"+name, "--json", "--",
		"[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, path, "]")
	var all []struct {
		Offset, Length int64
		Type           int
	}
	if code != 0 || json.Unmarshal([]byte(out), &all) != nil {
		t.Fatalf("nbdinfo exits with %d:\n%s", code, out)
	}
	for _, x := range all {
		if k := len(runs) - 1; k >= 0 && runs[k].Dirty == (x.Type == 1) {
			runs[k].Length += x.Length
		} else {
			runs = append(runs, dirtyRun{x.Offset, x.Length, x.Type == 1})
		}
	}
	return runs
}

// withBitmaps makes an image with an enabled bitmap "on" of granularity on, and
// a disabled one "off" of 64 KiB.
func withBitmaps(t testing.TB, size int64, on int, options string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bits.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(size))
	qemuImg(t, "bitmap", "--add", "-g", fmt.Sprint(1<<on), path, "on")
	qemuImg(t, "bitmap", "--add", "--disable", "-g", "64k", path, "off")
	return path
}

func stored(t testing.TB, path string, f *memfile.File) {
	t.Helper()
	if err := os.WriteFile(path, f.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

// changes makes random changes of the disk and marks them.
func changes(t testing.TB, im *Image, m *dirtyModel, rng *rand.Rand, n int) {
	t.Helper()
	for range n {
		off := rng.Int64N(im.Size())
		length := 1 + rng.Int64N(min(im.Size()-off, 20000))
		var err error
		switch rng.IntN(4) {
		case 0:
			err = im.Zero(off, length, rng.IntN(2) == 0)
		case 1:
			err = im.Discard(off, length)
		default:
			err = im.writeAt(noise(rng, length), off)
		}
		if err != nil {
			t.Fatal(err)
		}
		m.mark(off, length)
	}
}

func TestBitmapsFollowChangesHereAndInQEMU(t *testing.T) {
	for _, c := range []struct {
		options     string
		size        int64
		granularity int
	}{
		{"cluster_size=512", 1 << 20, 9},       // tables of several entries
		{"cluster_size=512", 9<<20 + 512, 9},   // several clusters of bits, the last one not whole
		{"cluster_size=4k", 300<<10 + 512, 12}, // less than a word of bits
		{"cluster_size=64k", 5 << 20, 16},
		{"cluster_size=16k,extended_l2=on", 2 << 20, 14},
		{"cluster_size=64k", 3 << 30, 9},
		{"data", 1<<20 + 512, 9},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, uint64(c.size)))
			data := ""
			if c.options == "data" {
				data = filepath.Join(t.TempDir(), "data")
				c.options = "cluster_size=512,data_file=" + data
			}
			path := withBitmaps(t, c.size, c.granularity, c.options)
			m := newDirtyModel(c.granularity, c.size)
			for round := range 3 {
				f := loaded(t, path)
				var o Options
				if data != "" {
					o.Data = loaded(t, data)
				}
				before := opened(t, f, o)
				if got := runsOf(t, before, "on"); !slices.Equal(got, m.runs()) {
					t.Fatalf("round %d: read before Begin: %v, want %v", round, got, m.runs())
				}
				im := begun(t, f, o)
				for range 2 {
					// Settled, it can be changed again.
					changes(t, im, m, rng, 20)
					if round == 1 {
						all := int64(10 << 20)
						for off := int64(0); off < min(c.size, 30<<20); off += all {
							n := min(all, c.size-off)
							m.mark(off, n)
							if err := im.Zero(off, n, false); err != nil {
								t.Fatal(err)
							}
						}
					}
					if err := im.Settle(); err != nil {
						t.Fatal(err)
					}
				}
				if got := runsOf(t, im, "on"); !slices.Equal(got, m.runs()) {
					t.Fatalf("round %d: %v, want %v", round, got, m.runs())
				}
				im.Close()
				stored(t, path, f)
				if data != "" {
					stored(t, data, o.Data.(*memfile.File))
				}
				checked(t, f.Bytes(), true)
				if got := qemuRuns(t, path, "on"); !slices.Equal(got, m.runs()) {
					t.Fatalf("round %d: QEMU says %v, want %v", round, got, m.runs())
				}
				if got := qemuRuns(t, path, "off"); !slices.Equal(got, []dirtyRun{{0, c.size, false}}) {
					t.Fatalf("round %d: the disabled one: %v", round, got)
				}

				off := rng.Int64N(c.size - 4096)
				program(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P 1 %d 1k", off), path)
				m.mark(off, 1024)
				qemuImg(t, "bitmap", "--merge", "on", path, "off")
				qemuImg(t, "bitmap", "--clear", path, "off")
			}
			qemuImg(t, "check", path)
		})
	}
}

func TestBitmapInfos(t *testing.T) {
	path := withBitmaps(t, 1<<20, 16, "cluster_size=4k")
	program(t, "qemu-io", "-f", "qcow2", "-c", "write 70k 1k", path)
	qemuImg(t, "bitmap", "--merge", "on", path, "off")
	im := opened(t, loaded(t, path), Options{})
	got, err := im.BitmapInfos()
	want := []BitmapInfo{{"on", 1 << 16, true, false, 1 << 16}, {"off", 1 << 16, false, false, 1 << 16}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v %+v", err, got)
	}
	if err := im.DirtyRuns("none", 0, 1, nil); !errors.Is(err, unix.ENOENT) {
		t.Errorf("%v", err)
	}
	if got, err := opened(t, made(t, "1M"), Options{}).BitmapInfos(); got != nil || err != nil {
		t.Errorf("%v %v", got, err)
	}
}

// TestBitmapsAreToldAtAnyTime: also while they are marked as in use, and stored.
func TestBitmapsAreToldAtAnyTime(t *testing.T) {
	f := loaded(t, withBitmaps(t, 1<<20, 9, "cluster_size=512"))
	im := begun(t, f, Options{})
	syncs := 0
	f.AfterSync = func() {
		syncs++
		infos, err := im.BitmapInfos()
		if err != nil || infos[0].Dirty > 512 || len(infos) != 2 {
			t.Errorf("%v %+v", err, infos)
		}
		if err := im.DirtyRuns("on", 0, 1<<20, func(int64, bool) bool { return true }); err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(im.writeAt(make([]byte, 1), 0), im.Settle()); err != nil {
		t.Fatal(err)
	}
	if syncs < 5 {
		t.Errorf("%d syncs", syncs)
	}
}

// TestBitmapsThatCannotBeRead are inconsistent, and the others are told.
func TestBitmapsThatCannotBeRead(t *testing.T) {
	path := withBitmaps(t, 1<<20, 16, "cluster_size=4k")
	program(t, "qemu-io", "-f", "qcow2", "-c", "write 70k 1k", path)
	qemuImg(t, "bitmap", "--merge", "on", path, "off")
	f := loaded(t, path)
	im := begun(t, f, Options{})
	f.FailRead = func(int64, int64) error { return unix.EIO }
	got, err := im.BitmapInfos()
	want := []BitmapInfo{{"on", 1 << 16, true, false, 1 << 16}, {"off", 1 << 16, false, true, 0}}
	if !errors.Is(err, unix.EIO) || !slices.Equal(got, want) {
		t.Errorf("%v %+v", err, got)
	}
}

func TestBitmapsCostNothingWithoutChanges(t *testing.T) {
	path := withBitmaps(t, 1<<20, 9, "cluster_size=4k")
	f := loaded(t, path)
	f.Record()
	im := begun(t, f, Options{})
	if _, err := im.BitmapInfos(); err != nil {
		t.Fatal(err)
	}
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	for _, e := range second(f.Events()) {
		if e.Op == memfile.Write {
			t.Errorf("written: %+v", e)
		}
	}
}

func second[A, B any](_ A, b B) B { return b }

func TestBitmapsAreInconsistentAfterACrash(t *testing.T) {
	path := withBitmaps(t, 1<<20, 9, "cluster_size=4k")
	f := loaded(t, path)
	im := begun(t, f, Options{})
	var p Plan
	if err := im.Prepare(&p, 0, 512, 0); err != ErrWait {
		t.Fatalf("the first write does not wait for the mark: %v", err)
	}
	if err := errors.Join(im.writeAt(make([]byte, 512), 4096), im.Flush()); err != nil {
		t.Fatal(err)
	}
	im.Close()
	stored(t, path, f)
	qemuImg(t, "check", path)
	if out := qemuImg(t, "info", path); !strings.Contains(out, "in-use") {
		t.Errorf("qemu-img info:\n%s", out)
	}
	// It stays what it is, and the other one too.
	im = begun(t, f, Options{})
	if err := errors.Join(im.writeAt(make([]byte, 512), 8192), im.Settle()); err != nil {
		t.Fatal(err)
	}
	infos, err := opened(t, f, Options{}).BitmapInfos()
	if err != nil || !infos[0].Inconsistent || infos[1].Inconsistent {
		t.Errorf("%v %+v", err, infos)
	}
	if err := im.DirtyRuns("on", 0, 1, nil); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "inconsistent") {
		t.Errorf("%v", err)
	}
	checked(t, f.Bytes(), true)
}

// failingCall calls f while the file's call number k from now fails, if there are so
// many; syncs and punches do not count.
func failingCall(file *memfile.File, k int, f func() error) (failed bool, err error) {
	calls := 0
	file.Fail = func(op memfile.Op, off, n int64) error {
		if op == memfile.Sync || op == memfile.Punch {
			return nil
		}
		if calls++; calls-1 == k {
			failed = true
			return unix.ENOSPC
		}
		return nil
	}
	err = f()
	file.Fail = nil
	return failed, err
}

// TestBitmapsAfterEachFailure fails every call of Settle in turn. The image
// stays as usable as before, and Settle succeeds later.
func TestBitmapsAfterEachFailure(t *testing.T) {
	for _, again := range []bool{false, true} {
		for k := 0; ; k++ {
			path := withBitmaps(t, 3<<20, 9, "cluster_size=512")
			f := loaded(t, path)
			im := begun(t, f, Options{Warn: func(string) {}})
			m := newDirtyModel(9, 3<<20)
			rng := rand.New(rand.NewPCG(uint64(k), 1))
			changes(t, im, m, rng, 5)
			if err := im.Settle(); err != nil {
				t.Fatal(err)
			}
			changes(t, im, m, rng, 5)
			failed, err := failingCall(f, k, im.Settle)
			if !failed {
				if err != nil {
					t.Fatal(err)
				}
				if k < 10 {
					t.Fatalf("only %d calls were failed", k)
				}
				break
			}
			// Cutting the file is the one thing that may fail unnoticed.
			if err != nil && !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("call %d: %v", k, err)
			}
			checked(t, f.Bytes(), false)
			if again {
				changes(t, im, m, rng, 5)
			}
			// What is in the file meanwhile must not be trusted, or be right.
			state := opened(t, memfile.New("now", f.Bytes()), Options{})
			if infos, err := state.BitmapInfos(); err != nil {
				t.Fatal(err)
			} else if !infos[0].Inconsistent && !slices.Equal(runsOf(t, state, "on"), m.runs()) {
				t.Fatalf("call %d: the bitmap in the file is wrong and trusted", k)
			}
			if err := im.Settle(); err != nil {
				t.Fatalf("call %d: again: %v", k, err)
			}
			checked(t, f.Bytes(), true)
			fresh := opened(t, f, Options{})
			if got := runsOf(t, fresh, "on"); !slices.Equal(got, m.runs()) {
				t.Fatalf("call %d: %v, want %v", k, got, m.runs())
			}
		}
	}
}

// TestFailedMark: a write before which the bitmaps cannot be marked as in use
// is refused, and they stay what they are.
func TestFailedMark(t *testing.T) {
	f := loaded(t, withBitmaps(t, 1<<20, 9, "cluster_size=4k"))
	im := begun(t, f, Options{})
	f.Fail = func(memfile.Op, int64, int64) error { return unix.EIO }
	p := make([]byte, 512)
	if err := im.writeAt(p, 0); !errors.Is(err, unix.EIO) {
		t.Fatalf("%v", err)
	}
	f.Fail = nil
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	if infos, err := opened(t, f, Options{}).BitmapInfos(); err != nil || infos[0].Inconsistent {
		t.Errorf("%v %+v", err, infos)
	}
	if err := errors.Join(im.writeAt(p, 0), im.Settle()); err != nil {
		t.Fatal(err)
	}
	if got := runsOf(t, opened(t, f, Options{}), "on"); !slices.Equal(got, []dirtyRun{{0, 512, true}, {512, 1<<20 - 512, false}}) {
		t.Errorf("%v", got)
	}
}

func TestMarksByManyAtOnce(t *testing.T) {
	const size = 1 << 20
	f := loaded(t, withBitmaps(t, size, 9, "cluster_size=4k"))
	im := begun(t, f, Options{})
	models := make([]*dirtyModel, 8)
	var wg sync.WaitGroup
	for i := range models {
		models[i] = newDirtyModel(9, size)
		wg.Go(func() { changes(t, im, models[i], rand.New(rand.NewPCG(uint64(i), 13)), 60) })
	}
	wg.Wait()
	for _, m := range models[1:] {
		for i, d := range m.dirty {
			models[0].dirty[i] = models[0].dirty[i] || d
		}
	}
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	if got := runsOf(t, opened(t, f, Options{}), "on"); !slices.Equal(got, models[0].runs()) {
		t.Errorf("%v, want %v", got, models[0].runs())
	}
	checked(t, f.Bytes(), true)
}

func TestRunsOfPartsOfBitmap(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 14))
	const size = 40<<10 + 100
	b := &bitmap{BitmapEntry: BitmapEntry{Granularity: 9}, words: make([]uint64, 2)}
	m := newDirtyModel(9, size)
	for range 300 {
		off := rng.Int64N(size)
		n := 1 + rng.Int64N(min(size-off, 3000))
		if rng.IntN(8) == 0 {
			b.mark(off, n)
			m.mark(off, n)
		}
		if rng.IntN(50) == 0 {
			clear(b.words)
			clear(m.dirty)
		}
		end := off + n
		for at := off; at < end; {
			next, dirty := b.run(at, end)
			want := at
			for want < end && m.dirty[want>>9] == m.dirty[at>>9] {
				want++
			}
			if next != want || dirty != m.dirty[at>>9] {
				t.Fatalf("from %d to %d: %d %v, want %d", at, end, next, dirty, want)
			}
			at = next
		}
	}
}

// TestBitmapsOfOtherPrograms are states that qemu-img does not make.
func TestBitmapsOfOtherPrograms(t *testing.T) {
	good := loaded(t, withBitmaps(t, 1<<20, 16, "cluster_size=4k")).Bytes()
	h, err := ReadHeader(memfile.New("good", good))
	if err != nil {
		t.Fatal(err)
	}
	dir := h.Bitmaps.DirectoryOffset
	all, err := Bitmaps(memfile.New("good", good), h)
	if err != nil || len(all) != 2 {
		t.Fatal(err, all)
	}
	for name, c := range map[string]struct {
		off  int64
		b    []byte
		text string // of what Begin says, "" for success
	}{
		"unknown flag":      {dir + 15, []byte{0x0a}, "not known"},
		"unknown type":      {dir + 16, []byte{2}, "not known"},
		"granularity":       {dir + 17, []byte{8}, "granularity of 2^8"},
		"large granularity": {dir + 17, []byte{32}, "granularity of 2^32"},
		"no name":           {dir + 18, []byte{0, 0}, "name of 0 bytes"},
		"long name":         {dir + 18, []byte{1, 0}, "cut off"},
		"extra data":        {dir + 20, []byte{0xff, 0xff, 0xff, 0xff}, "cut off"},
		"table offset":      {dir + 7, []byte{1}, "table of bitmap"},
		"table size":        {dir + 8, []byte{0, 0, 0, 0}, "table of bitmap"},
		"huge table":        {dir + 8, []byte{0x08, 0, 0, 0}, "table of bitmap"},
		"two entries":       {dir + 8, []byte{0, 0, 0, 2}, "2 entries instead of 1"},
		"reserved bit":      {all[0].TableOffset, []byte{0, 0, 0, 0, 0, 0, 0, 2}, "entry 0 of its table"},
		"ones with offset":  {all[0].TableOffset, []byte{0, 0, 0, 0, 0, 0, 0x10, 1}, "entry 0 of its table"},
		"past the end":      {all[0].TableOffset, []byte{0, 0, 0, 1, 0, 0, 0, 0}, "past the end"},
		"on the header":     {all[1].TableOffset, []byte{0, 0, 0, 0, 0, 0, 0x10, 0}, "overlaps"},
		"all ones":          {all[0].TableOffset, []byte{0, 0, 0, 0, 0, 0, 0, 1}, ""},
		"autoclear":         {offAutoclear, make([]byte, 8), ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := bytes.Clone(good)
			copy(b[c.off:], c.b)
			f := memfile.New("odd", b)
			before := f.Bytes()
			warned := 0
			im := opened(t, f, Options{Warn: func(string) { warned++ }})
			err := im.Begin(nil)
			if c.text != "" {
				if err == nil || !strings.Contains(err.Error(), c.text) {
					t.Errorf("%v, want %q", err, c.text)
				}
				if !bytes.Equal(before, f.Bytes()) {
					t.Error("an image that could not be begun has changed")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			infos, err := im.BitmapInfos()
			switch {
			case err != nil:
				t.Fatal(err)
			case name == "autoclear" && (len(infos) != 0 || warned != 1):
				t.Errorf("%+v, %d warnings", infos, warned)
			case name == "all ones" && infos[0].Dirty != 1<<20:
				t.Errorf("%+v", infos)
			}
			if err := errors.Join(im.writeAt(make([]byte, 512), 0), im.Settle()); err != nil {
				t.Error(err)
			}
			if name == "all ones" {
				checked(t, f.Bytes(), true)
			}
			im.Close()
		})
	}
}

// TestExtraDataOfBitmaps: data that need not be understood is kept, other data
// refuses writing.
func TestExtraDataOfBitmaps(t *testing.T) {
	path := withBitmaps(t, 1<<20, 16, "cluster_size=4k")
	for _, compatible := range []bool{true, false} {
		b := loaded(t, path).Bytes()
		h, err := ReadHeader(memfile.New("b", b))
		if err != nil {
			t.Fatal(err)
		}
		// Eight bytes more in the last entry: the directory becomes longer by
		// that.
		all, err := Bitmaps(memfile.New("b", b), h)
		if err != nil {
			t.Fatal(err)
		}
		e := b[h.Bitmaps.DirectoryOffset+all[1].at:]
		copy(e[24:], "\x01\x02\x03\x04\x05\x06\x07\x08off")
		e[23] = 8
		e[15] = bitmapAuto
		if compatible {
			e[15] |= bitmapExtraCompatible
		}
		i := bytes.Index(b[:1<<h.ClusterBits], []byte{0x23, 0x85, 0x28, 0x75})
		b[i+8+15] += 8
		f := memfile.New("b", append(b, make([]byte, 8)...))
		im := opened(t, f, Options{})
		err = im.Begin(nil)
		if !compatible {
			if !errors.Is(err, unix.EOPNOTSUPP) {
				t.Errorf("%v", err)
			}
			continue
		}
		if err := errors.Join(err, im.writeAt(make([]byte, 512), 0), im.Settle()); err != nil {
			t.Fatal(err)
		}
		im.Close()
		if h, err = ReadHeader(f); err != nil {
			t.Fatal(err)
		}
		all, err = Bitmaps(f, h)
		if err != nil || string(all[1].Extra) != "\x01\x02\x03\x04\x05\x06\x07\x08" || !all[1].ExtraCompatible || all[1].InUse {
			t.Errorf("%v %+v", err, all)
		}
	}
}

// FuzzBitmaps opens images with damaged bitmaps and uses them.
func FuzzBitmaps(f *testing.F) {
	path := withBitmaps(f, 1<<20, 9, "cluster_size=512")
	program(f, "qemu-io", "-f", "qcow2", "-c", "write 70k 1k", path)
	good := loaded(f, path).Bytes()
	h, err := ReadHeader(memfile.New("good", good))
	if err != nil {
		f.Fatal(err)
	}
	all, err := Bitmaps(memfile.New("good", good), h)
	if err != nil {
		f.Fatal(err)
	}
	dir := good[h.Bitmaps.DirectoryOffset:][:h.Bitmaps.DirectorySize]
	table := good[all[0].TableOffset:][:8*all[0].TableEntries]
	f.Add(dir, table, int64(2))
	f.Add([]byte("0"), []byte("0"), int64(2))
	f.Fuzz(func(t *testing.T, dir, table []byte, count int64) {
		b := bytes.Clone(good)
		copy(b[h.Bitmaps.DirectoryOffset:], dir[:min(len(dir), 512)])
		copy(b[all[0].TableOffset:], table[:min(len(table), 512)])
		h := *h
		x := *h.Bitmaps
		x.DirectorySize, x.Count = int64(len(dir)), int(count)
		h.Bitmaps = &x
		file := memfile.New("fuzzed", b)
		im, err := New(file, &h, Options{})
		if err != nil {
			t.Fatal(err)
		}
		infos, _ := im.BitmapInfos()
		for _, i := range infos {
			_ = im.DirtyRuns(i.Name, 0, im.Size(), func(int64, bool) bool { return true })
		}
		if _, err := Check(file, &h, nil); err != nil {
			if _, ok := errors.AsType[*FormatError](err); !ok { // see Check
				t.Fatal(err)
			}
		}
		if im.Begin(nil) != nil {
			if !bytes.Equal(b, file.Bytes()) {
				t.Fatal("an image that could not be begun has changed")
			}
			return
		}
		defer im.Close()
		_ = errors.Join(im.writeAt(make([]byte, 1000), 5000), im.Settle())
	})
}
