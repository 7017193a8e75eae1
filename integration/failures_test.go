package integration

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// failingDevice is a block device of 64 MiB that takes any write and can make
// only some MiB of them durable.
func failingDevice(t *testing.T) string {
	t.Helper()
	return loopDevice(t, smallDisk(t))
}

// smallDisk is the path of an image of 64 MiB on a file system of 4 MiB.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := tmpfsDir(t)
	p := spawn(t, "sleep", inNamespace(
		`mkdir "$1/small"; mount -t tmpfs -o size=4m none "$1/small"; truncate -s 64M "$1/small/disk.img"; : >"$1/ready"; shift`, dir),
		"sleep", "infinity")
	waitFor(t, startTimeout, "the small file system is there", func() bool {
		_, err := os.Stat(dir + "/ready")
		return err == nil
	})
	return fmt.Sprintf("/proc/%d/root%s/small/disk.img", p.pid, dir)
}

// A sync that fails may have lost writes, and the kernel says so only once:
// the image is kept, not handed over as if it were clean.
func TestFailedSync(t *testing.T) {
	device := failingDevice(t)
	e, other := serve(t, device), serve(t, device, "--inactive")
	c := dialRaw(t, e.socket, "")
	for i := range uint64(16) {
		c.want(0, cmdWrite, 0, i*mib, mib, randomBytes(int64(i), mib))
	}
	r := cli(t, "inactivate", "--control", e.control)
	wantFailure(t, r, 1, device, "abandon")
	if s := e.status(); !strings.Contains(s.State, "failed") {
		t.Errorf("state %q after a failed sync", s.State)
	}
	check := func() {
		t.Helper()
		if held := processLocks(t, e.pid, device); !slices.Equal(held, activeLocks) {
			t.Errorf("after a failed sync %v are held", held)
		}
		for _, cmd := range []uint16{cmdWrite, cmdWriteZeroes, cmdTrim} {
			var payload []byte
			if cmd == cmdWrite {
				payload = make([]byte, 4096)
			}
			if rep := c.want(nbdEIO, cmd, 0, 0, 4096, payload); rep.text == "" {
				t.Error("an error without a text")
			}
		}
		c.want(nbdEIO, cmdFlush, 0, 0, 0, nil)
		c.want(0, cmdRead, 0, 0, 4096, nil)
		c.want(0, cmdCache, 0, 0, 4096, nil)
		c.want(0, cmdBlockStatus, 0, 0, 4096, nil)
	}
	check()
	// No order but one leaves that state, and nobody else gets the image.
	wantFailure(t, cli(t, "inactivate", "--control", e.control), 1, "failed")
	wantFailure(t, cli(t, "activate", "--control", e.control), 1, "failed")
	wantFailure(t, cli(t, "activate", "--control", other.control), 1, lockText)
	e.signal(syscall.SIGUSR2)
	e.signal(syscall.SIGUSR1)
	check()

	n := len(e.log.lines())
	run(t, program(t), "inactivate", "--abandon", "--control", e.control)
	e.log.wait(t, n, "a possible loss", func(l string) bool {
		return strings.Contains(l, "lost") || strings.Contains(l, "loss")
	})
	wantStatus(t, e, "inactive", 1)
	// Told once, as after the sync that failed.
	if rep := c.want(nbdEIO, cmdFlush, 0, 0, 0, nil); !strings.Contains(rep.text, "may be lost") {
		t.Errorf("a flush after it was given up: %q", rep.text)
	}
	wantRefuses(t, c)
	if held := processLocks(t, e.pid, device); len(held) != 0 {
		t.Errorf("an abandoned image is still locked: %v", held)
	}
	if w := writableHolds(t, e.pid, device); len(w) != 0 {
		t.Errorf("an abandoned image can be written: %v", w)
	}
	run(t, program(t), "activate", "--control", other.control)
	wantServes(t, dialRaw(t, other.socket, ""), 0, 3)
	other.inactivate()
	run(t, program(t), "activate", "--control", e.control)
	wantStatus(t, e, "active", 2)
}

// A FLUSH that fails says so, and so does everything after it.
func TestFailedFlush(t *testing.T) {
	e := serve(t, failingDevice(t))
	c, other := dialRaw(t, e.socket, ""), dialRaw(t, e.socket, "")
	for i := range uint64(16) {
		c.want(0, cmdWrite, 0, i*mib, mib, randomBytes(int64(i), mib))
	}
	if rep := other.do(cmdFlush, 0, 0, 0, nil); rep.errno != nbdEIO && rep.errno != nbdENOSPC {
		t.Errorf("a FLUSH that cannot succeed: %s", errName(rep.errno))
	}
	for range 3 { // the kernel reports it once, we do not forget
		if rep := c.do(cmdFlush, 0, 0, 0, nil); rep.errno == 0 {
			t.Error("a FLUSH after a failed one succeeded")
		}
	}
	if r := cli(t, "inactivate", "--control", e.control); r.code != 1 {
		t.Errorf("an image whose FLUSH failed was handed over: exit status %d", r.code)
	}
	e.signal(syscall.SIGTERM)
	if code := e.wait(startTimeout); code != 1 {
		t.Errorf("exit status %d after losing writes, want 1", code)
	}
}

// A last sync that fails is exit status 1, with what may be lost.
func TestFailedLastFlush(t *testing.T) {
	device := failingDevice(t)
	e := serve(t, device)
	c := dialRaw(t, e.socket, "")
	for i := range uint64(16) {
		c.want(0, cmdWrite, 0, i*mib, mib, randomBytes(int64(i), mib))
	}
	c.Close()
	n := len(e.log.lines())
	e.signal(syscall.SIGTERM)
	if code := e.wait(startTimeout); code != 1 {
		t.Errorf("exit status %d, want 1", code)
	}
	if said := strings.Join(e.log.lines()[n:], "\n"); !strings.Contains(said, device) || !strings.Contains(said, "lost") {
		t.Errorf("the last words do not say what may be lost: %s", said)
	}
}

// dirty writes so much through a connection that making it durable takes a
// while.
func dirty(t testing.TB, c *rawConn, seed int64) {
	t.Helper()
	for off := range uint64(12) {
		c.want(0, cmdWrite, 0, off*32*mib, 32*mib, randomBytes(seed+int64(off), 32*mib))
	}
}

// While an inactivation takes its time, reads are served, the same order joins
// it and the opposite one is refused with the state.
func TestOrdersDuringTransition(t *testing.T) {
	image := sparseImage(t, t.TempDir(), 512*mib)
	e := serve(t, image)
	c, reader := dialRaw(t, e.socket, ""), dialRaw(t, e.socket, "")
	first, second, third := e.qmp(), e.qmp(), e.qmp()
	for round := range int64(5) {
		dirty(t, c, round)
		var wg sync.WaitGroup
		var joined, opposite error
		done := make(chan struct{})
		began := time.Now()
		wg.Go(func() {
			first.must("blockdev-set-active", map[string]any{"active": false})
			close(done)
		})
		time.Sleep(5 * time.Millisecond)
		wg.Go(func() { _, joined = second.execute("blockdev-set-active", map[string]any{"active": false}) })
		wg.Go(func() { _, opposite = third.execute("blockdev-set-active", map[string]any{"active": true}) })
		var reads int
		var slowest time.Duration
		for over := false; !over; reads++ {
			begin := time.Now()
			reader.want(0, cmdRead, 0, 480*mib, 4096, nil)
			slowest = max(slowest, time.Since(begin))
			select {
			case <-done:
				over = true
			default:
			}
		}
		wg.Wait()
		if joined != nil {
			t.Errorf("the same order during the transition: %v", joined)
		}
		if took := time.Since(began); slowest > time.Second+took/2 {
			t.Errorf("a read took %v during a transition of %v", slowest, took)
		}
		if opposite == nil {
			// It came before or after: nothing seen. Once more.
			second.must("blockdev-set-active", map[string]any{"active": true})
			continue
		}
		if !strings.Contains(opposite.Error(), "inactivating") {
			t.Errorf("the opposite order during the transition: %v", opposite)
		}
		if reads < 2 {
			continue
		}
		t.Logf("%d reads during the transition, the slowest %v", reads, slowest)
		wantStatus(t, e, "inactive", uint64(round)+1)
		wantLocks(t, image, nil)
		return
	}
	t.Error("no order fell into a transition")
}

// A stop in the middle of a transition lets it finish.
func TestStopDuringTransition(t *testing.T) {
	image := sparseImage(t, t.TempDir(), 512*mib)
	e := serve(t, image)
	c := dialRaw(t, e.socket, "")
	dirty(t, c, 1)
	e.signal(syscall.SIGUSR2)
	e.signal(syscall.SIGTERM)
	if code := e.wait(startTimeout); code != 0 {
		t.Errorf("exit status %d", code)
	}
	for off := range int64(12) {
		sameBytes(t, "the image", fileAt(t, image, off*32*mib, 32*mib), randomBytes(1+off, 32*mib))
	}
	wantLocks(t, image, nil)
}
