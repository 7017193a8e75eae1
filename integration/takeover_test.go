package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func containsAll(s string, parts ...string) bool {
	for _, p := range parts {
		if !strings.Contains(s, p) {
			return false
		}
	}
	return true
}

// ownControls are places where so many exporters' control sockets will be
// found, so that each can be told of the others before they run.
func ownControls(t testing.TB, n int) []string {
	dir := shortDir(t)
	paths := make([]string, n)
	for i := range paths {
		paths[i] = filepath.Join(dir, fmt.Sprint(i))
	}
	return paths
}

// serveTakeover starts n exporters of one image that take it from each other.
// The first is active unless flags has --inactive.
func serveTakeover(t testing.TB, image string, n int, flags ...string) []*daemon {
	t.Helper()
	return serveTakeoverPrepared(t, image, make([]func(*exec.Cmd), n), flags...)
}

func serveTakeoverPrepared(t testing.TB, image string, prepare []func(*exec.Cmd), flags ...string) []*daemon {
	t.Helper()
	n := len(prepare)
	if !slices.Contains(flags, "--inactive-writes") {
		flags = append(flags, "--inactive-writes", "hold=5m")
	}
	if !slices.Contains(flags, "--takeover-min-hold") {
		flags = append(flags, "--takeover-min-hold", "20ms")
	}
	paths := ownControls(t, n)
	sides := make([]*daemon, n)
	for i := range sides {
		own := slices.Clone(flags)
		for j, peer := range paths {
			if j != i {
				own = append(own, "--takeover", peer)
			}
		}
		if i > 0 && !slices.Contains(flags, "--inactive") {
			own = append(own, "--inactive")
		}
		sides[i] = servePrepared(t, image, prepare[i], own...)
		if err := os.Symlink(sides[i].control, paths[i]); err != nil {
			t.Fatal(err)
		}
	}
	return sides
}

// waitTaken waits until an exporter says that it has taken the image over.
func (e *daemon) waitTaken(skip int, parts ...string) {
	e.t.Helper()
	e.log.wait(e.t, skip, fmt.Sprintf("image taken over, %q", parts), func(line string) bool {
		return containsAll(line, append(parts, "image taken over", `reason="a client wrote"`, "duration=")...)
	})
}

// The first write takes the image from an exporter under load, which loses
// nothing that it has acknowledged.
func TestTakeoverUnderLoad(t *testing.T) {
	t.Parallel()
	everyPlace(t, func(t *testing.T, dir string) {
		image := sparseImage(t, dir, 64*mib)
		sides := serveTakeover(t, image, 2)
		const conns = 4
		last := make([]uint64, conns) // acknowledged, by sector
		enough := make(chan struct{}, conns)
		var wg sync.WaitGroup
		for i := range last {
			c := dialRaw(t, sides[0].socket, "")
			wg.Go(func() {
				for n := uint64(1); ; n++ {
					b := binary.BigEndian.AppendUint64(make([]byte, 0, 4096), n)
					switch rep := c.do(cmdWrite, 0, uint64(i)*mib, 4096, b[:4096]); rep.errno {
					case 0:
						last[i] = n
					case nbdEPERM:
						if !strings.Contains(rep.text, "--takeover-back") && !strings.Contains(rep.text, lostText) {
							t.Errorf("text %q", rep.text)
						}
						return
					default:
						t.Errorf("%s %q", errName(rep.errno), rep.text)
						return
					}
					if n == 200 {
						enough <- struct{}{}
					}
				}
			})
		}
		for range conns {
			<-enough
		}
		c := dialRaw(t, sides[1].socket, "")
		c.want(0, cmdWrite, 0, 32*mib, 4096, bytes.Repeat([]byte{7}, 4096))
		wg.Wait()
		sides[1].waitTaken(0, "gave it away")
		sides[0].log.wait(t, 0, "the image was given away", func(line string) bool { return containsAll(line, "image given to a peer", "duration=") })
		wantStatus(t, sides[0], "inactive", 1)
		wantStatus(t, sides[1], "active", 2)
		for i, n := range last {
			if got := binary.BigEndian.Uint64(c.want(0, cmdRead, 0, uint64(i)*mib, 4096, nil).data); got != n {
				t.Errorf("connection %d: write %d was acknowledged, the image has %d", i, n, got)
			}
		}
		if processLocks(t, sides[0].pid, image) != nil {
			t.Error("the one that gave it away still has locks")
		}
		wantLocks(t, image, activeLocks)
	})
}

// A write that arrives late, on a connection that wrote when its exporter
// owned the image before, does not take the image back; new connections do,
// and so do those that only read.
func TestTakeoverLateWrite(t *testing.T) {
	t.Parallel()
	image := randomImage(t, tmpfsDir(t), 1, mib)
	sides := serveTakeover(t, image, 2)
	late, reader := dialRaw(t, sides[0].socket, ""), dialRaw(t, sides[0].socket, "")
	wantServes(t, late, 0, 1)
	reader.want(0, cmdRead, 0, 0, 4096, nil)
	other := dialRaw(t, sides[1].socket, "")
	wantServes(t, other, 4096, 2)
	for range 2 {
		if rep := late.do(cmdWrite, 0, 0, 4096, make([]byte, 4096)); rep.errno != nbdEPERM || !containsAll(rep.text, inactiveText, "--takeover-back") {
			t.Errorf("a late write: %s %q", errName(rep.errno), rep.text)
		}
		wantStatus(t, sides[1], "active", 2)
	}
	late.want(0, cmdFlush, 0, 0, 0, nil)
	wantServes(t, reader, 8192, 3)
	wantStatus(t, sides[0], "active", 3)
	wantServes(t, late, 0, 4) // it is active again: nothing is taken
	if rep := other.do(cmdWrite, 0, 0, 4096, make([]byte, 4096)); rep.errno != nbdEPERM {
		t.Errorf("the other side's late write: %s %q", errName(rep.errno), rep.text)
	}
	wantServes(t, dialRaw(t, sides[1].socket, ""), 4096, 5)
}

// lostText: the write came just before its exporter gave the image away.
const lostText = "has owned the image and given it away since"

// With --takeover-back two clients that write all the while get the image in
// turns, each for its time. Refused is only what was under way at a handover.
func TestTakeoverPingPong(t *testing.T) {
	t.Parallel()
	image := sparseImage(t, tmpfsDir(t), mib)
	const minHold = 50 * time.Millisecond
	sides := serveTakeover(t, image, 2, "--takeover-back", "--takeover-min-hold", minHold.String())
	began := time.Now()
	var wg sync.WaitGroup
	for i, side := range sides {
		c := dialRaw(t, side.socket, "")
		wg.Go(func() {
			for n := uint64(1); n <= 100 || side.status().Epoch < 10; n++ {
				b := binary.BigEndian.AppendUint64(make([]byte, 0, 512), n)[:512]
				if rep := c.do(cmdWrite, 0, uint64(i*4096), 512, b); rep.errno == nbdEPERM && strings.Contains(rep.text, lostText) {
					n--
					continue
				} else if rep.errno != 0 {
					t.Errorf("%s %q", errName(rep.errno), rep.text)
					return
				}
				if got := c.want(0, cmdRead, 0, uint64(i*4096), 512, nil).data; !bytes.Equal(got, b) {
					t.Error("a read after a write does not give it")
				}
			}
		})
	}
	wg.Wait()
	last := max(sides[0].status().Epoch, sides[1].status().Epoch)
	if least := time.Duration(last-2) * minHold; time.Since(began) < least {
		t.Errorf("%d owners within %v, each for %v at least", last, time.Since(began), minHold)
	}
}

// Exporters whose clients want the image at the same moment get it one after
// the other.
func TestTakeoverRace(t *testing.T) {
	t.Parallel()
	for _, n := range []int{2, 3} {
		t.Run(fmt.Sprint(n, " exporters"), func(t *testing.T) {
			t.Parallel()
			image := sparseImage(t, tmpfsDir(t), mib)
			sides := serveTakeover(t, image, n, "--inactive")
			for round := range 5 {
				var wg sync.WaitGroup
				for i, side := range sides {
					c := dialRaw(t, side.socket, "")
					wg.Go(func() {
						c.want(0, cmdWrite, 0, uint64(i*4096), 512, bytes.Repeat([]byte{byte(round + 1)}, 512))
					})
				}
				wg.Wait()
				content := readFile(t, image)
				for i := range sides {
					if content[i*4096] != byte(round+1) || content[i*4096+511] != byte(round+1) {
						t.Fatalf("round %d: the write of side %d is not there", round, i)
					}
				}
				for _, side := range sides {
					side.inactivate()
				}
				wantLocks(t, image, nil)
			}
		})
	}
}

// A peer that died cannot give the image away, and holds nothing.
func TestTakeoverFromDead(t *testing.T) {
	t.Parallel()
	image := randomImage(t, t.TempDir(), 1, mib)
	sides := serveTakeover(t, image, 2)
	wantServes(t, dialRaw(t, sides[0].socket, ""), 0, 2)
	sides[0].kill()
	c := dialRaw(t, sides[1].socket, "")
	sameBytes(t, "what the dead one wrote", c.want(0, cmdRead, 0, 0, 4096, nil).data, randomBytes(2, 4096))
	wantServes(t, c, 4096, 3)
	sides[1].waitTaken(0, "is gone")
	wantStatus(t, sides[1], "active", 2)
}

// The owner dies at any step of giving the image away: it is not needed, and
// nothing that it acknowledged is lost.
func TestTakeoverOwnerDies(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"sync-ahead", "close-gate", "drain", "settle", "release"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			image := sparseImage(t, tmpfsDir(t), mib)
			h, prepare := newHooks(t)
			sides := serveTakeoverPrepared(t, image, []func(*exec.Cmd){prepare, nil})
			wantServes(t, dialRaw(t, sides[0].socket, ""), 0, 2)
			h.holdAt(step)
			c := dialRaw(t, sides[1].socket, "")
			cookie := c.send(cmdWrite, 0, 4096, 4096, randomBytes(3, 4096))
			h.wait()
			sides[0].kill()
			if rep := c.receive(0, 0); rep.cookie != cookie || rep.errno != 0 {
				t.Fatalf("%s %q", errName(rep.errno), rep.text)
			}
			sides[1].waitTaken(0)
			wantStatus(t, sides[1], "active", 2)
			wantLocks(t, image, activeLocks)
			sameBytes(t, "the image", readFile(t, image)[:8192], append(randomBytes(2, 4096), randomBytes(3, 4096)...))
		})
	}
}

// The one that takes dies at any step of it: a new client of the other side
// gets the image back there.
func TestTakeoverTakerDies(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"lock", "load", "claim", "publish", "retire"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			image := sparseImage(t, tmpfsDir(t), mib)
			h, prepare := newHooks(t)
			sides := serveTakeoverPrepared(t, image, []func(*exec.Cmd){nil, prepare})
			late := dialRaw(t, sides[0].socket, "")
			wantServes(t, late, 0, 2)
			h.holdAt(step)
			c := dialRaw(t, sides[1].socket, "")
			c.send(cmdWrite, 0, 4096, 4096, randomBytes(3, 4096))
			h.wait()
			if rep := late.do(cmdWrite, 0, 0, 512, make([]byte, 512)); rep.errno != nbdEPERM {
				t.Errorf("a late write: %s %q", errName(rep.errno), rep.text)
			}
			sides[1].kill()
			wantServes(t, dialRaw(t, sides[0].socket, ""), 8192, 4)
			if s := sides[0].status(); s.State != "active" {
				t.Errorf("it is %s", s.State)
			}
			wantLocks(t, image, activeLocks)
			sameBytes(t, "what was acknowledged first", readFile(t, image)[:4096], randomBytes(2, 4096))
		})
	}
}

// A peer that is stopped keeps its locks, so the image stays with it: the write
// is refused when its time is over, and the peer goes on as the owner.
func TestTakeoverFromStopped(t *testing.T) {
	t.Parallel()
	image := randomImage(t, tmpfsDir(t), 1, mib)
	sides := serveTakeover(t, image, 2, "--inactive-writes", "hold=2s")
	owner := dialRaw(t, sides[0].socket, "")
	wantServes(t, owner, 0, 2)
	sides[0].signal(syscall.SIGSTOP)
	waitStopped(t, sides[0].pid)
	c := dialRaw(t, sides[1].socket, "")
	wantHeldRefusal(t, c.do(cmdWrite, 0, 4096, 4096, make([]byte, 4096)), "it was not activated within the 2s")
	sides[1].log.wait(t, 0, "why not", func(line string) bool { return containsAll(line, "cannot be taken over", "does not greet") })
	sides[1].log.wait(t, 0, "the end of it", func(line string) bool { return containsAll(line, "error", "not taken over", "no write waits") })
	wantStatus(t, sides[1], "inactive", 0)
	wantLocks(t, image, activeLocks)
	sides[0].signal(syscall.SIGCONT)
	wantServes(t, owner, 0, 3)
	wantStatus(t, sides[0], "active", 1)
	wantServes(t, dialRaw(t, sides[1].socket, ""), 4096, 4)
	wantStatus(t, sides[1], "active", 2)
}

// waitStopped waits until no thread of a process runs: a signal gets to them
// one after the other.
func waitStopped(t testing.TB, pid int) {
	t.Helper()
	waitFor(t, startTimeout, "all threads are stopped", func() bool {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(stats) == 0 {
			t.Fatal("no threads", err)
		}
		for _, name := range stats {
			b, err := os.ReadFile(name)
			if _, state, ok := strings.Cut(string(b), ") "); err != nil || !ok || state[0] != 'T' {
				return false
			}
		}
		return true
	})
}

// An exporter that has the other's image in front of it but another file is not
// asked for its own.
func TestTakeoverOfAnotherImage(t *testing.T) {
	t.Parallel()
	one, two := sparseImage(t, t.TempDir(), mib), sparseImage(t, t.TempDir(), mib)
	stranger := serve(t, one)
	e := serve(t, two, "--inactive", "--takeover", stranger.control)
	wantServes(t, dialRaw(t, e.socket, ""), 0, 1)
	e.waitTaken(0, "does not give it away")
	wantStatus(t, stranger, "active", 1)
	wantStatus(t, e, "active", 1)
}

// Nobody who takes an image over is in the way of a stop.
func TestTakeoverAndStop(t *testing.T) {
	t.Parallel()
	image := sparseImage(t, tmpfsDir(t), mib)
	owner := serve(t, image, "--takeover-min-hold", "1h")
	e := serve(t, image, "--inactive", "--inactive-writes", "hold=1h", "--takeover", owner.control)
	c := dialRaw(t, e.socket, "")
	c.send(cmdWrite, 0, 0, 4096, make([]byte, 4096))
	e.waitHeld(1)
	e.signal(syscall.SIGTERM)
	if rep := c.receive(0, 0); rep.errno != nbdESHUTDOWN {
		t.Errorf("%s %q, want ESHUTDOWN", errName(rep.errno), rep.text)
	}
	if code := e.wait(startTimeout); code != 0 {
		t.Errorf("exit status %d", code)
	}
	wantStatus(t, owner, "active", 1)
}

// The peer may be behind a command.
func TestTakeoverThroughCommand(t *testing.T) {
	t.Parallel()
	image := randomImage(t, tmpfsDir(t), 1, mib)
	owner := serve(t, image, "--takeover-min-hold", "0s")
	wantServes(t, dialRaw(t, owner.socket, ""), 0, 2)
	peer := "exec:" + program(t) + " control-stdio " + owner.control
	e := serve(t, image, "--inactive", "--inactive-writes", "hold=5m", "--takeover", peer)
	wantServes(t, dialRaw(t, e.socket, ""), 4096, 3)
	e.waitTaken(0, "gave it away")
	wantStatus(t, owner, "inactive", 1)
	wantStatus(t, e, "active", 2)
}
