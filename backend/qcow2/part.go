package qcow2

// Part is a part of the disk as the image itself has it, whatever is behind.
type Part struct {
	Length int64 // bytes, > 0
	// Data and Zero say what the image has there; with neither what is behind it
	// shows through. Compressed is Data whose bytes have no place of their own.
	Data, Zero, Compressed bool
	// Offset is where the range lies in the file that has the guest's clusters, -1
	// if it has no host cluster. Also what is Zero may have one.
	Offset int64
}

// Part tells what the image itself has at off, and how far that goes on, at
// most n bytes, which lie inside Size. It may block.
func (im *Image) Part(off, n int64) (Part, error) {
	var all Part
	for all.Length < n {
		p, err := im.part(off+all.Length, n-all.Length)
		if err != nil {
			return all, err
		}
		if all.Length == 0 {
			all = p
			continue
		}
		next := all // as it would go on
		next.Length = p.Length
		if all.Offset >= 0 {
			next.Offset = all.Offset + all.Length
		}
		if p != next {
			break
		}
		all.Length += p.Length
	}
	return all, nil
}

// part is Part up to the end of the subcluster, or of an L2 table that is not
// there.
func (im *Image) part(off, n int64) (Part, error) {
	s, i, err := im.find(off, MayBlock)
	if err != nil {
		return Part{}, err
	}
	if s == nil {
		next := (off>>im.l1Shift + 1) << im.l1Shift
		return Part{Length: min(n, next-off), Offset: -1}, nil
	}
	c := im.cell(s, i)
	within := im.g.Within(off)
	sub := within >> im.subBits
	p := Part{Length: min(n, (sub+1)<<im.subBits-within), Offset: -1}
	if im.g.hasHost(c) {
		p.Offset = hostOffset(c.entry) + within
	}
	switch im.g.kind(c, int(sub)) {
	case zero:
		p.Zero = true
	case compressed:
		p.Data, p.Compressed = true, true
	case data:
		p.Data = true
	}
	return p, nil
}

// Preallocated reports whether more clusters are in use than the file, which
// takes allocated bytes on the host, has room for: then clusters may be holes of
// the file although tables name them (QEMU's
// qcow2_detect_metadata_preallocation). It may block.
func Preallocated(f File, h *Header, allocated int64) (bool, error) {
	g := h.Geometry()
	room := allocated >> g.ClusterBits
	threshold := max(room*10/9, room+2)
	end := g.Clusters(f.Length())
	if end < threshold {
		return false, nil
	}
	im := &Image{f: f, h: h, g: g}
	if err := im.readRefcountTable(); err != nil {
		return false, err
	}
	per, used := g.refcountsPerBlock(), int64(0)
	raw := make([]byte, g.ClusterSize())
	for i, e := range im.refs.table {
		off, first := int64(e), int64(i)*per
		if first >= end {
			break
		}
		if e == 0 {
			continue
		}
		if !g.tableOK(off) || off > f.Length()-g.ClusterSize() {
			return false, im.damaged("entry %d of the refcount table, %#x, names no refcount block", i, e)
		}
		if err := f.ReadAt(raw, off); err != nil {
			return false, err
		}
		for k := range min(per, end-first) {
			if g.refcount(raw, k) > 0 {
				used++
			}
		}
		if used >= threshold {
			return true, nil
		}
	}
	return false, nil
}
