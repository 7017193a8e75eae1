package state

import (
	"fmt"
	"testing"
)

// What follows does with writes that wait, and with the count of losses, what
// explore_test.go does with drains: every interleaving of two writes, of a
// connection each, and of a process that takes the image and gives it away,
// twice. A write that has to wait is parked under its connection's mutex, after
// it has asked once more there; reopen takes it out, and it asks again.

// holdFlaw changes one instruction.
type holdFlaw int

const (
	noHoldFlaw holdFlaw = iota
	forgets             // EnterAgain takes every time for the first
	uncounted           // losses are not counted
	countsLate          // losses are counted after the mode is set
	parksBlind          // park does not ask again
	wakesEarly          // reopen is called before the mode is set
)

// The steps of a write. Those of EnterAgain come twice, the second time in park.
const (
	wCount int8 = iota
	wLook
	wJudge
	wLock
	wCountLocked
	wLookLocked
	wJudgeLocked
	wParked
	wInside
	wLeave
	wRan // the ends
	wLost
)

// writeState is a write and its connection.
type writeState struct {
	pc     int8
	word   int8 // as loaded: the count
	mode   mode // and the mode
	since  int8 // what the write was given, 0 before
	came   int8 // what is true: owners when it first looked
	held   bool // and whether the image was inactive then
	others int8
	parked bool
	mu     bool // locked by the write; reopen waits for it
}

type holdState struct {
	mode   mode
	losses int8
	owners int8 // how often others may have owned the image
	writes [2]writeState

	pc, at int8 // of the process
	wrong  string
}

func (s holdState) write(i int, f holdFlaw) (holdState, bool) {
	w := &s.writes[i]
	switch w.pc {
	case wCount, wCountLocked:
		w.others++
	case wLook, wLookLocked:
		w.word, w.mode = s.losses+1, s.mode
		if w.since == 0 {
			w.came, w.held = s.owners, s.mode == modeHolding
		}
	case wJudge, wJudgeLocked:
		if w.since == 0 || f == forgets {
			w.since = w.word
		}
		v := verdicts[w.mode][Mutate]
		if w.since != w.word {
			v = Lost
		}
		if v != Admitted {
			w.others--
		}
		locked := w.pc == wJudgeLocked
		w.mu = false
		switch v {
		case Admitted:
			w.pc = wInside
			if w.came != s.owners {
				s.wrong = "runs on what others may have written after it came"
			}
		case Lost:
			w.pc = wLost
			if w.held && w.came == s.owners {
				s.wrong = "refused though nothing was lost"
			}
		default:
			w.pc, w.parked = wLock, locked
			if locked {
				w.pc = wParked
			}
		}
		return s, true
	case wLock:
		if w.mu = f != parksBlind; !w.mu {
			w.pc, w.parked = wParked, true
			return s, true
		}
	case wParked:
		if !w.parked {
			w.pc = wCount // a worker asks again
		}
		return s, !w.parked
	case wInside: // until the next step
	case wLeave:
		w.others--
	default:
		return s, false
	}
	w.pc++
	return s, true
}

// process makes one step of the process, which begins and ends inactive.
func (s holdState) process(f holdFlaw) (holdState, bool) {
	const round = 12
	if s.pc == 2*round {
		return s, false
	}
	set := func(m mode) {
		if f != wakesEarly || s.pc%round == 4 || s.pc%round == 11 {
			s.mode = m
		}
	}
	switch s.pc % round {
	case 0: // activate
		s.mode = modeHeld
	case 1:
		set(modeOpen)
	case 2, 3, 9, 10: // reopen, one connection a step
		w := &s.writes[s.at]
		if w.mu {
			return s, false
		}
		w.parked, s.at = false, 1-s.at
	case 4:
		set(modeOpen)
	case 5: // inactivate
		s.mode = modeHeld
	case 6: // drain and release
		if s.writes[0].others+s.writes[1].others > 0 {
			return s, false
		}
		s.owners++
	case 7:
		if f != uncounted && f != countsLate {
			s.losses++
		}
	case 8:
		set(modeHolding)
	case 11:
		set(modeHolding)
		if f == countsLate {
			s.losses++
		}
	}
	s.pc++
	return s, true
}

// exploreHold visits every state, and tells in which ways writes ended.
func exploreHold(f holdFlaw) (wrong string, ran, lost, held bool, states int) {
	start := holdState{mode: modeHolding}
	seen := map[holdState]bool{start: true}
	todo := []holdState{start}
	stuck := ""
	for len(todo) > 0 && wrong == "" {
		s := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		wrong = s.wrong
		moved := false
		visit := func(n holdState, ok bool) {
			if moved = moved || ok; ok && !seen[n] {
				seen[n] = true
				todo = append(todo, n)
			}
		}
		visit(s.write(0, f))
		visit(s.write(1, f))
		visit(s.process(f))
		if moved {
			continue
		}
		for _, w := range s.writes {
			switch {
			case w.pc == wRan:
				ran = true
			case w.pc == wLost:
				lost = true
			case w.pc == wParked && w.mode == modeHolding && w.came == s.owners:
				held = true // came after the last loss, and has a timer
			default:
				stuck = "waits for ever"
			}
		}
	}
	if wrong == "" {
		wrong = stuck
	}
	return wrong, ran, lost, held, len(seen)
}

func TestEveryInterleavingOfHeldWrites(t *testing.T) {
	for f, want := range map[holdFlaw]string{
		noHoldFlaw: "",
		forgets:    "runs on what others may have written after it came",
		uncounted:  "runs on what others may have written after it came",
		countsLate: "refused though nothing was lost",
		parksBlind: "waits for ever",
		wakesEarly: "waits for ever",
	} {
		t.Run(fmt.Sprint(f), func(t *testing.T) {
			wrong, ran, lost, held, states := exploreHold(f)
			check(t, "found", wrong, want)
			if f == noHoldFlaw && !(ran && lost && held) {
				t.Errorf("some ends were not seen: ran %v, lost %v, held %v", ran, lost, held)
			}
			t.Logf("%d states", states)
		})
	}
}
