package qcow2

// Geometry is how offsets of the guest and of the file are cut up.
type Geometry struct {
	ClusterBits   int
	RefcountOrder int
	Extended      bool // L2 entries have 16 bytes, clusters 32 subclusters
	External      bool // guest clusters are in a data file
	Version       int
}

// Geometry of the image.
func (h *Header) Geometry() Geometry {
	return Geometry{
		ClusterBits:   h.ClusterBits,
		RefcountOrder: h.RefcountOrder,
		Extended:      h.Incompatible&ExtendedL2 != 0,
		External:      h.Incompatible&DataFile != 0,
		Version:       h.Version,
	}
}

// subclusters of a cluster in an image with extended L2 entries.
const subclusters = 32

// ClusterSize in bytes.
func (g Geometry) ClusterSize() int64 { return 1 << g.ClusterBits }

// Within is the offset inside its cluster.
func (g Geometry) Within(off int64) int64 { return off & (g.ClusterSize() - 1) }

// Clusters is how many clusters n bytes need.
func (g Geometry) Clusters(n int64) int64 {
	return n>>g.ClusterBits + min(1, g.Within(n))
}

// EntrySize of an L2 table in bytes.
func (g Geometry) EntrySize() int64 {
	if g.Extended {
		return 16
	}
	return 8
}

// l2Bits is the logarithm of the number of entries of an L2 table.
func (g Geometry) l2Bits() int {
	if g.Extended {
		return g.ClusterBits - 4
	}
	return g.ClusterBits - 3
}

// L2Entries is the number of entries of an L2 table.
func (g Geometry) L2Entries() int64 { return 1 << g.l2Bits() }

// L2Coverage is how many bytes of the guest an L2 table maps.
func (g Geometry) L2Coverage() int64 { return 1 << (g.l2Bits() + g.ClusterBits) }

// L1Index is the entry of the L1 table for a guest offset.
func (g Geometry) L1Index(off int64) int64 { return off >> (g.l2Bits() + g.ClusterBits) }

// L1Needed is how many entries of the L1 table a disk of size bytes needs.
func (g Geometry) L1Needed(size int64) int64 {
	return g.L1Index(size) + min(1, size&(g.L2Coverage()-1))
}

// L2Index is the entry of its L2 table for a guest offset.
func (g Geometry) L2Index(off int64) int64 {
	return off >> g.ClusterBits & (g.L2Entries() - 1)
}

// SubclusterSize in bytes: the unit in which an image with extended L2 entries
// tells allocated from not, a cluster otherwise.
func (g Geometry) SubclusterSize() int64 {
	if g.Extended {
		return g.ClusterSize() / subclusters
	}
	return g.ClusterSize()
}

// refcountsPerBlock is how many clusters a refcount block counts.
func (g Geometry) refcountsPerBlock() int64 {
	return g.ClusterSize() * 8 >> g.RefcountOrder
}

// maxRefcount is the highest refcount there can be.
func (g Geometry) maxRefcount() uint64 {
	if g.RefcountOrder == 6 {
		return 1<<63 - 1 // as QEMU, which counts with signed numbers
	}
	return 1<<(1<<g.RefcountOrder) - 1
}

// tableOK reports whether a table may begin at a host offset.
func (g Geometry) tableOK(off int64) bool { return off > 0 && g.Within(off) == 0 && off < 1<<56 }
