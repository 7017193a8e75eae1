package model

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/state"
)

// kind of a move: good ones are what everybody does who does what they should,
// and no way back may need another.
type kind bool

const (
	good  kind = true
	fault kind = false
)

// model is a search of all states of an environment.
type model struct {
	t        *testing.T
	env      environment
	flaw     flaw
	scripts  []*script
	starts   [2]int16
	verdicts [numVerdicts]int // how often each was told
	defect   string           // what went wrong in the move under way

	seen   map[world]int32
	states []world
	came   []step // how each was first reached
	moves  int
	// back are the good moves, from the state they lead to.
	back  [][2]int32
	now   int32
	wrong string
	bad   int32 // the state where
}

type step struct {
	from int32
	what string
	who  int8
}

// emit is a move of the state under search.
func (m *model) emit(n world, what string, who int, k kind) {
	if m.wrong != "" {
		return
	}
	m.moves++
	n.normalize(m.env)
	id, known := m.seen[n]
	if !known {
		id = int32(len(m.states))
		m.seen[n] = id
		m.states = append(m.states, n)
		m.came = append(m.came, step{m.now, what, int8(who)})
	}
	if k == good && id != m.now {
		m.back = append(m.back, [2]int32{id, m.now})
	}
	if m.defect == "" && !known {
		m.defect = m.check(&n)
	}
	if m.defect != "" {
		m.wrong, m.bad, m.defect = m.defect, id, ""
		if known { // a move, and not a state, is wrong
			m.states = append(m.states, n)
			m.came = append(m.came, step{m.now, what, int8(who)})
			m.bad = int32(len(m.states) - 1)
		}
	}
}

// explore visits every state that env and f allow. It returns what goes
// wrong, "" if nothing does.
func explore(t *testing.T, env environment, f flaw) *model {
	m := &model{t: t, env: env, flaw: f, seen: make(map[world]int32), scripts: []*script{nil}}
	for from := range m.starts {
		m.starts[from] = int16(len(m.scripts))
		m.scripts = append(m.scripts, m.resume(from, 1-from, nil, nil))
	}
	begin := world{disk: 1, acked: 1, guest: paused, record: note{epoch: 1, owner: 0, clean: true}}
	for i := range begin.x {
		begin.x[i] = exporter{up: true, print: 1}
	}
	m.emit(begin, "begin", 0, fault)
	for ; int(m.now) < len(m.states) && m.wrong == ""; m.now++ {
		w := m.states[m.now]
		for i := range w.x {
			m.exporterMoves(&w, i)
			m.strayMoves(&w, i)
		}
		for k := range w.c {
			m.commanderMoves(&w, k)
		}
		m.operatorMoves(&w)
	}
	if m.wrong == "" {
		m.recoverable()
	}
	return m
}

const dirty = "a record that says clean of what is not"

// check says what is wrong in a state.
func (m *model) check(w *world) string {
	a, b := &w.x[0], &w.x[1]
	owners := 0
	for i := range w.x {
		x := &w.x[i]
		switch {
		case x.owns():
			owners++
			if !x.locks {
				return "an owner without locks"
			}
			if m.env.locks && (x.state == state.Active || x.state == state.Inactivating) && x.cache != w.acked {
				return "an owner without an acknowledged write"
			}
		case x.locks && x.at == idle:
			return "locks that nobody owns"
		case x.state == state.FailedFenced && m.env.locks:
			return "fenced in spite of locks"
		}
		if x.up && x.at == idle && (x.state == state.Activating || x.state == state.Inactivating) {
			return "a transition that nobody makes"
		}
	}
	if owners == 2 {
		if !m.env.mayClash {
			return "two owners"
		}
		// Who finds a lower epoch than its own puts its own back.
		if !m.taken(w, 0) && !m.taken(w, 1) && w.record.epoch >= max(a.claim, b.claim) {
			return "two owners, and neither will notice"
		}
	}
	for i := range w.x {
		// An older record, which a race without locks brought back, is soon
		// found by the owner.
		old := w.record.epoch < w.x[i].claim && m.env.mayClash
		if x := &w.x[i]; w.record.clean && x.owns() && x.at != unlock && !m.taken(w, i) && !old {
			return dirty
		}
	}
	if !m.env.mayClash {
		if owners == 0 && w.disk != w.acked {
			return "an acknowledged write is lost"
		}
		if w.record.clean && w.disk != w.acked {
			return dirty
		}
	}
	return ""
}

// well: one side owns the image, all is there, and nothing is under way.
func (w *world) well(env environment) bool {
	for i := range w.x {
		x, y := &w.x[i], &w.x[1-i]
		if x.up && x.state == state.Active && x.at == idle && x.locks && x.cache == w.acked &&
			!y.owns() && !y.locks && y.at == idle && x.stray|y.stray == 0 &&
			w.c == [2]commander{} && (env.anyClient || w.guest == int8(i)) {
			return true
		}
	}
	return false
}

// recoverable looks for states from which no good moves lead to one where all
// is well.
func (m *model) recoverable() {
	// from[first[id]:first[id+1]] are the states with a good move to id.
	first, from := make([]int32, len(m.states)+2), make([]int32, len(m.back))
	for _, e := range m.back {
		first[e[0]+2]++
	}
	for id := range m.states {
		first[id+2] += first[id+1]
	}
	for _, e := range m.back {
		from[first[e[0]+1]] = e[1]
		first[e[0]+1]++
	}
	ok := make([]bool, len(m.states))
	var todo []int32
	reach := func(id int32) {
		if !ok[id] {
			ok[id] = true
			todo = append(todo, id)
		}
	}
	for id := range m.states {
		if m.states[id].well(m.env) {
			reach(int32(id))
		}
	}
	for len(todo) > 0 {
		id := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, before := range from[first[id]:first[id+1]] {
			reach(before)
		}
	}
	if at := slices.Index(ok, false); at >= 0 {
		m.wrong, m.bad = "no way back", int32(at)
	}
}

// story is the shortest way to what is wrong.
func (m *model) story() string {
	if m.wrong == "" {
		return "nothing"
	}
	var lines []string
	for id := m.bad; ; id = m.came[id].from {
		lines = append(lines, fmt.Sprintf("%c %s\n\t%s", "AB"[m.came[id].who], m.came[id].what, m.states[id].String()))
		if id == 0 {
			break
		}
	}
	slices.Reverse(lines)
	return m.wrong + "\n" + strings.Join(lines, "\n")
}

func (w world) String() string {
	var b strings.Builder
	for i, x := range w.x {
		fmt.Fprintf(&b, "%c: ", "AB"[i])
		if !x.up {
			fmt.Fprintf(&b, "down, ")
			continue
		}
		fmt.Fprintf(&b, "%s at %d, epoch %d claim %d, serves %d left %d", x.state, x.at, x.own, x.claim, x.cache, x.print)
		for _, is := range []struct {
			is   bool
			what string
		}{{x.locks, "locks"}, {x.ifUnchanged, "if unchanged"}, {x.broken, "broken"}, {x.stray != 0, "stray orders"}} {
			if is.is {
				b.WriteString(", " + is.what)
			}
		}
		b.WriteString("; ")
	}
	fmt.Fprintf(&b, "disk %d acknowledged %d, record %+v, guest at %d, commanders %v", w.disk, w.acked, w.record, w.guest, w.c)
	return b.String()
}
