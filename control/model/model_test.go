package model

import (
	"os"
	"testing"
)

// flaw is a planted defect: the search has to find each.
type flaw int

const (
	noFlaw flaw = iota
	// Of an exporter.
	noLock               // activates without locks
	loadBeforeLocks      // reads the image, then takes the locks
	failureKeepsLocks    // a failed activation keeps them
	failureForgotten     // and is still activating
	takesBackAnything    // ignores "if unchanged"
	joinOpposite         // activate, while inactivating, joins that
	noSync               // settles without a sync
	syncFailureForgotten // is active again after a failed sync
	failedHandsOver      // failed(io) can be inactivated
	cleanBeforeSync      // says clean before the sync
	unlockBeforeSettle   // unlocks before the sync
	gateStaysOpen        // acknowledges writes until it unlocks
	recordIgnored        // hands over what the record says is another's
	sameEpochTrusted     // takes the epoch for its own, whoever wrote it
	// Of a handover.
	activatesFirst   // the destination, then inactivates the source
	silenceIsFailure // takes back when the destination does not answer
	neverRecalls     // does not take back orders that are on their way
)

var (
	// hostile: anybody orders and writes what they like. No command is needed
	// to get everywhere.
	hostile = environment{locks: true, crashes: true, startsActive: true, faults: true, anyOrder: true, anyClient: true}
	// tried: handovers by one command at a time, and an operator between them.
	tried = environment{locks: true, crashes: true, faults: true, cuts: true, kills: true, commanders: 1, operator: true}
	// late: orders may also arrive when nobody expects them any more.
	late = environment{locks: true, cuts: true, kills: true, late: true, strays: true, commanders: 1, operator: true}
	// everything, with one command at a time.
	everything = environment{
		locks: true, crashes: true, startsActive: true, faults: true,
		cuts: true, kills: true, late: true, strays: true, commanders: 1, operator: true,
	}
	// two commands at a time. Their broken connections as well are too much for
	// the memory of one machine.
	two = environment{locks: true, kills: true, commanders: 2}
	// unlocked: as NFS with nolock; nobody but one command at a time gives
	// orders, and what it sent ends with it.
	unlocked = environment{crashes: true, faults: true, cuts: true, kills: true, late: true, commanders: 1}
	// clash: the same and all the rest, so that two owners can be.
	clash = environment{crashes: true, startsActive: true, faults: true, anyOrder: true, anyClient: true, mayClash: true}
)

// size of a search: small is under 50,000 states, medium 200,000.
type size int

const (
	small size = iota
	medium
	large
)

var raceEnabled bool

func with(env environment, change func(*environment)) environment {
	change(&env)
	return env
}

// TestEveryInterleavingOfTheHandover makes the large searches too with
// NBD_EXPORT_MODEL=full, as make model does.
func TestEveryInterleavingOfTheHandover(t *testing.T) {
	most := medium
	switch {
	case os.Getenv("NBD_EXPORT_MODEL") == "full":
		most = large
	case raceEnabled: // there is one goroutine at a time, and it takes ten times as long
		most = small
	}
	for _, c := range []struct {
		name  string
		env   environment
		flaw  flaw
		size  size
		wrong string
	}{
		{"hostile", hostile, noFlaw, small, ""},
		{"calm", environment{locks: true, commanders: 1}, noFlaw, small, ""},
		{"tried", tried, noFlaw, medium, ""},
		{"late", late, noFlaw, medium, ""},
		{"everything", everything, noFlaw, large, ""},
		{"two commands", two, noFlaw, large, ""},

		// What the protocol promises without locks, and what it takes to lose it.
		{"unlocked", unlocked, noFlaw, medium, ""},
		{"unlocked, strays", with(unlocked, func(e *environment) { e.strays = true }), noFlaw, small, "two owners"},
		{"unlocked, two commands", with(unlocked, func(e *environment) { e.commanders = 2 }), noFlaw, large, "two owners"},
		{"unlocked, restarts take the image", with(unlocked, func(e *environment) { e.startsActive = true }), noFlaw, small, "two owners"},
		{"unlocked, an operator", with(unlocked, func(e *environment) { e.operator = true }), noFlaw, small, "two owners"},
		{"clash", clash, noFlaw, medium, ""},

		{"no lock", hostile, noLock, small, "an owner without locks"},
		{"load before locks", hostile, loadBeforeLocks, small, "an owner without an acknowledged write"},
		{"failure keeps locks", hostile, failureKeepsLocks, small, "locks that nobody owns"},
		{"failure forgotten", hostile, failureForgotten, small, "a transition that nobody makes"},
		{"takes back anything", hostile, takesBackAnything, small, "took back an image that was modified"},
		{"joins the opposite", hostile, joinOpposite, small, "an order that joined its opposite"},
		{"no sync", hostile, noSync, small, "a record that says clean of what is not"},
		{"sync failure forgotten", hostile, syncFailureForgotten, small, "an acknowledged write is lost"},
		{"failed hands over", hostile, failedHandsOver, small, "an acknowledged write is lost"},
		{"clean before sync", hostile, cleanBeforeSync, small, "a record that says clean of what is not"},
		{"unlock before settle", hostile, unlockBeforeSettle, small, "an owner without locks"},
		{"gate stays open", hostile, gateStaysOpen, small, "a record that says clean of what is not"},
		{"record ignored", clash, recordIgnored, small, "a record that says clean of what is not"},
		{"same epoch trusted", with(clash, func(e *environment) { e.faults = false }), sameEpochTrusted, small, "two owners, and neither will notice"},
		{"activates first", unlocked, activatesFirst, small, "two owners"},
		{"activates first, which locks forgive", tried, activatesFirst, large, ""},
		{"silence is failure", with(unlocked, func(e *environment) { e.anyVerdict = true }), silenceIsFailure, medium, "two owners"},
		{"never recalls", with(unlocked, func(e *environment) { e.anyVerdict = true }), neverRecalls, medium, "two owners"},
		{"never recalls, and says so", late, neverRecalls, small, `the command says "unowned", and the exporters are inactive and active`},
	} {
		if c.size > most {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			m := explore(t, c.env, c.flaw)
			t.Logf("%d states, %d moves", len(m.states), m.moves)
			if m.wrong != c.wrong {
				t.Errorf("found %q, want %q: %s", m.wrong, c.wrong, m.story())
			}
			if c.wrong != "" || c.env.commanders != 1 {
				return
			}
			for v := moved; v < numVerdicts; v++ {
				t.Logf("%s: %d times", v, m.verdicts[v])
				// Where nothing goes wrong a handover works, elsewhere it may
				// end in every way.
				if told := c.env.cuts || v == moved; (m.verdicts[v] > 0) != told {
					t.Errorf("handovers end as %q %d times", v, m.verdicts[v])
				}
			}
		})
	}
}
