package integration

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// ownSmallDisk is a file system of 4 MiB where an image has a path for everybody, and
// so an owner record.
func ownSmallDisk(t *testing.T) string {
	t.Helper()
	dir := tmpfsDir(t)
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatalf("cannot mount a small file system (%v); run this as root, or do without with -skip %s", err, t.Name())
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill leaves nothing of the file system that path is on, until path is removed.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for b := make([]byte, 4096); err == nil; {
		_, err = f.Write(b)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
}

// A stop on a full disk keeps what is nowhere else until there is space, or somebody
// insists, or has said that it is not to.
func TestStopOnAFullDisk(t *testing.T) {
	const writes, apart = 16, 1 << 30 // a table each, which only the server has
	for _, end := range []string{"space", "second signal", "no wait"} {
		space, more := end == "space", []string{"-f", "qcow2"}
		if end == "no wait" {
			more = append(more, "--full-disk-wait", "0s")
		}
		dir := ownSmallDisk(t)
		image, ballast := filepath.Join(dir, "new.qcow2"), filepath.Join(dir, "ballast")
		wantOutput(t, cli(t, "create", image, "40G"), "")
		e := serve(t, image, more...)
		c := dialRaw(t, e.socket, "")
		block := bytes.Repeat([]byte("x"), 4096)
		for i := range uint64(writes) {
			c.want(0, cmdWrite, 0, i*apart, uint32(len(block)), block)
		}
		fill(t, ballast)
		e.signal(syscall.SIGTERM)
		if end != "no wait" {
			e.log.wait(t, 0, "it waits for space", func(line string) bool { return strings.Contains(line, "the stop waits for space") })
		}
		switch end {
		case "space":
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
		case "second signal":
			e.signal(syscall.SIGTERM)
		}
		want := 0
		if !space {
			want = 1
		}
		if got := e.wait(startTimeout); got != want {
			t.Errorf("exit status %d with %s\n%s", got, end, e.log)
		}
		if end == "no wait" && (strings.Contains(e.log.String(), "waits for space") || !strings.Contains(e.log.String(), "writes acknowledged since the last flush may be lost")) {
			t.Errorf("it does not say what is lost, or waits\n%s", e.log)
		}
		if !space {
			continue
		}
		wantOutput(t, cli(t, "check", image), "No errors were found")
		wantOutput(t, cli(t, "who", image), "let go in order")
		e = serve(t, image, "-f", "qcow2")
		c = dialRaw(t, e.socket, "")
		for i := range uint64(writes) {
			if r := c.want(0, cmdRead, 0, i*apart, uint32(len(block)), nil); !bytes.Equal(r.data, block) {
				t.Errorf("write %d is lost", i)
			}
		}
		c.Close()
		e.stop()
	}
}

// The owner record is right on a full disk too, from owner to owner and after a stop.
// Where there was none before there is room for none, which is no failure of a stop.
func TestOwnerRecordOnAFullDisk(t *testing.T) {
	dir := ownSmallDisk(t)
	image, other, ballast := sparseImage(t, dir, mib), filepath.Join(dir, "other.img"), filepath.Join(dir, "ballast")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a, b := serve(t, image), serve(t, image, "--inactive")
	fill(t, ballast)
	for _, to := range []*daemon{b, a} {
		if h := handover(t, map[*daemon]string{a: b.control, b: a.control}[to], to.control); h.Outcome != "moved" || h.Images[0].Proof != "owner record" {
			t.Fatalf("%+v", h)
		}
		r := cli(t, "who", image)
		wantOutput(t, r, "it is locked as that says")
		wantOutput(t, r, to.control)
	}
	for _, e := range []*daemon{a, b} {
		e.signal(syscall.SIGTERM)
		if got := e.wait(startTimeout); got != 0 || strings.Contains(e.log.String(), "cannot") {
			t.Errorf("exit status %d\n%s", got, e.log)
		}
	}
	r := cli(t, "who", image)
	wantOutput(t, r, "let go in order")
	wantOutput(t, r, "epoch        3")

	e := serve(t, other)
	wantOutput(t, cli(t, "status", "--control", e.control), "owner record per process (")
	e.signal(syscall.SIGTERM)
	if got := e.wait(startTimeout); got != 0 {
		t.Errorf("exit status %d\n%s", got, e.log)
	}
}
