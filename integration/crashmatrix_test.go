package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// crashCell is one accident at one step.
type crashCell struct {
	scene *crashScene
	step  string
	accident
}

func (c crashCell) String() string {
	return fmt.Sprintf("%s/%s/%s", path.Join(c.scene.format, c.scene.name), c.step, c.accident)
}

// crashCells are all there are.
func crashCells() []crashCell {
	var cells []crashCell
	for i := range crashScenes {
		s := &crashScenes[i]
		for _, step := range s.steps {
			for kind := range fails {
				for who := range 2 {
					if s.name == "stop" && kind == ended && who == s.actor {
						continue // a second SIGTERM ends the process at once, which is SIGKILL
					}
					cells = append(cells, crashCell{s, step.name, accident{kind: kind, who: who}})
				}
			}
			for _, call := range step.calls {
				for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
					cells = append(cells, crashCell{s, step.name, accident{kind: fails, who: s.actor, call: call, errno: errno}})
				}
			}
		}
	}
	return cells
}

// TestCrashMatrix has every accident happen at every step of a transition,
// while clients write and read, and holds what it leaves against the rules:
// at most one owner, locks that agree with the state, nothing lost, and another
// owner afterwards. docs/crash-matrix.md shows what came of it; -update writes
// it anew.
func TestCrashMatrix(t *testing.T) {
	cells := crashCells()
	ends := runCrashCells(t, cells, tmpfsDir)
	if len(ends) < len(cells) {
		return // not all were asked for, or some failed
	}
	checkCrashDocs(t, ends)
}

// TestCrashMatrixOnDisk is a part of it where a sync is one. For as long as
// NBD_EXPORT_SOAK says it is all of it, again and again.
func TestCrashMatrixOnDisk(t *testing.T) {
	for _, cache := range []string{"writeback", "none"} {
		t.Run(cache, func(t *testing.T) {
			end := time.Now().Add(migrateSoak(t) / 2)
			for again := true; again; again = time.Now().Before(end) && !t.Failed() {
				cells := crashCells()
				if migrateSoak(t) == 0 {
					cells = slices.DeleteFunc(cells, func(c crashCell) bool {
						return !(c.kind == killed && c.who == c.scene.actor || c.kind == fails && c.call.name == "sync" && c.errno == syscall.EIO)
					})
				}
				rand.Shuffle(len(cells), func(i, j int) { cells[i], cells[j] = cells[j], cells[i] })
				runCrashCells(t, cells, diskDir, "--cache", cache)
			}
		})
	}
}

// crashWide is how many cells run at once; most of the time they wait.
const crashWide = 4

func runCrashCells(t *testing.T, cells []crashCell, dir func(testing.TB) string, flags ...string) map[string]string {
	var mu sync.Mutex
	ends := map[string]string{}
	next := make(chan crashCell)
	var workers sync.WaitGroup
	for range crashWide {
		workers.Go(func() {
			for c := range next {
				t.Run(c.String(), func(t *testing.T) {
					r := &crashRun{t: t, cell: c, dir: dir(t), flags: flags}
					text := r.run()
					if !t.Failed() {
						mu.Lock()
						ends[c.String()] = text
						mu.Unlock()
					}
				})
			}
		})
	}
	for _, c := range cells {
		next <- c
	}
	close(next)
	workers.Wait()
	return ends
}

// TestCrashCalls requires that the matrix has every system call that the steps
// of a transition make.
func TestCrashCalls(t *testing.T) {
	t.Run("raw", func(t *testing.T) { checkCrashCalls(t, "", rawScenes) })
	t.Run("qcow2", func(t *testing.T) { checkCrashCalls(t, "qcow2", qcow2Scenes) })
}

func checkCrashCalls(t *testing.T, format string, scenes []crashScene) {
	image := crashImage(t, tmpfsDir(t), format)
	h, prepare := newHooks(t)
	a := servePrepared(t, image, prepare, crashFlags(format)...)
	// last activates, and returns the calls made since it was last called: when
	// the step lock is held, all before it have been heard of.
	last := func() map[string][]string {
		h.holdAt("lock")
		var activated sync.WaitGroup
		activated.Go(a.activate)
		h.wait()
		calls := h.seen()
		h.goOn()
		activated.Wait()
		return calls
	}
	write := func(n int) {
		// There is to be something to sync, and with qcow2 a table to be made.
		dialRaw(t, a.socket, "").want(0, cmdWrite, 0, uint64(n)*crashTable, crashBlock, randomBytes(int64(n), crashBlock))
	}
	a.inactivate()
	last()
	made := map[string][]string{}
	for n := range 3 {
		write(2 * n)
		a.inactivate()
		if format == "qcow2" {
			makeDirty(t, image)
		}
		a.activate()
		write(2*n + 1)
		h.holdAt(crashSync(format))
		q, failed := a.qmp(), make(chan error, 1)
		go func() {
			_, err := q.execute("blockdev-set-active", map[string]any{"active": false})
			failed <- err
		}()
		h.wait()
		h.fail("sync", syscall.EIO)
		h.goOn()
		if <-failed == nil {
			t.Fatal("inactivated without a sync")
		}
		q.must("blockdev-set-active", map[string]any{"active": false, "x-abandon": true})
		// What the owner checks once a second may fall into any step, but not
		// into the same one of every round.
		for step, calls := range last() {
			if n == 0 {
				made[step] = calls
			}
			made[step] = slices.DeleteFunc(made[step], func(c string) bool { return !slices.Contains(calls, c) })
		}
	}
	a.stop()
	<-h.left
	// The bitmap of an image that was abandoned is not stored any more.
	image = crashImage(t, tmpfsDir(t), format)
	a = servePrepared(t, image, prepare, crashFlags(format)...)
	write(0)
	h.seen()
	a.stop()
	<-h.left
	stop := h.seen()
	made["stop"] = stop["stop"]
	for step, calls := range made {
		made[step] = slices.DeleteFunc(calls, func(c string) bool { return c == "write" && format == "" || c == "try-write" })
		if !slices.ContainsFunc(scenes, func(s crashScene) bool { return s.at(step) >= 0 }) {
			t.Errorf("the matrix does not have the step %s", step)
		}
	}
	for _, s := range scenes {
		for _, step := range s.steps {
			was := made[step.name]
			if s.name == "stop" {
				was = slices.DeleteFunc(stop[step.name], func(c string) bool { return c == "try-write" })
			}
			if format == "qcow2" && step.name == "retire" {
				continue // until the next step all is said to be its, clients' requests too
			}
			var known []string
			for _, c := range step.calls {
				if c.alternatives == nil { // it is not a client's
					known = append(known, c.name)
				}
			}
			slices.Sort(known)
			if format == "qcow2" && s.name == "inactivate" && s.at(step.name) > s.at("settle") && step.name != "release" {
				// Some of it was done ahead; all is done when it stops.
				known = slices.DeleteFunc(known, func(c string) bool { return !slices.Contains(was, c) })
			}
			if !slices.Equal(was, known) {
				t.Errorf("%s: step %s makes the calls %v, the matrix has %v", s.name, step.name, was, known)
			}
		}
	}
}

// TestShippedWithoutHooks requires that only the program built for tests can
// be made to fail.
func TestShippedWithoutHooks(t *testing.T) {
	const name = "NBD_EXPORT_HOOKS"
	if !bytes.Contains(readFile(t, hookedProgram(t)), []byte(name)) {
		t.Errorf("the hooked program does not know %s", name)
	}
	if bytes.Contains(readFile(t, program(t)), []byte(name)) {
		t.Errorf("the program that is shipped knows %s", name)
	}
}
