package qcow2

import (
	"encoding/binary"
	"slices"
	"sync/atomic"
)

// ensureTable makes sure that there is an L2 table for guest offset off that
// belongs to the active image alone.
func (im *Image) ensureTable(off int64, mode Mode) error {
	l1 := off >> im.l1Shift
	if atomic.LoadUint64(&im.l1[l1])&entryCopied != 0 {
		return nil
	}
	if mode&MayBlock == 0 {
		return ErrWait
	}
	im.tables.Lock()
	defer im.tables.Unlock()
	was := atomic.LoadUint64(&im.l1[l1])
	if was&entryCopied != 0 {
		return nil
	}
	var old []*slice
	if was != 0 {
		// A snapshot has it too. Whoever changes an entry needs the table, so
		// until it is published nobody changes these.
		for i := range im.g.L2Entries() >> im.sliceBits {
			s, err := im.load(l1, i)
			if err != nil {
				return err
			}
			old = append(old, s)
		}
	}
	got, err := im.take(1, mode)
	if err != nil {
		return err
	}
	host := got.first << im.g.ClusterBits
	if !got.zero {
		if err := im.f.ZeroAt(host, im.g.ClusterSize()); err != nil {
			im.giveBack(got)
			return err
		}
	}
	im.refs.mu.Lock()
	im.refs.metadata.add(got.first)
	im.refs.mu.Unlock()
	im.publishTable(l1, uint64(host)|entryCopied, old)
	if was != 0 {
		im.drop(hostRange{hostOffset(was), im.g.ClusterSize()})
	}
	return nil
}

// publishTable makes entry, which names a cluster that reads as zeros, the
// table of l1, with the contents of former, which is all of the table that was
// there, or nothing.
func (im *Image) publishTable(l1 int64, entry uint64, former []*slice) {
	defer im.startTimer() // which has a lock of its own
	c := &im.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	t := im.newTable(hostOffset(entry))
	t.fresh, t.kept = true, len(former)
	c.dirtyMu.Lock()
	defer c.dirtyMu.Unlock()
	for _, old := range former {
		s := &slice{table: t, index: old.index, l1: l1, words: slices.Clone(old.words)}
		s.dirty.Store(true)
		s.unsynced.Store(true)
		c.dirty = append(c.dirty, s)
		im.admitLocked(s)
	}
	im.dirs[l1].Store(t)
	atomic.StoreUint64(&im.l1[l1], entry)
	c.l1 = append(c.l1, l1)
}

// holdEntry is find and hold: the slice stays in memory until release.
func (im *Image) holdEntry(off int64, mode Mode) (*slice, int, error) {
	for {
		if s, i, ok := im.hold(off); ok {
			return s, i, nil
		}
		if _, _, err := im.find(off, mode); err != nil {
			return nil, 0, err
		}
	}
}

// be64 is a number as the file has it.
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }
