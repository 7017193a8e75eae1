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
type checker struct {
	f        File
	h        *Header
	g        Geometry
	r        Report
	counts   counts
	table    []uint64 // refcount table, decoded
	progress func(done, total int64)

	// tables are the L2 tables by offset. Each is read once, however many
	// entries lead to it: an image full of those would keep us for years.
	tables map[int64]uses
	weight uint32 // how many entries lead to what is being looked at

	copied []copiedFlag // wrong ones of the active disk
	broken bool         // refcount structures cannot be mended in place
	lost   bool         // not all of what is used could be found
	scan   int64        // where free looks next

	block      []byte // the last one that refcount read
	blockIndex int64
}

// uses is how many L1 entries lead to a table: of the active disk, and in all.
type uses struct{ active, all uint32 }

// copiedFlag is an entry whose flag does not fit its refcount.
type copiedFlag struct {
	off int64 // of the entry in the file
	is  uint64
}

// Check looks at all metadata, while nobody changes it. It reads only. progress,
// which may be nil, is told bytes of tables looked at. The error is one of
// reading; what is wrong with the image is in the report.
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
	return &checker{f: f, h: h, g: h.Geometry(), counts: make(counts), tables: make(map[int64]uses), weight: 1, progress: progress}
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
	c.r.Total = c.g.Clusters(c.h.Size)
	if err := c.countAll(); err != nil {
		return err
	}
	if err := c.compare(); err != nil {
		return err
	}
	return c.checkCopied()
}

// countAll counts what the header leads to.
func (c *checker) countAll() error {
	if err := c.countContent(); err != nil {
		return err
	}
	return c.walkRefcounts()
}

// countContent counts all but the refcount structures.
func (c *checker) countContent() error {
	c.count("header", 0, c.g.ClusterSize())
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

// count counts the clusters of a range, which begins in the file, and may end
// past its end by less than a cluster.
func (c *checker) count(what string, off, n int64) bool {
	if n <= 0 {
		return true
	}
	if off < 0 || n > 1<<62 || off >= c.f.Length() || off > c.f.Length()+c.g.ClusterSize()-1-n {
		c.corrupt("%s: %d bytes at %#x reach past the end of the file", what, n, uint64(off))
		return false
	}
	for k := off >> c.g.ClusterBits; k <= (off+n-1)>>c.g.ClusterBits; k++ {
		c.counts.add(k, c.weight)
	}
	return true
}

// readWords reads n numbers of a table.
func (c *checker) readWords(off, n int64) ([]uint64, error) {
	raw := make([]byte, 8*n)
	// What is past the end of the file reads as zeros.
	have := min(max(c.f.Length()-off, 0), 8*n)
	if err := c.f.ReadAt(raw[:have], off); err != nil {
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
	if entries == 0 {
		return nil
	}
	if !c.count("L1 table", off, 8*int64(entries)) {
		return nil
	}
	l1, err := c.readWords(off, int64(entries))
	if err != nil {
		return err
	}
	for i, e := range l1 {
		l2 := hostOffset(e)
		switch {
		case e == 0:
			continue
		case e&l1Reserved != 0:
			c.corrupt("L1 entry %d, %#x, has reserved bits", i, e)
		}
		if l2 == 0 {
			continue
		}
		if !c.g.tableOK(l2) {
			c.corrupt("L1 entry %d: offset %#x is not the beginning of a cluster", i, l2)
			continue
		}
		if !c.count(fmt.Sprintf("L2 table %d", i), l2, c.g.ClusterSize()) {
			continue
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
	for i, off := range slices.Sorted(maps.Keys(c.tables)) {
		c.weight = c.tables[off].all
		if err := c.walkL2(off, int64(c.tables[off].active)); err != nil {
			return err
		}
		c.progress(int64(i+1)<<c.g.ClusterBits, total)
	}
	return nil
}

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
		if what := c.g.fault(e); what != "" {
			// What it names is used all the same, as far as that can be told.
			c.corrupt("L2 entry %d of the table at %#x, %#x: %s", i/width, off, e.entry, what)
		}
		switch {
		case e.entry&entryCompressed != 0:
			at, n := c.g.compressed(e.entry)
			c.count("compressed cluster", at, min(n, max(c.f.Length()-at, 1)))
			c.r.Allocated += active
			c.r.Compressed += active
			c.r.Fragmented += active
		case c.g.hasHost(e):
			at := hostOffset(e.entry)
			c.r.Allocated += active
			if next != 0 && at != next {
				c.r.Fragmented += active
			}
			next = at + c.g.ClusterSize()
			if !c.g.External {
				c.count("data cluster", at, c.g.ClusterSize())
			}
		}
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
	c.count("snapshot table", c.h.SnapshotsOffset, n)
	room := c.f.Length() // their tables do not overlap
	for i := range all {
		s := &all[i]
		room -= 8 * int64(s.L1Entries)
		if s.L1Entries > maxL1Size/8 || s.L1Entries > 0 && !c.g.tableOK(s.L1Offset) || room < 0 {
			c.lost = true
			c.corrupt("snapshot %q: its L1 table, %d entries at %#x, is not possible", s.Name, s.L1Entries, uint64(s.L1Offset))
			continue
		}
		if err := c.walkL1(s.L1Offset, s.L1Entries, false); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) walkBitmaps() error {
	if c.h.Autoclear&BitmapsConsistent == 0 {
		return nil // the extension may be older than the image
	}
	all, err := Bitmaps(c.f, c.h)
	if bad, ok := err.(*FormatError); ok {
		c.lost = true
		c.corrupt("%s", bad.What)
		return nil
	}
	if err != nil || all == nil {
		return err
	}
	c.count("bitmap directory", c.h.Bitmaps.DirectoryOffset, c.h.Bitmaps.DirectorySize)
	room := c.f.Length() // their tables do not overlap
	for i := range all {
		b := &all[i]
		if room -= 8 * b.TableEntries; room < 0 {
			c.lost = true
			c.corrupt("bitmap %q: its table overlaps another one", b.Name)
			return nil
		}
		c.count("bitmap table", b.TableOffset, 8*b.TableEntries)
		t, err := readBitmapTable(c.f, b)
		if err != nil {
			return err
		}
		for k, e := range t {
			off := hostOffset(e)
			switch {
			case c.g.bitmapFault(e):
				c.corrupt("bitmap %q: entry %d of its table, %#x, is not possible", b.Name, k, e)
			case off != 0:
				c.count("bitmap", off, c.g.ClusterSize())
			}
		}
	}
	return nil
}

// walkRefcounts counts the refcount table and its blocks.
func (c *checker) walkRefcounts() error {
	if !c.count("refcount table", c.h.RefcountOffset, c.h.RefcountLength<<c.g.ClusterBits) {
		c.broken = true
		return nil
	}
	t, err := c.readWords(c.h.RefcountOffset, c.h.RefcountLength<<c.g.ClusterBits/8)
	if err != nil {
		return err
	}
	c.table = t
	seen := make(clusterSet)
	for i, e := range t {
		switch {
		case e == 0:
		case e&0x1ff != 0 || !c.g.tableOK(int64(e)):
			c.corrupt("refcount table entry %d, %#x, is not the offset of a cluster", i, e)
			c.table[i], c.broken = 0, true
		case !c.count(fmt.Sprintf("refcount block %d", i), int64(e), c.g.ClusterSize()) || !seen.add(int64(e)>>c.g.ClusterBits):
			c.table[i], c.broken = 0, true
		}
	}
	return nil
}

// compare compares what was counted with the refcounts.
func (c *checker) compare() error {
	per := c.g.refcountsPerBlock()
	compared := make(map[int64]bool)
	for i, e := range c.table {
		if e == 0 {
			continue
		}
		raw, err := c.readBlock(int64(e))
		if err != nil {
			return err
		}
		compared[int64(i)] = true
		for k := range per {
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
	c.r.EndOffset = max(c.r.EndOffset, c.counts.end()<<c.g.ClusterBits)
	return nil
}

func (c *checker) compareOne(cluster int64, refcount uint64) {
	used := uint64(c.counts.get(cluster))
	past := cluster >= c.g.Clusters(c.f.Length()) // where a leak takes no space
	switch {
	case refcount < used:
		c.corrupt("cluster %d refcount=%d reference=%d", cluster, refcount, used)
	case past:
		return
	case refcount > used:
		c.leak("Leaked cluster %d refcount=%d reference=%d", cluster, refcount, used)
	}
	if refcount > 0 {
		c.r.EndOffset = max(c.r.EndOffset, (cluster+1)<<c.g.ClusterBits)
	}
}

func (c *checker) readBlock(off int64) ([]byte, error) {
	raw := make([]byte, c.g.ClusterSize())
	err := c.f.ReadAt(raw[:min(int64(len(raw)), c.f.Length()-off)], off)
	return raw, err
}

// checkCopied compares the flags of the active disk with the refcounts, and
// notes those that do not fit what was counted: that is what the refcounts are
// going to be.
func (c *checker) checkCopied() error {
	if int64(c.h.L1Entries) == 0 || c.h.L1Offset > c.f.Length()-8*int64(c.h.L1Entries) {
		return nil
	}
	l1, err := c.readWords(c.h.L1Offset, int64(c.h.L1Entries))
	if err != nil {
		return err
	}
	width := int(c.g.EntrySize() / 8)
	for i, e := range l1 {
		l2 := hostOffset(e)
		if l2 == 0 || !c.g.tableOK(l2) || l2 > c.f.Length()-c.g.ClusterSize() {
			continue
		}
		if err := c.checkFlag("L1 table", c.h.L1Offset+8*int64(i), e, l2); err != nil {
			return err
		}
	}
	defer func() { c.weight = 1 }()
	for _, l2 := range slices.Sorted(maps.Keys(c.tables)) {
		if c.weight = c.tables[l2].active; c.weight == 0 {
			continue
		}
		words, err := c.readWords(l2, c.g.ClusterSize()/8)
		if err != nil {
			return err
		}
		for k := 0; k < len(words); k += width {
			e := cell{entry: words[k]}
			if width == 2 {
				e.bits = words[k+1]
			}
			if c.g.fault(e) != "" || e.entry&entryOffset == 0 || !c.g.hasHost(e) {
				continue
			}
			if err := c.checkFlag("L2 table", l2+8*int64(k), e.entry, hostOffset(e.entry)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) checkFlag(what string, off int64, e uint64, host int64) error {
	cluster, n, used := host>>c.g.ClusterBits, uint64(1), uint32(1)
	if !c.g.External || what == "L1 table" {
		// Clusters of a data file have no refcounts, and one use.
		var err error
		if n, err = c.refcount(cluster); err != nil {
			return err
		}
		used = c.counts.get(cluster)
	}
	copied := e&entryCopied != 0
	if copied != (n == 1) {
		c.corrupt("OFLAG_COPIED %s: entry %#x at %#x, refcount=%d", what, e, off, n)
	}
	if copied != (used == 1) {
		c.copied = append(c.copied, copiedFlag{off, e ^ entryCopied})
	}
	return nil
}

// refcount of a cluster as it is in the file.
func (c *checker) refcount(cluster int64) (uint64, error) {
	per := c.g.refcountsPerBlock()
	index := cluster / per
	if index >= int64(len(c.table)) || c.table[index] == 0 {
		return 0, nil
	}
	if c.block == nil || c.blockIndex != index {
		raw, err := c.readBlock(int64(c.table[index]))
		if err != nil {
			return 0, err
		}
		c.block, c.blockIndex = raw, index
	}
	return c.g.refcount(c.block, cluster%per), nil
}
