package qcow2

import "sync"

// blocksKept is how many bytes of refcount blocks are kept in memory while
// they are clean; those in use or dirty are kept besides.
const blocksKept = 8 << 20

// refcounts are the refcount table and the blocks in memory. They say what
// will be in the file after the next flush, never less: an increment is made
// before an entry names the cluster, a decrement after no entry does.
type refcounts struct {
	mu sync.Mutex // see cache for the order; never held during I/O

	table  []uint64 // decoded
	offset int64    // of the table in the file
	blocks map[int64]*refblock

	dirty []*refblock
	added []int64     // entries of the table that the file has not
	moved bool        // the whole table is new, at offset
	gone  []hostRange // clusters of former tables

	metadata clusterSet // clusters that tables are in; empty before Begin
}

// refblock is a refcount block.
type refblock struct {
	index  int64
	off    int64
	b      []byte
	lo, hi int64 // bytes that the file has not, hi is 0 for none
	users  int   // who will change it, or is writing it to the file
}

// hostRange is a run of whole host clusters, in bytes.
type hostRange struct{ off, n int64 }

// loadBlock brings block index into memory, where it stays until its users
// are counted down again.
// nil means that there is none. It does I/O; the caller holds filling, so that
// a block is read by one goroutine at a time.
func (im *Image) loadBlock(index int64) (*refblock, error) {
	r := &im.refs
	r.mu.Lock()
	if index >= int64(len(r.table)) || r.table[index] == 0 {
		r.mu.Unlock()
		return nil, nil
	}
	if b := r.blocks[index]; b != nil {
		b.users++
		r.mu.Unlock()
		return b, nil
	}
	entry := r.table[index]
	r.mu.Unlock()
	off := int64(entry)
	if entry&0x1ff != 0 || !im.g.tableOK(off) || off > im.f.Length()-im.g.ClusterSize() {
		return nil, im.odd("entry %d of the refcount table, %#x, names no refcount block", index, entry)
	}
	raw := make([]byte, im.g.ClusterSize())
	if err := im.f.ReadAt(raw, off); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.blocks[index]
	if b == nil {
		b = &refblock{index: index, off: off, b: raw}
		r.trimLocked(int(blocksKept >> im.g.ClusterBits))
		r.blocks[index] = b
	}
	b.users++
	return b, nil
}

// trimLocked forgets blocks that can be read again.
func (r *refcounts) trimLocked(keep int) {
	if len(r.blocks) <= max(keep, 8) {
		return
	}
	for i, b := range r.blocks {
		if b.users == 0 && b.hi == 0 {
			delete(r.blocks, i)
			if len(r.blocks) <= max(keep, 8) {
				return
			}
		}
	}
}

// setLocked changes the refcount of a cluster whose block is b.
func (im *Image) setLocked(b *refblock, cluster int64, v uint64) {
	i := cluster % im.g.refcountsPerBlock()
	im.g.setRefcount(b.b, i, v)
	at := i << im.g.RefcountOrder >> 3 &^ 511
	im.touchLocked(b, at, at+512)
}

// touchLocked marks bytes lo..hi of a block dirty. They are whole sectors, so
// that no write is torn within one.
func (im *Image) touchLocked(b *refblock, lo, hi int64) {
	if b.hi == 0 {
		im.refs.dirty = append(im.refs.dirty, b)
		b.lo, b.hi = lo, hi
		return
	}
	b.lo, b.hi = min(b.lo, lo), max(b.hi, hi)
}

// addBlockLocked makes block index, which the table has not, at host cluster
// off, which must be free. It counts nothing, not even its own cluster.
func (im *Image) addBlockLocked(index, off int64) *refblock {
	r := &im.refs
	b := &refblock{index: index, off: off, b: make([]byte, im.g.ClusterSize())}
	im.touchLocked(b, 0, im.g.ClusterSize())
	r.blocks[index] = b
	r.table[index] = uint64(off)
	r.added = append(r.added, index)
	r.metadata.add(off >> im.g.ClusterBits)
	return b
}

// readRefcountTable reads the table anew.
func (im *Image) readRefcountTable() error {
	n := im.h.RefcountLength << im.g.ClusterBits
	if im.h.RefcountOffset > im.f.Length()-n {
		return im.damaged("its refcount table reaches past the end of the file")
	}
	table := make([]uint64, n/8)
	if err := readWords(im.f, table, im.h.RefcountOffset); err != nil {
		return err
	}
	r := &im.refs
	r.table, r.offset = table, im.h.RefcountOffset
	r.blocks = make(map[int64]*refblock)
	return nil
}
