package state

import (
	"fmt"
	"testing"
)

// What follows steps the gate's algorithm through every interleaving of two
// lanes and one transition, instruction by instruction, as sequentially
// consistent atomics allow. Each step of lane and switcher below is one atomic
// operation of gate.go. With one instruction changed the search finds what
// goes wrong, so it would find it in the original too.

// flaw changes one instruction.
type flaw int

const (
	none         flaw = iota
	addLate           // Enter looks at the mode before it counts itself
	noSecondLook      // EnterRead does not look at the parity again
	noFlip            // synchronize waits without flipping the parity
	lookBefore        // await looks at the lanes before it counts as watcher
	kickFirst         // leave kicks before it takes back its count
	oneScan           // await does not look again when it was kicked
)

// laneState is a goroutine that enters and leaves through its own lane.
type laneState struct {
	pc, rounds int8
	others     int8
	reads      [2]int8
	p          int8 // EnterRead's parity
	view       int8 // in use, 0 none
	inside     bool // admitted by Enter
	admitted   bool // what Enter saw
}

type gateState struct {
	open           bool
	parity         int8
	watchers, kick bool
	view           int8  // current, from 1
	closed         uint8 // views closed, by bit
	shut           bool  // drained: nobody may be inside
	lanes          [2]laneState

	pc, round, old, at int8 // of the transition
	empty              bool
}

// lane makes one step of lane i: n rounds of Enter and Leave (reads: EnterRead
// and LeaveRead). It reports whether there was one to make.
func (s gateState) lane(i int, reads bool, f flaw) (gateState, bool) {
	l := &s.lanes[i]
	leave := func() { // the end of Enter, EnterRead and Leave
		if reads {
			l.reads[l.p]--
		} else {
			l.others--
		}
	}
	kick := func() {
		if s.watchers {
			s.kick = true
		}
	}
	const done, left, kicked = 10, 5, 6
	switch {
	case l.pc == done:
		return s, false
	case l.pc == left: // leave, first half
		if l.view, l.inside = 0, false; f == kickFirst {
			kick()
		} else {
			leave()
		}
		l.pc = kicked
	case l.pc == kicked: // leave, second half
		if f == kickFirst {
			leave()
		} else {
			kick()
		}
		l.pc = 0
		if l.rounds--; l.rounds == 0 {
			l.pc = done
		}
	case reads:
		switch l.pc {
		case 0:
			l.p = s.parity
		case 1:
			l.reads[l.p]++
		case 2:
			if s.parity != l.p && f != noSecondLook {
				l.rounds++ // the retry is not a round
				l.pc = left
				return s, true
			}
		case 3:
			l.view = s.view
		case 4: // the view is used until the next step
		}
		l.pc++
	default:
		switch l.pc {
		case 0, 1:
			if (l.pc == 0) == (f == addLate) {
				l.admitted = s.open
			} else {
				l.others++
			}
		case 2:
			if !l.admitted {
				l.pc = left
				return s, true
			}
			l.inside = true
		case 3, 4: // inside
		}
		l.pc++
	}
	return s, true
}

// transition makes one step of what closes and drains (reads: publishes and
// synchronizes), some rounds of it.
func (s gateState) transition(reads bool, f flaw) (gateState, bool) {
	const rounds = 3
	switch s.pc {
	case 0:
		if s.round == rounds {
			return s, false
		}
		if s.round++; reads {
			s.view++
		} else {
			s.open = false
		}
	case 1:
		s.old = s.parity
	case 2:
		if reads && f != noFlip {
			s.parity = 1 - s.old
		}
	case 3:
		s.at, s.empty = 0, true
		s.watchers = s.watchers || f != lookBefore
	case 4, 5: // allLanes, one lane a step
		l := s.lanes[s.at]
		s.empty = s.empty && l.others == 0 && l.reads[s.old] == 0
		s.at++
	case 6:
		switch {
		case s.empty:
			s.watchers = false
		case !s.watchers:
			s.watchers = true
			return s, true
		case !s.kick:
			return s, false // waits
		default:
			s.kick, s.pc = false, 3
			if f == oneScan {
				s.pc, s.empty = 6, true
			}
			return s, true
		}
	case 7:
		if reads {
			s.closed |= 1 << (s.view - 1)
		} else {
			s.shut = true
		}
	case 8:
		s.shut = false
	case 9:
		s.open = true
		s.pc = -1
	}
	s.pc++
	return s, true
}

func (s gateState) wrong() string {
	for _, l := range s.lanes {
		if s.shut && l.inside {
			return "inside a drained gate"
		}
		if l.view != 0 && s.closed&(1<<l.view) != 0 {
			return "reading a closed view"
		}
	}
	return ""
}

// explore visits every state. It returns what goes wrong, "" if nothing does.
func explore(reads bool, f flaw) (wrong string, states int) {
	start := gateState{open: true, view: 1}
	for i := range start.lanes {
		start.lanes[i].rounds = 2
	}
	seen := map[gateState]bool{start: true}
	todo := []gateState{start}
	for len(todo) > 0 {
		s := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if w := s.wrong(); w != "" {
			return w, len(seen)
		}
		moved := false
		visit := func(n gateState, ok bool) {
			if !ok {
				return
			}
			moved = true
			if !seen[n] {
				seen[n] = true
				todo = append(todo, n)
			}
		}
		visit(s.lane(0, reads, f))
		visit(s.lane(1, reads, f))
		visit(s.transition(reads, f))
		if !moved && s.pc != 0 {
			return "waits for ever", len(seen)
		}
	}
	return "", len(seen)
}

func TestEveryInterleavingOfTheGate(t *testing.T) {
	for _, c := range []struct {
		reads bool
		flaw  flaw
		wrong string
	}{
		{false, none, ""},
		{false, addLate, "inside a drained gate"},
		{false, lookBefore, "waits for ever"},
		{false, kickFirst, "waits for ever"},
		{false, oneScan, "inside a drained gate"},
		{true, none, ""},
		{true, noSecondLook, "reading a closed view"},
		{true, noFlip, ""}, // waits for new reads too: slow, not wrong
		{true, lookBefore, "waits for ever"},
		{true, kickFirst, "waits for ever"},
		{true, oneScan, "reading a closed view"},
	} {
		t.Run(fmt.Sprint(c.reads, c.flaw), func(t *testing.T) {
			wrong, states := explore(c.reads, c.flaw)
			check(t, "found", wrong, c.wrong)
			t.Logf("%d states", states)
		})
	}
}
