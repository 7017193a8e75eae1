package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// answerToOrder is the number of the message, through a command, that answers
// the order to inactivate or activate; the order is the one before.
const answerToOrder = 9

// letGo begins a handover and stops it where the source is inactive and the
// command does not know yet.
func (p *pair) letGo(flags ...string) (*handoverProcess, *held) {
	p.t.Helper()
	ctl, answer := hold(p.t, p.sides[0], answerToOrder)
	cmd := newHandoverProcess(p.t, ctl, p.sides[1].control, flags...)
	answer.wait(cmd.process)
	if s := p.states(); s != [2]string{"inactive", "inactive"} {
		p.t.Fatalf("the sides are %v before the source's answer; %s", s, cmd.log)
	}
	return cmd, answer
}

// The destination refuses when the source has let go: it is taken back.
func TestHandoverReturns(t *testing.T) {
	dir := tmpfsDir(t)
	link, other := filepath.Join(dir, "link"), filepath.Join(dir, "other")
	p := &pair{t: t, image: sparseImage(t, dir, 4*mib)}
	pointTo := func(target string) {
		t.Helper()
		if err := errors.Join(os.RemoveAll(link), os.Symlink(target, link)); err != nil {
			t.Fatal(err)
		}
	}
	pointTo(p.image)
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p.sides = [2]*daemon{serve(t, p.image), serve(t, link, "--inactive")}
	for i := range p.sides {
		p.load[i] = startWriter(t, p.sides[i], i)
	}

	cmd, answer := p.letGo()
	pointTo(other)
	answer.release()
	if h := parseHandover(t, cmd.result()); h.Outcome != "returned" || h.From.State != "active" || h.To.State != "inactive" {
		t.Errorf("%+v", h)
	}
	if owner := p.judge(); owner != 0 {
		t.Fatalf("side %d owns the image", owner)
	}
	// Nor when it is written to meanwhile.
	pointTo(p.image)
	cmd, answer = p.letGo()
	pointTo(other)
	if f, err := os.OpenFile(p.image, os.O_WRONLY, 0); err != nil {
		t.Fatal(err)
	} else if _, err := f.WriteAt([]byte{1}, 3*mib); err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	answer.release()
	h := parseHandover(t, cmd.result())
	if h.Outcome != "unowned" || !strings.Contains(h.Error, "image was modified while inactive") {
		t.Errorf("%+v", h)
	}
	if owner := p.judge(); owner != -1 {
		t.Fatalf("side %d owns the image", owner)
	}
	pointTo(p.image)
	if h := handover(t, p.sides[0].control, p.sides[1].control); h.Outcome != "moved" {
		t.Errorf("%+v", h)
	}
	p.end()
}

// patiences are the timeouts of handovers that have to time out at one point:
// the least with which a machine that is busy gets there.
var patiences = []string{"500ms", "2s", "8s"}

// outlast gives f these timeouts, one after the other, until it says that the
// handover got to the point where it had to time out. Side 0 is the owner each
// time. A machine that is too busy for the last one fails the test.
func (p *pair) outlast(patiences []string, f func(patience string) (handoverReport, bool)) (h handoverReport) {
	p.t.Helper()
	for i, patience := range patiences {
		if i > 0 {
			p.rest()
			if h := handover(p.t, p.sides[1].control, p.sides[0].control); h.Outcome != "moved" && h.Outcome != "already" {
				p.t.Fatalf("%+v", h)
			}
		}
		var there bool
		if h, there = f(patience); there {
			return h
		}
		p.t.Logf("%s were over too early: %+v", patience, h)
	}
	p.t.Fatal("the machine is too busy to test anything, or it never gets there")
	return h
}

// restart serves the image again, inactive, where an exporter was killed.
func (p *pair) restart(side int) {
	p.t.Helper()
	p.load[side].stop()
	p.sides[side] = serve(p.t, p.image, "--inactive")
	p.load[side].again(p.sides[side])
}

// A destination that hangs when the source has let go leaves both as they are,
// and it is finished once it answers.
func TestHandoverDestinationHangs(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	h := p.outlast(patiences, func(patience string) (handoverReport, bool) {
		ctl, answer := hold(t, p.sides[0], answerToOrder)
		cmd := newHandoverProcess(t, ctl, p.sides[1].control, "--timeout", patience)
		answer.wait(cmd.process)
		p.sides[1].signal(syscall.SIGSTOP)
		answer.release()
		h := parseHandover(t, cmd.result())
		p.sides[1].signal(syscall.SIGCONT)
		return h, h.Outcome == "unknown" && h.To.State == "unknown"
	})
	if h.From.State != "inactive" || h.IfGone == "" {
		t.Errorf("%+v", h)
	}
	if h := handover(t, p.sides[0].control, p.sides[1].control); h.Outcome != "moved" && h.Outcome != "already" {
		t.Errorf("%+v", h)
	}
	if owner := p.judge(); owner != 1 {
		t.Errorf("side %d owns the image", owner)
	}
	p.end()
}

// A destination that dies when the source has let go is seen to be gone, and
// the source takes back.
func TestHandoverDestinationDies(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	cmd, answer := p.letGo()
	p.sides[1].kill()
	answer.release()
	if h := parseHandover(t, cmd.result()); h.Outcome != "returned" || h.From.State != "active" || h.To.State != "unknown" {
		t.Errorf("%+v", h)
	}
	if owner := p.judge(); owner != 0 {
		t.Errorf("side %d owns the image", owner)
	}
	p.end()
}

// The same, where the destination cannot be seen to be gone.
func TestHandoverRemoteDies(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	h := p.outlast(patiences[1:], func(patience string) (handoverReport, bool) {
		ctl, order := hold(t, p.sides[1], answerToOrder-1)
		cmd := newHandoverProcess(t, p.sides[0].control, ctl, "--timeout", patience)
		order.wait(cmd.process)
		p.sides[1].kill()
		order.release()
		h := parseHandover(t, cmd.result())
		there := h.Outcome == "unknown" && h.To.State == "unknown"
		if !there {
			p.restart(1)
		}
		return h, there
	})
	if h.From.State != "inactive" || h.IfGone == "" || p.judge() != -1 {
		t.Errorf("%+v", h)
	}
	run(t, "/bin/sh", "-c", strings.Replace(h.IfGone, "nbd-export", program(t), 1))
	if owner := p.judge(); owner != 0 {
		t.Errorf("side %d owns the image after %s", owner, h.IfGone)
	}
	p.end()
}

// Either exporter is killed at each message from the proof on: afterwards at
// most one owns the image, and what the command says to run next makes the
// survivor the owner.
func TestHandoverExporterKilled(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	from := 0
	outcomes := map[string]int{}
	for n := range 2 * 2 * 6 {
		victim, at, through := (from+n)%2, answerToOrder-3+n/4, n/2%2
		ctl := [2]string{p.sides[from].control, p.sides[1-from].control}
		var message *held
		ctl[through], message = hold(t, p.sides[(from+through)%2], at)
		cmd := newHandoverProcess(t, ctl[0], ctl[1], "--timeout", "700ms")
		message.wait(cmd.process)
		p.sides[victim].kill()
		message.release()
		h := parseHandover(t, cmd.result())
		outcomes[h.Outcome]++
		what := fmt.Sprintf("side %d killed at message %d through %d, from %d: %+v", victim, at, through, from, h)
		switch owner := p.judge(); {
		case owner == 1-victim:
		case h.Outcome == "moved" && victim != from: // it had answered that it owns it
			p.sides[from].activate()
		case [2]string{h.From.State, h.To.State}[(victim+from)%2] != "unknown":
			t.Logf("the time was over before the kill: %s", what)
			p.sides[1-victim].activate()
		default:
			next := h.Next
			if h.IfGone != "" {
				next = h.IfGone
			}
			if !strings.Contains(next, " activate ") {
				t.Fatalf("nobody owns the image, and it says to run %s: %s", next, what)
			}
			run(t, "/bin/sh", "-c", strings.Replace(next, "nbd-export", program(t), 1))
			if owner := p.judge(); owner != 1-victim {
				t.Fatalf("the survivor does not own the image after %s: %s", next, what)
			}
		}
		p.restart(victim)
		from = 1 - victim
	}
	t.Logf("outcomes: %v", outcomes)
	p.end()
}

// The command is killed, or told to stop, at every message: run again it
// finishes.
func TestHandoverKilled(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	from := 0
	outcomes := map[string]int{}
	for n := range 3 * 2 * 11 {
		sig := []syscall.Signal{syscall.SIGKILL, syscall.SIGINT, syscall.SIGTERM}[n%3]
		side, at := n/3%2, 1+n/6
		ctl := [2]string{p.sides[from].control, p.sides[1-from].control}
		var message *held
		ctl[side], message = hold(t, p.sides[(from+side)%2], at)
		cmd := newHandoverProcess(t, ctl[0], ctl[1])
		message.wait(cmd.process)
		_ = cmd.cmd.Process.Signal(sig) // it may just have ended
		if sig == syscall.SIGKILL {
			cmd.wait(toolTimeout)
		}
		message.release()
		if code := cmd.wait(toolTimeout); code == 128+int(syscall.SIGKILL) {
			outcomes["killed"]++
		} else {
			h := parseHandover(t, cmd.result())
			outcomes[h.Outcome]++
			p.agree(h, from)
		}
		again := handover(t, p.sides[from].control, p.sides[1-from].control)
		if owner := p.judge(); owner != 1-from || again.Outcome != "moved" && again.Outcome != "already" {
			t.Fatalf("%v at message %d of side %d: side %d owns the image: %+v", sig, at, side, owner, again)
		}
		from = 1 - from
	}
	t.Logf("outcomes: %v", outcomes)
	for _, o := range []string{"killed", "cancelled", "moved"} {
		if outcomes[o] == 0 {
			t.Errorf("no handover ended %s: too little happened to prove anything", o)
		}
	}
	p.end()
}
