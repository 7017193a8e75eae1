package qcow2

import (
	"encoding/binary"
	"maps"
	"slices"
)

// walkL2 counts what an L2 table names, to which active entries of the active
// disk lead.
func (c *checker) walkL2(off, active int64) error {
	words, err := c.readWords(off, c.g.ClusterSize()/8)
	if err != nil {
		return err
	}
	width := int(c.g.EntrySize() / 8)
	var next int64 // where the next cluster would follow the last one
	for i := 0; i < len(words); i += width {
		e := cell{entry: words[i]}
		if width == 2 {
			e.bits = words[i+1]
		}
		if e == (cell{}) {
			continue
		}
		bad := func(what string) {
			c.corrupt("L2 entry %d of the table at %#x, %#x: %s", i/width, off, e.entry, what)
		}
		if e.entry&entryCompressed != 0 {
			if c.countCompressed(e, bad) {
				c.r.Allocated += active
				c.r.Compressed += active
				c.r.Fragmented += active
			}
			continue
		}
		if e.entry&l2Reserved != 0 {
			bad("reserved bits are set")
		}
		if e.entry&entryZero != 0 && !c.g.zeroEntries() {
			bad("it reads as zeros, and no entry can in this image")
		}
		if !c.g.counted(e) {
			if e.bits&allAllocated != 0 && c.g.Extended {
				bad("subclusters are allocated without a host cluster")
			}
			continue
		}
		if e.bits>>32&e.bits != 0 {
			bad("a subcluster is both allocated and zero")
		}
		at := hostOffset(e.entry)
		if c.g.Within(at) != 0 {
			bad("its host offset is not the beginning of a cluster")
			c.noteZero(off, off+8*int64(i), e)
		}
		c.r.Allocated += active
		if next != 0 && at != next {
			c.r.Fragmented += active
		}
		next = at + c.g.ClusterSize()
		if !c.g.External {
			c.count("data cluster", at, c.g.ClusterSize())
		}
	}
	return nil
}

// countCompressed counts a compressed cluster, and reports whether it is one.
func (c *checker) countCompressed(e cell, bad func(string)) bool {
	if e.entry&entryCopied != 0 {
		bad("a compressed cluster is marked as not shared")
	}
	switch {
	case c.g.External:
		bad("a compressed cluster in an image with a data file")
	case e.bits != 0:
		bad("a compressed cluster has subclusters")
	default:
		at, n := c.g.compressed(e.entry)
		c.count("compressed cluster", at, n)
		return true
	}
	return false
}

// noteZero notes an entry of a table, at off, whose host cluster cannot be one. Where it has
// no data that is lost with it the entry can do without: it reads as zeros, as
// it would if the cluster were right.
func (c *checker) noteZero(table, off int64, e cell) {
	switch {
	case !c.g.Extended && e.entry&entryZero != 0 && c.g.zeroEntries():
		c.zeros = append(c.zeros, entryFix{off, be64(entryZero), table})
	case c.g.Extended && e.bits&allAllocated == 0:
		c.zeros = append(c.zeros, entryFix{off, binary.BigEndian.AppendUint64(be64(0), e.bits&allZero), table})
	}
}

// zeroEntries reports whether an L2 entry can say that its cluster reads as
// zeros.
func (g Geometry) zeroEntries() bool { return g.Version >= 3 && !g.Extended }

// counted reports whether a cell that is not compressed has a host cluster, also
// one that is not possible. It is as QEMU tells it, which does not look at the
// version.
func (g Geometry) counted(e cell) bool {
	zero := e.entry&entryZero != 0 && !g.Extended
	return e.entry&entryOffset != 0 || g.External && e.entry&entryCopied != 0 && !zero
}

// checkCopied compares the flags of the active disk with the refcounts, and
// notes those that do not fit what was counted: that is what the refcounts are
// going to be.
func (c *checker) checkCopied() error {
	l1, err := c.readWords(c.h.L1Offset, int64(c.h.L1Entries))
	if err != nil {
		return err
	}
	for i, e := range l1 {
		if l2 := hostOffset(e); l2 != 0 {
			if err := c.checkFlag(-1, c.h.L1Offset+8*int64(i), e); err != nil {
				return err
			}
		}
	}
	defer func() { c.weight = 1 }()
	width := int(c.g.EntrySize() / 8)
	for _, l2 := range slices.Sorted(maps.Keys(c.tables)) {
		if c.weight = c.tables[l2].active; c.weight == 0 || l2 == 0 {
			continue
		}
		words, err := c.readWords(l2, c.g.ClusterSize()/8)
		if err != nil {
			return err
		}
		for k := 0; k < len(words); k += width {
			if e := words[k]; e&entryCompressed == 0 && c.g.counted(cell{entry: e}) {
				if err := c.checkFlag(l2, l2+8*int64(k), e); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// checkFlag looks at the flag of an entry, at off, of an L2 table, or with -1 of
// the L1 table. Clusters of a data file have no refcounts, and one use.
func (c *checker) checkFlag(table, off int64, e uint64) error {
	n, used := uint64(1), uint32(1)
	if !c.g.External || table < 0 {
		cluster := hostOffset(e) >> c.g.ClusterBits
		var err error
		if n, err = c.refcount(cluster); err != nil {
			return err
		}
		used = c.counts.get(cluster)
	}
	copied := e&entryCopied != 0
	if copied != (n == 1) {
		c.flags += int64(c.weight)
		what := "L2"
		if table < 0 {
			what = "L1"
		}
		c.corrupt("OFLAG_COPIED %s table: entry %#x at %#x, refcount=%d", what, e, off, n)
	}
	if copied != (used == 1) {
		c.copied = append(c.copied, entryFix{off, be64(e ^ entryCopied), table})
	}
	return nil
}
