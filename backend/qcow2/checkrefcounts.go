package qcow2

import "fmt"

// walkRefcounts counts the refcount table and its blocks.
func (c *checker) walkRefcounts() error {
	n := c.h.RefcountLength << c.g.ClusterBits
	if !c.countTable("refcount table", c.h.RefcountOffset, n) {
		c.counting++
		c.broken = true
	}
	t, err := c.readWords(c.h.RefcountOffset, n/8)
	if err != nil {
		return err
	}
	c.table = t
	for i, e := range t {
		off := int64(e &^ 0x1ff)
		c.table[i] = 0
		switch {
		case e == 0:
		case e&0x1ff != 0:
			c.badBlock("refcount table entry %d, %#x, has reserved bits", i, e)
			if off > 0 && c.g.Within(off) == 0 {
				c.table[i], c.mixed = uint64(off), true
			}
		case c.g.Within(off) != 0:
			c.badBlock("refcount table entry %d, %#x, is not the offset of a cluster", i, e)
		case off < 0 || off >= c.f.Length():
			c.badBlock("refcount block %d, at %#x, lies past the end of the file", i, e)
		default:
			c.table[i] = e
			before := c.r.Corruptions
			c.countTable(fmt.Sprintf("refcount block %d", i), off, c.g.ClusterSize())
			if n := c.counts.get(off >> c.g.ClusterBits); n != 1 {
				c.badBlock("refcount block %d, at %#x, is named %d times", i, e, n)
			}
			if c.r.Corruptions > before {
				c.mixed, c.broken = true, true
			}
		}
	}
	return nil
}

// badBlock is a corruption of the refcount structures that ends when they are
// made anew.
func (c *checker) badBlock(format string, args ...any) {
	c.broken = true
	c.counting++
	c.corrupt(format, args...)
}

// compare compares what was counted with the refcounts.
func (c *checker) compare() error {
	per := c.g.refcountsPerBlock()
	end := max(c.g.Clusters(c.f.Length()), c.counts.end())
	c.r.EndOffset = c.g.ClusterSize()
	compared := make(map[int64]bool)
	for i, e := range c.table {
		if e == 0 || int64(i)*per >= end {
			continue
		}
		raw, err := c.read(int64(e), c.g.ClusterSize())
		if err != nil {
			return err
		}
		compared[int64(i)] = true
		for k := range min(per, end-int64(i)*per) {
			c.compareOne(int64(i)*per+k, c.g.refcount(raw, k))
		}
	}
	for _, page := range c.counts.pages() {
		for k := range int64(countsPage) {
			if n := page*countsPage + k; !compared[n/per] {
				c.compareOne(n, 0)
			}
		}
	}
	return nil
}

func (c *checker) compareOne(cluster int64, refcount uint64) {
	used := uint64(c.counts.get(cluster))
	switch {
	case refcount < used:
		c.counting++
		c.corrupt("cluster %d refcount=%d reference=%d", cluster, refcount, used)
	case refcount > used:
		c.leak("Leaked cluster %d refcount=%d reference=%d", cluster, refcount, used)
	}
	if refcount > 0 || used > 0 {
		c.r.EndOffset = max(c.r.EndOffset, (cluster+1)<<c.g.ClusterBits)
	}
}

// refcount of a cluster as it is in the file.
func (c *checker) refcount(cluster int64) (uint64, error) {
	per := c.g.refcountsPerBlock()
	index := cluster / per
	if index >= int64(len(c.table)) || c.table[index] == 0 {
		return 0, nil
	}
	if c.block == nil || c.blockIndex != index {
		raw, err := c.read(int64(c.table[index]), c.g.ClusterSize())
		if err != nil {
			return 0, err
		}
		c.block, c.blockIndex = raw, index
	}
	return c.g.refcount(c.block, cluster%per), nil
}
