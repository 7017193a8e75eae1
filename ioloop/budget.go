package ioloop

import (
	"slices"
	"sync"
	"sync/atomic"
)

// budget bounds the payload bytes of the process. Who wants more than is
// left waits, which pauses receiving on its connection; nothing else does.
//
// So that connections that hold much without moving (a client that does not
// read its replies) cannot keep all others from working:
//   - a connection never holds more than its share, except that a single
//     request always fits;
//   - a part of the budget is only for requests of connections that hold
//     nothing else, the smaller the better;
//   - Engine evicts connections whose client has moved next to nothing for a while,
//     but only when others wait for memory.
//
// What can be in use at once is at most the limit, one request, and the floor:
// an input and a reply buffer for each connection that is not idle.
type budget struct {
	share int64 // bytes for one connection

	mu      sync.Mutex // leaf
	most    [purposes]int64
	used    [purposes]int64
	waiters []*waiter // in order of arrival
}

// purpose says which part of the budget bytes are taken from.
type purpose uint8

const (
	// floor: input and reply buffers. They are taken without asking, so that
	// each connection can work whatever others hold, and leave so much less
	// for general.
	floor purpose = iota
	// general: for any request, in order of arrival.
	general
	// reserve: for a request of at most smallRequest of a connection that
	// holds nothing else. It gets no more than an eighth of what is left, so
	// that many larger ones never keep out the smaller.
	reserve
	// forHeld: what was taken for writes that then have to be held until the
	// image is active. It leaves so much less for general, and is a quarter of
	// the budget at most, so that reads always go on.
	forHeld

	purposes
)

// smallRequest is the size in bytes up to which a request may use the reserve.
// Kernels and guests send up to 1 MiB; only tools that copy whole images send
// more, and those can wait while clients that move nothing are evicted.
const smallRequest = 1 << 20

// lease is memory taken from the budget.
type lease struct {
	n  int64 // bytes
	of purpose
}

// want is what a request asks of the budget.
type want struct {
	n     int64 // bytes
	small bool  // may use the reserve
	// held is what the connection that asks holds already.
	held *atomic.Int64
}

// waiter is a want that did not fit.
type waiter struct {
	want
	granted chan struct{} // closed when lease is set
	lease   lease
}

func newBudget(limit int64) *budget {
	b := &budget{share: max(limit/4, bufferCost(maxClass))}
	b.most[reserve] = limit / 8
	b.most[general] = limit - b.most[reserve]
	b.most[forHeld] = limit / 4
	return b
}

// commonLocked is what is in use of all but the reserve, in bytes: what general
// has left is its most less this.
func (b *budget) commonLocked() int64 { return b.used[floor] + b.used[forHeld] + b.used[general] }

// takeLocked takes what is wanted if it is there. first says that nobody came
// before who waits as well.
func (b *budget) takeLocked(w want, first bool) (lease, bool) {
	l := lease{w.n, general}
	switch {
	// One request alone always fits, however small the budget.
	case first && (b.commonLocked()+w.n <= b.most[general] || b.used[general] == 0):
	case w.small && w.held.Load() == 0 && w.n <= (b.most[reserve]-b.used[reserve])/8:
		l.of = reserve
	default:
		return lease{}, false
	}
	b.used[l.of] += w.n
	return l, true
}

// try takes what is wanted if it is there and nobody came before.
func (b *budget) try(w want) (lease, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.takeLocked(w, len(b.waiters) == 0)
}

// acquire is try, but waits, or until gone is closed. It reports whether it
// got what is wanted.
func (b *budget) acquire(w want, gone <-chan struct{}) (lease, bool) {
	me := &waiter{want: w, granted: make(chan struct{})}
	b.mu.Lock()
	b.waiters = append(b.waiters, me)
	b.grantLocked()
	b.mu.Unlock()
	select {
	case <-me.granted:
		return me.lease, true
	case <-gone:
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if i := slices.Index(b.waiters, me); i >= 0 {
		b.waiters = slices.Delete(b.waiters, i, i+1)
	} else { // granted in the same moment
		b.used[me.lease.of] -= me.lease.n
	}
	b.grantLocked()
	return lease{}, false
}

// takeFloor takes n bytes of the floor.
func (b *budget) takeFloor(n int64) {
	b.mu.Lock()
	b.used[floor] += n
	b.mu.Unlock()
}

// tryFloor is takeFloor, but only if nobody else has a use for the bytes.
func (b *budget) tryFloor(n int64) bool { return b.tryFloorUpTo(b.most[general], n) }

// trySpare is tryFloor for what is only nice to have: with it no more than a
// quarter of general is in use.
func (b *budget) trySpare(n int64) bool { return b.tryFloorUpTo(b.most[general]/4, n) }

func (b *budget) tryFloorUpTo(most, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.waiters) > 0 || b.commonLocked()+n > most {
		return false
	}
	b.used[floor] += n
	return true
}

// release gives a lease back, or a part of one.
func (b *budget) release(l lease) {
	b.mu.Lock()
	b.used[l.of] -= l.n
	if len(b.waiters) > 0 {
		b.grantLocked()
	}
	b.mu.Unlock()
}

// hold turns a lease into one of forHeld. If there is no room for that the
// lease stays as it is. most is what there is for all that is held, in bytes.
func (b *budget) hold(l *lease) (most int64, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used[forHeld]+l.n > b.most[forHeld] {
		return b.most[forHeld], false
	}
	b.used[l.of] -= l.n
	l.of = forHeld
	b.used[forHeld] += l.n
	b.grantLocked()
	return b.most[forHeld], true
}

// grantLocked serves waiters in order. One that does not fit keeps later ones
// back, or a large one would starve; those that the reserve is for pass it.
func (b *budget) grantLocked() {
	kept := b.waiters[:0]
	for _, w := range b.waiters {
		var ok bool
		if w.lease, ok = b.takeLocked(w.want, len(kept) == 0); ok {
			close(w.granted)
			continue
		}
		kept = append(kept, w)
	}
	clear(b.waiters[len(kept):])
	b.waiters = kept
}

// wanted reports whether anyone waits but the connection that holds held.
func (b *budget) wanted(held *atomic.Int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.ContainsFunc(b.waiters, func(w *waiter) bool { return w.held != held })
}

// wantedBytes is what all who wait want, in bytes.
func (b *budget) wantedBytes() (n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, w := range b.waiters {
		n += w.n
	}
	return n
}

// inUse is all that is taken, in bytes.
func (b *budget) inUse() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.commonLocked() + b.used[reserve]
}
