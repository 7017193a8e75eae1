package qcow2

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// allocator gives out host clusters. What it has ready is free in the file and
// in memory, counted by refcount blocks that are in memory, so that taking one
// does no I/O. It is filled from what was freed, then with free clusters found
// in refcount blocks, which are looked at once from the beginning, and then by
// making the file longer.
//
//	ready -> take -> Commit -> ... -> drop -> flush -> grace period -> ready
type allocator struct {
	// filling is held by whoever fills it, or loads refcount blocks. See cache
	// for the order.
	filling sync.Mutex

	// Under refcounts.mu:
	ready []run // taken from the end
	have  int64 // clusters in ready
	scan  int64 // the next refcount block to look at
	old   int64 // in clusters: up to where it is looked; at first where the file ended at Begin
	end   int64 // in clusters: where the file ends

	fixed bool  // the file cannot become longer
	least int64 // bytes by which it becomes longer; growMin but in tests
}

// run is a run of free host clusters.
type run struct {
	first, n int64 // clusters
	zero     bool  // they read as zeros
}

const (
	// scanBlocks is how many refcount blocks one refill looks at before it
	// makes the file longer: finding all free clusters of a large image first
	// would keep a write waiting.
	scanBlocks = 16
	// The file becomes longer by an eighth, within these bounds in bytes. It is
	// sparse, so that the surplus costs nothing but a longer file after a crash.
	growMin = 1 << 20
	growMax = 64 << 20
	// readyRuns is how many runs are ready at most, of what was freed; what is
	// freed beyond is looked for when all are taken. They have 24 bytes.
	readyRuns = 1 << 17
)

// take takes up to n neighbouring clusters and counts them. Without MayBlock
// the answer is ErrWait where it would have to look for some.
func (im *Image) take(n int64, mode Mode) (run, error) {
	for {
		im.refs.mu.Lock()
		got, ok := im.takeLocked(n)
		im.refs.mu.Unlock()
		switch {
		case ok:
			im.startTimer()
			return got, nil
		case mode&MayBlock == 0:
			return run{}, ErrWait
		}
		if err := im.refill(n); err != nil {
			return run{}, err
		}
	}
}

func (im *Image) takeLocked(n int64) (run, bool) {
	a, per := &im.alloc, im.g.refcountsPerBlock()
	k := len(a.ready) - 1
	if k < 0 {
		return run{}, false
	}
	last := &a.ready[k]
	got := run{last.first, min(n, last.n, per-last.first%per), last.zero}
	b := im.refs.blocks[got.first/per]
	for c := got.first; c < got.first+got.n; c++ {
		im.setLocked(b, c, 1)
	}
	b.users -= int(got.n)
	a.have -= got.n
	last.first += got.n
	last.n -= got.n
	if last.n == 0 {
		a.ready = a.ready[:k]
	}
	return got, true
}

// readyLocked adds free clusters that b counts; b stays in memory for them.
func (im *Image) readyLocked(b *refblock, x run) {
	a := &im.alloc
	b.users += int(x.n)
	a.have += x.n
	if k := len(a.ready) - 1; k >= 0 {
		last := &a.ready[k]
		if last.zero == x.zero && last.first+last.n == x.first {
			last.n += x.n
			return
		}
	}
	a.ready = append(a.ready, x)
}

// refill finds at least one free cluster. It does I/O.
func (im *Image) refill(n int64) error {
	a := &im.alloc
	a.filling.Lock()
	defer a.filling.Unlock()
	if err := im.reclaimLocked(); err != nil {
		return err
	}
	for tries := 0; ; tries++ {
		im.refs.mu.Lock()
		have, index := a.have, a.scan
		im.refs.mu.Unlock()
		switch {
		case have > 0:
			return nil
		case !a.fixed && tries == scanBlocks:
			return im.grow(n, false)
		}
		more, err := im.scanBlock(index)
		if !more && err == nil && a.fixed {
			more, err = im.growTable()
		}
		switch {
		case err != nil:
			return err
		case more:
		case a.fixed:
			return fmt.Errorf("qcow2 image %s has no free cluster left, and what it lies on cannot become larger: %w", im.f.Path(), unix.ENOSPC)
		default:
			return im.grow(n, false)
		}
	}
}

// scanBlock makes the free clusters ready that refcount block index counts, where
// nothing is ready: what is might be found again. If there is no such block it
// makes one. It reports whether there are more.
func (im *Image) scanBlock(index int64) (more bool, err error) {
	a, r, per := &im.alloc, &im.refs, im.g.refcountsPerBlock()
	first, last := index*per, min((index+1)*per, a.old)
	if first >= a.old || index >= int64(len(r.table)) {
		return false, nil
	}
	b, err := im.loadBlock(index)
	if err != nil {
		return false, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.have > 0 { // given back since the caller looked
		if b != nil {
			b.users--
		}
		return true, nil
	}
	a.scan = index + 1
	if b == nil {
		for first < last && r.metadata.has(first) {
			first++
		}
		if first == last {
			return true, nil
		}
		b = im.addBlockLocked(index, first<<im.g.ClusterBits)
		b.users++
		im.setLocked(b, first, 1)
	}
	for c := first; c < last; c++ {
		if im.g.refcount(b.b, c%per) == 0 && !r.metadata.has(c) {
			im.readyLocked(b, run{c, 1, false})
		}
	}
	b.users--
	return true, nil
}

// grow makes the file longer by n clusters or more, with refcount blocks for
// them, and if need be a larger refcount table. Their clusters come from what
// was added, and so does no more than the file's end change before all has
// succeeded. With together the n clusters lie side by side, behind all that
// counts them and a new refcount table, by which alone these blocks are found.
func (im *Image) grow(n int64, together bool) error {
	a, r, bits := &im.alloc, &im.refs, im.g.ClusterBits
	first := a.end
	n = max(n, min(max(min(first<<bits/8, 64*a.least), a.least), growMax)>>bits) + 2
	last := first + n
	if together {
		last += 2*(im.blocksTo(last)-first/im.g.refcountsPerBlock()) + 2 // the blocks and what these and the table take
	}
	table := int64(0) // clusters of a new table
	if entries := im.g.ClusterSize() / 8; together || im.blocksTo(last) > int64(len(r.table)) {
		for table*entries < im.blocksTo(last+table)*5/4 {
			table++
		}
		if table<<bits > maxRefcountTable {
			return fmt.Errorf("qcow2 image %s cannot become larger: its refcount table would exceed %d bytes: %w", im.f.Path(), maxRefcountTable, unix.EFBIG)
		}
		last += table
	}
	if err := im.f.Resize(last << bits); err != nil {
		return err
	}
	return im.addClusters(first, last, table, true)
}

// growTable makes a larger refcount table for a file that cannot become longer,
// and reaches further than the table can count: what is there is free. It reports
// false if there is no room. The table is for all of the file; of the blocks only
// those are made that count the first of the new clusters, and scanBlock makes the
// others.
func (im *Image) growTable() (bool, error) {
	a, r, per := &im.alloc, &im.refs, im.g.refcountsPerBlock()
	first, entries := int64(len(r.table))*per, min(im.blocksTo(a.end), maxRefcountTable/8)
	table := im.g.Clusters(8 * entries)
	used := func(last int64) int64 { return first + table + im.blocksTo(last) - first/per } // where tables end
	last := first + table
	for last < used(last) {
		last++
	}
	last = min(im.blocksTo(last)*per, a.end)
	if last < used(last) || im.blocksTo(last) > entries {
		return false, nil
	}
	r.mu.Lock()
	for c := first; c < used(last); c++ {
		if r.metadata.has(c) { // which nothing counts
			r.mu.Unlock()
			return false, nil
		}
	}
	r.mu.Unlock()
	if err := im.addClusters(first, last, table, false); err != nil {
		return false, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	a.scan = im.blocksTo(last)
	return true, nil
}

// blocksTo is how many refcount blocks count the clusters up to end.
func (im *Image) blocksTo(end int64) int64 { return (end-1)/im.g.refcountsPerBlock() + 1 }

// addClusters makes the clusters from first to last ready, which are free, with
// refcount blocks for them and a new refcount table of so many clusters, 0 for
// none. zero says that they read as zeros. After an error nothing has changed.
func (im *Image) addClusters(first, last, table int64, zero bool) error {
	a, r, bits, per := &im.alloc, &im.refs, im.g.ClusterBits, im.g.refcountsPerBlock()
	var have []*refblock // by index from that of first; nil for new ones
	defer func() {
		r.mu.Lock()
		for _, b := range have {
			if b != nil {
				b.users--
			}
		}
		r.mu.Unlock()
	}()
	for index := first / per; index < im.blocksTo(last); index++ {
		b, err := im.loadBlock(index)
		if err != nil {
			return err
		}
		have = append(have, b)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	a.end = max(a.end, last)
	block := func(c int64) *refblock { return have[c/per-first/per] }
	next := first // what may be used for metadata
	if table > 0 {
		r.gone = append(r.gone, hostRange{r.offset, int64(len(r.table)) * 8})
		larger := make([]uint64, table<<bits/8)
		copy(larger, r.table)
		r.table, r.offset, r.moved = larger, first<<bits, true
		next += table
	}
	var used []int64
	for c := first; c < next; c++ {
		r.metadata.add(c)
		used = append(used, c)
	}
	for i, b := range have {
		if b != nil {
			continue
		}
		// A block counts its own cluster: then the table in the file may name
		// it without any of the others. Only what the header does not lead to
		// yet can be anywhere.
		index := first/per + int64(i)
		if table == 0 {
			next = max(next, index*per)
		}
		have[i] = im.addBlockLocked(index, next<<bits)
		have[i].users++
		used = append(used, next)
		next++
	}
	for _, c := range used {
		im.setLocked(block(c), c, 1)
	}
	for c := first; c < last; c++ {
		// A damaged image may count what is past its end.
		if b := block(c); im.g.refcount(b.b, c%per) == 0 && !r.metadata.has(c) {
			im.readyLocked(b, run{c, 1, zero})
		}
	}
	return nil
}
