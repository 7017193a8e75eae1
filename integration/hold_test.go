package integration

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// held is how many writes an exporter says it holds.
func (e *daemon) held() (n, bytes int64) {
	e.t.Helper()
	q := e.qmp()
	defer q.Close()
	var s struct {
		Images []struct {
			Held      int64 `json:"held"`
			HeldBytes int64 `json:"held-bytes"`
		}
	}
	if err := json.Unmarshal(q.must("x-query-status", nil), &s); err != nil || len(s.Images) != 1 {
		e.t.Fatal(err)
	}
	return s.Images[0].Held, s.Images[0].HeldBytes
}

func (e *daemon) waitHeld(want int64) {
	e.t.Helper()
	waitFor(e.t, startTimeout, "so many writes are held", func() bool { n, _ := e.held(); return n == want })
}

// serveHolding starts an exporter that is inactive and holds writes.
func serveHolding(t testing.TB, image string, flags ...string) *daemon {
	t.Helper()
	if !slices.Contains(flags, "--inactive-writes") {
		flags = append(flags, "--inactive-writes", "hold=5m")
	}
	return serve(t, image, append(flags, "--inactive")...)
}

func wantHeldRefusal(t testing.TB, rep reply, why string) {
	t.Helper()
	if rep.errno != nbdEPERM || !strings.HasPrefix(rep.text, inactiveText+": ") || !strings.Contains(rep.text, why) {
		t.Errorf("%s %q, want EPERM and %q", errName(rep.errno), rep.text, why)
	}
}

// Writes of every kind and size wait for the activation, then run in the order
// in which they came; meanwhile the rest is served, and nothing is written.
func TestHoldUntilActive(t *testing.T) {
	t.Parallel()
	everyPlace(t, func(t *testing.T, dir string) {
		image := randomImage(t, dir, 1, 40*mib)
		e := serveHolding(t, image)
		c := dialRaw(t, e.socket, "")
		before, want := snap(t, image), randomBytes(1, 40*mib)
		var cookies []uint64
		var total int64
		for i, n := range []uint32{512, 4096, 65536, 32 * mib, 100_000, 4096} {
			b := randomBytes(int64(i+2), int64(n))
			cookies = append(cookies, c.send(cmdWrite, 0, uint64(i*512), n, b))
			copy(want[i*512:], b)
			total += int64(n)
		}
		cookies = append(cookies, c.send(cmdWrite, flagFUA, 36*mib, 512, want[:512]),
			c.send(cmdTrim, 0, 37*mib, 65536, nil), c.send(cmdWriteZeroes, 0, 37*mib, 65536, nil))
		copy(want[36*mib:], want[:512])
		clear(want[37*mib : 37*mib+65536])
		e.waitHeld(int64(len(cookies)))
		if _, bytes := e.held(); bytes != total+512 {
			t.Errorf("%d bytes are held, want %d", bytes, total+512)
		}
		if out := run(t, program(t), "status", "--control", e.control); !strings.Contains(out, "in 9 writes, until the image is active") {
			t.Errorf("status does not tell what is held:\n%s", out)
		}
		sameBytes(t, "a read", c.want(0, cmdRead, 0, 0, 65536, nil).data, randomBytes(1, 65536))
		c.want(0, cmdFlush, 0, 0, 0, nil)
		for _, cmd := range []uint16{cmdBlockStatus, cmdCache} {
			if rep := c.want(nbdEPERM, cmd, 0, 0, 4096, nil); rep.text != inactiveText {
				t.Errorf("text %q, want %q", rep.text, inactiveText)
			}
		}
		sameSnap(t, image, before)
		wantLocks(t, image, nil)
		e.activate()
		for _, cookie := range cookies {
			if rep := c.receive(0, 0); rep.cookie != cookie || rep.errno != 0 {
				t.Errorf("request %d: %s %q, want success of %d", rep.cookie, errName(rep.errno), rep.text, cookie)
			}
		}
		e.waitHeld(0)
		sameBytes(t, "the image", readFile(t, image), want)
	})
}

// Nobody activates: EPERM when the time is over, and not before.
func TestHoldTimesOut(t *testing.T) {
	t.Parallel()
	image := randomImage(t, tmpfsDir(t), 1, mib)
	before := snap(t, image)
	e := serveHolding(t, image, "--inactive-writes", "hold=300ms")
	c := dialRaw(t, e.socket, "")
	for _, cmd := range []uint16{cmdWrite, cmdWriteZeroes, cmdTrim} {
		var payload []byte
		if cmd == cmdWrite {
			payload = make([]byte, 4096)
		}
		began := time.Now()
		wantHeldRefusal(t, c.do(cmd, 0, 0, 4096, payload), "it was not activated within the 300ms that writes are held")
		if d := time.Since(began); d < 300*time.Millisecond {
			t.Errorf("refused after %v", d)
		}
	}
	sameSnap(t, image, before)
	e.activate()
	wantServes(t, c, 0, 3)
}

// A write that comes while its exporter still owns the image, but admits nothing
// any more, is refused, and never runs however soon the exporter is active
// again: others may have written in between.
func TestHoldNeverOutlivesALoss(t *testing.T) {
	t.Parallel()
	image := randomImage(t, tmpfsDir(t), 1, mib)
	before := readFile(t, image)
	h, prepare := newHooks(t)
	e := servePrepared(t, image, prepare, "--inactive-writes", "hold=5m")
	c := dialRaw(t, e.socket, "")
	h.holdAt("settle")
	q := e.qmp()
	defer q.Close()
	q.send(`{"execute":"blockdev-set-active","arguments":{"active":false}}` + "\n")
	h.wait()
	for i := range 10 {
		c.send(cmdWrite, 0, uint64(i*512), 512, make([]byte, 512))
	}
	waitFor(t, startTimeout, "the writes are there", func() bool { return e.inFlight() == 10 })
	q.send(`{"execute":"blockdev-set-active","arguments":{"active":true}}` + "\n")
	h.goOn()
	for range 2 {
		if r := q.next(); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	wantStatus(t, e, "active", 2)
	for range 10 {
		if rep := c.receive(0, 0); rep.errno != nbdEPERM || !strings.Contains(rep.text, lostText) {
			t.Errorf("%s %q", errName(rep.errno), rep.text)
		}
	}
	sameBytes(t, "the image", readFile(t, image), before)
}

// inFlight is how many requests an exporter says it has.
func (e *daemon) inFlight() (n int64) {
	e.t.Helper()
	q := e.qmp()
	defer q.Close()
	var s struct {
		Images []struct {
			InFlight int64 `json:"in-flight"`
		}
	}
	if err := json.Unmarshal(q.must("x-query-status", nil), &s); err != nil || len(s.Images) != 1 {
		e.t.Fatal(err)
	}
	return s.Images[0].InFlight
}

// A write does not run once its connection closes, whatever happens later. A client
// that says so is answered first, as the protocol has it.
func TestHoldDropsWithConnection(t *testing.T) {
	t.Parallel()
	image := randomImage(t, tmpfsDir(t), 1, 8*mib)
	before := readFile(t, image)
	e := serveHolding(t, image)
	closed, gone := dialRaw(t, e.socket, ""), dialRaw(t, e.socket, "")
	for _, c := range []*rawConn{closed, gone} {
		c.send(cmdWrite, 0, 0, 4096, make([]byte, 4096))
		c.send(cmdWrite, 0, mib, 4*mib, make([]byte, 4*mib))
	}
	e.waitHeld(4)
	closed.Close()
	gone.send(cmdDisc, 0, 0, 0, nil)
	for range 2 {
		if rep := gone.receive(0, 0); rep.errno != nbdEPERM || !strings.Contains(rep.text, "disconnected") {
			t.Errorf("%s %q", errName(rep.errno), rep.text)
		}
	}
	gone.wantClosed(startTimeout)
	e.waitHeld(0)
	e.activate()
	wantServes(t, dialRaw(t, e.socket, ""), 6*mib, 2)
	sameBytes(t, "the image", readFile(t, image)[:6*mib], before[:6*mib])
}

func TestHoldAnsweredByStop(t *testing.T) {
	t.Parallel()
	image := randomImage(t, tmpfsDir(t), 1, mib)
	before := snap(t, image)
	e := serveHolding(t, image)
	c := dialRaw(t, e.socket, "")
	for range 3 {
		c.send(cmdWrite, 0, 0, 4096, make([]byte, 4096))
	}
	e.waitHeld(3)
	e.signal(syscall.SIGTERM)
	for range 3 {
		if rep := c.receive(0, 0); rep.errno != nbdESHUTDOWN {
			t.Errorf("%s %q, want ESHUTDOWN", errName(rep.errno), rep.text)
		}
	}
	if code := e.wait(startTimeout); code != 0 {
		t.Errorf("exit status %d", code)
	}
	sameSnap(t, image, before)
}

// What is held has a part of the memory; the rest serves reads, of the same
// connection too.
func TestHoldLeavesMemoryToReads(t *testing.T) {
	t.Parallel()
	image := randomImage(t, tmpfsDir(t), 1, 8*mib)
	content := readFile(t, image)
	e := serveHolding(t, image, "--memory", "16M")
	c, other := dialRaw(t, e.socket, ""), dialRaw(t, e.socket, "")
	held := int64(0)
	for i := range 40 {
		c.send(cmdWrite, 0, 0, mib, make([]byte, mib))
		if held < 3 { // of a quarter, with what a buffer takes beside its payload
			held++
			e.waitHeld(held)
		} else {
			wantHeldRefusal(t, c.receive(0, 0), "the memory for held writes, 4096 KiB, is full")
		}
		for _, r := range []*rawConn{c, other} {
			if rep := r.do(cmdRead, 0, 0, 4*mib, nil); !bytes.Equal(rep.data, content[:4*mib]) {
				t.Fatalf("read %d: %s", i, errName(rep.errno))
			}
		}
	}
	e.activate()
	for range held {
		if rep := c.receive(0, 0); rep.errno != 0 {
			t.Errorf("%s %q", errName(rep.errno), rep.text)
		}
	}
}

// Histories with writes that are held, and then run, time out or are lost: each
// write's answer is the truth.
func TestTwoExportersHolding(t *testing.T) {
	runSoak(t, tmpfsDir(t), soakTime(t, 6*time.Second), "--inactive-writes", "hold=20ms")
}

func TestHoldOptions(t *testing.T) {
	t.Parallel()
	image := sparseImage(t, t.TempDir(), mib)
	for _, c := range []struct {
		args []string
		text string
	}{
		{[]string{"--inactive-writes", "wait"}, "reject, hold, hold=TIME"},
		{[]string{"--inactive-writes", "hold=0"}, "no time to hold writes for"},
		{[]string{"--inactive-writes", "hold=-1s"}, "no time to hold writes for"},
		{[]string{"--inactive-writes", "hold", "-r"}, "takes no writes"},
		{[]string{"--takeover", "x", "-r"}, "takes no writes"},
		{[]string{"--takeover", ""}, "needs the control socket of a peer"},
		{[]string{"--takeover", "unix:x", "--control", "x"}, "the peer is another exporter"},
		{[]string{"--takeover", "x", "--inactive-writes", "reject"}, "leave out --inactive-writes reject"},
		{[]string{"--takeover-back"}, "only with --takeover"},
		{[]string{"--takeover-min-hold", "-1s"}, "is negative"},
	} {
		r := cli(t, append(append([]string{"serve", "-f", "raw", "--inactive"}, c.args...), image)...)
		if r.code != 2 || !strings.Contains(r.stderr, c.text) {
			t.Errorf("%v: exit status %d, %s", c.args, r.code, r.stderr)
		}
	}
}
