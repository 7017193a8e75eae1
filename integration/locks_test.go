package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestLocksOfEachState(t *testing.T) {
	everyPlace(t, func(t *testing.T, dir string) {
		image := sparseImage(t, dir, mib)
		e := serve(t, image, "--inactive")
		wantLocks(t, image, nil)
		e.activate()
		wantLocks(t, image, activeLocks)
		e.inactivate()
		wantLocks(t, image, nil)
		e.stop()

		ro := serve(t, image, "--read-only")
		wantLocks(t, image, readOnlyLocks)
		ro.inactivate()
		wantLocks(t, image, nil)
		ro.activate()
		wantLocks(t, image, readOnlyLocks)
		ro.stop()
		wantLocks(t, image, nil)

		off := serve(t, image, "--locking", "off")
		wantLocks(t, image, nil)
		off.stop()
	})
}

// Two read-only exporters do not disturb one another, a writer does both.
func TestReadOnlyExportersShare(t *testing.T) {
	image := randomImage(t, tmpfsDir(t), 1, mib)
	before := snap(t, image)
	first, second := serve(t, image, "--read-only"), serve(t, image, "--read-only")
	for _, e := range []*daemon{first, second} {
		c := dialRaw(t, e.socket, "")
		c.want(0, cmdRead, 0, 0, 4096, nil)
		c.want(0, cmdBlockStatus, 0, 0, 4096, nil)
		c.want(0, cmdCache, 0, 0, 4096, nil)
		c.want(0, cmdFlush, 0, 0, 0, nil)
		c.want(nbdEPERM, cmdWrite, 0, 0, 4096, make([]byte, 4096))
		c.want(nbdEPERM, cmdTrim, 0, 0, 4096, nil)
		c.want(nbdEPERM, cmdWriteZeroes, 0, 0, 4096, nil)
		if w := writableHolds(t, e.pid, image); len(w) != 0 {
			t.Errorf("a read-only exporter can write its image: %v", w)
		}
	}
	writer := serve(t, image, "--inactive")
	wantFailure(t, cli(t, "activate", "--control", writer.control), 1, "Failed to get")
	first.stop()
	wantFailure(t, cli(t, "activate", "--control", writer.control), 1, "Failed to get")
	second.stop()
	sameSnap(t, image, before)
	run(t, program(t), "activate", "--control", writer.control)
	wantFailure(t, cli(t, "serve", "-r", "-f", "raw", "-k", shortDir(t)+"/nbd", image), 1, "Failed to get")
}

// What others write while nobody owns the image is what we serve. Whom we let
// in otherwise is the lock matrix.
func TestQEMUToolsWriteWhileInactive(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	need(t, "qemu-io", "qemu-utils")
	everyPlace(t, func(t *testing.T, dir string) {
		image := randomImage(t, dir, 1, mib)
		e := serve(t, image, "--inactive")
		run(t, "qemu-io", "-f", "raw", "-c", "write 0 4k", image)
		run(t, "qemu-img", "resize", "-f", "raw", image, "2M")
		want := bytes.Repeat([]byte{0xcd}, 4096)
		sameBytes(t, "read while inactive", dialRaw(t, e.socket, "").want(0, cmdRead, 0, 0, 4096, nil).data, want)
		e.activate()
		sameBytes(t, "read while active", dialRaw(t, e.socket, "").want(0, cmdRead, 0, 0, 4096, nil).data, want)
	})
}

// holdByQemuIO opens an image for writing with qemu-io and keeps it open.
func holdByQemuIO(t testing.TB, image string) (release func()) {
	t.Helper()
	need(t, "qemu-io", "qemu-utils")
	var stdin io.WriteCloser
	p := spawn(t, "qemu-io", func(c *exec.Cmd) {
		var err error
		if stdin, err = c.StdinPipe(); err != nil {
			t.Fatal(err)
		}
	}, "qemu-io", "-f", "raw", image)
	waitFor(t, startTimeout, "qemu-io has the image", func() bool { return slices.Contains(fileLocks(t, image), 101) })
	return func() {
		fmt.Fprintln(stdin, "quit")
		p.wait(startTimeout)
	}
}

// A dead owner's locks go with it, however many connections it had.
func TestLocksEndWithTheProcess(t *testing.T) {
	image := sparseImage(t, tmpfsDir(t), mib)
	a, b := serve(t, image), serve(t, image, "--inactive")
	for i := range uint64(4) {
		wantServes(t, dialRaw(t, a.socket, ""), i*4096, int64(i))
	}
	a.kill()
	wantLocks(t, image, nil)
	b.activate()
	wantLocks(t, image, activeLocks)
	sameBytes(t, "the dead owner's write", dialRaw(t, b.socket, "").want(0, cmdRead, 0, 0, 4096, nil).data, randomBytes(0, 4096))
}

// The path may come to mean another file; that must not be taken for ours.
func TestActivationChecksThePath(t *testing.T) {
	dir := tmpfsDir(t)
	image := randomImage(t, dir, 1, mib)
	e := serve(t, image, "--inactive")
	if err := os.Rename(image, image+".old"); err != nil {
		t.Fatal(err)
	}
	other := randomImage(t, dir, 2, mib)
	before, old := snap(t, other), snap(t, image+".old")
	_, err := e.qmp().execute("blockdev-set-active", map[string]any{"active": true})
	if err == nil {
		t.Error("an exporter took ownership of another file than the one it serves")
	}
	sameSnap(t, other, before)
	sameSnap(t, image+".old", old)
	wantLocks(t, other, nil)
	wantLocks(t, image+".old", nil)
	sameBytes(t, "reads", dialRaw(t, e.socket, "").want(0, cmdRead, 0, 0, 4096, nil).data, randomBytes(1, 4096))
	// Back in place it works.
	if err := os.Rename(image+".old", image); err != nil {
		t.Fatal(err)
	}
	e.activate()
	wantServes(t, dialRaw(t, e.socket, ""), 0, 3)
}

// A symbolic link is another name of the same image.
func TestLocksSeeThroughLinks(t *testing.T) {
	dir := tmpfsDir(t)
	image := sparseImage(t, dir, mib)
	for _, link := range []struct {
		name string
		make func(old, new string) error
	}{{"symbolic", os.Symlink}, {"hard", os.Link}} {
		t.Run(link.name, func(t *testing.T) {
			path := dir + "/" + link.name
			if err := link.make(image, path); err != nil {
				t.Fatal(err)
			}
			e := serve(t, image)
			wantFailure(t, cli(t, "serve", "-f", "raw", "-k", shortDir(t)+"/nbd", path), 1, lockText)
			e.signal(syscall.SIGUSR2)
			e.waitActive(false)
			e.stop()
		})
	}
}

// While the path of an active image names something else, status and
// query-named-block-nodes say where its bytes are.
func TestLostPathIsTold(t *testing.T) {
	image := randomImage(t, tmpfsDir(t), 1, mib)
	e := serve(t, image)
	q := e.qmp()
	defer q.Close()
	told := func() (lost string) {
		t.Helper()
		var s struct {
			Images []struct {
				PathLost string `json:"path-lost"`
			}
		}
		var nodes []struct {
			PathLost string `json:"x-path-lost"`
		}
		for cmd, into := range map[string]any{"x-query-status": &s, "query-named-block-nodes": &nodes} {
			if err := json.Unmarshal(q.must(cmd, nil), into); err != nil {
				t.Fatal(err)
			}
		}
		lost = s.Images[0].PathLost
		for _, n := range nodes {
			if n.PathLost != lost {
				return "" // between two looks
			}
		}
		return lost
	}
	if lost := told(); lost != "" {
		t.Errorf("an image in its place is said to be at %s", lost)
	}
	if err := os.Rename(image, image+".old"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, startTimeout, "the path is lost", func() bool { return told() != "" })
	sameBytes(t, "what is said to be the image", readFile(t, told()), randomBytes(1, mib))
	if out := run(t, program(t), "status", "--control", e.control); !strings.Contains(out, "path lost    it names another file or none; copy the bytes from "+told()) {
		t.Errorf("status:\n%s", out)
	}
	if err := os.Rename(image+".old", image); err != nil {
		t.Fatal(err)
	}
	waitFor(t, startTimeout, "the path is right again", func() bool { return told() == "" })
}
