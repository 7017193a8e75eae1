package qcow2

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
)

// L2 tables are kept in slices of up to sliceSize bytes. Who reads an entry
// follows three pointers and takes no lock; a slice that is thrown out of the
// cache meanwhile is still what it was (Map is pinned, see pins).
const sliceSize = 4 << 10

// slice is a part of an L2 table.
type slice struct {
	table *table
	l1    int64 // of the table
	index int64 // in the table

	ref   atomic.Bool  // used since the clock came by
	users atomic.Int32 // who will change it, see hold

	// dirty: it differs from the file. unsynced: it did when the last flush
	// that ended began, or does now.
	dirty, unsynced atomic.Bool

	mu sync.Mutex // of who changes words
	// words are entries; where entries are extended each is followed by its
	// bits, and seq is odd while a pair is being changed. They are read without
	// mu.
	words []uint64
	seq   atomic.Uint32
}

// table holds the slices of an L2 table.
type table struct {
	slices []atomic.Pointer[slice]
	off    int64 // in the file

	// Under cache.mu:
	// fresh: the L1 table in the file does not name the table yet, whose
	// cluster reads as zeros where it was not written.
	fresh bool
	kept  int // slices that are in memory or are being read
}

// cache is what of the L2 tables is in memory.
//
// Lock order: flusher.background, bitmaps.storing, the guest clusters of busy,
// Image.tables, flusher.running, allocator.filling (all of them during I/O);
// cache.mu, slice.mu, cache.dirtyMu, refcounts.mu, freeing.mu (never during I/O).
// Those that are called leaves come last.
type cache struct {
	mu      sync.Mutex
	limit   int // slices
	ring    []*slice
	hand    int
	loading map[loadKey]*load

	dirtyMu sync.Mutex // leaf
	dirty   []*slice
	l1      []int64 // dirty entries of the L1 table
}

type loadKey struct {
	table *table
	index int64
}

type load struct {
	done chan struct{}
	s    *slice
	err  error
}

// find returns the slice with the entry for guest offset off, and the index of
// that entry in it. nil means that there is no table, so that nothing is
// allocated.
func (im *Image) find(off int64, mode Mode) (*slice, int, error) {
	l1 := off >> im.l1Shift
	index := off >> im.g.ClusterBits & (im.g.L2Entries() - 1)
	if t := im.dirs[l1].Load(); t != nil {
		if s := t.slices[index>>im.sliceBits].Load(); s != nil {
			if !s.ref.Load() {
				s.ref.Store(true)
			}
			return s, int(index & (1<<im.sliceBits - 1)), nil
		}
	}
	if atomic.LoadUint64(&im.l1[l1]) == 0 {
		return nil, 0, nil
	}
	if mode&MayBlock == 0 {
		return nil, 0, ErrWait
	}
	s, err := im.load(l1, index>>im.sliceBits)
	return s, int(index & (1<<im.sliceBits - 1)), err
}

// cell reads entry i.
func (im *Image) cell(s *slice, i int) cell {
	if !im.g.Extended {
		return cell{entry: atomic.LoadUint64(&s.words[i])}
	}
	seq := s.seq.Load()
	c := cell{atomic.LoadUint64(&s.words[2*i]), atomic.LoadUint64(&s.words[2*i+1])}
	if seq&1 == 0 && s.seq.Load() == seq {
		return c
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return cell{s.words[2*i], s.words[2*i+1]}
}

// setCell changes entry i of a slice that is held.
func (im *Image) setCell(s *slice, i int, c cell) {
	s.mu.Lock()
	// First, so that nobody takes the entry for one that is in the file.
	im.dirtyLocked(s)
	if im.g.Extended {
		s.seq.Add(1)
		atomic.StoreUint64(&s.words[2*i], c.entry)
		atomic.StoreUint64(&s.words[2*i+1], c.bits)
		s.seq.Add(1)
	} else {
		atomic.StoreUint64(&s.words[i], c.entry)
	}
	s.mu.Unlock()
	im.startTimer()
}

// dirtyLocked marks a slice under its mu: who sees it marked knows that it is
// in the list, so that the flush that takes what that one drops later has a
// copy of the slice without it.
func (im *Image) dirtyLocked(s *slice) {
	s.unsynced.Store(true)
	if s.dirty.Swap(true) {
		return
	}
	im.cache.dirtyMu.Lock()
	im.cache.dirty = append(im.cache.dirty, s)
	im.cache.dirtyMu.Unlock()
}

// hold keeps the slice that has off's entry in memory until release, for
// setCell. It fails if the slice is not in memory, or there is no table.
// Whoever throws a slice out takes it from its table first and looks for users
// then, so that one of the two sees the other.
func (im *Image) hold(off int64) (*slice, int, bool) {
	index := off >> im.g.ClusterBits & (im.g.L2Entries() - 1)
	t := im.dirs[off>>im.l1Shift].Load()
	if t == nil {
		return nil, 0, false
	}
	p := &t.slices[index>>im.sliceBits]
	s := p.Load()
	if s == nil {
		return nil, 0, false
	}
	s.users.Add(1)
	if p.Load() != s {
		s.users.Add(-1)
		return nil, 0, false
	}
	return s, int(index & (1<<im.sliceBits - 1)), true
}

func (im *Image) release(s *slice) { s.users.Add(-1) }

// load brings a slice into memory; one goroutine reads it for all who want it,
// so that nobody brings in what was read before a change.
func (im *Image) load(l1, index int64) (*slice, error) {
	_ = im.makeRoom() // who changes tables is told of an error; to read them there is room
	c := &im.cache
	c.mu.Lock()
	t := im.dirs[l1].Load()
	if t == nil {
		e := atomic.LoadUint64(&im.l1[l1])
		if off := hostOffset(e); e&l1Reserved != 0 || !im.g.tableOK(off) || off > im.f.Length()-im.g.ClusterSize() {
			c.mu.Unlock()
			return nil, im.odd("entry %d of the L1 table, %#x, names no L2 table", l1, e)
		}
		t = im.newTable(hostOffset(e))
		im.dirs[l1].Store(t)
	}
	if s := t.slices[index].Load(); s != nil {
		c.mu.Unlock()
		return s, nil
	}
	key := loadKey{t, index}
	if l := c.loading[key]; l != nil {
		c.mu.Unlock()
		<-l.done
		return l.s, l.err
	}
	l := &load{done: make(chan struct{})}
	c.loading[key] = l
	t.kept++
	fresh := t.fresh
	c.mu.Unlock()

	s := &slice{table: t, l1: l1, index: index, words: make([]uint64, im.sliceWords)}
	if !fresh {
		l.err = im.readSlice(s)
	}
	c.mu.Lock()
	if l.err == nil {
		l.s = s
		s.ref.Store(true)
		im.admitLocked(s)
	} else {
		im.forgetLocked(t, s.l1)
	}
	delete(c.loading, key)
	c.mu.Unlock()
	close(l.done)
	return l.s, l.err
}

func (im *Image) newTable(off int64) *table {
	return &table{off: off, slices: make([]atomic.Pointer[slice], im.g.L2Entries()>>im.sliceBits)}
}

// forgetLocked forgets a slice of a table, and the table when that was the last:
// where clusters are small its memory is as much as the slice's.
func (im *Image) forgetLocked(t *table, l1 int64) {
	if t.kept--; t.kept == 0 && !t.fresh {
		im.dirs[l1].CompareAndSwap(t, nil)
	}
}

// admitLocked puts a slice, which its table counts, into the cache, in the place
// of one that is not needed if there are enough.
func (im *Image) admitLocked(s *slice) {
	c := &im.cache
	s.table.slices[s.index].Store(s)
	if len(c.ring) < c.limit {
		c.ring = append(c.ring, s)
		return
	}
	for range 2*len(c.ring) + 1 {
		c.hand = (c.hand + 1) % len(c.ring)
		old := c.ring[c.hand]
		if old.ref.Swap(false) || old.unsynced.Load() {
			continue
		}
		p := &old.table.slices[old.index]
		p.Store(nil)
		if old.users.Load() > 0 || old.unsynced.Load() {
			p.Store(old)
			continue
		}
		im.forgetLocked(old.table, old.l1)
		c.ring[c.hand] = s
		return
	}
	c.ring = append(c.ring, s) // all are needed
}

// forgetTables throws everything out. Nobody uses the image meanwhile, and
// nothing is dirty.
func (im *Image) forgetTables() {
	im.cache.ring, im.cache.hand = nil, 0
	clear(im.dirs)
}

// makeRoom flushes if so much of the cache is dirty that it has to be before more
// is: it is called before a table changes, and before one comes in.
func (im *Image) makeRoom() error {
	c := &im.cache
	c.dirtyMu.Lock()
	crowded := len(c.dirty) > c.limit/2
	c.dirtyMu.Unlock()
	if !crowded {
		return nil
	}
	return im.Flush()
}

// readSlice reads and checks a slice.
func (im *Image) readSlice(s *slice) error {
	if err := readWords(im.f, s.words, s.off()); err != nil {
		return err
	}
	if i, what := im.badCell(s); what != "" {
		return im.odd("entry %d of the L2 table at %#x: %s", s.index<<im.sliceBits+int64(i), s.table.off, what)
	}
	return nil
}

// off is the slice's offset in the file.
func (s *slice) off() int64 { return s.table.off + s.index*8*int64(len(s.words)) }

// guestOffset is where the guest has the cluster of entry i.
func (s *slice) guestOffset(im *Image, i int) int64 {
	return s.l1<<im.l1Shift + (s.index<<im.sliceBits+int64(i))<<im.g.ClusterBits
}

// encode is the slice as the file has it.
func (s *slice) encode() []byte {
	raw := make([]byte, 8*len(s.words))
	for i, w := range s.words {
		binary.BigEndian.PutUint64(raw[8*i:], w)
	}
	return raw
}
