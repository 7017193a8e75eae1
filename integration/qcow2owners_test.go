package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

// makeQcow2 makes an image with qemu-img; args are its options.
func makeQcow2(t testing.TB, path, size string, args ...string) string {
	t.Helper()
	need(t, "qemu-img", "qemu-utils")
	run(t, slices.Concat([]string{"qemu-img", "create", "-q", "-f", "qcow2"}, args, []string{path, size})...)
	return path
}

// qcow2Content is what a guest finds in an image that nobody owns, which has to
// be without fault.
func qcow2Content(t testing.TB, image string) []byte {
	t.Helper()
	run(t, "qemu-img", "check", "-q", "-f", "qcow2", image)
	raw := filepath.Join(t.TempDir(), "raw")
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
	return readFile(t, raw)
}

// Two exporters of one qcow2 image under load, between which it goes to and fro.
func TestTwoExportersQcow2(t *testing.T) {
	duration := soakTime(t, 60*time.Second) / 6
	size := fmt.Sprint(soakSectors * sectorSize)
	t.Run("tmpfs", func(t *testing.T) {
		dir := tmpfsDir(t)
		soakImage(t, makeQcow2(t, dir+"/disk.qcow2", size, "-o", "cluster_size=16k"), "qcow2", duration)
	})
	t.Run("disk", func(t *testing.T) {
		dir := t.TempDir()
		soakImage(t, makeQcow2(t, dir+"/disk.qcow2", size, "-o", "cluster_size=16k"), "qcow2", duration, "--cache", "none")
	})
	t.Run("overlay", func(t *testing.T) {
		dir := tmpfsDir(t)
		makeQcow2(t, dir+"/base.qcow2", size)
		soakImage(t, makeQcow2(t, dir+"/disk.qcow2", size, "-o", "extended_l2=on", "-b", "base.qcow2", "-F", "qcow2"), "qcow2", duration)
	})
}

// One qcow2 image between nbd-export and QEMU's storage daemon: each owns it in
// turn, and finds all that the other has written.
func TestQcow2BetweenUsAndQEMU(t *testing.T) {
	const size = 8 * mib
	for name, args := range map[string][]string{
		"plain":     nil,
		"small":     {"-o", "cluster_size=512,refcount_bits=1,lazy_refcounts=on"},
		"extended":  {"-o", "extended_l2=on,compression_type=zstd"},
		"data file": {"-o", "data_file=DATA"},
		"overlay":   {"-b", "base.raw", "-F", "raw"},
	} {
		t.Run(name, func(t *testing.T) {
			seed := soakSeed(t)
			rnd := rand.New(rand.NewPCG(seed, 1))
			dir := t.TempDir()
			want := make([]byte, size)
			args = slices.Clone(args)
			for i := range args {
				if args[i] == "data_file=DATA" {
					args[i] = "data_file=" + dir + "/data"
				}
			}
			if name == "overlay" {
				base := make([]byte, size/2+512)
				for i := range base {
					base[i] = byte(rnd.Uint32())
				}
				if err := os.WriteFile(dir+"/base.raw", base, 0o600); err != nil {
					t.Fatal(err)
				}
				copy(want, base)
			}
			image := makeQcow2(t, dir+"/disk.qcow2", fmt.Sprint(size), args...)
			ours := serve(t, image, "-f", "qcow2", "--inactive")
			theirs := serveQSDFormat(t, image, "qcow2", true)
			for round := range 20 {
				for _, owner := range []*daemon{ours, theirs} {
					q := owner.qmp()
					q.must("blockdev-set-active", map[string]any{"active": true})
					c, err := client.Dial(t.Context(), owner.uri(), client.Options{})
					if err != nil {
						t.Fatal(err)
					}
					got := make([]byte, size)
					if _, err := c.ReadAt(got, 0); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(got, want) {
						t.Fatalf("round %d: what the other wrote is not all there", round)
					}
					for range 12 {
						off := rnd.IntN(size - 200000)
						b := make([]byte, 1+rnd.IntN(200000))
						switch rnd.IntN(5) {
						case 0:
							if err := c.WriteZeroes(int64(off), uint32(len(b)), 0); err != nil {
								t.Fatal(err)
							}
						default:
							for i := range b {
								b[i] = byte(rnd.Uint32())
							}
							if _, err := c.WriteAt(b, int64(off), rnd.IntN(4) == 0); err != nil {
								t.Fatal(err)
							}
						}
						copy(want[off:], b)
					}
					c.Close()
					q.must("blockdev-set-active", map[string]any{"active": false})
					q.Close()
					if l := processLocks(t, ours.pid, image); len(l) != 0 {
						t.Errorf("nbd-export is inactive and holds %v", l)
					}
					if !bytes.Equal(qcow2Content(t, image), want) {
						t.Fatalf("round %d: the image differs", round)
					}
				}
			}
		})
	}
}

// An owner of a qcow2 image is killed under load, again and again: the next one
// gets the image at once, with everything that was flushed, and none of what was
// not is mixed up. At worst clusters are leaked.
func TestQcow2OwnerIsKilled(t *testing.T) {
	const blocks, size = 256, 64 << 10
	dir := tmpfsDir(t)
	image := makeQcow2(t, dir+"/disk.qcow2", fmt.Sprint(blocks*size), "-o", "cluster_size=16k")
	seed := soakSeed(t)
	rnd := rand.New(rand.NewPCG(seed, 1))
	flushed := make([]byte, blocks) // what block i is full of
	for round := range 10 {
		e := serve(t, image, "-f", "qcow2")
		c, err := client.Dial(t.Context(), e.uri(), client.Options{})
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		for i := range blocks {
			if _, err := c.ReadAt(got, int64(i)*size); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, bytes.Repeat(got[:1], size)) {
				t.Errorf("round %d: block %d is a mixture", round, i)
			}
			if i%2 == 0 && got[0] != flushed[i] {
				t.Errorf("round %d: block %d has %d, and %d was flushed", round, i, got[0], flushed[i])
			}
			flushed[i] = got[0]
		}
		// The even ones are flushed, the odd ones are not.
		write := func(i int) {
			b := bytes.Repeat([]byte{byte(1 + rnd.IntN(255))}, size)
			if _, err := c.WriteAt(b, int64(i)*size, false); err != nil {
				t.Fatal(err)
			}
			flushed[i] = b[0]
		}
		for range 40 {
			write(2 * rnd.IntN(blocks/2))
		}
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
		for range 40 {
			write(2*rnd.IntN(blocks/2) + 1)
		}
		e.kill()
		c.Close()
		r := tryRun(t, "qemu-img", "check", "-f", "qcow2", image)
		if r.code != 0 && r.code != 3 {
			t.Fatalf("round %d: %s%s", round, r.stdout, r.stderr)
		}
	}
}

// A qcow2 image goes by itself to whose client writes.
func TestTakeoverQcow2(t *testing.T) {
	dir := tmpfsDir(t)
	makeQcow2(t, dir+"/base.qcow2", "16M")
	image := makeQcow2(t, dir+"/disk.qcow2", "16M", "-b", "base.qcow2", "-F", "qcow2")
	sides := serveTakeover(t, image, 2, "-f", "qcow2", "--takeover-back")
	want := make([]byte, 16<<20)
	for round := range 20 {
		c, err := client.Dial(t.Context(), sides[round%2].uri(), client.Options{})
		if err != nil {
			t.Fatal(err)
		}
		b := bytes.Repeat([]byte{byte(round + 1)}, 50000)
		off := round * 700001
		if _, err := c.WriteAt(b, int64(off), false); err != nil {
			t.Fatal(err)
		}
		copy(want[off:], b)
		got := make([]byte, len(want))
		if _, err := c.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("round %d: what the other wrote is not all there", round)
		}
		c.Close()
	}
	for _, e := range sides {
		e.stop()
	}
	if !bytes.Equal(qcow2Content(t, image), want) {
		t.Error("the image differs")
	}
}
