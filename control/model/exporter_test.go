package model

import "github.com/nbd-export/nbd-export/state"

// A world is everything there is: two exporters on hosts of their own, one
// storage, commanders and their messages. It is comparable, so that a map tells
// which were seen.
//
// Versions number the writes of clients, from 1: version v of the image holds
// write v and all before. Epochs are as in the owner record. Of both only the
// order matters, so normalize keeps them small, and no run is too long.

// version of the image; 0 is none.
type version int8

type note struct {
	epoch int8
	owner int8
	clean bool
}

// phase is where an exporter's transition is. Each step below is one atomic
// action of it, so that all others can come between any two.
type phase uint8

const (
	idle phase = iota
	// Activation.
	acquire
	load
	readRecord  // claim, first half
	writeRecord // claim, second half
	publish
	// Inactivation.
	syncAhead
	drain
	lookRecord // settle, first half
	settle
	sayClean
	unlock
)

type exporter struct {
	up          bool
	locks       bool // held, as it thinks
	ifUnchanged bool // of the activation under way
	broken      bool // a sync failed: what the cache holds never reaches the storage
	state       state.State
	at          phase
	own         int8    // epoch of the last activation
	claim       int8    // epoch it wrote, or is about to write, into the record
	before      note    // what stood there
	cache       version // what it serves and writes while it owns the image
	print       version // what it left behind
	// orders are the commanders whose order the transition carries out.
	orders uint8
	// stray are orders in flight of commanders that no longer wait for them.
	stray uint8
}

type world struct {
	x      [2]exporter
	disk   version // what a new owner finds
	acked  version // the last write that a client was promised
	record note
	c      [2]commander
	guest  int8 // where it runs: an exporter, or paused
}

const paused = 2

// owns: it can still change what others will find.
func (x *exporter) owns() bool { return x.up && x.state.Owns() }

// admits: a write is served now.
func (x *exporter) admits() bool {
	return x.up && (x.state == state.Active || x.state == state.Inactivating && x.at == syncAhead)
}

// normalize makes states equal that differ in nothing that matters.
func (w *world) normalize(env environment) {
	for i := range w.x {
		x := &w.x[i]
		if !x.up {
			*x = exporter{}
			continue
		}
		if !x.state.Owns() && (x.at <= load || x.at > publish) {
			x.cache = 0
		}
		if !x.state.Owns() {
			x.broken = false
		}
		if x.at == idle {
			x.before, x.ifUnchanged = note{}, false
		}
		if x.at <= load {
			x.before = note{}
		}
		if env.locks {
			// With locks the record never goes back, and an image that was
			// changed is never again as it was.
			if x.own <= w.record.epoch {
				x.own = 0
			}
			if x.print != w.disk {
				x.print = 0
			}
		}
	}
	a, b := &w.x[0], &w.x[1]
	if env.mayClash {
		// Of two images only one can be kept; which writes it has is no question.
		w.disk, w.acked, a.cache, a.print, b.cache, b.print = 0, 0, 0, 0, 0, 0
	}
	rank(1, &w.disk, &w.acked, &a.cache, &a.print, &b.cache, &b.print)
	// An epoch is compared with others and with others plus one.
	rank(2, &w.record.epoch, &a.own, &a.claim, &a.before.epoch, &b.own, &b.claim, &b.before.epoch)
}

// rank makes numbers as small as their order allows, with gaps of up to gap.
// 0 stays 0.
func rank[T ~int8](gap T, all ...*T) {
	var was, is [8]T // was in ascending order
	n := 1           // 0 is the first
	for _, p := range all {
		at := 0
		for at < n && was[at] < *p {
			at++
		}
		if at < n && was[at] == *p {
			continue
		}
		copy(was[at+1:n+1], was[at:n])
		was[at] = *p
		n++
	}
	for k := 1; k < n; k++ {
		is[k] = is[k-1] + min(gap, was[k]-was[k-1])
	}
	for _, p := range all {
		for k := range n {
			if was[k] == *p {
				*p = is[k]
				break
			}
		}
	}
}

// event applies e to exporter i by the machine's own table.
func (m *model) event(w *world, i int, e state.Event) bool {
	next, ok := m.after(w.x[i].state, e)
	if !ok {
		m.defect = e.String() + " while " + w.x[i].state.String()
		return false
	}
	w.x[i].state = next
	return true
}

// after is the real table, but for planted flaws.
func (m *model) after(s state.State, e state.Event) (state.State, bool) {
	switch {
	case m.flaw == joinOpposite && s == state.Inactivating && e == state.OrderActivate:
		return s, true
	case m.flaw == syncFailureForgotten && e == state.SyncFailed && s == state.Inactivating:
		return state.Active, true
	case m.flaw == failedHandsOver && s == state.FailedIO && e == state.OrderInactivate:
		return state.Inactivating, true
	}
	return state.After(s, e)
}

// end finishes the transition of exporter i and answers who waits for it.
func (m *model) end(w *world, i int, a answer) {
	x := &w.x[i]
	for k := range w.c {
		c := &w.c[k]
		if x.orders>>k&1 != 0 && c.reply == waiting && m.scripts[c.at].side == i {
			c.reply = a
		}
	}
	x.at, x.orders = idle, 0
}

// order is given to exporter i. It returns the answer, or waiting.
func (m *model) order(w *world, i int, o request) answer {
	x := &w.x[i]
	e := state.OrderActivate
	switch o {
	case orderInactivate:
		e = state.OrderInactivate
	case orderAbandon:
		e = state.OrderAbandon
	}
	next, ok := m.after(x.state, e)
	switch {
	case !ok:
		return failed
	case x.at != idle: // joins
		if (e == state.OrderActivate) != (x.at <= publish) {
			m.defect = "an order that joined its opposite"
		}
		return waiting
	case next == x.state:
		return done
	}
	switch o {
	case orderAbandon:
		// The loss is known from here on, if there is one.
		w.letGo(i)
		x.state = next
		return done
	case orderInactivate:
		x.at = syncAhead
	default:
		x.at, x.ifUnchanged = acquire, o == orderReactivate
		if m.flaw == noLock {
			x.at = load
		}
	}
	x.state = next
	return waiting
}

// letGo ends an ownership without making anything durable. What a process
// wrote the kernel writes back in the end, unless that has failed already; the
// locks go after that. A loss that state tells is known and no lost write.
func (w *world) letGo(i int) {
	x := &w.x[i]
	if x.state.Owns() && !x.broken {
		w.disk = x.cache
	}
	if x.state == state.FailedIO {
		w.acked = w.disk
	}
	x.locks, x.broken, x.claim = false, false, 0
}

// exporterMoves are the moves of exporter i by itself.
func (m *model) exporterMoves(w *world, i int) {
	x := &w.x[i]
	if !x.up {
		n := *w
		n.x[i] = exporter{up: true}
		m.emit(n, "starts inactive", i, good)
		if m.env.startsActive {
			n.x[i].state, n.x[i].at = state.Activating, acquire
			m.emit(n, "starts active", i, fault)
		}
		return
	}
	if m.env.crashes {
		n := *w
		n.letGo(i)
		m.dies(&n, i)
		n.stir()
		m.emit(n, "is killed", i, fault)
	}
	if (x.admits() || m.flaw == gateStaysOpen && x.owns() && x.state == state.Inactivating) && (m.env.anyClient || w.guest == int8(i)) {
		n := *w
		n.acked = max(w.disk, w.acked, w.x[0].cache, w.x[1].cache, w.x[0].print, w.x[1].print) + 1
		n.x[i].cache = n.acked
		m.emit(n, "acknowledges a write", i, good)
	}
	if x.owns() && !x.broken && x.cache != w.disk {
		n := *w
		n.disk = x.cache
		m.emit(n, "has its cache written back", i, good)
	}
	if x.state == state.Active && m.env.faults && !x.broken {
		n := *w
		n.x[i].broken = true
		if m.event(&n, i, state.SyncFailed) {
			n.stir()
			m.emit(n, "has a flush fail", i, fault)
		}
	}
	if x.owns() && x.at < sayClean && m.taken(w, i) {
		n := *w
		if m.event(&n, i, state.Fenced) {
			m.fence(&n, i)
			m.emit(n, "sees another owner in the record", i, good)
		}
	}
	if x.owns() && x.at < sayClean && w.record.epoch < x.claim {
		n := *w
		n.record = note{x.claim, int8(i), false}
		m.emit(n, "puts the record back", i, good)
	}
	switch {
	case x.at == idle:
	case x.at <= publish:
		m.activation(w, i)
	default:
		m.inactivation(w, i)
	}
}

// dies: what was sent to exporter i goes with it.
func (m *model) dies(w *world, i int) {
	m.end(w, i, silence)
	w.x[i].up = false
	for k := range w.c {
		if c := &w.c[k]; c.at != 0 {
			for r := range numOrders {
				if m.scripts[c.at].sideOf(r) == i {
					c.late &^= 1 << r
				}
			}
		}
	}
}

// taken: the record names another owner than exporter i, which claimed it.
func (m *model) taken(w *world, i int) bool {
	x := &w.x[i]
	same := w.record.owner == int8(i) || m.flaw == sameEpochTrusted
	return w.record.epoch > x.claim || w.record.epoch == x.claim && !same
}

// fence lets the image go without a word about it in the record.
func (m *model) fence(w *world, i int) {
	w.x[i].locks, w.x[i].broken, w.x[i].claim = false, false, 0
	m.end(w, i, failed)
}

func (m *model) activation(w *world, i int) {
	x := &w.x[i]
	n := *w
	fails := func(what string, k kind) {
		n := *w
		y := &n.x[i]
		if x.at == publish && !m.taken(w, i) {
			n.record = x.before
		}
		y.locks = m.flaw == failureKeepsLocks && y.locks
		y.claim = 0
		if m.flaw == failureForgotten || m.event(&n, i, state.ActivateFailed) {
			m.end(&n, i, failed)
			m.emit(n, what, i, k)
		}
	}
	if m.env.faults {
		fails("fails to activate", fault)
	}
	y := &n.x[i]
	switch x.at {
	case acquire:
		if m.env.locks && w.x[1-i].locks {
			fails("is refused the locks", good)
			return
		}
		y.locks, y.at = true, load
		if m.flaw == loadBeforeLocks {
			y.at = readRecord // it has loaded before
		}
	case load:
		if x.ifUnchanged && w.disk != x.print {
			if m.flaw != takesBackAnything {
				fails("finds the image modified", good)
				return
			}
			m.defect = "took back an image that was modified"
		}
		y.cache, y.at = w.disk, readRecord
		if m.flaw == loadBeforeLocks {
			y.at = acquire
		}
	case readRecord:
		y.before, y.claim, y.at = w.record, max(w.record.epoch, x.own)+1, writeRecord
	case writeRecord:
		n.record = note{x.claim, int8(i), false}
		y.at = publish
	case publish:
		if !m.event(&n, i, state.Published) {
			return
		}
		y.own = x.claim
		m.end(&n, i, done)
	}
	m.emit(n, phaseNames[x.at], i, good)
}

func (m *model) inactivation(w *world, i int) {
	x := &w.x[i]
	n := *w
	y := &n.x[i]
	if m.env.faults && x.at <= sayClean {
		// Of a write here, or of another image of the group.
		o := *w
		if m.event(&o, i, state.InactivateFailed) {
			m.end(&o, i, failed)
			m.emit(o, "fails to inactivate", i, fault)
		}
	}
	if m.env.faults && (x.at == syncAhead || x.at == settle) {
		o := *w
		o.x[i].broken = true
		if m.event(&o, i, state.SyncFailed) {
			m.end(&o, i, failed)
			m.emit(o, "has its sync fail", i, fault)
		}
	}
	switch x.at {
	case syncAhead:
		y.at = drain
	case drain:
		y.at = lookRecord
		if m.flaw == cleanBeforeSync {
			n.record.clean = true
		}
		if m.flaw == unlockBeforeSettle {
			y.locks = false
		}
	case lookRecord:
		if m.taken(w, i) && m.flaw != recordIgnored {
			return // fenced, which is a move of its own
		}
		y.at = settle
	case settle:
		if !x.broken && m.flaw != noSync {
			n.disk = x.cache
		}
		y.print, y.at = n.disk, sayClean
	case sayClean:
		if !m.taken(w, i) {
			n.record = note{x.claim, int8(i), true}
		} else if m.flaw == recordIgnored {
			n.record.clean = true
		}
		y.at = unlock
	case unlock:
		if !m.event(&n, i, state.Released) {
			return
		}
		y.locks, y.claim = false, 0
		m.end(&n, i, done)
	}
	m.emit(n, phaseNames[x.at], i, good)
}

var phaseNames = [...]string{
	acquire: "takes the locks", load: "reads the image anew", readRecord: "reads the record",
	writeRecord: "writes itself into the record", publish: "is active",
	syncAhead: "has synced ahead", drain: "has drained its gate", lookRecord: "finds itself in the record",
	settle: "settles", sayClean: "says clean", unlock: "unlocks and is inactive",
}
