package model

import (
	"slices"

	"github.com/nbd-export/nbd-export/state"
)

// request is what a commander sends to one exporter.
type request uint8

const (
	orderActivate   request = iota
	orderReactivate         // activate if the image is unchanged
	orderInactivate
	orderAbandon

	numOrders

	askStatus request = iota
	// askGone asks the host, and not the exporter, whether the process lives.
	askGone
	// recall + r takes order r back: it does not begin any more.
	recall
)

func (r request) String() string {
	if r >= recall {
		return "take back " + (r - recall).String()
	}
	return [...]string{"activate", "activate if unchanged", "inactivate", "abandon", "", "status", "is it gone"}[r]
}

// answer is what a commander hears.
type answer uint8

const (
	none    answer = iota // nothing yet
	waiting               // the order is being carried out
	done                  // also: yes
	failed                // also: no; it said so
	silence               // cut off: it may have been done, or be done later
	timeUp                // so often that it waits no longer
	// answerState + s: the state is s.
	answerState
)

func is(s state.State) answer { return answerState + answer(s) }

func moving(a answer) bool { return a == is(state.Activating) || a == is(state.Inactivating) }

// verdict is what a handover tells whoever gave the command.
type verdict uint8

const (
	running verdict = iota
	moved
	already
	refused  // the source owns the image as before, or whoever did
	returned // the destination did not take it, the source has taken it back
	unowned
	unknown // a side does not answer, and may own it

	numVerdicts
)

func (v verdict) String() string {
	return [...]string{"running", "moved", "already", "refused", "returned", "unowned", "unknown"}[v]
}

// commander is a run of the command.
type commander struct {
	// at is the program's state: what it has heard so far, as an index of
	// model.scripts. 0 is none.
	at      int16
	reply   answer // to the request of at
	onWay   bool   // the request is on its way
	stirred bool   // something else changed the exporters meanwhile
	// late are orders that it no longer waits for and that may still arrive.
	late uint8
}

// script is a point in a handover that waits for an answer or has ended.
type script struct {
	from, to int
	path     []int16 // the points before, from the first
	heard    []answer
	side     int
	request  request
	loop     int     // a number of the loop that it is in, 0 if it is in none
	verdict  verdict // running if it waits
	next     map[answer]int16
}

// hear takes a handover on by an answer. Who asks the same side the same once
// more in a loop, is where it was before: these loops remember nothing but the
// time, which is up when the answer says so.
func (m *model) hear(at int16, a answer) int16 {
	sc := m.scripts[at]
	if next, ok := sc.next[a]; ok {
		return next
	}
	n := m.resume(sc.from, sc.to, append(slices.Clip(sc.path), at), append(slices.Clip(sc.heard), a))
	next := int16(len(m.scripts))
	for _, id := range n.path {
		if p := m.scripts[id]; n.loop > 0 && p.loop == n.loop && p.side == n.side && p.request == n.request {
			next = id
			break
		}
	}
	if sc.next[a] = next; int(next) == len(m.scripts) {
		m.scripts = append(m.scripts, n)
	}
	return next
}

// commanderMoves are the moves of commander k and of its messages.
func (m *model) commanderMoves(w *world, k int) {
	c := w.c[k]
	if c.at == 0 {
		m.commanderStarts(w, k)
		return
	}
	sc := m.scripts[c.at]
	if m.env.kills {
		n := *w
		n.leave(k)
		m.emit(n, "commander is killed, and what it sent is lost", k, fault)
		if n.c[k].late = c.late; c.onWay && sc.request < numOrders && m.env.late && w.mayBeLate(sc.side) {
			n.c[k].late |= 1 << sc.request
		}
		m.orphan(&n, k, sc)
		m.emit(n, "commander is killed", k, fault)
	}
	switch {
	case c.reply == waiting:
	case c.reply != none:
		n := *w
		at := m.hear(c.at, c.reply)
		n.c[k] = commander{at: at, onWay: true, stirred: c.stirred, late: c.late}
		if v := m.scripts[at].verdict; v != running {
			n.leave(k)
			n.c[k].late = c.late
			m.orphan(&n, k, sc)
			m.ends(&n, sc, v, c.stirred)
		}
		m.emit(n, "commander hears", k, good)
	case sc.request == askGone:
		n := *w
		n.c[k].onWay, n.c[k].reply = false, failed
		if !w.x[sc.side].up {
			n.c[k].reply = done
		}
		m.emit(n, "the host is asked", k, good)
	default:
		n := *w
		n.c[k].onWay = false
		if n.c[k].reply = silence; w.x[sc.side].up {
			n.c[k].reply = m.receive(&n, k, sc.side, sc.request)
		}
		m.emit(n, sc.request.String()+" reaches", sc.side, good)
	}
	if m.env.cuts && c.reply < silence && sc.request >= numOrders && sc.request != askGone {
		n := *w
		n.c[k].onWay, n.c[k].reply = false, timeUp
		m.emit(n, "commander has waited long enough", k, fault)
	}
	if m.env.cuts && c.reply < silence && sc.request != askGone {
		n := *w
		n.c[k].onWay, n.c[k].reply = false, silence
		m.emit(n, "commander is cut off", k, fault)
		if c.onWay && sc.request < numOrders && m.env.late && w.mayBeLate(sc.side) {
			n.c[k].late |= 1 << sc.request
			m.emit(n, "commander is cut off, its order is on its way", k, fault)
		}
	}
	for r := range numOrders {
		if c.late>>r&1 == 0 {
			continue
		}
		n := *w
		n.c[k].late &^= 1 << r
		m.emit(n, "late order is lost", k, good)
		if side := sc.sideOf(r); n.x[side].up {
			m.receive(&n, k, side, r)
			m.emit(n, "late order arrives: "+r.String(), side, fault)
		}
	}
}

// receive is a message of commander k at an exporter that is up.
func (m *model) receive(w *world, k, side int, r request) answer {
	x := &w.x[side]
	switch {
	case r == askStatus:
		return is(x.state)
	case r < recall:
		a := m.order(w, side, r)
		if a == waiting {
			x.orders |= 1 << k
		}
		return a
	}
	w.c[k].late &^= 1 << (r - recall)
	under := x.orders>>k&1 != 0
	if x.state == state.Inactivating && x.at == syncAhead && m.event(w, side, state.InactivateFailed) {
		m.end(w, side, failed)
	}
	if under {
		return done
	}
	return failed
}

// sideOf is the side that a handover gives an order to.
func (sc *script) sideOf(r request) int {
	if r == orderActivate {
		return sc.to
	}
	return sc.from
}

// leave: nobody waits for what commander k has ordered.
func (w *world) leave(k int) {
	for i := range w.x {
		w.x[i].orders &^= 1 << k
	}
	w.c[k] = commander{}
}

// orphan leaves what commander k has sent to itself.
func (m *model) orphan(w *world, k int, sc *script) {
	for r := range numOrders {
		if side := sc.sideOf(r); w.c[k].late>>r&1 != 0 && m.env.strays && w.x[side].up {
			w.x[side].stray |= 1 << r
		}
	}
	w.c[k].late = 0
}

// mayBeLate: an order that was sent to a process may reach it with nobody
// waiting for it, one at a time.
func (w *world) mayBeLate(side int) bool {
	return w.x[side].up && w.x[0].stray|w.x[1].stray|w.c[0].late|w.c[1].late == 0
}

// strayMoves deliver or lose what dead commanders have sent.
func (m *model) strayMoves(w *world, i int) {
	for r := range numOrders {
		if w.x[i].stray>>r&1 == 0 {
			continue
		}
		n := *w
		n.x[i].stray &^= 1 << r
		m.emit(n, "stray order is lost", i, good)
		m.order(&n, i, r)
		n.stir()
		m.emit(n, "stray order arrives: "+r.String(), i, fault)
	}
}

func (w *world) stir() {
	for k := range w.c {
		if w.c[k].at != 0 {
			w.c[k].stirred = true
		}
	}
}
