package backend

import "github.com/nbd-export/nbd-export/backend/qcow2"

// Mapping is a part of a disk and where it comes from, in the terms of QEMU's
// block status.
type Mapping struct {
	Start, Length int64 // of the disk, bytes
	// Present: an image of the chain has something here; it is the Depth-th
	// behind the first.
	Present bool
	Depth   int
	// Zero: it reads as zeros. Data: there are bytes of it, which are
	// Compressed, or at Offset of the file at Path.
	Zero, Data, Compressed bool
	Offset                 int64 // -1 for none; what is Zero may have one
	Path                   string
}

// Mappings tells where each part of the disk comes from, in order; neighbours
// that go on in the same way are one, and an empty disk has one that is empty. An
// error of yield ends it.
func (c *Chain) Mappings(yield func(Mapping) error) error {
	w := mapper{links: c.Links, sparse: make([]bool, len(c.Links))}
	for i, l := range c.Links {
		if l.Header == nil || l.Header.Incompatible&qcow2.DataFile != 0 {
			continue
		}
		allocated, err := l.File.Allocated()
		if err != nil {
			return err
		}
		if w.sparse[i], err = qcow2.Preallocated(l.File, l.Header, allocated); err != nil {
			return err
		}
	}
	var last Mapping
	size := c.Links[0].diskSize()
	for off := int64(0); off < size; {
		m, err := w.at(off, size-off)
		if err != nil {
			return err
		}
		off += m.Length
		next := last
		next.Start, next.Length = m.Start, m.Length
		if last.Offset >= 0 {
			next.Offset = last.Offset + last.Length
		}
		switch {
		case last.Length > 0 && m == next:
			last.Length += m.Length
			continue
		case last.Length > 0:
			if err := yield(last); err != nil {
				return err
			}
		}
		last = m
	}
	if size == 0 {
		last.Offset = -1 // as QEMU: an empty disk has an empty part
	}
	return yield(last)
}

// mapper is the way of QEMU's bdrv_co_do_block_status.
type mapper struct {
	links  []*Link
	sparse []bool // clusters of that image may be holes of its file
}

// at tells of [off, off+n) as far as it is all alike.
func (w *mapper) at(off, n int64) (Mapping, error) {
	for depth, l := range w.links {
		m := Mapping{Start: off, Length: n, Depth: depth, Offset: -1}
		if l.Header == nil {
			m.Length, m.Zero = l.File.alike(off, min(n, l.diskSize()-off))
			m.Present, m.Data, m.Offset, m.Path = true, !m.Zero, off, l.Path
			return m, nil
		}
		part, err := l.Image.Part(off, min(n, l.diskSize()-off))
		if err != nil {
			return m, err
		}
		n = part.Length
		m.Length, m.Zero, m.Data, m.Compressed, m.Offset = n, part.Zero, part.Data, part.Compressed, part.Offset
		m.Present = m.Zero || m.Data
		if m.Offset >= 0 {
			m.Path = l.Path
			if l.Data != nil {
				m.Path = l.Data.Path()
			}
		}
		if w.sparse[depth] && m.Data && m.Offset >= 0 {
			m.Length, m.Zero = l.File.alike(m.Offset, m.Length)
		}
		if m.Present {
			return m, nil
		}
		if depth+1 == len(w.links) || off >= w.links[depth+1].diskSize() {
			m.Zero = true
			return m, nil
		}
	}
	panic("backend: an image without files")
}

// diskSize is the size of the disk in bytes. QEMU counts in sectors.
func (l *Link) diskSize() int64 {
	if l.Header != nil {
		return l.Header.Size
	}
	return (l.File.Length() + 511) &^ 511
}

// alike tells how far the file is a hole, or is none, from off on, at most n
// bytes. Past its end it is a hole.
func (f *File) alike(off, n int64) (length int64, hole bool) {
	end := f.Length()
	if off >= end {
		return n, true
	}
	next, hole := f.extent(off, min(end, off+n))
	return next - off, hole
}
