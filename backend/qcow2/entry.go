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

// hostOffset of an entry that is not compressed, 0 for none.
func hostOffset(e uint64) int64 { return int64(e & entryOffset) }

// compressed tells where the bytes of a compressed cluster are: from off, at
// most n bytes, which end at a sector boundary of 512 bytes (section "Compressed
// Clusters Descriptor").
func (g Geometry) compressed(e uint64) (off, n int64) {
	shift := 62 - (g.ClusterBits - 8)
	off = int64(e & (1<<shift - 1))
	sectors := int64(e>>shift&(1<<(g.ClusterBits-8)-1)) + 1
	return off, sectors*512 - off&511
}

// The second word of an extended entry (section "Extended L2 Entries"): bit i
// says that subcluster i is allocated, bit 32+i that it reads as zeros; not
// both.
func subAllocated(bits uint64, i int) bool { return bits>>i&1 != 0 }
func subZero(bits uint64, i int) bool      { return bits>>(32+i)&1 != 0 }
