package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/integration/guest"
)

// crashSide is an exporter of the run.
type crashSide struct {
	*daemon
	name  string
	ctl   *guest.QMP // for orders
	watch *guest.QMP // for questions
	load  *crashFront
	end   string // "killed" or "exited", "" while it lives
}

// crashRun is one cell.
type crashRun struct {
	t     *testing.T
	cell  crashCell
	dir   string
	flags []string // of all exporters
	image string
	sides []*crashSide // A, B, and C if there has to be one
	load  *crashLoad
	left  os.FileInfo // the image as A left it, if B activates
	held  chan error  // receives what becomes of a write that fresh holds; nil for none
	leaks bool        // an owner has not written all
}

func (r *crashRun) stat() os.FileInfo {
	r.t.Helper()
	st, err := os.Stat(r.image)
	if err != nil {
		r.t.Fatal(err)
	}
	return st
}

func (r *crashRun) start(inactive bool) *crashSide {
	r.t.Helper()
	h, prepare := newHooks(r.t)
	flags := slices.Concat(crashFlags(r.cell.scene.format), r.flags)
	if inactive {
		flags = append(flags, "--inactive")
	}
	s := &crashSide{name: sideName(len(r.sides)), daemon: newDaemon(r.t, r.image, prepare, flags...)}
	s.hooks = h
	r.sides = append(r.sides, s)
	r.t.Cleanup(func() {
		if r.t.Failed() && s.alive() {
			s.kill() // it may be held at a step
		}
	})
	return s
}

// ready waits until s serves, and has clients use it.
func (r *crashRun) ready(s *crashSide) {
	r.t.Helper()
	s.daemon.ready()
	for _, q := range []**guest.QMP{&s.ctl, &s.watch} {
		c, err := guest.DialQMP(s.control, startTimeout)
		if err != nil {
			r.t.Fatal(err)
		}
		r.t.Cleanup(func() { c.Close() })
		*q = c
	}
	s.load = r.load.at(s.uri())
}

func (s *crashSide) order(active bool, more ...string) error {
	args := map[string]any{"active": active}
	for _, m := range more {
		args[m] = true
	}
	_, err := s.ctl.Execute("blockdev-set-active", args)
	return err
}

func (r *crashRun) must(s *crashSide, active bool, more ...string) {
	r.t.Helper()
	if err := s.order(active, more...); err != nil {
		r.t.Fatalf("%s: active=%v %v: %v", s.name, active, more, err)
	}
}

// refused gives an order that must fail for this reason.
func (r *crashRun) refused(s *crashSide, active bool, why string, more ...string) {
	r.t.Helper()
	err := s.order(active, more...)
	if err == nil || !strings.Contains(err.Error(), why) {
		r.t.Fatalf("%s: active=%v %v: %v, want a refusal with %q", s.name, active, more, err, why)
	}
}

// state is what an exporter says of the image, or how it ended.
func (r *crashRun) state(s *crashSide) string {
	r.t.Helper()
	if s.end != "" {
		return s.end
	}
	answer, err := s.watch.Execute("x-query-status", nil)
	if err != nil {
		r.t.Fatalf("%s: %v", s.name, err)
	}
	return decodeStatus(r.t, answer).State
}

// side returns A, B or C.
func (r *crashRun) side(name string) *crashSide {
	return r.sides[slices.IndexFunc(r.sides, func(s *crashSide) bool { return s.name == name })]
}

// owner is who says that the image is its own, of whom there may be one. Its
// locks and descriptors must agree with that, and those of all others.
func (r *crashRun) owner() (owner *crashSide) {
	r.t.Helper()
	want := []int(nil)
	for _, s := range r.sides {
		if s.end != "" {
			continue
		}
		state := r.state(s)
		locks, writable := processLocks(r.t, s.pid, r.image), writableHolds(r.t, s.pid, r.image)
		switch state {
		case "active", "inactivating", "failed(io)":
			if owner != nil {
				r.t.Errorf("%s and %s both say that they own the image", owner.name, s.name)
			}
			owner, want = s, activeLocks
			if !slices.Equal(locks, activeLocks) || len(writable) == 0 {
				r.t.Errorf("%s is %s, has locked %v and can write by %v", s.name, state, locks, writable)
			}
		case "inactive":
			if len(locks) > 0 || len(writable) > 0 {
				r.t.Errorf("%s is %s, has locked %v and can write by %v", s.name, state, locks, writable)
			}
		case "activating":
			if owner != nil && len(locks) > 0 {
				r.t.Errorf("%s owns the image, and %s has locked %v", owner.name, s.name, locks)
			}
			want = locks
		default:
			r.t.Errorf("%s is %s", s.name, state)
		}
	}
	// The locks of one that was killed end with the I/O it had submitted. Where an
	// owner has a second description, for a tail that fills no block, it holds all.
	locked := func() []int { return slices.Compact(fileLocks(r.t, r.image)) }
	got := locked()
	for try := 0; try < 50 && !slices.Equal(got, want); try++ {
		time.Sleep(time.Millisecond)
		got = locked()
	}
	if !slices.Equal(got, want) {
		r.t.Errorf("locked bytes of the image: %v, want %v", got, want)
	}
	return owner
}

// crashRecord is an owner record as everybody can read it.
type crashRecord struct {
	PID   int
	Epoch uint64
	Clean bool
}

func (r *crashRun) record() (rec crashRecord) {
	r.t.Helper()
	if err := json.Unmarshal(readFile(r.t, r.image+".owner"), &rec); err != nil {
		r.t.Fatal(err)
	}
	return rec
}

// run has the accident happen and returns the cell of the table.
func (r *crashRun) run() string {
	t, c := r.t, r.cell
	r.image = crashImage(t, r.dir, c.scene.format)
	r.load = newCrashLoad(t, r.content)
	a := r.start(false)
	// B may come only when A has the image: it is the first to own it.
	a.daemon.ready()
	b := r.start(true)
	r.ready(a)
	r.ready(b)
	a.load.wait(10)

	actor := r.sides[c.scene.actor]
	switch c.scene.name {
	case "activate", "take-back":
		r.must(a, false)
		r.load.settled()
		r.left = r.stat()
		if c.scene.format != "" && c.scene.name == "activate" {
			makeDirty(t, r.image)
		}
	case "abandon":
		a.hooks.holdAt(crashSync(c.scene.format))
		failed := make(chan error, 1)
		go func() { failed <- a.order(false) }()
		a.hooks.wait()
		a.load.allow(syscall.EIO)
		a.hooks.fail("sync", syscall.EIO)
		a.hooks.goOn()
		if err := <-failed; err == nil {
			t.Fatal("A inactivated without a sync")
		}
		r.lose()
	}
	resume := func() {}
	switch {
	case c.scene.format != "" && (c.scene.name == "inactivate" && c.step != "sync-ahead" || c.scene.name == "stop"):
		resume = r.fresh(a, true)
	case c.step == "drain":
		// There is to be something to wait for.
		a.hooks.stall("try-write", "write")
	}
	done := make(chan error, 1)
	give := func() { done <- r.give(actor) }
	if drain := r.drains(); r.held != nil && c.scene.at(c.step) > c.scene.at(drain) {
		actor.hooks.holdAt(drain)
		go give()
		actor.hooks.wait()
		resume() // the gate is closed
		resume = func() {}
		actor.hooks.holdAt(c.step)
		actor.hooks.goOn()
		r.letGo(actor)
	} else {
		actor.hooks.holdAt(c.step)
		go give()
	}
	actor.hooks.wait()
	resume()
	r.owner()
	if c.step == "retire" {
		// What it writes is seen by who looks at the image's times.
		waitFor(t, startTimeout, "the new owner writes", func() bool { return !r.stat().ModTime().Equal(r.left.ModTime()) })
		actor.load.wait(1)
	}
	want := expect(c.scene, c.step, c.accident)
	r.happen(actor, want, done)

	got := r.judge(want)
	r.goesOn(want)
	return got
}

// drains is the step of the scene in which writes that are under way are waited
// for.
func (r *crashRun) drains() string {
	if r.cell.scene.name == "stop" {
		return "stop"
	}
	return "drain"
}

// give orders what the scene is about, and waits for it.
func (r *crashRun) give(actor *crashSide) error {
	switch r.cell.scene.name {
	case "activate":
		return actor.order(true)
	case "take-back":
		return actor.order(true, "x-if-unchanged")
	case "abandon":
		return actor.order(false, "x-abandon")
	case "stop":
		if err := actor.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
		<-actor.exited
		return nil
	}
	return actor.order(false)
}

// happen has the accident happen while actor is held at the step, and lets all
// go on.
func (r *crashRun) happen(actor *crashSide, want crashEnd, done chan error) {
	t, c := r.t, r.cell
	t.Helper()
	victim := r.sides[c.who]
	other := r.sides[1-c.scene.actor]
	finish := func() {
		actor.hooks.goOn()
		if c.step == "drain" {
			if state := r.state(actor); state != "inactivating" {
				t.Errorf("%s is %s while a write is under way", actor.name, state)
			}
			actor.hooks.resume()
		}
		r.letGo(actor)
		err := <-done
		switch {
		case c.kind == ended && victim == actor: // nobody may be left to answer
		case c.scene.name == "stop":
		case want.refused && err == nil:
			t.Errorf("%s: %s is done, and must fail", actor.name, c.scene.name)
		case !want.refused && err != nil:
			t.Errorf("%s: %s: %v", actor.name, c.scene.name, err)
		case err == nil && c.scene.name == "inactivate":
			r.load.settled()
		}
	}
	switch c.kind {
	case killed:
		if r.owner() == victim {
			r.lose()
		}
		victim.kill()
		victim.end = "killed"
		if victim == actor {
			<-done
			break
		}
		finish()
	case stopped:
		victim.signal(syscall.SIGSTOP)
		waitFor(t, startTimeout, "all threads stand still", victim.standsStill)
		if victim == actor {
			if c.scene.holdsLocks(c.step) {
				why := "in use by another process"
				if rec := r.record(); !rec.Clean {
					why = fmt.Sprintf("pid %d, since", rec.PID)
					if rec.PID != victim.pid {
						t.Errorf("the owner record names pid %d, the owner is %d", rec.PID, victim.pid)
					}
				}
				r.refused(other, true, why)
			} else {
				r.must(other, true)
				other.load.wait(3)
			}
		} else {
			finish()
		}
		victim.signal(syscall.SIGCONT)
		if victim == actor {
			finish()
		}
	case ended:
		victim.signal(syscall.SIGTERM)
		if victim == actor {
			victim.log.wait(t, 0, "stopping", func(line string) bool { return strings.Contains(line, "stopping") })
		} else if code := victim.process.wait(startTimeout); code != 0 {
			t.Errorf("%s: exit status %d", victim.name, code)
		}
		finish()
		if code := victim.process.wait(startTimeout); code != 0 {
			t.Errorf("%s: exit status %d", victim.name, code)
		}
		victim.end = "exited"
	case fails:
		calls := append([]string{c.call.name}, c.call.alternatives...)
		effect := c.call.eio
		if c.errno == syscall.ENOSPC {
			effect = c.call.enospc
		}
		switch effect {
		case told:
			actor.load.allow(c.errno)
		case poisons, blind:
			actor.load.allow(syscall.EIO, c.errno)
		case refuses, untidy:
			if c.scene.format != "" {
				actor.load.allow(syscall.EIO, c.errno) // who reads or flushes may meet it too
			}
		}
		if c.scene.format != "" && c.step == "sync-ahead" {
			defer r.fresh(actor, false)()
		}
		for _, call := range calls {
			actor.hooks.fail(call, c.errno)
		}
		if effect == told {
			actor.hooks.waitFailed(c.call.name)
		}
		finish()
		if effect != told {
			actor.hooks.waitFailed(calls...)
		}
		for _, call := range calls {
			actor.hooks.fail(call, 0)
		}
	}
	if c.scene.name == "stop" && actor.end == "" {
		if code := actor.process.wait(startTimeout); code != want.status {
			t.Errorf("%s: exit status %d, want %d\n%s", actor.name, code, want.status, actor.log)
		}
		actor.end = "exited"
		if want.status != 0 {
			r.lose()
		}
	}
}

// standsStill reports whether a process is stopped.
func (p *process) standsStill() bool {
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.pid))
	if err != nil {
		return false
	}
	for _, task := range tasks {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/stat", p.pid, task.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		_, stat, _ := strings.Cut(string(b), ") ")
		if err != nil || !strings.HasPrefix(stat, "T") {
			return false
		}
	}
	return true
}

// judge looks at what the accident has left.
func (r *crashRun) judge(want crashEnd) string {
	r.t.Helper()
	owner := r.owner()
	a, b := r.state(r.sides[0]), r.state(r.sides[1])
	if [2]string{a, b} != want.state {
		r.t.Fatalf("A is %s and B is %s, want %s and %s", a, b, want.state[0], want.state[1])
	}
	rec := r.record()
	if rec.Epoch != want.epoch || rec.Clean != want.clean {
		r.t.Errorf("owner record: epoch %d, clean %v; want %d, %v", rec.Epoch, rec.Clean, want.epoch, want.clean)
	}
	note := ""
	switch {
	case owner == nil && !rec.Clean:
		note = " (not clean)"
	case owner != nil && (rec.PID != owner.pid || rec.Clean):
		r.t.Errorf("the owner record is not that of %s: %+v", owner.name, rec)
	}
	r.load.check("after the accident")
	r.checkTables("after the accident")
	if want.status != 0 {
		a = fmt.Sprintf("%s(%d)", a, want.status)
	}
	return fmt.Sprintf("%s, %s%s → %s", a, b, note, want.next)
}

// goesOn has the next owner take the image, and all come to an end.
func (r *crashRun) goesOn(want crashEnd) {
	t := r.t
	t.Helper()
	c := r.cell
	if owner := r.owner(); owner != nil && r.state(owner) == "failed(io)" {
		r.refused(r.side("B"), true, " lock")
		r.refused(owner, false, "failed(io)")
		r.takesNoWrites(owner)
		r.lose()
		r.must(owner, false, "x-abandon")
	} else if owner != nil {
		owner.load.wait(3)
		r.must(owner, false)
		r.load.settled()
	}
	if r.owner() != nil {
		t.Fatal("the image is still owned")
	}
	r.load.check("after the first owner")
	r.checkTables("after the first owner")

	before := r.record()
	if want.next == "C" {
		r.ready(r.start(true))
	}
	next := r.side(want.next)
	var more []string
	if next.name == "A" && (c.scene.name == "inactivate" || c.scene.takes()) && want.state[1] != "active" {
		// A has let go in order, and takes the image back if B has not written.
		if more = []string{"x-if-unchanged"}; r.left != nil && !r.left.ModTime().Equal(r.stat().ModTime()) {
			r.refused(next, true, "modified while inactive", more...)
			more = nil
		}
	}
	r.must(next, true, more...)
	next.load.wait(3)
	if owner := r.owner(); owner != next {
		t.Fatalf("%s is not the owner", next.name)
	}
	if rec := r.record(); rec.PID != next.pid || rec.Epoch != before.Epoch+1 || rec.Clean {
		t.Errorf("owner record of %s: %+v; the one before: %+v", next.name, rec, before)
	}
	r.load.check("while " + next.name + " is the next owner")
	r.must(next, false)
	r.load.settled()
	if rec := r.record(); rec.PID != next.pid || rec.Epoch != before.Epoch+1 || !rec.Clean {
		t.Errorf("owner record of %s, which has let go: %+v", next.name, rec)
	}
	for _, s := range r.sides {
		if s.end == "" {
			reads := s.load.reads.Load()
			waitFor(t, startTimeout, s.name+" serves reads", func() bool { return s.load.reads.Load() > reads || want.unreadable })
			s.stop()
			s.end = "exited"
		}
	}
	r.load.check("at the end")
	r.checkTables("at the end")
}

// takesNoWrites requires what a failed image owes a client.
func (r *crashRun) takesNoWrites(s *crashSide) {
	r.t.Helper()
	c := dialRaw(r.t, s.socket, "")
	defer c.Close()
	const free = (crashStripes - 1) * crashBlocks * crashBlock
	c.want(nbdEIO, cmdWrite, 0, free, crashBlock, make([]byte, crashBlock))
	c.want(nbdEIO, cmdFlush, 0, 0, 0, nil)
	c.want(0, cmdRead, 0, free, crashBlock, nil)
}
