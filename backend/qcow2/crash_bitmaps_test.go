package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// TestCrashStatesOfBitmaps requires that whatever a crash leaves of a bitmap is
// one that says it is not to be trusted, or one with a bit for everything that is
// not as it was when the bitmap was made.
func TestCrashStatesOfBitmaps(t *testing.T) {
	runs := uint64(1)
	if os.Getenv("NBD_EXPORT_SOAK") != "" {
		runs = 20
	}
	for name, c := range map[string]struct {
		size, options string
		every         int // of the places at which it can crash is looked at
		data          bool
	}{
		"512":                  {size: "120k", options: "cluster_size=512", every: 1},
		"two clusters of bits": {size: "2304k", options: "cluster_size=512", every: 8},
		"subclusters":          {size: "120k", options: "cluster_size=16k,extended_l2=on", every: 1},
		"data file":            {size: "120k", options: "cluster_size=4k", every: 1, data: true},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range runs {
				dir := t.TempDir()
				path, dataPath := filepath.Join(dir, "b.qcow2"), filepath.Join(dir, "data")
				options := c.options
				if c.data {
					options += ",data_file=" + dataPath
				}
				qemuImg(t, "create", "-q", "-f", "qcow2", "-o", options, path, c.size)
				qemuImg(t, "bitmap", "--add", "-g", "4k", path, coarse)
				qemuImg(t, "bitmap", "--add", "-g", "512", path, "fine")
				qemuImg(t, "bitmap", "--add", "-g", "512", "--disable", path, "off")
				crashBitmaps(t, path, dataPath, c.data, c.every, seed)
			}
		})
	}
}

// The name is so long that the entry of the next bitmap lies in two sectors, of
// which a crash may leave one as it was.
var coarse = strings.Repeat("x", 504-24)

func crashBitmaps(t *testing.T, path, dataPath string, data bool, every int, seed uint64) {
	t.Helper()
	var clock atomic.Int64
	o := Options{L2Cache: 1, Warn: func(string) {}}
	image, external := loaded(t, path), (*memfile.File)(nil)
	image.Clock = &clock
	if data {
		external = loaded(t, dataPath)
		external.Clock, o.Data = &clock, external
	}
	begin := func() *Image {
		im := opened(t, image, o)
		im.alloc.least = 0
		if err := im.Begin(nil); err != nil {
			t.Fatal(err)
		}
		return im
	}
	// An owner before has set some bits.
	was := newBitmapHistory(t, begin())
	im := begin()
	was.h = newHistory(t, im, func() int { return int(clock.Load()) })
	if all, err := Bitmaps(image, im.h); err != nil || all[1].Name != "fine" || all[1].at%512 != 504 {
		t.Fatalf("the directory is not what the test is about: %v %v", all, err)
	}
	image.Record()
	if external != nil {
		external.Record()
	}
	for round := range uint64(3) {
		several(t, was.h, seed*10+round)
		if err := errors.Join(im.Settle(), was.h.flush()); err != nil {
			t.Fatal(err)
		}
	}
	im.Close()
	rng := rand.New(rand.NewPCG(seed, 23))
	for at := int64(0); at <= clock.Load(); at += int64(stride * every) {
		for try := range 3 {
			chance := rng
			if try == 0 {
				chance = nil
			}
			crashedAt(t, was.h, image, external, o, at, chance, func(im *Image, disk []byte) error {
				if was.states++; !data && was.states%300 == 0 {
					checked(t, im.f.(*memfile.File).Bytes(), false)
				}
				return was.judge(im, disk)
			})
		}
	}
	if was.trusted == 0 || was.inUse == 0 {
		t.Errorf("of the bitmaps %d told of changes and %d were in use", was.trusted, was.inUse)
	}
}

// bitmapHistory is what bitmaps must tell.
type bitmapHistory struct {
	h     *history
	disk  []byte            // when they were made
	first map[string][]bool // the sectors that each called dirty when the history began

	// How many states were looked at, and bitmaps in them: that told of a change,
	// and that were in use.
	states, trusted, inUse int
}

// newBitmapHistory writes a little, and notes what that makes of the bitmaps.
func newBitmapHistory(t *testing.T, im *Image) *bitmapHistory {
	t.Helper()
	b := &bitmapHistory{disk: readAll(t, im), first: map[string][]bool{}}
	if err := errors.Join(im.writeAt(sectorOf(4000, 20), 20*512), im.writeAt(sectorOf(4000, 200), 200*512), im.Settle()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fine", coarse, "off"} {
		var err error
		if b.first[name], err = dirtySectors(im, name); err != nil {
			t.Fatal(err)
		}
	}
	im.Close()
	return b
}

// dirtySectors says of each sector of the disk whether a bitmap calls it dirty.
func dirtySectors(im *Image, name string) (dirty []bool, err error) {
	err = im.DirtyRuns(name, 0, im.Size(), func(n int64, is bool) bool {
		for range n / 512 {
			dirty = append(dirty, is)
		}
		return true
	})
	return dirty, err
}

// judge holds the bitmaps of an image against what its disk holds.
func (b *bitmapHistory) judge(im *Image, disk []byte) error {
	infos, err := im.BitmapInfos()
	if err != nil {
		return err
	}
	if len(infos) != len(b.first) {
		return fmt.Errorf("it has %d bitmaps instead of %d", len(infos), len(b.first))
	}
	for _, i := range infos {
		if i.Inconsistent {
			if !i.Auto {
				return fmt.Errorf("bitmap %q is in use, which nobody writes", i.Name)
			}
			b.inUse++
			continue
		}
		dirty, err := dirtySectors(im, i.Name)
		if err != nil {
			return err
		}
		changed := false
		for s, is := range dirty {
			differs := !bytes.Equal(disk[s*512:][:512], b.disk[s*512:][:512])
			if !is && (b.first[i.Name][s] || differs && i.Auto) {
				return fmt.Errorf("bitmap %q calls sector %d clean, which has changed, and does not say that it is not to be trusted", i.Name, s)
			}
			changed = changed || differs && !b.first[i.Name][s]
		}
		if changed && i.Auto {
			b.trusted++
		}
	}
	return nil
}
