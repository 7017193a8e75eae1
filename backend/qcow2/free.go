package qcow2

import (
	"errors"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// freeing is what no table in memory names any more. A drop waits until no
// table in the file names it either (the flush that began after it), and then
// in limbo until nobody uses it (pins); only then is its refcount decreased,
// and what is left with none punched and made ready.
type freeing struct {
	mu    sync.Mutex // see cache for the order
	drops []hostRange
	// limbo, in the order in which they were added.
	limbo []limbo
}

type limbo struct {
	epoch  uint64 // of pins
	ranges []hostRange
}

// drop notes that a table does not name a range of host clusters any more,
// after the table was changed. Where there was none the range is empty.
func (im *Image) drop(x hostRange) {
	if x.n == 0 {
		return // or the cluster at its offset would go, which is that of the header
	}
	im.free.mu.Lock()
	im.free.drops = append(im.free.drops, x)
	im.free.mu.Unlock()
}

// dropCell drops what a cell that was replaced named: its cluster, or the
// clusters in which its compressed bytes lie. The guest's cluster is busy.
func (im *Image) dropCell(c cell) {
	switch {
	case c.entry&entryCompressed != 0:
		off, n := im.g.compressed(c.entry)
		first := off &^ (im.g.ClusterSize() - 1)
		end := off + n - 1 | (im.g.ClusterSize() - 1)
		im.drop(hostRange{first, end + 1 - first})
	case im.g.External && im.g.hasHost(c):
		im.punchData(hostOffset(c.entry))
	case im.g.hasHost(c):
		im.drop(hostRange{hostOffset(c.entry), im.g.ClusterSize()})
	}
}

// giveBack returns clusters that were taken, and that no table has named: nobody
// else can be using them.
func (im *Image) giveBack(x run) {
	r, per := &im.refs, im.g.refcountsPerBlock()
	var left []hostRange
	r.mu.Lock()
	for c := x.first; c < x.first+x.n; c++ {
		if b := r.blocks[c/per]; b != nil {
			im.setLocked(b, c, 0)
			im.readyLocked(b, run{c, 1, x.zero})
		} else {
			left = append(left, hostRange{c << im.g.ClusterBits, im.g.ClusterSize()})
		}
	}
	r.mu.Unlock()
	if len(left) > 0 {
		im.dropped(left) // which loads the block
	}
}

// takeDrops moves the drops to the flush that begins.
func (im *Image) takeDrops() []hostRange {
	im.free.mu.Lock()
	defer im.free.mu.Unlock()
	d := im.free.drops
	im.free.drops = nil
	return d
}

// dropped is called when a flush has made durable that no table names these.
func (im *Image) dropped(d []hostRange) {
	if len(d) == 0 {
		return
	}
	im.free.mu.Lock()
	im.free.limbo = append(im.free.limbo, limbo{im.pins.now(), d})
	im.free.mu.Unlock()
}

// undrop puts back what a failed flush has taken.
func (im *Image) undrop(d []hostRange) {
	im.free.mu.Lock()
	im.free.drops = append(im.free.drops, d...)
	im.free.mu.Unlock()
}

// inLimbo reports whether something waits for users to leave.
func (im *Image) inLimbo() bool {
	im.free.mu.Lock()
	defer im.free.mu.Unlock()
	return len(im.free.limbo) > 0
}

// dropsWait reports whether a flush would free something.
func (im *Image) dropsWait() bool {
	im.free.mu.Lock()
	defer im.free.mu.Unlock()
	return len(im.free.drops)+len(im.free.limbo) > 0
}

// reclaim frees what has left limbo. What cannot be counted because of an error
// stays there.
func (im *Image) reclaim() error {
	im.alloc.filling.Lock()
	defer im.alloc.filling.Unlock()
	return im.reclaimLocked()
}

// reclaimLocked is reclaim for who holds filling.
func (im *Image) reclaimLocked() error {
	for im.pins.advance() {
		// Twice is enough for all that is there; more does no harm, and the
		// loop ends because new users come only into the latest epoch.
		im.free.mu.Lock()
		waiting := len(im.free.limbo) > 0 && !im.pins.over(im.free.limbo[len(im.free.limbo)-1].epoch)
		im.free.mu.Unlock()
		if !waiting {
			break
		}
	}
	for {
		im.free.mu.Lock()
		if len(im.free.limbo) == 0 || !im.pins.over(im.free.limbo[0].epoch) {
			im.free.mu.Unlock()
			return nil
		}
		l := im.free.limbo[0]
		im.free.limbo = im.free.limbo[1:]
		im.free.mu.Unlock()
		if left, err := im.reclaimRanges(l.ranges); err != nil {
			im.free.mu.Lock()
			im.free.limbo = slices.Insert(im.free.limbo, 0, limbo{l.epoch, left})
			im.free.mu.Unlock()
			return err
		}
	}
}

// reclaimRanges decreases the refcounts of ranges; those left are what was not
// because of an error.
func (im *Image) reclaimRanges(ranges []hostRange) (left []hostRange, err error) {
	slices.SortFunc(ranges, func(a, b hostRange) int { return int(min(max(a.off-b.off, -1), 1)) })
	for len(ranges) > 0 {
		// As many as one block counts, with their punching at once.
		per := im.g.refcountsPerBlock()
		index := ranges[0].off >> im.g.ClusterBits / per
		b, err := im.loadBlock(index)
		if err != nil {
			return ranges, err
		}
		if b == nil {
			return ranges, im.odd("nothing counts the host cluster at %#x, which was in use", ranges[0].off)
		}
		var free []run
		under := int64(-1)
		im.refs.mu.Lock()
		for len(ranges) > 0 && ranges[0].off>>im.g.ClusterBits/per == index {
			x := &ranges[0]
			c := x.off >> im.g.ClusterBits
			n := im.g.refcount(b.b, c%per)
			if n == 0 {
				under = c
			} else {
				im.setLocked(b, c, n-1)
			}
			if n == 1 {
				im.refs.metadata.remove(c)
				if k := len(free) - 1; k >= 0 && free[k].first+free[k].n == c {
					free[k].n++
				} else {
					free = append(free, run{first: c, n: 1})
				}
			}
			x.off += im.g.ClusterSize()
			if x.n -= im.g.ClusterSize(); x.n <= 0 {
				ranges = ranges[1:]
			}
		}
		im.refs.mu.Unlock()
		for i := range free {
			free[i].zero = im.punch(free[i])
		}
		im.refs.mu.Lock()
		a := &im.alloc
		for _, x := range free {
			switch {
			case index >= a.scan && x.first < a.old: // will be found there
			case len(a.ready) < readyRuns:
				im.readyLocked(b, x)
			default:
				// Nobody looks before nothing is ready, so that nothing is found
				// twice.
				a.scan, a.old = min(a.scan, index), a.end
			}
		}
		b.users--
		im.refs.mu.Unlock()
		if under >= 0 {
			return ranges, im.odd("host cluster %d was in use, and its refcount is 0", under)
		}
	}
	return nil, nil
}

// punch gives the space of free clusters back, and reports whether they read
// as zeros now.
func (im *Image) punch(x run) bool {
	if im.opts.KeepSpace {
		return false
	}
	err := im.f.Punch(x.first<<im.g.ClusterBits, x.n<<im.g.ClusterBits)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		im.opts.Warn(err.Error())
	}
	return err == nil
}

// punchData gives the space of a cluster of the data file back. That is where
// the guest's cluster will be again, so it cannot wait for the flush: a crash
// before that leaves an entry that names zeros, as a discard may.
func (im *Image) punchData(off int64) {
	n := min(im.g.ClusterSize(), im.data.Length()-off)
	if n <= 0 || im.opts.KeepSpace {
		return
	}
	if err := im.data.Punch(off, n); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		im.opts.Warn(err.Error())
	}
}
