package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

// groupPair is two daemons with the same images, which the second knows by
// links and has in the opposite order. The first owns them all.
type groupPair struct {
	t       testing.TB
	images  []string
	daemons [2]*daemon
	q       [2]*qmpConn
	round   byte // of writes
}

const groupSides = "ab"

// node is what a side calls an image.
func (g *groupPair) node(side, i int) string { return fmt.Sprintf("%c%d", groupSides[side], i) }

// link is the name by which the second side knows an image.
func (g *groupPair) link(i int) string { return g.images[i] + ".link" }

func newGroupPair(t testing.TB, n int) *groupPair {
	t.Helper()
	g := &groupPair{t: t}
	dir := tmpfsDir(t)
	for i := range n {
		path := filepath.Join(dir, fmt.Sprintf("%d.img", i))
		if err := os.WriteFile(path, make([]byte, 4*kib), 0o600); err != nil {
			t.Fatal(err)
		}
		g.images = append(g.images, path)
		g.point(i, path)
	}
	for side := range g.daemons {
		dir := shortDir(t)
		d := &daemon{socket: filepath.Join(dir, "nbd"), control: filepath.Join(dir, "ctl"), pidFile: filepath.Join(dir, "pid")}
		d.process = spawn(t, "nbd-export daemon", nil, program(t), "daemon", "--control", d.control, "--pid-file", d.pidFile,
			"--nbd-server", "addr.type=unix,addr.path="+d.socket)
		d.ready()
		g.daemons[side], g.q[side] = d, d.qmp()
		for n := range g.images {
			i, path := n, g.images[n]
			if side == 1 {
				i = len(g.images) - 1 - n
				path = g.link(i)
			}
			node := g.node(side, i)
			g.q[side].must("blockdev-add", map[string]any{
				"driver": "raw", "node-name": node, "active": side == 0, "file": map[string]any{"driver": "file", "filename": path},
			})
			g.export(side, i, true)
		}
	}
	return g
}

// point makes the second side's name of an image one of path.
func (g *groupPair) point(i int, path string) {
	g.t.Helper()
	next := g.link(i) + ".new"
	if err := os.Symlink(path, next); err != nil {
		g.t.Fatal(err)
	}
	if err := os.Rename(next, g.link(i)); err != nil {
		g.t.Fatal(err)
	}
}

func (g *groupPair) export(side, i int, allowInactive bool) {
	g.t.Helper()
	node := g.node(side, i)
	g.q[side].must("block-export-add", map[string]any{
		"type": "nbd", "id": node, "node-name": node, "writable": true, "allow-inactive": allowInactive,
	})
}

// owners requires that the images numbered in second are owned by the second
// side, and all others by the first, says the status of both and the kernel,
// and that the owner of each can write to it.
func (g *groupPair) owners(second ...int) {
	g.t.Helper()
	for side, q := range g.q {
		var s struct{ Images []status }
		if err := json.Unmarshal(q.must("x-query-status", nil), &s); err != nil || len(s.Images) != len(g.images) {
			g.t.Fatalf("%d images of %d: %v", len(s.Images), len(g.images), err)
		}
		for n, image := range s.Images {
			i := n
			if side == 1 {
				i = len(g.images) - 1 - n
			}
			want := "inactive"
			if slices.Contains(second, i) == (side == 1) {
				want = "active"
			}
			if image.State != want {
				g.t.Fatalf("side %d: image %d is %s, want %s", side, i, image.State, want)
			}
		}
	}
	for i, image := range g.images {
		for side, d := range g.daemons {
			var want []int
			if slices.Contains(second, i) == (side == 1) {
				want = activeLocks
			}
			if held := processLocks(g.t, d.pid, image); !slices.Equal(held, want) {
				g.t.Errorf("side %d holds %v of image %d, want %v", side, held, i, want)
			}
		}
	}
	g.round++
	for i := range g.images {
		for side := range g.daemons {
			c, err := client.Dial(g.t.Context(), nbdURI(g.node(side, i), g.daemons[side].socket), client.Options{})
			if err != nil {
				g.t.Fatal(err)
			}
			_, err = c.WriteAt(slices.Repeat([]byte{g.round}, sectorSize), 0, false)
			if owns := slices.Contains(second, i) == (side == 1); owns != (err == nil) {
				g.t.Errorf("side %d, image %d: written with %v", side, i, err)
			}
			if err := c.Close(); err != nil {
				g.t.Error(err)
			}
		}
		if got := fileAt(g.t, g.images[i], 0, 1)[0]; got != g.round {
			g.t.Errorf("image %d holds write %d, want %d", i, got, g.round)
		}
	}
}

// all are the numbers of all images.
func (g *groupPair) all() (list []int) {
	for i := range g.images {
		list = append(list, i)
	}
	return list
}

func (g *groupPair) stop() {
	for _, d := range g.daemons {
		d.stop()
	}
}

// The images of two daemons move together, or none does.
func TestHandoverGroup(t *testing.T) {
	g := newGroupPair(t, 20)
	a, b := g.daemons[0].control, g.daemons[1].control
	expect := func(h handoverReport, outcome, why string) {
		t.Helper()
		if h.Outcome != outcome || !strings.Contains(h.Error, why) {
			t.Fatalf("%s: %s; want %s: %s", h.Outcome, h.Error, outcome, why)
		}
	}
	g.owners()

	// One has an export that may not be inactive.
	g.q[0].must("block-export-del", map[string]any{"id": g.node(0, 7)})
	g.export(0, 7, false)
	expect(handover(t, a, b), "refused", "allow-inactive")
	g.owners()
	g.q[0].must("block-export-del", map[string]any{"id": g.node(0, 7)})
	g.export(0, 7, true)

	// One is another file at the destination, from the start or since the check.
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, make([]byte, 4*kib), 0o600); err != nil {
		t.Fatal(err)
	}
	g.point(13, other)
	expect(handover(t, a, b), "refused", g.link(13))
	g.owners()
	g.point(13, g.images[13])
	ctl, answer := hold(t, g.daemons[0], answerToOrder)
	cmd := newHandoverProcess(t, ctl, b)
	answer.wait(cmd.process)
	g.point(13, other)
	answer.release()
	expect(parseHandover(t, cmd.result()), "returned", g.link(13))
	g.owners()
	g.point(13, g.images[13])

	// One is not there any more at the destination when it is to take them.
	ctl, answer = hold(t, g.daemons[0], answerToOrder)
	cmd = newHandoverProcess(t, ctl, b)
	answer.wait(cmd.process)
	g.q[1].must("block-export-del", map[string]any{"id": g.node(1, 0)})
	g.q[1].must("blockdev-del", map[string]any{"node-name": g.node(1, 0)})
	answer.release()
	h := parseHandover(t, cmd.result())
	expect(h, "returned", g.node(1, 0))
	for _, s := range h.Steps {
		if s.Step == "ask" && s.Error != "" {
			t.Errorf("what became of the order was not found out: %s", s.Error)
		}
	}
	// A file node that nothing exports cannot own it.
	g.q[1].must("blockdev-add", map[string]any{"driver": "file", "node-name": "f", "filename": g.link(0), "active": false})
	expect(handover(t, a, b), "refused", "export the node, or add a format node")
	g.q[1].must("blockdev-add", map[string]any{"driver": "raw", "node-name": g.node(1, 0), "file": "f", "active": false})
	g.export(1, 0, true)

	g.owners()
	expect(handover(t, a, b, "--node", "a3", "--node", "a13", "--node", "a0"), "moved", "")
	g.owners(0, 3, 13)
	expect(handover(t, a, b), "moved", "")
	g.owners(g.all()...)
	expect(handover(t, b, a), "moved", "")
	g.owners()
	g.stop()
}

// A thousand images move by one command.
func TestHandoverThousand(t *testing.T) {
	const n = 1000
	began := time.Now()
	g := newGroupPair(t, n)
	t.Logf("%d images and exports added to two daemons in %v", n, time.Since(began))
	for from := range 2 {
		began = time.Now()
		r := cli(t, "handover", "--json", "--timeout", "1m", "--from", g.daemons[from].control, "--to", g.daemons[1-from].control)
		took := time.Since(began)
		h := parseHandover(t, r)
		if h.Outcome != "moved" || len(h.Images) != n || h.From.State != "inactive" || h.To.State != "active" {
			t.Fatalf("%s: %s", h.Outcome, h.Error)
		}
		t.Logf("%d images handed over in %v, the gap is %v ms: %v", n, took, h.Gap, h.Steps)
	}
	g.stop()
}
