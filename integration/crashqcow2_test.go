package integration

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

// The crash matrix with qcow2 images: their scenes, and what the run needs to
// know of tables.

// bySync is a part of settling that writes tables and makes them durable.
func bySync(write, sync effect) []crashCall {
	return []crashCall{call("write", write), call("sync", sync)}
}

// settling are the steps in which tables are written, where a failed write and a
// failed look at the file do this. l1 are those that write the L1 table: what it
// was to be told of before the gate was closed has been written ahead.
func settling(write, stat effect, l1 []crashStep, more ...crashCall) []crashStep {
	return slices.Concat([]crashStep{
		{"store-bitmaps", []crashCall{call("write", write)}},
		{"refcounts", bySync(write, poisons)},
		{"l2", bySync(write, poisons)},
	}, l1, []crashStep{
		{"bitmap-tables", bySync(write, poisons)},
		{"bitmap-flags", bySync(write, poisons)},
		{"trim", []crashCall{call("truncate", harmless)}},
		{"give-back", []crashCall{call("punch", harmless)}},
		{"settled", slices.Concat([]crashCall{call("stat", stat), call("read", stat)}, more)},
	})
}

// qcow2Taking is how an image is taken; its file is read at each step that
// reads tables.
func qcow2Taking(more ...crashStep) []crashStep {
	steps := slices.Clone(activation)
	for i, s := range steps {
		if s.name == "load" || s.name == "claim" {
			steps[i].calls = slices.Concat(s.calls, []crashCall{call("read", refuses)})
		}
	}
	claim := slices.IndexFunc(steps, func(s crashStep) bool { return s.name == "claim" })
	return slices.Insert(steps, claim+1, more...)
}

var qcow2Scenes = []crashScene{
	{
		format: "qcow2", name: "inactivate", title: "A inactivates a qcow2 image", actor: 0,
		steps: slices.Concat([]crashStep{
			{"sync-ahead", bySync(refuses, poisons)},
			{"close-gate", nil},
			{"drain", nil},
			{"settle", []crashCall{recordLook}},
		}, settling(refuses, refuses, nil), []crashStep{
			{"release", slices.Concat([]crashCall{recordLook}, recordWrite(untidy), []crashCall{call("close", harmless)})},
		}),
		end: crashEnd{state: [2]string{"inactive", "inactive"}, epoch: 1, clean: true, next: "B"},
	},
	{
		format: "qcow2", name: "activate", title: "B activates, after A has inactivated a qcow2 image", actor: 1,
		steps: qcow2Taking(
			crashStep{"repair", []crashCall{call("read", refuses), call("write", refuses), call("sync", refuses)}},
			crashStep{"mark-clean", []crashCall{call("read", refuses), call("write", refuses), call("sync", refuses)}},
			crashStep{"autoclear", bySync(refuses, refuses)},
		),
		end: crashEnd{state: [2]string{"inactive", "active"}, epoch: 2, next: "A"},
	},
	{
		format: "qcow2", name: "take-back", title: "A takes a qcow2 image back with --if-unchanged", actor: 0, steps: qcow2Taking(),
		end: crashEnd{state: [2]string{"active", "inactive"}, epoch: 2, next: "B"},
	},
	{
		format: "qcow2", name: "stop", title: "A stops (SIGTERM), with a qcow2 image", actor: 0,
		steps: slices.Concat([]crashStep{{"stop", []crashCall{recordLook}}},
			settling(untidy, untidy, []crashStep{{"l1", bySync(untidy, poisons)}}, slices.Concat([]crashCall{recordLook}, recordWrite(untidy), []crashCall{tidyUp, call("close", harmless)})...)),
		end: crashEnd{state: [2]string{"exited", "inactive"}, epoch: 1, clean: true, next: "B"},
	},
	{
		format: "qcow2", name: "abandon", title: "A, which is failed(io), is abandoned with a qcow2 image", actor: 0,
		steps: []crashStep{
			{"abandon", slices.Concat([]crashCall{call("sync", harmless)}, openView(blind), []crashCall{call("read", blind), call("advise", harmless), call("close", harmless)})},
		},
		end: crashEnd{state: [2]string{"inactive", "inactive"}, epoch: 1, next: "B"},
	},
}

const (
	// crashTable is how many bytes of the disk an L2 table maps.
	crashTable = 2 * mib
	// crashFresh is where nothing was before crashRun.fresh writes.
	crashFresh = 2 * crashTable
	crashDisk  = 8 * crashTable
)

// crashSync is the step of settling in which a sync is what makes data durable.
func crashSync(format string) string {
	if format == "qcow2" {
		return "refcounts"
	}
	return "settle"
}

func crashFlags(format string) []string {
	if format == "" {
		return nil
	}
	return []string{"--format", format}
}

// crashImage makes an empty image for a run, with a dirty bitmap if it is qcow2.
func crashImage(t testing.TB, dir, format string) string {
	t.Helper()
	if format == "" {
		return sparseImage(t, dir, crashDisk)
	}
	image := filepath.Join(dir, "disk.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "16M")
	run(t, "qemu-img", "bitmap", "--add", "-g", "4k", image, "b")
	return image
}

// Of the header of a qcow2 image.
const (
	qcow2Incompatible = 72
	qcow2Autoclear    = 88
	qcow2Dirty        = 1 << 0
	qcow2Corrupt      = 1 << 1
)

// makeDirty makes an image that nobody owns what one is that had lazy refcounts
// when its owner died: clusters in use are counted as free. It also has a feature
// that nobody knows, which who changes the image is to clear.
func makeDirty(t testing.TB, image string) {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	word := func(off int64) uint64 {
		var b [8]byte
		if _, err := f.ReadAt(b[:], off); err != nil {
			t.Fatal(err)
		}
		return binary.BigEndian.Uint64(b[:])
	}
	set := func(off int64, v uint64) {
		if _, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, v), off); err != nil {
			t.Fatal(err)
		}
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	// The refcount table, the first block that it names, and what qemu-img put
	// behind the header, these and the L1 table: four refcounts at once.
	block := int64(word(int64(word(48))))
	for c := int64(4); c < min(st.Size()/crashBlock, 24); c += 4 {
		set(block+2*c, 0)
	}
	set(qcow2Incompatible, word(qcow2Incompatible)|qcow2Dirty)
	set(qcow2Autoclear, word(qcow2Autoclear)|1<<63)
	// Whatever the clock's resolution, it has been changed.
	if err := os.Chtimes(image, time.Time{}, st.ModTime().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
}

// content is what the disk holds of the blocks that are written: as the owner
// shows it, or if there is none what is in the file.
func (r *crashRun) content() []byte {
	t := r.t
	t.Helper()
	const first = crashStripes * crashBlocks * crashBlock
	b := make([]byte, first+crashBlock)
	parts := map[int64][]byte{0: b[:first], crashFresh: b[first:]}
	if owner := r.owner(); owner != nil && r.cell.scene.format != "" {
		c := r.dial(owner)
		defer c.Abort()
		for off, p := range parts {
			if _, err := c.ReadAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		return b
	}
	path := r.image
	if r.cell.scene.format != "" {
		path = filepath.Join(t.TempDir(), "raw")
		run(t, "qemu-img", "convert", "-f", r.cell.scene.format, "-O", "raw", r.image, path)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off, p := range parts {
		if _, err := f.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func (r *crashRun) dial(s *crashSide) *client.Conn {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	c, err := client.Dial(ctx, s.uri(), client.Options{})
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

// fresh writes, beside the load, where a new L2 table is needed for it. If held,
// the write is under way until the hooks let it go on: what it changes is still to
// be written when the gate is closed. The load is paused until resume, as it
// flushes.
func (r *crashRun) fresh(s *crashSide, held bool) (resume func()) {
	t := r.t
	t.Helper()
	resume = r.load.pause()
	c := r.dial(s)
	if err := c.Flush(); err != nil { // the image's own timer has nothing to write either
		t.Fatal(err)
	}
	if held {
		s.hooks.stallNext("write")
	}
	done := make(chan error, 1)
	go func() {
		defer c.Abort()
		done <- r.load.write(c, make([]byte, crashBlock), len(r.load.blocks)-1, crashFresh)
	}()
	if !held {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		return resume
	}
	s.hooks.waitStalled()
	r.held = done
	return resume
}

// letGo lets a write go on that fresh holds.
func (r *crashRun) letGo(s *crashSide) {
	r.t.Helper()
	if r.held == nil {
		return
	}
	s.hooks.resume()
	if err := <-r.held; err != nil {
		r.t.Errorf("a write that was under way: %v", err)
	}
	r.held = nil
}

// lose says that the owner has not written all.
func (r *crashRun) lose() {
	if r.cell.scene.format != "" {
		r.leaks = true
		r.load.lose()
	}
}

// checkTables has qemu-img check an image that nobody owns.
func (r *crashRun) checkTables(when string) {
	t := r.t
	t.Helper()
	if r.cell.scene.format == "" || r.owner() != nil {
		return
	}
	features := binary.BigEndian.Uint64(readFile(t, r.image)[qcow2Incompatible:])
	if features&qcow2Corrupt != 0 {
		t.Errorf("%s: it is marked corrupt", when)
	}
	if features&qcow2Dirty != 0 {
		return // until it is mended its refcounts are what they are
	}
	out := tryRun(t, "qemu-img", "check", "-f", "qcow2", r.image)
	if out.code != 0 && !(r.leaks && out.code == 3) {
		t.Errorf("%s: qemu-img check: %d\n%s%s", when, out.code, out.stdout, out.stderr)
	}
}
