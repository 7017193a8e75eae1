package model

import (
	"fmt"

	"github.com/nbd-export/nbd-export/state"
)

// environment is what may happen around the two exporters.
type environment struct {
	locks        bool // they keep the other one out; false is NFS with nolock
	crashes      bool // an exporter is killed, or stopped
	startsActive bool // a new process may take the image without being told to
	faults       bool // a step fails
	cuts         bool // a commander is cut off, or gives up waiting
	kills        bool // a commander is killed
	late         bool // what it sent arrives all the same, later
	strays       bool // even when it has ended
	commanders   int  // at a time
	operator     bool // gives orders by hand while no commander runs
	anyOrder     bool // anybody gives any order at any time
	mayClash     bool // two owners are no surprise, but have to be noticed
	anyVerdict   bool // what a handover says is not looked at
	anyClient    bool // writes come to both sides at all times; else from a guest that moves
}

// commanderStarts is somebody who gives the command: who moves a guest pauses
// it first.
func (m *model) commanderStarts(w *world, k int) {
	for i := range w.c {
		if i < k && w.c[i].at == 0 || i != k && w.c[i].at != 0 && m.env.commanders < 2 {
			return // commanders are alike: the first that is free
		}
	}
	if k >= m.env.commanders {
		return
	}
	for from := range w.x {
		if m.env.anyClient || w.guest == int8(from) || w.guest == paused {
			n := *w
			n.guest = paused
			n.c[k] = commander{at: m.starts[from], onWay: true}
			if m.env.commanders > 1 && w.c[1-k].at != 0 {
				n.c[k].stirred, n.c[1-k].stirred = true, true
			}
			m.emit(n, fmt.Sprintf("commander %d starts a handover from", k), from, good)
		}
	}
}

// ends: the command has told v, and who gave it acts on that.
func (m *model) ends(w *world, sc *script, v verdict, stirred bool) {
	m.verdicts[v]++
	src, dst := &w.x[sc.from], &w.x[sc.to]
	wrong := false
	switch v {
	case moved, already:
		w.guest = int8(sc.to)
		wrong = dst.state != state.Active || src.owns()
	case returned:
		w.guest = int8(sc.from)
		wrong = src.state != state.Active || dst.owns()
	case unowned:
		wrong = src.owns() || dst.owns()
	}
	if m.env.anyClient {
		w.guest = paused
	}
	if wrong && !stirred && !m.env.anyVerdict {
		m.defect = fmt.Sprintf("the command says %q, and the exporters are %s and %s", v, src.state, dst.state)
	}
}

// operatorMoves are what somebody does who looks at the status of both, and
// what the documentation tells to do then.
func (m *model) operatorMoves(w *world) {
	busy := w.c[0].at != 0 || w.c[1].at != 0
	for i := range w.x {
		x := &w.x[i]
		if m.env.crashes && x.up && x.at == idle {
			m.stops(w, i)
		}
		if !x.up || busy && !m.env.anyOrder || !m.env.operator && !m.env.anyOrder {
			continue
		}
		for _, r := range []request{orderActivate, orderReactivate, orderInactivate, orderAbandon} {
			n := *w
			if m.order(&n, i, r); n != *w {
				n.stir()
				m.emit(n, "operator orders "+r.String(), i, good)
			}
		}
	}
	// Whoever has a paused guest sees which side is active, and nothing else
	// under way, and lets it go on there.
	if w.guest == paused && !busy && !m.env.anyClient {
		for i := range w.x {
			if x := &w.x[i]; x.up && x.state == state.Active && !w.x[1-i].owns() {
				n := *w
				n.guest = int8(i)
				m.emit(n, "guest goes on", i, good)
			}
		}
	}
}

// stops ends a process in order. What it cannot settle it tells.
func (m *model) stops(w *world, i int) {
	n := *w
	x := &n.x[i]
	clean := x.state == state.Active && !m.taken(&n, i)
	if !m.event(&n, i, state.OrderStop) {
		return
	}
	if x.state = w.x[i].state; clean {
		n.record = note{x.claim, int8(i), true}
	}
	n.letGo(i)
	m.dies(&n, i)
	n.stir()
	m.emit(n, "is stopped", i, good)
}
