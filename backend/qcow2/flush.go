package qcow2

import (
	"bytes"
	"encoding/binary"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// writeBack is how long a change of a table is at most kept in memory only.
const writeBack = 5 * time.Second

// flusher lets flushes that have not begun yet be one.
type flusher struct {
	running    sync.Mutex // one sequence at a time; see cache for the order
	background sync.Mutex // the timer's goroutine; see cache for the order

	mu    sync.Mutex // leaf
	next  *round     // has not begun
	armed atomic.Bool
	timer *time.Timer // nil before the first
	off   bool        // no timer any more
	told  string      // the last warning, "" if all went well since
}

type round struct {
	done chan struct{}
	err  error
}

// Flush makes everything durable that was committed before the call (see the
// package comment for how). It may block. After an error that is no failed
// sync, it can be called again.
func (im *Image) Flush() error {
	if !im.begun.Load() {
		return im.lost()
	}
	fl := &im.flush
	fl.mu.Lock()
	r := fl.next
	if r != nil {
		fl.mu.Unlock()
		<-r.done
		return r.err
	}
	r = &round{done: make(chan struct{})}
	fl.next = r
	fl.mu.Unlock()

	fl.running.Lock()
	fl.mu.Lock()
	fl.next = nil
	fl.mu.Unlock()
	r.err = im.flushOnce()
	fl.running.Unlock()
	close(r.done)
	return r.err
}

// batch is what one flush writes: copies of tables, and what is to be done
// when they are in the file.
type batch struct {
	drops  []hostRange
	slices []sliceCopy
	l1     []l1Copy
	blocks []blockCopy

	added  []int64 // entries of the refcount table
	table  []uint64
	offset int64
	moved  bool
	gone   []hostRange
}

type sliceCopy struct {
	s   *slice
	off int64
	raw []byte
}

type l1Copy struct {
	index int64
	entry uint64
	table *table
}

type blockCopy struct {
	b      *refblock
	lo, hi int64
	raw    []byte
}

// flushOnce is the sequence; the caller holds running.
func (im *Image) flushOnce() error {
	im.flush.armed.Store(false)
	b := im.collect()
	if err := im.writeBatch(b); err != nil {
		im.putBack(b)
		im.startTimer()
		return err
	}
	im.settled(b)
	if im.inLimbo() {
		im.at(StepGiveBack)
	}
	im.tell(im.reclaim()) // what was flushed is durable all the same
	if im.dirty() {
		im.startTimer() // for refcounts that were decreased, and for limbo
	}
	return nil
}

// collect copies what is dirty. The drops come first: whose drop is in the
// batch has changed its table before, so that the change is in the batch or was
// in one before. The refcount blocks come last: they count everything that the
// copies name.
func (im *Image) collect() *batch {
	b := &batch{drops: im.takeDrops()}
	c := &im.cache
	c.dirtyMu.Lock()
	dirty, l1 := c.dirty, c.l1
	c.dirty, c.l1 = nil, nil
	c.dirtyMu.Unlock()
	for _, i := range l1 {
		b.l1 = append(b.l1, l1Copy{i, atomic.LoadUint64(&im.l1[i]), im.dirs[i].Load()})
	}
	for _, s := range dirty {
		s.mu.Lock()
		raw := s.encode()
		s.dirty.Store(false)
		s.mu.Unlock()
		b.slices = append(b.slices, sliceCopy{s, s.off(), raw})
	}

	r := &im.refs
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range r.dirty {
		b.blocks = append(b.blocks, blockCopy{x, x.lo, x.hi, bytes.Clone(x.b[x.lo:x.hi])})
		x.lo, x.hi = 0, 0
		x.users++ // until it is in the file, or who reads it there gets what it was
	}
	b.added, b.offset, b.moved, b.gone = r.added, r.offset, r.moved, r.gone
	if len(b.added) > 0 || b.moved {
		b.table = slices.Clone(r.table)
	}
	r.dirty, r.added, r.moved, r.gone = nil, nil, false, nil
	return b
}

// writeBatch is steps 2 and 3 of the package comment.
func (im *Image) writeBatch(b *batch) error {
	if err := im.sureOfL1(); err != nil {
		return err
	}
	im.at(StepRefcounts)
	for _, x := range b.blocks {
		if err := im.writeTable(x.raw, x.b.off+x.lo); err != nil {
			return err
		}
	}
	if len(b.added) > 0 || b.moved {
		if err := im.f.Sync(); err != nil {
			return err
		}
		if err := im.writeRefcountTable(b); err != nil {
			return err
		}
	}
	if err := im.syncAll(); err != nil {
		return err
	}
	if b.moved {
		if err := im.writeHeaderRefcounts(b.offset, int64(len(b.table))*8>>im.g.ClusterBits); err != nil {
			return err
		}
	}
	if len(b.slices) > 0 {
		im.at(StepL2)
	}
	for _, x := range b.slices {
		if err := im.writeTable(x.raw, x.off); err != nil {
			return err
		}
	}
	if len(b.slices) > 0 || len(b.l1) > 0 {
		if err := im.f.Sync(); err != nil {
			return err
		}
	}
	if len(b.l1) > 0 {
		im.at(StepL1)
	}
	for _, x := range b.l1 {
		if err := im.writeTable(be64(x.entry), im.h.L1Offset+8*x.index); err != nil {
			return err
		}
	}
	if len(b.l1) > 0 {
		return im.f.Sync()
	}
	return nil
}

// writeRefcountTable writes what is new of the table: a table in a new place as
// a whole, which nothing names yet.
func (im *Image) writeRefcountTable(b *batch) error {
	if b.moved {
		raw := make([]byte, 0, 8*len(b.table))
		for _, w := range b.table {
			raw = binary.BigEndian.AppendUint64(raw, w)
		}
		return im.writeTable(raw, b.offset)
	}
	for _, i := range b.added {
		if err := im.writeTable(be64(b.table[i]), b.offset+8*i); err != nil {
			return err
		}
	}
	return nil
}

// writeHeaderRefcounts makes the header name a new refcount table. Both fields
// are in one sector.
func (im *Image) writeHeaderRefcounts(off, clusters int64) error {
	raw := binary.BigEndian.AppendUint64(nil, uint64(off))
	raw = binary.BigEndian.AppendUint32(raw, uint32(clusters))
	if err := im.f.WriteAt(raw, offRefcountTable, false); err != nil {
		return err
	}
	if err := im.f.Sync(); err != nil {
		return err
	}
	im.h.RefcountOffset, im.h.RefcountLength = off, clusters
	return nil
}

func (im *Image) syncAll() error {
	if im.data != im.f {
		if err := im.data.Sync(); err != nil {
			return err
		}
	}
	return im.f.Sync()
}

// settled notes that a batch is in the file.
func (im *Image) settled(b *batch) {
	im.cache.mu.Lock()
	for _, x := range b.l1 {
		x.table.fresh = false
	}
	im.cache.mu.Unlock()
	for _, x := range b.slices {
		x.s.mu.Lock()
		x.s.unsynced.Store(x.s.dirty.Load())
		x.s.mu.Unlock()
	}
	im.refs.mu.Lock()
	for _, x := range b.blocks {
		x.b.users--
	}
	im.refs.mu.Unlock()
	im.dropped(b.drops)
	im.dropped(b.gone)
}

// putBack makes everything of a batch dirty again.
func (im *Image) putBack(b *batch) {
	im.undrop(b.drops)
	for _, x := range b.slices {
		x.s.mu.Lock()
		im.dirtyLocked(x.s)
		x.s.mu.Unlock()
	}
	c := &im.cache
	c.dirtyMu.Lock()
	for _, x := range b.l1 {
		c.l1 = append(c.l1, x.index)
	}
	c.dirtyMu.Unlock()
	r := &im.refs
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range b.blocks {
		im.touchLocked(x.b, x.lo, x.hi)
		x.b.users--
	}
	r.added = append(r.added, b.added...)
	r.moved = r.moved || b.moved
	r.gone = append(r.gone, b.gone...)
}

// dirty reports whether there is anything that a flush would write.
func (im *Image) dirty() bool {
	c, r := &im.cache, &im.refs
	c.dirtyMu.Lock()
	n := len(c.dirty) + len(c.l1)
	c.dirtyMu.Unlock()
	r.mu.Lock()
	n += len(r.dirty) + len(r.added) + len(r.gone)
	moved := r.moved
	r.mu.Unlock()
	return n > 0 || moved || im.dropsWait()
}

// startTimer sees to it that what is dirty is written back in time.
func (im *Image) startTimer() {
	fl := &im.flush
	if fl.armed.Load() || fl.armed.Swap(true) {
		return
	}
	fl.mu.Lock()
	defer fl.mu.Unlock()
	switch {
	case fl.off:
	case fl.timer == nil:
		fl.timer = time.AfterFunc(writeBack, im.writeBackNow)
	default:
		fl.timer.Reset(writeBack)
	}
}

func (im *Image) writeBackNow() {
	im.flush.background.Lock()
	defer im.flush.background.Unlock()
	im.flush.mu.Lock()
	off := im.flush.off
	im.flush.mu.Unlock()
	if off || !im.dirty() {
		im.flush.armed.Store(false)
		return
	}
	if err := im.Flush(); err != nil {
		im.tell(err)
	}
}

// tell warns of an error that nobody asked for, unless it was told last: where a
// disk is full, or fails, it comes again with each write-back.
func (im *Image) tell(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	fl := &im.flush
	fl.mu.Lock()
	news := text != fl.told
	fl.told = text
	fl.mu.Unlock()
	if news && err != nil {
		im.opts.Warn(text)
	}
}

// stopTimer returns when no write-back is under way, and none will begin until
// allowTimer.
func (im *Image) stopTimer() {
	fl := &im.flush
	fl.mu.Lock()
	fl.off = true
	fl.mu.Unlock()
	fl.background.Lock()
	defer fl.background.Unlock()
	if fl.timer != nil {
		fl.timer.Stop()
	}
}

// allowTimer ends stopTimer, unless the image was closed meanwhile.
func (im *Image) allowTimer() {
	im.flush.mu.Lock()
	im.flush.off = im.closed.Load()
	im.flush.mu.Unlock()
	im.flush.armed.Store(false)
}
