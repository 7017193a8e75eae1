package qcow2

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Repair says what is to be mended.
type Repair uint8

const (
	// RepairLeaks: refcounts that are too high.
	RepairLeaks Repair = iota
	// RepairAll: also those that are too low, and flags that do not fit them. If
	// nothing is wrong afterwards the image is no longer Dirty or Corrupt.
	RepairAll
)

// Mend checks an image, which nobody else uses, and mends it. before is what
// was found, after what is left. A crash in between leaves an image that is no
// worse: a refcount is raised before an entry relies on it and lowered when no
// table needs it. The header is read anew into h. Where a list of what is used,
// of snapshots or bitmaps, cannot be read, nothing is changed: what only they
// name would be given away.
func Mend(f File, h *Header, what Repair, progress func(done, total int64)) (before, after *Report, err error) {
	before, after, err = mend(f, h, what, progress)
	if err == nil && after.Corruptions == 0 {
		err = unmark(f, h)
	}
	return before, after, err
}

// unmark makes an image that is mended neither Dirty nor Corrupt.
func unmark(f File, h *Header) error {
	if h.Incompatible&(Dirty|Corrupt) == 0 {
		return nil
	}
	h.Incompatible &^= Dirty | Corrupt
	if err := f.WriteAt(be64(h.Incompatible), offIncompatible, false); err != nil {
		return err
	}
	return f.Sync()
}

// mend is Mend, which leaves the image marked.
func mend(f File, h *Header, what Repair, progress func(done, total int64)) (before, after *Report, err error) {
	c := newChecker(f, h, progress)
	if err := c.run(); err != nil {
		return nil, nil, err
	}
	before = &c.r
	var fixed Report
	if what == RepairAll && !c.lost && len(c.zeros) > 0 {
		if fixed.CorruptionsFixed, err = c.setEntries(c.zeros); err != nil {
			return before, nil, err
		}
		// What they named may be free now.
		c = newChecker(f, h, progress)
		if err := c.run(); err != nil {
			return before, nil, err
		}
	}
	if err := c.mend(what, &fixed); err != nil {
		return before, nil, err
	}
	fresh, err := ReadHeader(f)
	if err != nil {
		return before, nil, err
	}
	*h = *fresh
	after = &Report{}
	*after = *before
	if fixed.CorruptionsFixed+fixed.LeaksFixed > 0 {
		if after, err = Check(f, h, progress); err != nil {
			return before, nil, err
		}
	}
	after.CorruptionsFixed, after.LeaksFixed = fixed.CorruptionsFixed, fixed.LeaksFixed
	return before, after, nil
}

// mend mends refcounts and flags, and notes in fixed how many.
func (c *checker) mend(what Repair, fixed *Report) error {
	if c.lost {
		// What seems to be free may be what a snapshot has.
		return nil
	}
	if what == RepairLeaks {
		if c.mixed {
			return nil
		}
		if c.r.Leaks > 0 {
			fixed.LeaksFixed = c.r.Leaks
			if err := c.setRefcounts(func(is, used uint64) uint64 { return min(is, used) }); err != nil {
				return err
			}
		}
		if c.r.Corruptions > c.flags {
			return nil // what flags have to be is not known before refcounts are right
		}
		return c.setFlags(fixed)
	}
	if c.counting > 0 || c.r.Leaks > 0 || c.broken {
		fixed.CorruptionsFixed += c.counting
		fixed.LeaksFixed = c.r.Leaks
		in, err := c.addBlocks()
		if err != nil {
			return err
		}
		if !in {
			if err := c.rebuild(); err != nil {
				return err
			}
			return c.setFlags(fixed)
		}
		if err := c.setRefcounts(func(is, used uint64) uint64 { return max(is, used) }); err != nil {
			return err
		}
	}
	if err := c.setFlags(fixed); err != nil || c.r.Leaks == 0 {
		return err
	}
	return c.setRefcounts(func(_, used uint64) uint64 { return used })
}

// setRefcounts gives every cluster the refcount that choose makes of what it
// is and how often the cluster is used.
func (c *checker) setRefcounts(choose func(is, used uint64) uint64) error {
	per := c.g.refcountsPerBlock()
	for i, e := range c.table {
		if e == 0 {
			continue
		}
		raw, err := c.read(int64(e), c.g.ClusterSize())
		if err != nil {
			return err
		}
		changed := false
		for k := range per {
			is := c.g.refcount(raw, k)
			to := min(choose(is, uint64(c.counts.get(int64(i)*per+k))), c.g.maxRefcount())
			if to != is {
				c.g.setRefcount(raw, k, to)
				changed = true
			}
		}
		if changed {
			if err := c.write(raw, int64(e)); err != nil {
				return err
			}
		}
	}
	return c.f.Sync()
}

// write writes a table, whose last cluster the file need not have wholly.
func (c *checker) write(raw []byte, off int64) error {
	if end := off + int64(len(raw)); end > c.f.Length() {
		if err := c.f.Resize(end); err != nil {
			return err
		}
	}
	return c.f.WriteAt(raw, off, false)
}

// setFlags makes the flags of the active disk fit the refcounts.
func (c *checker) setFlags(fixed *Report) error {
	n, err := c.setEntries(c.copied)
	fixed.CorruptionsFixed += n
	return err
}

// setEntries writes those entries that may be written, and returns how many.
func (c *checker) setEntries(all []entryFix) (n int64, err error) {
	for _, x := range all {
		if !c.may(x) {
			continue
		}
		if err := c.write(x.is, x.off); err != nil {
			return n, err
		}
		n++
	}
	if n == 0 {
		return 0, nil
	}
	return n, c.f.Sync()
}

// addBlocks makes refcount blocks for clusters that none counts. It reports
// false if the table is damaged, or too small.
func (c *checker) addBlocks() (bool, error) {
	if c.broken {
		return false, nil
	}
	per := c.g.refcountsPerBlock()
	var added []int64
	// A new block has a cluster too.
	for again := true; again; {
		again = false
		for index := range c.needed() {
			if index >= int64(len(c.table)) {
				return false, nil
			}
			if c.table[index] != 0 {
				continue
			}
			host, err := c.free()
			if err != nil {
				return false, err
			}
			c.counts.add(host, 1, 1)
			c.table[index] = uint64(host) << c.g.ClusterBits
			added = append(added, index)
			again = true
		}
	}
	if len(added) == 0 {
		return true, nil
	}
	for _, index := range added {
		raw := make([]byte, c.g.ClusterSize())
		for k := range per {
			c.g.setRefcount(raw, k, min(uint64(c.counts.get(index*per+k)), c.g.maxRefcount()))
		}
		if err := c.write(raw, int64(c.table[index])); err != nil {
			return false, err
		}
	}
	if err := c.f.Sync(); err != nil {
		return false, err
	}
	for _, index := range added {
		if err := c.write(be64(c.table[index]), c.h.RefcountOffset+8*index); err != nil {
			return false, err
		}
	}
	return true, c.f.Sync()
}

// needed are the blocks that count a cluster that is used.
func (c *checker) needed() map[int64]bool {
	per := c.g.refcountsPerBlock()
	set := make(map[int64]bool)
	for page, p := range c.counts {
		for k := range p {
			if p[k] > 0 {
				set[(page*countsPage+int64(k))/per] = true
			}
		}
	}
	return set
}

// free finds a cluster that nothing uses.
func (c *checker) free() (int64, error) {
	end := c.g.Clusters(c.f.Length())
	for k := c.scan; k < end; k++ {
		if c.counts.get(k) == 0 {
			c.scan = k + 1
			return k, nil
		}
	}
	c.scan = end + 1
	if err := c.f.Resize((end + 1) << c.g.ClusterBits); err != nil {
		return 0, err
	}
	return end, nil
}

// rebuild makes all refcounts anew, behind everything that is used, and has the
// header name them then. Until then those that are there stay.
func (c *checker) rebuild() error {
	old := c.g.Clusters(min(c.h.RefcountOffset+c.h.RefcountLength<<c.g.ClusterBits, c.f.Length()))
	for _, e := range c.table {
		old = max(old, min(int64(e), c.f.Length())>>c.g.ClusterBits+1)
	}
	old = max(old, c.counts.end())
	if err := c.recount(); err != nil {
		return err
	}
	per, entries := c.g.refcountsPerBlock(), c.g.ClusterSize()/8
	first := max(old, c.counts.end())
	needed := c.needed()
	var table int64
	for {
		// What is added has to be counted too.
		n := int64(len(needed)) + table
		last := (first + n - 1) / per
		for i := first / per; i <= last && n > 0; i++ {
			needed[i] = true
		}
		highest := int64(0)
		for i := range needed {
			highest = max(highest, i)
		}
		if t := (highest + entries) / entries; t > table {
			table = t
			continue
		}
		if int64(len(needed))+table == n {
			break
		}
	}
	if table<<c.g.ClusterBits > maxRefcountTable {
		return damaged(c.f, "its refcounts cannot be made anew: their table would exceed %d bytes", maxRefcountTable)
	}
	total := int64(len(needed)) + table
	if end := (first + total) << c.g.ClusterBits; end > c.f.Length() {
		if err := c.f.Resize(end); err != nil {
			return fmt.Errorf("the refcounts of %s cannot be made anew: %w", c.f.Path(), err)
		}
	}
	for k := range total {
		c.counts.add(first+k, 1, 1)
	}
	raw := make([]byte, table<<c.g.ClusterBits)
	at := first + table
	for index := range needed {
		block := make([]byte, c.g.ClusterSize())
		for k := range per {
			c.g.setRefcount(block, k, min(uint64(c.counts.get(index*per+k)), c.g.maxRefcount()))
		}
		if err := c.write(block, at<<c.g.ClusterBits); err != nil {
			return err
		}
		binary.BigEndian.PutUint64(raw[8*index:], uint64(at)<<c.g.ClusterBits)
		at++
	}
	if err := c.write(raw, first<<c.g.ClusterBits); err != nil {
		return err
	}
	if err := c.f.Sync(); err != nil {
		return err
	}
	field := binary.BigEndian.AppendUint64(nil, uint64(first)<<c.g.ClusterBits)
	field = binary.BigEndian.AppendUint32(field, uint32(table))
	if err := c.write(field, offRefcountTable); err != nil {
		return err
	}
	return c.f.Sync()
}

// recount counts all but the refcount structures, and finds the flags that do
// not fit that.
func (c *checker) recount() error {
	n := newChecker(c.f, c.h, c.progress)
	if err := n.countContent(); err != nil {
		return err
	}
	n.table = c.table
	if err := n.checkCopied(); err != nil {
		return err
	}
	c.counts, c.tables, c.metadata, c.shared, c.copied = n.counts, n.tables, n.metadata, n.shared, n.copied
	return nil
}

// repairDirty mends an image whose last owner died, and reads it anew.
func (im *Image) repairDirty(progress func(done, total int64)) error {
	im.at(StepRepair)
	_, after, err := mend(im.f, im.h, RepairAll, progress)
	if err != nil {
		return err
	}
	if after.Corruptions > 0 {
		return im.refused(unix.EIO, fmt.Sprintf("it was not closed in order, and %d errors in it could not be mended; look at it with nbd-export check", after.Corruptions))
	}
	im.at(StepMarkClean)
	if err := unmark(im.f, im.h); err != nil {
		return err
	}
	return im.readL1(im.h.L1Offset)
}
