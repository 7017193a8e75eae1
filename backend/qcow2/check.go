package qcow2

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
)

// Report is what Check found.
type Report struct {
	// Corruptions are errors that may lose data, Leaks clusters that are
	// counted more often than used: they only take space.
	Corruptions, Leaks int64
	// Findings are the first of both, in words.
	Findings []string

	// What Mend has mended, in the report of what is left.
	CorruptionsFixed, LeaksFixed int64

	// Of the active disk, in clusters.
	Total, Allocated, Fragmented, Compressed int64
	EndOffset                                int64 // where the last used cluster ends, bytes
}

// maxFindings bounds what is told in words.
const maxFindings = 1000

// Clean reports whether nothing was found.
func (r *Report) Clean() bool { return r.Corruptions+r.Leaks == 0 }

// checker walks everything that the header leads to. It takes memory for a
// table at a time and for counts: about a 16000th of the file's length with
// clusters of 64 KiB.
//
// It counts as qemu-img check does, which reads the file as if zeros followed
// it, and what a broken entry names as if it were right.
type checker struct {
	f        File
	h        *Header
	g        Geometry
	r        Report
	counts   counts
	table    []uint64 // refcount table: offsets of blocks that can be read, or 0
	progress func(done, total int64)

	// tables are the L2 tables by offset. Each is read once, however many
	// entries lead to it: an image full of those would keep us for years.
	tables map[int64]uses
	weight uint32 // how many entries lead to what is being looked at

	// metadata are the clusters that tables are in, shared those that two are
	// in, or that are named too often to be counted: what is written to a table
	// there may be something else's.
	metadata, shared clusterSet

	// Corruptions that mending refcounts ends, and those of flags.
	counting, flags int64

	zeros  []entryFix // entries that can be plain zeros instead of what they are
	copied []entryFix // flags of the active disk that do not fit
	broken bool       // refcount structures cannot be mended in place
	mixed  bool       // and some of their blocks may be something else too
	lost   bool       // not all of what is used could be found
	scan   int64      // where free looks next

	block      []byte // the last one that refcount read
	blockIndex int64
}

// uses is how many L1 entries lead to a table: of the active disk, and in all.
type uses struct{ active, all uint32 }

// entryFix is what an entry has to be.
type entryFix struct {
	off   int64 // of the entry in the file
	is    []byte
	table int64 // the L2 table that it is of, -1 for the L1 table
}

// Check looks at all metadata, while nobody changes it. It reads only. progress,
// which may be nil, is told bytes of tables looked at. The error is one of
// reading, or a *FormatError of bitmaps, with which QEMU opens no image; what
// else is wrong with the image is in the report.
func Check(f File, h *Header, progress func(done, total int64)) (*Report, error) {
	c := newChecker(f, h, progress)
	if err := c.run(); err != nil {
		return nil, err
	}
	return &c.r, nil
}

func newChecker(f File, h *Header, progress func(done, total int64)) *checker {
	if progress == nil {
		progress = func(int64, int64) {}
	}
	return &checker{
		f: f, h: h, g: h.Geometry(), counts: make(counts), tables: make(map[int64]uses), weight: 1,
		metadata: make(clusterSet), shared: make(clusterSet), progress: progress,
	}
}

func (c *checker) corrupt(format string, args ...any) {
	c.r.Corruptions += int64(c.weight)
	c.tell("ERROR "+format, args...)
}

func (c *checker) leak(format string, args ...any) {
	c.r.Leaks++
	c.tell(format, args...)
}

func (c *checker) tell(format string, args ...any) {
	if len(c.r.Findings) < maxFindings {
		c.r.Findings = append(c.r.Findings, fmt.Sprintf(format, args...))
	}
}

func (c *checker) run() error {
	c.r.Total = c.g.Clusters(c.h.Size &^ 511) // as QEMU, whose disks have whole sectors
	if err := c.countContent(); err != nil {
		return err
	}
	if err := c.walkRefcounts(); err != nil {
		return err
	}
	if err := c.compare(); err != nil {
		return err
	}
	return c.checkCopied()
}

// countContent counts all but the refcount structures.
func (c *checker) countContent() error {
	c.countTable("header", 0, c.g.ClusterSize())
	if err := c.walkL1(c.h.L1Offset, c.h.L1Entries, true); err != nil {
		return err
	}
	if err := c.walkSnapshots(); err != nil {
		return err
	}
	if err := c.walkTables(); err != nil {
		return err
	}
	return c.walkBitmaps()
}

// count counts the clusters of a range, which may end past the end of the file
// by less than a cluster.
func (c *checker) count(what string, off, n int64) bool {
	if n <= 0 {
		return true
	}
	if off < 0 || off > 1<<62 || off+n-c.f.Length() >= c.g.ClusterSize() {
		c.corrupt("%s: %d bytes at %#x reach past the end of the file", what, n, uint64(off))
		return false
	}
	for k := off >> c.g.ClusterBits; k <= (off+n-1)>>c.g.ClusterBits; k++ {
		if over := c.counts.add(k, c.weight, c.most()); over > 0 {
			c.shared.add(k)
			c.r.Corruptions += int64(over)
			c.tell("ERROR %s: cluster %d is named more often than a refcount of %d bits can count", what, k, 1<<c.g.RefcountOrder)
		}
	}
	return true
}

// countTable is count of metadata.
func (c *checker) countTable(what string, off, n int64) bool {
	if !c.count(what, off, n) {
		return false
	}
	c.note(off, n)
	return true
}

// note notes that metadata is in a range that count has found to be possible.
func (c *checker) note(off, n int64) {
	for k := off >> c.g.ClusterBits; k <= (off+n-1)>>c.g.ClusterBits && n > 0; k++ {
		if !c.metadata.add(k) {
			c.shared.add(k)
		}
	}
}

// may reports whether an entry can be written without harm: nothing but the table
// that it is of has its cluster, or what says so may be what is wrong.
func (c *checker) may(x entryFix) bool {
	k, uses := x.off>>c.g.ClusterBits, uint32(1)
	if x.table >= 0 {
		uses = c.tables[x.table].all
	}
	return c.metadata.has(k) && !c.shared.has(k) && c.counts.get(k) == uses && (x.table < 0 || c.g.Within(x.table) == 0)
}

// most is how often a cluster can be counted.
func (c *checker) most() uint32 { return uint32(min(c.g.maxRefcount(), 1<<32-1)) }

// read reads n bytes; what is past the end of the file reads as zeros.
func (c *checker) read(off, n int64) ([]byte, error) {
	raw := make([]byte, n)
	if off < 0 || off >= c.f.Length() {
		return raw, nil
	}
	return raw, c.f.ReadAt(raw[:min(n, c.f.Length()-off)], off)
}

// readWords reads n numbers of a table.
func (c *checker) readWords(off, n int64) ([]uint64, error) {
	raw, err := c.read(off, 8*n)
	if err != nil {
		return nil, err
	}
	words := make([]uint64, n)
	for i := range words {
		words[i] = binary.BigEndian.Uint64(raw[8*i:])
	}
	return words, nil
}

// walkL1 counts an L1 table and the L2 tables that it names.
func (c *checker) walkL1(off int64, entries int, active bool) error {
	c.countTable("L1 table", off, 8*int64(entries))
	l1, err := c.readWords(off, int64(entries))
	if err != nil {
		return err
	}
	for i, e := range l1 {
		if e == 0 {
			continue
		}
		if e&l1Reserved != 0 {
			c.corrupt("L1 entry %d, %#x, has reserved bits", i, e)
		}
		l2 := hostOffset(e)
		c.count(fmt.Sprintf("L2 table %d", i), l2, c.g.ClusterSize())
		if c.g.Within(l2) != 0 {
			c.corrupt("L1 entry %d: offset %#x is not the beginning of a cluster", i, l2)
		}
		u := c.tables[l2]
		u.all++
		if active {
			u.active++
		}
		c.tables[l2] = u
	}
	return nil
}

// walkTables counts what the L2 tables name.
func (c *checker) walkTables() error {
	defer func() { c.weight = 1 }()
	total := int64(len(c.tables)) << c.g.ClusterBits
	room := c.f.Length() // tables that begin within a cluster overlap, and are not to be read without end
	for i, off := range slices.Sorted(maps.Keys(c.tables)) {
		u := c.tables[off]
		if c.g.Within(off) != 0 {
			room -= c.g.ClusterSize()
		}
		switch {
		case off >= c.f.Length():
			delete(c.tables, off) // all zeros
		case room < 0:
			delete(c.tables, off)
			c.lost = true
		default:
			c.note(off, c.g.ClusterSize())
			c.weight = u.all
			if err := c.walkL2(off, int64(u.active)); err != nil {
				return err
			}
		}
		c.progress(int64(i+1)<<c.g.ClusterBits, total)
	}
	return nil
}

func (c *checker) walkSnapshots() error {
	all, n, err := readSnapshots(c.f, c.h)
	if bad, ok := err.(*FormatError); ok {
		c.lost = true
		c.corrupt("%s", bad.What)
		return nil
	}
	if err != nil {
		return err
	}
	if len(all) > 0 && c.g.External {
		c.corrupt("%d snapshots in an image with a data file", len(all))
	}
	room := c.f.Length() // their tables do not overlap
	for i := range all {
		s := &all[i]
		if c.g.Version >= 3 && s.extra < 16 {
			c.corrupt("snapshot %q: its entry has %d bytes of extra data, and 16 are needed", s.Name, s.extra)
		}
		room -= 8 * int64(s.L1Entries)
		if s.L1Entries > maxL1Size/8 || c.g.Within(s.L1Offset) != 0 || room < 0 {
			c.lost = true
			c.corrupt("snapshot %q: its L1 table, %d entries at %#x, is not possible", s.Name, s.L1Entries, uint64(s.L1Offset))
			continue
		}
		if err := c.walkL1(s.L1Offset, s.L1Entries, false); err != nil {
			return err
		}
	}
	c.countTable("snapshot table", c.h.SnapshotsOffset, n)
	return nil
}

func (c *checker) walkBitmaps() error {
	if !c.h.HasBitmaps() {
		return nil // the extension may be older than the image
	}
	all, err := Bitmaps(c.f, c.h)
	if err != nil {
		return err
	}
	c.countTable("bitmap directory", c.h.Bitmaps.DirectoryOffset, c.h.Bitmaps.DirectorySize)
	room := c.f.Length() // their tables do not overlap
	for i := range all {
		b := &all[i]
		if room -= 8 * b.TableEntries; room < 0 {
			return damaged(c.f, "bitmap %q: its table overlaps another one", b.Name)
		}
		c.countTable("bitmap table", b.TableOffset, 8*b.TableEntries)
		if err := b.sizeFault(c.f, c.g, c.h.Size); err != nil && !b.InUse {
			return err
		}
		t, err := readBitmapTable(c.f, b)
		if err != nil {
			return err
		}
		for k, e := range t {
			off := hostOffset(e)
			switch {
			case c.g.bitmapFault(e) && !b.InUse:
				return b.fault(c.f, k, e)
			case c.g.bitmapFault(e):
				c.corrupt("bitmap %q: entry %d of its table, %#x, is not possible", b.Name, k, e)
			case off != 0:
				c.count("bitmap", off, c.g.ClusterSize())
			}
		}
	}
	return nil
}
