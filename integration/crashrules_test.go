package integration

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
)

// What must come of each accident at each step of a transition. A hands over,
// B takes over.

// crashScene is an order, and the steps in which it is carried out.
type crashScene struct {
	format string // of the image, "" for raw
	name   string
	title  string
	actor  int // who carries it out: 0 is A, 1 is B
	steps  []crashStep
	// end is what becomes of it without an accident.
	end crashEnd
}

// crashStep is a step, and the system calls on the image and its record that it
// makes.
type crashStep struct {
	name  string
	calls []crashCall
}

// crashCall is a call, and what its failure does to the transition.
type crashCall struct {
	name         string
	eio, enospc  effect
	alternatives []string // other names of the same call
}

// effect is what a failed call does.
type effect uint8

const (
	// harmless: the transition does without it.
	harmless effect = iota
	// refuses: the order fails, and everything is as before.
	refuses
	// poisons: nobody knows what is on the disk.
	poisons
	// untidy: the order is carried out, but the record does not say that the
	// image was let go in order.
	untidy
	// told: only the client whose request it is hears of it.
	told
	// blind: the image is given up, but cannot be read any more.
	blind
)

// call is one whose failure does the same whatever the errno.
func call(name string, e effect) crashCall { return crashCall{name: name, eio: e, enospc: e} }

// recordRead are the calls by which another's owner record is looked at.
func recordRead(e effect) []crashCall {
	return []crashCall{call("record-open", e), call("record-read", e)}
}

// recordLook is the one by which an owner sees that its own still stands there.
// If that fails the record is read.
var recordLook = call("record-stat", harmless)

// recordWrite are those by which it is replaced. On a full disk it is written over.
func recordWrite(eio effect) []crashCall {
	var calls []crashCall
	for _, name := range []string{"record-create", "record-write", "record-rename"} {
		calls = append(calls, crashCall{name: name, eio: eio, enospc: harmless})
	}
	return calls
}

// tidyUp removes what the record was.
var tidyUp = call("record-unlink", harmless)

// openView makes the read-only view, of a description that is open already.
func openView(e effect) []crashCall { return []crashCall{call("stat", e)} }

// activation is how an image is taken.
var activation = []crashStep{
	{"lock", []crashCall{
		call("open", refuses), call("stat", refuses), call("lock", refuses), call("test-lock", refuses),
	}},
	{"load", []crashCall{call("stat", refuses)}},
	{"claim", slices.Concat([]crashCall{call("stat", refuses)}, recordRead(refuses), recordWrite(refuses))},
	{"publish", nil},
	{"retire", nil},
}

// crashScenes are all steps there are.
var crashScenes = slices.Concat(rawScenes, qcow2Scenes)

var rawScenes = []crashScene{
	{
		name: "inactivate", title: "A inactivates", actor: 0,
		steps: []crashStep{
			{"sync-ahead", []crashCall{call("sync", poisons), {name: "write", eio: told, enospc: told, alternatives: []string{"try-write"}}}},
			{"close-gate", nil},
			{"drain", nil},
			{"settle", slices.Concat([]crashCall{recordLook, call("sync", poisons)}, openView(refuses))},
			{"release", slices.Concat([]crashCall{recordLook}, recordWrite(untidy), []crashCall{call("close", harmless)})},
		},
		end: crashEnd{state: [2]string{"inactive", "inactive"}, epoch: 1, clean: true, next: "B"},
	},
	{
		name: "activate", title: "B activates, after A has inactivated", actor: 1, steps: activation,
		end: crashEnd{state: [2]string{"inactive", "active"}, epoch: 2, next: "A"},
	},
	{
		name: "take-back", title: "A takes the image back with --if-unchanged", actor: 0, steps: activation,
		end: crashEnd{state: [2]string{"active", "inactive"}, epoch: 2, next: "B"},
	},
	{
		name: "stop", title: "A stops (SIGTERM)", actor: 0,
		steps: []crashStep{
			{"stop", slices.Concat([]crashCall{recordLook}, recordWrite(untidy), []crashCall{tidyUp, call("sync", poisons)}, openView(untidy), []crashCall{call("close", harmless)})},
		},
		end: crashEnd{state: [2]string{"exited", "inactive"}, epoch: 1, clean: true, next: "B"},
	},
	{
		name: "abandon", title: "A, which is failed(io), is abandoned", actor: 0,
		steps: []crashStep{
			{"abandon", slices.Concat([]crashCall{call("sync", harmless)}, openView(blind), []crashCall{call("advise", harmless), call("close", harmless)})},
		},
		end: crashEnd{state: [2]string{"inactive", "inactive"}, epoch: 1, next: "B"},
	},
}

// takes reports whether the actor becomes the owner.
func (s *crashScene) takes() bool { return s.end.state[s.actor] == "active" }

// holdsLocks reports whether the actor has the locks when a step begins.
func (s *crashScene) holdsLocks(step string) bool { return step != "lock" }

// at is the place of a step.
func (s *crashScene) at(step string) int {
	return slices.IndexFunc(s.steps, func(of crashStep) bool { return of.name == step })
}

// claimed reports whether the record names the actor when a step of its
// activation begins.
func (s *crashScene) claimed(step string) bool { return s.at(step) > s.at("claim") }

// accident is what happens at a step.
type accident struct {
	kind  accidentKind
	who   int // 0 is A, 1 is B
	call  crashCall
	errno syscall.Errno
}

type accidentKind uint8

const (
	killed  accidentKind = iota // SIGKILL
	stopped                     // SIGSTOP, some time later SIGCONT
	ended                       // SIGTERM
	fails                       // a call of the actor
)

var accidentNames = [...]string{"SIGKILL", "SIGSTOP", "SIGTERM"}

func sideName(i int) string { return string(rune('A' + i)) }

func (a accident) String() string {
	if a.kind == fails {
		return fmt.Sprintf("%s fails with %s", a.call.name, errnoNames[a.errno])
	}
	return accidentNames[a.kind] + " " + sideName(a.who)
}

var errnoNames = map[syscall.Errno]string{syscall.EIO: "EIO", syscall.ENOSPC: "ENOSPC"}

// crashEnd is what an accident leaves.
type crashEnd struct {
	state [2]string // of A and B; "killed" and "exited" beside those of the machine
	// The owner record: the last epoch in it, and whether it says that the
	// image was let go in order.
	epoch uint64
	clean bool
	next  string // who owns the image next: "A", "B", or "C", a new exporter
	// refused: the order fails.
	refused bool
	// status is the exit status of an exporter that was to stop.
	status int
	// unreadable: A answers reads with EIO.
	unreadable bool
}

// expect derives the end of an accident from the rules of the design.
func expect(s *crashScene, step string, a accident) crashEnd {
	end := s.end
	actor, other := s.actor, 1-s.actor
	actorLives := func() bool { return end.state[actor] != "killed" && end.state[actor] != "exited" }
	switch a.kind {
	case killed:
		end.state[a.who] = "killed"
		if a.who == actor {
			// The kernel lets its locks go, and the record stays as it stands.
			end.next = sideName(other)
			if s.takes() && !s.claimed(step) {
				end.epoch, end.clean = 1, true
			} else {
				end.clean = false
			}
			break
		}
		fallthrough
	case ended:
		if a.who == actor {
			// A transition is finished, and what is owned then is let go.
			end.state[actor], end.next = "exited", sideName(other)
			end.clean = s.name != "abandon"
			break
		}
		if a.kind == ended {
			end.state[a.who] = "exited"
		}
		// Who is not the actor has no part in it. The actor takes the image
		// back, unless it is the owner already or gone.
		if end.next == sideName(other) {
			end.next = sideName(actor)
			if end.state[actor] == "active" || !actorLives() {
				end.next = "C"
			}
		}
	case stopped:
		if a.who == actor && !s.holdsLocks(step) {
			// The other one takes the image meanwhile.
			end.state[other], end.state[actor] = "active", "inactive"
			end.refused, end.next = true, sideName(actor)
		}
	case fails:
		e := a.call.eio
		if a.errno == syscall.ENOSPC {
			e = a.call.enospc
		}
		end.fail(s, e)
		// What cannot be written is told; the owner record has nothing of a client.
		if s.name == "stop" && e != harmless && !slices.Contains([]string{"stat", "read"}, a.call.name) && !strings.HasPrefix(a.call.name, "record-") {
			end.status = 1
		}
		if s.name == "stop" && a.call.name == "close" {
			end.status = 1
		}
	}
	return end
}

// fail applies the effect of a failed call.
func (end *crashEnd) fail(s *crashScene, e effect) {
	switch e {
	case harmless, told:
	case refuses:
		end.refused = true
		if s.takes() {
			end.state[s.actor], end.epoch, end.clean, end.next = "inactive", 1, true, sideName(s.actor)
		} else {
			end.state[0], end.clean = "active", false
		}
	case poisons:
		end.refused, end.clean = true, false
		if s.name != "stop" {
			end.state[0] = "failed(io)"
		}
	case untidy:
		end.clean = false
	case blind:
		end.unreadable = true
	}
}
