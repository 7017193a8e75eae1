package qcow2

// An entry of an L1 or L2 table (sections "Cluster mapping"), decoded from
// big-endian. Bits 9 to 55 are a host offset.
const (
	entryCopied     = 1 << 63 // the refcount is exactly one: it may be overwritten
	entryCompressed = 1 << 62
	entryZero       = 1 << 0 // reads as zeros; not with extended L2 entries
	entryOffset     = 0x00fffffffffffe00

	// l1Reserved and l2Reserved must be zero.
	l1Reserved = 0x7f000000000001ff
	l2Reserved = 0x3f000000000001fe
)

// cell is an entry of an L2 table. bits is its second word where entries are
// extended (section "Extended L2 Entries"), otherwise 0: bit i says that
// subcluster i is allocated, bit 32+i that it reads as zeros; not both.
type cell struct{ entry, bits uint64 }

const (
	allAllocated = 1<<32 - 1
	allZero      = allAllocated << 32
)

// kind is what an image itself has in a subcluster.
type kind uint8

const (
	unallocated kind = iota // what is behind the image shows through
	zero
	data
	compressed
)

// hostOffset of an entry that is not compressed, 0 for none.
func hostOffset(e uint64) int64 { return int64(e & entryOffset) }

// hasHost reports whether the cell has a host cluster, also one that reads as
// zeros. In a data file offset 0 is one.
func (g Geometry) hasHost(c cell) bool {
	return c.entry&entryCompressed == 0 &&
		(c.entry&entryOffset != 0 || g.External && c.entry&entryCopied != 0)
}

// kind of subcluster sub, which is 0 where there are none.
func (g Geometry) kind(c cell, sub int) kind {
	switch {
	case c.entry&entryCompressed != 0:
		return compressed
	case g.Extended:
		switch {
		case c.bits>>sub&1 != 0:
			return data
		case c.bits>>(32+sub)&1 != 0:
			return zero
		}
		return unallocated
	case c.entry&entryZero != 0 && g.Version >= 3:
		return zero
	case g.hasHost(c):
		return data
	}
	return unallocated
}

// compressed tells where the bytes of a compressed cluster are: from off, at
// most n bytes, which end at a sector boundary of 512 bytes (section "Compressed
// Clusters Descriptor").
func (g Geometry) compressed(e uint64) (off, n int64) {
	shift := 62 - (g.ClusterBits - 8)
	off = int64(e & (1<<shift - 1))
	sectors := int64(e>>shift&(1<<(g.ClusterBits-8)-1)) + 1
	return off, sectors*512 - off&511
}

// fault says what is wrong with a cell, "" if nothing is. It does not know
// what else is at its host cluster.
func (g Geometry) fault(c cell) string {
	e := c.entry
	if e&entryCompressed != 0 {
		switch {
		case e&entryCopied != 0:
			return "a compressed cluster is marked as not shared"
		case g.External:
			return "a compressed cluster in an image with a data file"
		}
		return ""
	}
	reserved := uint64(l2Reserved)
	if g.Extended || g.Version < 3 {
		reserved |= entryZero
	}
	switch {
	case e&reserved != 0:
		return "reserved bits are set"
	case g.Within(hostOffset(e)) != 0:
		return "its host offset is not the beginning of a cluster"
	case g.Extended && c.bits>>32&c.bits != 0:
		return "a subcluster is both allocated and zero"
	case g.Extended && c.bits&allAllocated != 0 && !g.hasHost(c):
		return "subclusters are allocated without a host cluster"
	}
	return ""
}
