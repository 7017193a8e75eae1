package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
	"github.com/nbd-export/nbd-export/state"
)

// groupOf is three images, as one process has them, whose system calls can be
// made to fail from a step of a transition on.
type groupOf struct {
	t        *testing.T
	images   [3]*Owned
	machines [3]*state.Machine
	failing  [3]*failing
	// The call of image at fails with err from step on until the next.
	at   int
	step state.Step
	op   sysop
	err  error
}

func newGroup(t *testing.T, dir string) *groupOf {
	g := &groupOf{t: t}
	for i := range g.images {
		path := filepath.Join(dir, fmt.Sprintf("%d.img", i))
		must(t, os.WriteFile(path, make([]byte, 64<<10), 0o644))
		g.failing[i] = &failing{}
		g.images[i] = openImage(t, Options{Path: path, Warn: func(string) {}}, g.failing[i].hook)
		g.machines[i] = state.NewMachine(g.images[i], state.Options{Step: func(_ string, s state.Step) {
			g.failing[i].set(g.op, nil)
			if i == g.at && s == g.step {
				g.failing[i].set(g.op, g.err)
			}
		}})
	}
	t.Cleanup(func() {
		g.step = ""
		_ = state.Stop(g.machines[:]...)
	})
	return g
}

func (g *groupOf) activate() error {
	return state.Activate(context.Background(), state.ActivateOptions{}, g.machines[:]...)
}

func (g *groupOf) inactivate() error { return state.Inactivate(context.Background(), g.machines[:]...) }

// records are the bytes of all owner records.
func (g *groupOf) records() (all [3][]byte) {
	for i, r := range g.images {
		all[i] = contentOf(g.t, r.RecordPlace().Path)
	}
	return all
}

// want requires the states of the images, and locks, descriptors and records
// that agree with them.
func (g *groupOf) want(when string, states [3]state.State, clean [3]bool) {
	g.t.Helper()
	for i, m := range g.machines {
		path := g.images[i].Name()
		if s := m.Status().State; s != states[i] {
			g.t.Errorf("%s: image %d is %s, want %s", when, i, s, states[i])
		}
		_, writable := descriptors(g.t, path)
		if owns := states[i].Owns(); (writable > 0) != owns || (len(procLocks(g.t, path)) > 0) != owns {
			g.t.Errorf("%s: image %d is %s with %d writable descriptors, locks %v", when, i, states[i], writable, procLocks(g.t, path))
		}
		r, _, err := readRecord(path+recordSuffix, nil)
		if err != nil || r.Clean != clean[i] {
			g.t.Errorf("%s: image %d: record %+v, %v; want clean %v", when, i, r, err, clean[i])
		}
	}
}

func all[T any](v T) [3]T { return [3]T{v, v, v} }

// TestGroupAllOrNone has each system call of each step fail for one image of
// three: none is taken or handed over without the others, and what the owner
// records say is what they said before.
func TestGroupAllOrNone(t *testing.T) {
	recordReads := []sysop{opRecordOpen, opRecordRead}
	recordWrites := []sysop{opRecordCreate, opRecordWrite, opRecordRename}
	type row struct {
		step state.Step
		ops  []sysop
	}
	try := func(t *testing.T, rows []row, run func(t *testing.T, g *groupOf)) {
		for _, row := range rows {
			for _, op := range row.ops {
				for at := range 3 {
					g := newGroup(t, testfs.Memory(t))
					must(t, g.activate())
					g.at, g.step, g.op, g.err = at, row.step, op, unix.EIO
					t.Run(fmt.Sprintf("%s, %s of image %d", row.step, op, at), func(t *testing.T) {
						g.t = t
						run(t, g)
					})
					g.t = t
					must(t, state.Stop(g.machines[:]...))
				}
			}
		}
	}

	t.Run("inactivate", func(t *testing.T) {
		try(t, []row{
			{state.StepSyncAhead, []sysop{opSync}},
			{state.StepSettle, []sysop{opSync, opStat}},
		}, func(t *testing.T, g *groupOf) {
			before := g.records()
			must(t, write(g.images[g.at], 0, pattern(4096, 2), false)) // there is to be something to sync
			err := g.inactivate()
			if !errors.Is(err, unix.EIO) {
				t.Fatalf("inactivated with a failing call: %v", err)
			}
			states := all(state.Active)
			if g.op == opSync {
				states[g.at] = state.FailedIO
			}
			g.want("after the failure", states, all(false))
			if now := g.records(); !equalRecords(now, before) {
				t.Errorf("the records are %s, were %s", now, before)
			}
			for i, m := range g.machines {
				if states[i] == state.Active {
					must(t, write(g.images[i], 0, pattern(4096, 1), false))
				} else {
					must(t, state.Abandon(context.Background(), m))
				}
			}
			g.step = ""
			must(t, g.inactivate())
			clean := all(true)
			clean[g.at] = g.op != opSync
			g.want("afterwards", all(state.Inactive), clean)
			must(t, g.activate())
			g.want("when activated again", all(state.Active), all(false))
		})
	})

	t.Run("activate", func(t *testing.T) {
		try(t, []row{
			{state.StepLock, []sysop{opOpen, opStat, opLock, opTestLock}},
			{state.StepLoad, []sysop{opStat}},
			{state.StepClaim, append(append([]sysop{opStat}, recordReads...), recordWrites...)},
		}, func(t *testing.T, g *groupOf) {
			must(t, g.inactivate())
			before := g.records()
			if err := g.activate(); !errors.Is(err, unix.EIO) {
				t.Fatalf("activated with a failing call: %v", err)
			}
			g.step = ""
			g.want("after the failure", all(state.Inactive), all(true))
			if now := g.records(); !equalRecords(now, before) {
				t.Errorf("the records are %s, were %s", now, before)
			}
			must(t, g.activate())
			g.want("afterwards", all(state.Active), all(false))
		})
	})

	// What fails when all is handed over, or taken, is only told.
	t.Run("past the point of return", func(t *testing.T) {
		try(t, []row{
			{state.StepRelease, append([]sysop{opClose, opRecordStat}, recordWrites...)},
			{state.StepRetire, []sysop{opClose}},
		}, func(t *testing.T, g *groupOf) {
			must(t, g.inactivate())
			clean := all(true)
			clean[g.at] = g.step == state.StepRetire || g.op == opClose || g.op == opRecordStat
			g.want("inactive", all(state.Inactive), clean)
			must(t, g.activate())
			g.want("active", all(state.Active), all(false))
		})
	})
}

func equalRecords(a, b [3][]byte) bool {
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}
