package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	inactiveText = "export is inactive"
	lockText     = `Failed to get "write" lock`
)

// status is what "status --json" must tell of an image.
type status struct {
	Image string    `json:"image"`
	State string    `json:"state"`
	Step  string    `json:"step"`
	Epoch uint64    `json:"epoch"`
	Since time.Time `json:"since"`
	Size  int64     `json:"size"`
	Locks struct {
		Held string `json:"held"`
	} `json:"locks"`
	Connections  int64  `json:"connections"`
	BytesWritten uint64 `json:"bytes-written"`
}

func (e *daemon) status() status {
	e.t.Helper()
	return decodeStatus(e.t, []byte(run(e.t, program(e.t), "status", "--json", "--control", e.control)))
}

// status is the same over a connection that is open already.
func (q *qmpConn) status() status {
	q.t.Helper()
	return decodeStatus(q.t, q.must("x-query-status", nil))
}

func decodeStatus(t testing.TB, b []byte) status {
	t.Helper()
	var s struct{ Images []status }
	if err := json.Unmarshal(b, &s); err != nil || len(s.Images) != 1 {
		t.Fatalf("status of one image: %v in %s", err, b)
	}
	return s.Images[0]
}

func wantStatus(t testing.TB, e *daemon, state string, epoch uint64) {
	t.Helper()
	if s := e.status(); s.State != state || s.Epoch != epoch {
		t.Errorf("status: %s, epoch %d; want %s, epoch %d", s.State, s.Epoch, state, epoch)
	}
}

// orders are the ways to change ownership.
var orders = map[string]func(e *daemon, active bool){
	"signal": func(e *daemon, active bool) {
		e.t.Helper()
		sig := syscall.SIGUSR2
		if active {
			sig = syscall.SIGUSR1
		}
		e.signal(sig)
		e.waitActive(active)
	},
	"control socket": func(e *daemon, active bool) {
		e.t.Helper()
		if active {
			e.activate()
		} else {
			e.inactivate()
		}
	},
	"verb": func(e *daemon, active bool) {
		e.t.Helper()
		verb := "inactivate"
		if active {
			verb = "activate"
		}
		run(e.t, program(e.t), verb, "--control", e.control)
	},
}

// wantServes requires that an exporter takes and returns bytes.
func wantServes(t testing.TB, c *rawConn, off uint64, seed int64) {
	t.Helper()
	b := randomBytes(seed, 4096)
	c.want(0, cmdWrite, 0, off, 4096, b)
	sameBytes(t, "what was just written", c.want(0, cmdRead, 0, off, 4096, nil).data, b)
}

// wantRefuses requires all that an inactive export owes a client.
func wantRefuses(t testing.TB, c *rawConn) {
	t.Helper()
	before := c.want(0, cmdRead, 0, 0, 65536, nil).data
	for _, r := range []struct {
		what       string
		cmd, flags uint16
		payload    []byte
	}{
		{"WRITE", cmdWrite, 0, make([]byte, 65536)},
		{"WRITE with FUA", cmdWrite, flagFUA, make([]byte, 65536)},
		{"WRITE_ZEROES", cmdWriteZeroes, 0, nil},
		{"WRITE_ZEROES with NO_HOLE", cmdWriteZeroes, flagNoHole, nil},
		{"TRIM", cmdTrim, 0, nil},
		{"CACHE", cmdCache, 0, nil},
		{"BLOCK_STATUS", cmdBlockStatus, 0, nil},
	} {
		if r.cmd == cmdBlockStatus && !c.structured {
			continue
		}
		rep := c.want(nbdEPERM, r.cmd, r.flags, 0, 65536, r.payload)
		if c.structured && rep.text != inactiveText {
			t.Errorf("%s: text %q, want %q", r.what, rep.text, inactiveText)
		}
	}
	c.want(0, cmdFlush, 0, 0, 0, nil)
	sameBytes(t, "a read after refused writes", c.want(0, cmdRead, 0, 0, 65536, nil).data, before)
}

func TestInactiveRefusesAndChangesNothing(t *testing.T) {
	everyPlace(t, func(t *testing.T, dir string) {
		image := patchyImage(t, dir, 4*mib)
		before := snap(t, image)
		e := serve(t, image, "--inactive")
		structured, simple := dialRaw(t, e.socket, ""), dialSimple(t, e.socket, "")
		if structured.flags&2 != 0 {
			t.Error("an inactive export is announced as read-only")
		}
		for range 3 {
			wantRefuses(t, structured)
			wantRefuses(t, simple)
		}
		wantLocks(t, image, nil)
		if w := writableHolds(t, e.pid, image); len(w) != 0 {
			t.Errorf("an inactive exporter can write its image: %v", w)
		}
		if len(holds(t, e.pid, image, false)) == 0 {
			t.Error("the check of descriptors sees none at all")
		}
		sameSnap(t, image, before)
		e.stop()
		sameSnap(t, image, before)
	})
}

func TestInactiveSeenByLibNBD(t *testing.T) {
	e := serve(t, randomImage(t, tmpfsDir(t), 1, mib), "--inactive")
	python(t, e.uri(), `
h = connect("base:allocation")
assert not h.is_read_only()
first = h.pread(65536, 0)
for i in range(3):
    for f in (lambda: h.pwrite(bytes(65536), 0),
              lambda: h.zero(65536, 0),
              lambda: h.trim(65536, 0),
              lambda: h.cache(65536, 0),
              lambda: h.block_status(65536, 0, lambda *args: 0)):
        h.server_says.clear()
        fails("EPERM", f)
        assert any("export is inactive" in s for s in h.server_says), h.server_says
    h.flush()
    assert h.pread(65536, 0) == first
h.shutdown()
`)
}

func TestQemuIOOnInactive(t *testing.T) {
	e := serve(t, randomImage(t, tmpfsDir(t), 1, mib), "--inactive")
	for _, c := range []string{"write 0 4k", "write -z 0 4k", "discard 0 4k"} {
		if r := qemuIO(t, e.uri(), c); r.code == 0 || !strings.Contains(r.stdout+r.stderr, "Operation not permitted") {
			t.Errorf("%s: exit status %d, %s%s", c, r.code, r.stdout, r.stderr)
		}
	}
	mustQemuIO(t, e.uri(), "read 0 64k", "flush")
}

// Clients stay connected over any number of changes and are served by the
// state of the moment; each activation counts.
func TestOwnershipFollowsOrders(t *testing.T) {
	for name, order := range orders {
		t.Run(name, func(t *testing.T) {
			everyPlace(t, func(t *testing.T, dir string) {
				image := patchyImage(t, dir, 4*mib)
				e := serve(t, image, "--inactive")
				structured, simple := dialRaw(t, e.socket, ""), dialSimple(t, e.socket, "")
				wantStatus(t, e, "inactive", 0)
				for i := range uint64(3) {
					order(e, true)
					wantStatus(t, e, "active", i+1)
					wantLocks(t, image, activeLocks)
					if got := processLocks(t, e.pid, image); !slices.Equal(got, activeLocks) {
						t.Errorf("the active exporter holds %v", got)
					}
					if len(writableHolds(t, e.pid, image)) == 0 {
						t.Error("the check of writable descriptors finds none of an active exporter")
					}
					wantServes(t, structured, 8192*i, int64(i))
					wantServes(t, simple, 8192*i+4096, int64(i+100))
					order(e, false)
					wantStatus(t, e, "inactive", i+1)
					wantLocks(t, image, nil)
					if w := writableHolds(t, e.pid, image); len(w) != 0 {
						t.Errorf("an inactive exporter can write its image: %v", w)
					}
					sameBytes(t, "the file", fileAt(t, image, int64(8192*i), 8192),
						append(randomBytes(int64(i), 4096), randomBytes(int64(i+100), 4096)...))
					before := snap(t, image)
					wantRefuses(t, structured)
					wantRefuses(t, simple)
					sameSnap(t, image, before)
				}
			})
		})
	}
}

func TestOrdersAreIdempotent(t *testing.T) {
	for name, order := range orders {
		t.Run(name, func(t *testing.T) {
			e := serve(t, sparseImage(t, tmpfsDir(t), mib))
			wantStatus(t, e, "active", 1)
			order(e, true)
			order(e, true)
			wantStatus(t, e, "active", 1)
			wantLocks(t, e.image, activeLocks)
			order(e, false)
			order(e, false)
			wantStatus(t, e, "inactive", 1)
			wantLocks(t, e.image, nil)
			order(e, true)
			wantStatus(t, e, "active", 2)
		})
	}
}

func TestCloseWhileInactiveTouchesNothing(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGKILL} {
		for _, owned := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v/was active %v", sig, owned), func(t *testing.T) {
				everyPlace(t, func(t *testing.T, dir string) {
					image := patchyImage(t, dir, 4*mib)
					var e *daemon
					if owned {
						e = serve(t, image)
						c := dialRaw(t, e.socket, "")
						wantServes(t, c, 3*mib, 7)
						c.want(0, cmdTrim, 0, 0, 65536, nil)
						e.inactivate()
					} else {
						e = serve(t, image, "--inactive")
					}
					before := snap(t, image)
					wantRefuses(t, dialRaw(t, e.socket, ""))
					e.signal(sig)
					want := 0
					if sig == syscall.SIGKILL {
						want = 128 + int(sig)
					}
					if code := e.wait(startTimeout); code != want {
						t.Errorf("exit status %d, want %d", code, want)
					}
					sameSnap(t, image, before)
				})
			})
		}
	}
}

// What was acknowledged is in the file after an orderly stop, and after a
// death, since a raw image's bytes are the kernel's once written.
func TestCloseWhileActiveKeepsWrites(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			everyPlace(t, func(t *testing.T, dir string) {
				image := sparseImage(t, dir, 8*mib)
				e := serve(t, image)
				c := dialRaw(t, e.socket, "")
				c.want(0, cmdWrite, 0, 0, 8*mib, randomBytes(5, 8*mib))
				e.signal(sig)
				if code := e.wait(startTimeout); sig != syscall.SIGKILL && code != 0 {
					t.Errorf("exit status %d", code)
				}
				sameBytes(t, "the file", readFile(t, image), randomBytes(5, 8*mib))
				wantLocks(t, image, nil)
				c.wantClosed(startTimeout)
			})
		})
	}
}

// A stop waits at most 5 s for a client that does not read its replies; a
// second signal waits for nobody.
func TestStopIsNotHeldUpByClients(t *testing.T) {
	for _, signals := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d signals", signals), func(t *testing.T) {
			t.Parallel()
			e := serve(t, randomImage(t, tmpfsDir(t), 1, 32*mib))
			neverRead(t, e)
			stalledWrite(t, e, 4*mib, mib)
			n := len(e.log.lines())
			begin := time.Now()
			e.signal(syscall.SIGTERM)
			bound := 12 * time.Second
			if signals == 2 {
				bound = 4 * time.Second // less than without the second signal
				// Two that are not taken yet are one.
				e.log.wait(t, n, "the stop is logged", func(l string) bool { return strings.Contains(l, "stopping") })
				if !e.alive() {
					t.Log("already stopped after the first signal")
					e.wait(0)
					return
				}
				e.signal(syscall.SIGTERM)
			}
			code := e.wait(startTimeout)
			if took := time.Since(begin); took > bound {
				t.Errorf("stopping took %v, want at most %v", took, bound)
			}
			if signals == 1 && code != 0 {
				t.Errorf("exit status %d", code)
			}
		})
	}
}

// neverRead makes a client that asks for more than any buffer between it and
// the server takes, and never reads a byte of it.
func neverRead(t testing.TB, e *daemon) *rawConn {
	t.Helper()
	c := dialRaw(t, e.socket, e.name)
	var b []byte
	for i := range uint64(64) {
		b = append(b, requestHeader(cmdRead, 0, i, 0, 4*mib)[:28]...)
	}
	c.write(b)
	return c
}

// stalledWrite makes a client that stops after some bytes of a WRITE's payload.
func stalledWrite(t testing.TB, e *daemon, length, sent uint32) *rawConn {
	t.Helper()
	c := dialRaw(t, e.socket, e.name)
	c.send(cmdWrite, 0, 0, length, make([]byte, sent))
	return c
}

func TestSecondOwnerIsRefused(t *testing.T) {
	image := randomImage(t, tmpfsDir(t), 1, mib)
	first := serve(t, image)
	advice := regexp.MustCompile(`(?i)inactiv|another process`)

	// At start.
	dir := shortDir(t)
	r := cli(t, "serve", "-f", "raw", "-k", dir+"/nbd", "--control", dir+"/ctl", image)
	wantFailure(t, r, 1, image, lockText)
	if !advice.MatchString(r.stderr) {
		t.Errorf("the error does not say what to do: %s", r.stderr)
	}

	// By order, each way; every time the loser stays inactive and holds nothing.
	second := serve(t, image, "--inactive")
	q := second.qmp()
	_, err := q.execute("blockdev-set-active", map[string]any{"active": true})
	if err == nil || err.(*qmpError).Class != "GenericError" || !strings.Contains(err.(*qmpError).Desc, lockText) {
		t.Errorf("activation of a second owner over the control socket: %v", err)
	}
	r = cli(t, "activate", "--control", second.control)
	wantFailure(t, r, 1, lockText)
	if !advice.MatchString(r.stderr) {
		t.Errorf("the error does not say what to do: %s", r.stderr)
	}
	n := len(second.log.lines())
	second.signal(syscall.SIGUSR1)
	second.log.wait(t, n, lockText, func(line string) bool {
		// JSON or not, the quotes may be escaped.
		return strings.Contains(strings.ReplaceAll(line, `\`, ""), lockText)
	})
	wantStatus(t, second, "inactive", 0)
	if held := processLocks(t, second.pid, image); len(held) != 0 {
		t.Errorf("the refused exporter holds %v", held)
	}
	if w := writableHolds(t, second.pid, image); len(w) != 0 {
		t.Errorf("the refused exporter can write the image: %v", w)
	}
	wantStatus(t, first, "active", 1)
	if held := processLocks(t, first.pid, image); !slices.Equal(held, activeLocks) {
		t.Errorf("the owner holds %v", held)
	}
	wantServes(t, dialRaw(t, first.socket, ""), 0, 1)
	wantRefuses(t, dialRaw(t, second.socket, ""))

	// A refusal is no end: once the owner lets go it works.
	first.inactivate()
	second.activate()
	wantServes(t, dialRaw(t, second.socket, ""), 0, 2)
}

func TestHandoverByVerbs(t *testing.T) {
	everyPlace(t, func(t *testing.T, dir string) {
		image := sparseImage(t, dir, 4*mib)
		a, b := serve(t, image), serve(t, image, "--inactive")
		conns := map[*daemon]*rawConn{a: dialRaw(t, a.socket, ""), b: dialRaw(t, b.socket, "")}
		for i := range int64(6) {
			wantServes(t, conns[a], uint64(i)*4096, i)
			wantRefuses(t, conns[b])
			run(t, program(t), "inactivate", "--control", a.control)
			wantRefuses(t, conns[a])
			wantRefuses(t, conns[b])
			run(t, program(t), "activate", "--control", b.control)
			for j := range i + 1 {
				sameBytes(t, fmt.Sprintf("block %d through the new owner", j),
					conns[b].want(0, cmdRead, 0, uint64(j)*4096, 4096, nil).data, randomBytes(j, 4096))
			}
			a, b = b, a
		}
		a.stop()
		b.stop()
		for j := range int64(6) {
			sameBytes(t, "the file", fileAt(t, image, j*4096, 4096), randomBytes(j, 4096))
		}
	})
}

func TestActivateIfUnchanged(t *testing.T) {
	everyPlace(t, func(t *testing.T, dir string) {
		image := randomImage(t, dir, 1, mib)
		a, b := serve(t, image), serve(t, image, "--inactive")
		wantServes(t, dialRaw(t, a.socket, ""), 0, 1)
		a.inactivate()
		run(t, program(t), "activate", "--if-unchanged", "--control", a.control)
		wantStatus(t, a, "active", 2)

		a.inactivate()
		b.activate()
		wantServes(t, dialRaw(t, b.socket, ""), 4096, 2)
		b.inactivate()
		r := cli(t, "activate", "--if-unchanged", "--control", a.control)
		wantFailure(t, r, 1, "image was modified while inactive")
		wantStatus(t, a, "inactive", 2)
		wantLocks(t, image, nil)

		// Without the condition a foreign change is no obstacle. The other's
		// ownership counts.
		run(t, program(t), "activate", "--control", a.control)
		wantStatus(t, a, "active", 4)
		sameBytes(t, "the other's write", dialRaw(t, a.socket, "").want(0, cmdRead, 0, 4096, 4096, nil).data, randomBytes(2, 4096))
	})
}

// Each transition is one line with state, epoch and duration, and on failure
// the reason.
func TestTransitionsAreLogged(t *testing.T) {
	image := sparseImage(t, tmpfsDir(t), mib)
	e := serve(t, image, "--inactive", "--log-format", "json")
	skip := len(e.log.lines())
	for range 3 {
		e.activate()
		e.inactivate()
	}
	other := serve(t, image)
	q := e.qmp()
	if _, err := q.execute("blockdev-set-active", map[string]any{"active": true}); err == nil {
		t.Fatal("two owners")
	}
	other.stop()
	e.stop()
	var got []string
	for _, line := range e.log.lines()[skip:] {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Errorf("not JSON: %s", line)
			continue
		}
		state, isString := m["to"].(string)
		epoch, hasEpoch := m["epoch"].(float64)
		if _, hasDuration := m["duration"]; !hasDuration {
			continue
		}
		if !isString || !hasEpoch {
			t.Errorf("a transition's line lacks state or epoch: %s", line)
			continue
		}
		if state == "closed" { // the stop
			continue
		}
		got = append(got, fmt.Sprintf("%s %v", state, epoch))
		if len(got) == 7 && !strings.Contains(strings.ReplaceAll(line, `\`, ""), lockText) {
			t.Errorf("the line of the failed activation does not say why: %s", line)
		}
	}
	want := []string{"active 1", "inactive 1", "active 2", "inactive 2", "active 3", "inactive 3", "inactive 3"}
	if !slices.Equal(got, want) {
		t.Errorf("transitions logged: %q, want %q", got, want)
	}
}

func TestStatus(t *testing.T) {
	image := randomImage(t, tmpfsDir(t), 1, mib)
	e := serve(t, image)
	c := dialRaw(t, e.socket, "")
	wantServes(t, c, 0, 1)
	table := run(t, program(t), "status", "--control", e.control)
	for _, want := range []string{image, "raw", "1 MiB", "active", "100,", "203"} {
		if !strings.Contains(table, want) {
			t.Errorf("status does not show %q:\n%s", want, table)
		}
	}
	for _, word := range []string{"image", "format", "size", "state", "epoch", "since", "locks", "connections", "in flight", "read", "written"} {
		if !strings.Contains(strings.ToLower(table), word) {
			t.Errorf("status has no %q:\n%s", word, table)
		}
	}
	if s := e.status(); s.Image != image || s.State != "active" || s.Size != mib || s.Connections != 1 ||
		s.Locks.Held != "100,101,103,201,203" || s.BytesWritten != 4096 || time.Since(s.Since) > time.Minute {
		t.Errorf("status --json: %+v", s)
	}
	wantFailure(t, cli(t, "status", "--control", e.control+"-none"), 1, e.control+"-none")
}

// Signals that mean nothing to a server do nothing.
func TestOtherSignalsAreHarmless(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), mib))
	c := dialRaw(t, e.socket, "")
	n := len(e.log.lines())
	e.signal(syscall.SIGHUP)
	e.log.wait(t, n, "SIGHUP is ignored", func(line string) bool {
		return strings.Contains(line, "SIGHUP") || strings.Contains(line, "hangup")
	})
	for _, sig := range []syscall.Signal{syscall.SIGWINCH, syscall.SIGCHLD, syscall.SIGURG, syscall.SIGCONT, syscall.SIGPIPE} {
		e.signal(sig)
		wantServes(t, c, 0, int64(sig))
	}
	wantStatus(t, e, "active", 1)
}

// Signals that arrive in a bunch are no reason for anything but the state
// that the last of them asked for.
func TestSignalStorm(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), mib))
	for range 200 {
		e.signal(syscall.SIGUSR2)
		e.signal(syscall.SIGUSR1)
	}
	// The storm is over when nothing has changed for a while.
	q := e.qmp()
	for last := q.status(); ; {
		time.Sleep(200 * time.Millisecond)
		now := q.status()
		if now.Since.Equal(last.Since) && (now.State == "active" || now.State == "inactive") {
			break
		}
		last = now
	}
	e.signal(syscall.SIGUSR2)
	e.waitActive(false)
	wantLocks(t, e.image, nil)
	e.signal(syscall.SIGUSR1)
	e.waitActive(true)
	wantLocks(t, e.image, activeLocks)
}

// While a stopping server still waits for a client to take its replies, others
// get no service any more: ESHUTDOWN, or the end of their connection.
func TestRequestsDuringStop(t *testing.T) {
	t.Parallel()
	image := randomImage(t, tmpfsDir(t), 1, 32*mib)
	e := serve(t, image)
	neverRead(t, e)
	c := dialRaw(t, e.socket, "")
	wantServes(t, c, 0, 1)
	before := snap(t, image).sha256
	n := len(e.log.lines())
	e.signal(syscall.SIGTERM)
	e.log.wait(t, n, "the stop is logged", func(l string) bool { return strings.Contains(l, "stopping") })
	// From when it greets nobody any more requests are refused, too.
	waitFor(t, startTimeout, "new clients are not greeted", func() bool {
		nc, err := net.Dial("unix", e.socket)
		if err != nil {
			return true
		}
		defer nc.Close()
		nc.SetReadDeadline(time.Now().Add(time.Second))
		greeted, _ := nc.Read(make([]byte, 1))
		return greeted == 0
	})
	if _, err := c.Write(append(requestHeader(cmdWrite, 0, 4711, 0, 4096)[:28], make([]byte, 4096)...)); err == nil {
		var magic [4]byte
		c.SetReadDeadline(time.Now().Add(2 * time.Second))
		if _, err := io.ReadFull(c.Conn, magic[:]); err == nil {
			if rep := c.receiveStructured(0, 0); rep.errno != nbdESHUTDOWN || rep.text == "" {
				t.Errorf("a write during the stop: %s %q, want ESHUTDOWN", errName(rep.errno), rep.text)
			}
		}
	}
	if code := e.wait(startTimeout); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if snap(t, image).sha256 != before {
		t.Error("a write after the stop began changed the image")
	}
}
