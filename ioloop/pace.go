package ioloop

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// A sync that takes no longer leaves little for the one with the gate closed.
	littleLeft = 5 * time.Millisecond
	// One that takes no longer is good enough where it does not get better.
	fewLeft = 20 * time.Millisecond
	// paceRounds is how often a disk is synced ahead to get there.
	paceRounds = 8
	// unhurried is how long the first sync takes before writers are slowed: it
	// writes what has gathered before, and nobody knows how much that is.
	unhurried = 100 * time.Millisecond
	// leastShare is what each disk of a large group may leave, in bytes.
	leastShare = 1 << 20
)

// Pace slows the writers of a disk while an inactivation syncs it ahead: what
// is written after a sync has begun is what the sync behind the closed gate has
// to write. It is the state.Pacer of the disk's machine.
//
// From the second sync on writers have an allowance of bytes, from the start of
// one to the start of the next, or to the closing of the gate. They are let on
// so that it would last for as long as the last sync took, and if this one takes
// longer, four times as long as it has: they get slower and slower rather than
// stop (pace_queue.go).
//
// While nothing is synced ahead a write costs a look at on, which nobody writes
// then.
type Pace struct {
	limit int64 // bytes that may be left
	on    atomic.Bool
	_     [64]byte

	// Set by Disk.SetPace.
	counts   *counts
	fastZero bool

	// mu is a leaf.
	mu struct {
		sync.Mutex
		engaged bool   // from the first call of Ahead until Done, or its ctx ends
		run     uint64 // which inactivation: timers and contexts of earlier ones may come late
		waiting        // pace_queue.go
		mark    uint64 // of dirtied, when the present round began
		stats   PaceStats
	}

	// Of the goroutine that carries out the inactivation.
	run     uint64 // mu.run
	round   int
	share   int64         // bytes of limit that are for this disk
	took    time.Duration // by the last sync
	clean   uint64        // dirtied when a sync began that left nothing
	unwatch func() bool   // ctx
}

// PaceStats is what syncing ahead has come to, in the inactivation under way
// or else in the last one.
type PaceStats struct {
	Syncs int `json:"syncs"` // that have ended
	// Dirty is what was written, zeroed or discarded since the last of them
	// began, in bytes of whole pages: what closing the gate leaves to write.
	Dirty uint64 `json:"dirty-bytes"`
	// Slowed is for how many seconds any writer had to wait, Delayed how many
	// requests did.
	Slowed  float64 `json:"slowed-seconds"`
	Delayed uint64  `json:"delayed-requests"`
}

// NewPace makes a Pace that leaves at most limit bytes when the gate closes.
// Disks that move together share that, but each may leave 1 MiB.
func NewPace(limit int64) *Pace { return &Pace{limit: limit, clean: 1<<64 - 1} }

// SetPace puts the disk's writers under p, before any connection is served. It
// is not for images whose writes leave nothing to sync.
func (d *Disk) SetPace(p *Pace) {
	p.counts, p.fastZero = &d.counts, d.Image.Info().CanFastZero
	d.pace = p
}

// Stats never waits for storage.
func (p *Pace) Stats() PaceStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.mu.stats
	if p.on.Load() {
		s.Dirty = p.counts.dirtied.Load() - p.mu.mark
	}
	s.Slowed = p.mu.slowedFor().Seconds()
	return s
}

// dirties is what r makes the next sync write, in bytes: whole pages, one of
// them where only metadata changes.
func (p *Pace) dirties(r *Request) int64 {
	switch {
	case r.Length == 0, r.Flags&FUA != 0:
		return 0
	case r.Op == OpWrite, r.Op == OpZero && !p.fastZero:
		return (r.Offset+r.Length+pageSize-1)&^(pageSize-1) - r.Offset&^(pageSize-1)
	case r.Op == OpZero, r.Op == OpDiscard:
		return pageSize
	}
	return 0
}

// Ahead implements state.Pacer.
func (p *Pace) Ahead(ctx context.Context, images int, sync func(context.Context) error) (again bool, err error) {
	if p.unwatch == nil {
		p.begin(ctx, images)
	}
	mark := p.counts.dirtied.Load()
	if p.round == 0 && mark == p.clean {
		p.allow(p.run, 0, mark, p.share, fewLeft) // others of the group may take their time
		return false, nil
	}
	p.round++
	round := p.round
	if round == 1 {
		defer p.hurry(mark).Stop()
	} else {
		// If that did not help they get half as much each time.
		p.allow(p.run, round, mark, p.share>>(round-2), p.took)
	}
	last, start := p.took, time.Now()
	if err := sync(ctx); err != nil {
		return false, err
	}
	p.took = time.Since(start)
	dirty := p.endRound(mark)
	if dirty == 0 {
		p.clean = mark
	}
	again = p.another(dirty, last)
	if round == 1 { // until the next, or while others of the group are synced
		left := p.share
		if !again {
			left -= dirty
		}
		p.allow(p.run, round, mark, left, max(p.took, fewLeft))
	} else if !again {
		p.clamp(p.share - dirty)
	}
	return again, nil
}

// another judges the round that has ended, after one that took last.
func (p *Pace) another(dirty int64, last time.Duration) bool {
	switch {
	case dirty > p.share:
		// From the third round on only what was admitted before them can make
		// that so.
		return p.round < 2*paceRounds
	case p.took <= littleLeft || p.round >= paceRounds:
		return false
	case p.took <= fewLeft && p.round > 1:
		return p.took < last*4/5
	}
	return true
}

// begin is for the first call of an inactivation.
func (p *Pace) begin(ctx context.Context, images int) {
	p.round, p.took = 0, 0
	p.share = max(p.limit/int64(images), min(p.limit, leastShare))
	p.mu.Lock()
	p.mu.engaged, p.mu.stats, p.mu.slowed = true, PaceStats{}, 0
	p.mu.run++
	p.run = p.mu.run
	p.mu.Unlock()
	run := p.run
	p.unwatch = context.AfterFunc(ctx, func() { p.release(run) })
}

// Done implements state.Pacer.
func (p *Pace) Done() {
	if p.unwatch != nil {
		p.unwatch()
		p.unwatch = nil
		p.release(p.run)
	}
}

// hurry slows writers in the first round, once that has gone on for a while.
// They may write once more what they have by then.
func (p *Pace) hurry(mark uint64) *time.Timer {
	run, share := p.run, p.share
	return time.AfterFunc(unhurried, func() {
		dirty := int64(p.counts.dirtied.Load() - mark)
		p.allow(run, 0, mark, max(share, dirty), stretch*unhurried)
	})
}

// endRound returns what was dirtied in the round that began at mark.
func (p *Pace) endRound(mark uint64) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	dirty := p.counts.dirtied.Load() - mark
	p.mu.stats.Syncs, p.mu.stats.Dirty = p.round, dirty
	return int64(dirty)
}

// allow lets writers dirty n bytes from mark on, at first as if that were to take
// spread. round is how many rounds have begun or, 0, none has ended.
func (p *Pace) allow(run uint64, round int, mark uint64, n int64, spread time.Duration) {
	p.mu.Lock()
	if p.mu.engaged && p.mu.run == run && (round > 0 || p.mu.stats.Syncs == 0) {
		p.mu.mark = mark
		p.mu.allowance, p.mu.spread, p.mu.begun = max(n, 0), max(spread, time.Millisecond), time.Now()
		p.mu.next = p.mu.begun
		p.on.Store(true)
	}
	p.mu.Unlock()
	p.resume()
}

// clamp leaves writers n bytes at most: what was let on before the round began
// may have been written in it.
func (p *Pace) clamp(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.allowance = min(p.mu.allowance, max(n, 0))
}

// release ends the slowdown of an inactivation, if there is one.
func (p *Pace) release(run uint64) {
	p.mu.Lock()
	if !p.mu.engaged || p.mu.run != run {
		p.mu.Unlock()
		return
	}
	p.mu.stats.Dirty = p.counts.dirtied.Load() - p.mu.mark
	p.mu.engaged = false
	p.on.Store(false)
	tasks := p.mu.takeAll()
	p.mu.Unlock()
	goOn(tasks)
}
