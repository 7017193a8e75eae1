package state

import "fmt"

// State is where an image's ownership stands.
type State uint8

const (
	// Inactive: another process may own the image. Reads are served and may
	// be stale; nothing of this process can write it.
	Inactive State = iota
	// Activating: locks are being taken and the image is read anew.
	Activating
	// Active: this process owns the image and holds its locks.
	Active
	// Inactivating: still the owner, on the way to hand over.
	Inactivating
	// FailedIO: a sync failed. Still the owner; what is on disk is unknown,
	// so the image is never handed over as clean.
	FailedIO
	// FailedFenced: another process may own the image although this one did
	// not let go. Locks are dropped, nothing is ever written again.
	FailedFenced
	// Closed: stopped; terminal.
	Closed

	numStates
)

var stateNames = [numStates]string{
	"inactive", "activating", "active", "inactivating", "failed(io)", "failed(fenced)", "closed",
}

// String gives the name used in status, logs and errors.
func (s State) String() string {
	if s < numStates {
		return stateNames[s]
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// Owns reports whether this process holds the image's locks in s for good
// (in the transitional states they are on their way).
func (s State) Owns() bool { return s == Active || s == Inactivating || s == FailedIO }

// Event is what may change a state.
type Event uint8

const (
	// OrderActivate and OrderInactivate start a transition.
	OrderActivate Event = iota
	OrderInactivate
	// OrderAbandon gives a failed image up: caches dropped, locks released.
	OrderAbandon
	// Published: the active view is in place under the locks.
	Published
	// ActivateFailed: locks refused, or the image could not be read.
	ActivateFailed
	// Released: settled, every writable descriptor closed, locks dropped.
	Released
	// InactivateFailed: cancelled, or a write failed; still the owner.
	InactivateFailed
	// SyncFailed: the kernel reported a failed sync.
	SyncFailed
	// Fenced: a higher epoch was seen, someone else took the image.
	Fenced
	// OrderStop: the process lets the image go for good.
	OrderStop

	numEvents
)

var eventNames = [numEvents]string{
	"activate", "inactivate", "abandon", "published", "activate failed", "released",
	"inactivate failed", "sync failed", "fenced", "stop",
}

// String gives the event's name.
func (e Event) String() string {
	if e < numEvents {
		return eventNames[e]
	}
	return fmt.Sprintf("event(%d)", uint8(e))
}

// cell is the outcome of an event in a state.
type cell struct {
	// next is where the event leads.
	next State
	// kind says how.
	kind outcome
}

type outcome uint8

const (
	impossible outcome = iota // a defect of this package if it happens
	moves                     // the state becomes next
	stays                     // idempotent: nothing to do, success
	joins                     // the same transition is under way: wait for it
	refused                   // an order the state does not allow
)

// table is the machine: table[state][event]. Cells not listed are impossible
// for events and refused for orders (see init).
var table = [numStates][numEvents]cell{
	Inactive: {
		OrderActivate:   {Activating, moves},
		OrderInactivate: {Inactive, stays},
		OrderAbandon:    {Inactive, stays},
		SyncFailed:      {Inactive, stays}, // late: what it wrote was given up
		Fenced:          {Inactive, stays}, // owns nothing: nobody to fence
		OrderStop:       {Closed, moves},
	},
	Activating: {
		OrderActivate:  {Activating, joins},
		Published:      {Active, moves},
		ActivateFailed: {Inactive, moves},
		SyncFailed:     {Activating, stays}, // late, as above
		Fenced:         {Activating, stays}, // late too: the locks decide now
	},
	Active: {
		OrderActivate:   {Active, stays},
		OrderInactivate: {Inactivating, moves},
		SyncFailed:      {FailedIO, moves},
		Fenced:          {FailedFenced, moves},
		OrderStop:       {Closed, moves},
	},
	Inactivating: {
		OrderInactivate:  {Inactivating, joins},
		Released:         {Inactive, moves},
		InactivateFailed: {Active, moves},
		SyncFailed:       {FailedIO, moves},
		Fenced:           {FailedFenced, moves},
	},
	FailedIO: {
		OrderAbandon: {Inactive, moves},
		SyncFailed:   {FailedIO, stays},
		Fenced:       {FailedFenced, moves},
		OrderStop:    {Closed, moves},
	},
	FailedFenced: {
		OrderAbandon: {Inactive, moves},
		SyncFailed:   {FailedFenced, stays},
		Fenced:       {FailedFenced, stays},
		OrderStop:    {Closed, moves},
	},
	Closed: {
		SyncFailed: {Closed, stays},
		Fenced:     {Closed, stays},
		OrderStop:  {Closed, stays},
	},
}

func init() {
	for s := range table {
		for _, e := range []Event{OrderActivate, OrderInactivate, OrderAbandon, OrderStop} {
			if c := &table[s][e]; c.kind == impossible {
				*c = cell{State(s), refused}
			}
		}
	}
}

// After is what e leads to from s. ok is false if s refuses e (an order), or if
// e cannot happen there. An order that changes nothing, or joins the transition
// under way, leads from s to s.
func After(s State, e Event) (next State, ok bool) {
	c := table[s][e]
	return c.next, c.kind == moves || c.kind == stays || c.kind == joins
}
