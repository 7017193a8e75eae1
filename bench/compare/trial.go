package main

import (
	"fmt"
	"slices"
)

// enoughRounds is from when on a goal counts as met or missed. What was measured in
// fewer rounds is a trial, and is marked where it stands; if all was, the page is.
const enoughRounds = 7

// roundsOf is how many rounds there were of what has this id, as in part.What; 0 if
// it was not measured. A round that failed is one.
func (rep *report) roundsOf(id string) (n int) {
	count := func(round int) { n = max(n, round+1) }
	switch {
	case id == scaleID:
		for _, row := range rep.Scale {
			n = max(n, len(row.Values))
		}
	case id == qcowID:
		for _, s := range rep.Qcow2 {
			count(s.Round)
		}
	case slices.ContainsFunc(fairScenarios, func(sc fairScenario) bool { return sc.id == id }):
		for _, s := range rep.Fair {
			if s.Scenario == id {
				count(s.Round)
			}
		}
	default:
		for _, s := range rep.Samples {
			if s.Cell == id {
				count(s.Round)
			}
		}
	}
	return n
}

// rounds are the fewest and the most of all that was measured.
func (rep *report) rounds() (least, most int) {
	if !rep.loads() {
		return rep.Rounds, rep.Rounds
	}
	for i, id := range rep.what() {
		n := rep.roundsOf(id)
		if i == 0 {
			least = n
		}
		least, most = min(least, n), max(most, n)
	}
	return least, most
}

// trial reports whether all of the page is one.
func (rep *report) trial() bool {
	_, most := rep.rounds()
	return rep.Quick || most < enoughRounds
}

// trialNote is what stands above all that is a trial of n rounds.
func trialNote(n string) string {
	return fmt.Sprintf("> **A trial**: %s. Goals are judged from %d rounds on.\n\n", n, enoughRounds)
}

// note is trialNote of what has this id; "" if it is none, or if the page says so.
func (rep *report) note(id string) string {
	if n := rep.roundsOf(id); n < enoughRounds && !rep.trial() {
		return trialNote(rounds(n))
	}
	return ""
}

// mention is note in a table.
func (rep *report) mention(id string) string {
	if n := rep.roundsOf(id); n < enoughRounds && !rep.trial() {
		return fmt.Sprintf(" (**a trial**: %s)", rounds(n))
	}
	return ""
}

func rounds(n int) string {
	if n == 1 {
		return "1 round"
	}
	return fmt.Sprintf("%d rounds", n)
}

// span are from a to b rounds.
func span(a, b int) string {
	if a == b {
		return rounds(a)
	}
	return fmt.Sprintf("%d to %s", a, rounds(b))
}
