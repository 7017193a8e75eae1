package qcow2

// piece is what the cluster of a change needs beside the caller's bytes.
type piece struct {
	change int
	at     int64  // offset in the cluster
	from   Extent // what is there until now
}

// findAround adds what the cluster of change i needs beside the write of
// start..end: what its entry is going to show and is not there yet. Without
// MayBlock the answer is ErrWait if that is more than zeros.
func (im *Image) findAround(p *Plan, i int, start, end int64, mode Mode) error {
	c := &p.changes[i]
	base, size := c.cluster<<im.g.ClusterBits, im.g.ClusterSize()
	from, to := max(start-base, 0), min(end-base, size) // written by the caller
	if im.g.External {
		// The data file need not have a whole last cluster.
		size = min(size, im.data.Length()-base)
	}
	for lo := int64(0); lo < size; {
		if lo == from {
			lo = to
			continue
		}
		// To the caller's bytes at most, of subclusters that are treated alike.
		hi := lo
		shown := im.shows(c, lo)
		for limit := size; hi < limit && im.shows(c, hi) == shown; {
			if hi < from {
				limit = from
			}
			hi = min(limit, (hi>>im.subBits+1)<<im.subBits)
		}
		if shown {
			if err := im.addPieces(p, i, base, lo, hi, mode); err != nil {
				return err
			}
		}
		lo = hi
	}
	return nil
}

// shows reports whether the subcluster at offset off of a cluster will be data,
// and is not there yet.
func (im *Image) shows(c *change, off int64) bool {
	sub := int(off >> im.subBits)
	if im.g.Extended && c.is.bits>>sub&1 == 0 {
		return false
	}
	return c.new || im.g.kind(c.was, sub) != data
}

// addPieces adds what bytes lo..hi of a cluster were.
func (im *Image) addPieces(p *Plan, i int, base, lo, hi int64, mode Mode) error {
	var err error
	p.old, err = im.appendOld(p.old[:0], p.changes[i].was, base, lo, hi, mode)
	if err != nil {
		return err
	}
	for _, e := range p.old {
		if e.Kind != Zero && mode&MayBlock == 0 {
			return ErrWait
		}
		p.pieces = append(p.pieces, piece{i, lo, e})
		lo += e.Length
	}
	return nil
}

// copyPieces puts the pieces of a plan where they belong.
func (im *Image) copyPieces(p *Plan, mode Mode) error {
	for i := range p.pieces {
		x := &p.pieces[i]
		c := &p.changes[x.change]
		if x.from.Kind == Zero && c.zero {
			continue
		}
		if mode&MayBlock == 0 {
			return ErrWait
		}
		c.touched = true
		host := hostOffset(c.is.entry) + x.at
		if x.from.Kind == Zero {
			if err := im.data.ZeroAt(host, x.from.Length); err != nil {
				return err
			}
			continue
		}
		if err := im.copyPiece(&x.from, host); err != nil {
			return err
		}
	}
	return nil
}

func (im *Image) copyPiece(e *Extent, host int64) error {
	buf := clusters.get(e.Length)
	defer clusters.put(buf)
	var err error
	if e.Kind == Compressed {
		err = e.Image.readCompressed(e.Entry, e.Offset, *buf)
	} else {
		err = e.File.ReadAt(*buf, e.Offset)
	}
	if err != nil {
		return err
	}
	return im.data.WriteAt(*buf, host, false)
}

// appendOld is what bytes lo..hi of a cluster were with the entry c. The
// cluster may reach past the end of the disk, where there are zeros.
func (im *Image) appendOld(dst []Extent, c cell, base, lo, hi int64, mode Mode) ([]Extent, error) {
	var err error
	for lo < hi {
		next := min(hi, (lo>>im.subBits+1)<<im.subBits)
		k := im.g.kind(c, int(lo>>im.subBits))
		switch k {
		case unallocated:
			if dst, err = im.appendBehind(dst, 0, base+lo, next-lo, mode); err != nil {
				return dst, err
			}
		case zero:
			dst = im.join(dst, 0, Extent{Kind: Zero, Length: next - lo})
		case data:
			dst = im.join(dst, 0, Extent{Kind: Data, Length: next - lo, File: im.data, Offset: hostOffset(c.entry) + lo})
		case compressed:
			dst = im.join(dst, 0, Extent{Kind: Compressed, Length: next - lo, File: im.f, Offset: lo, Image: im, Entry: c.entry})
		}
		lo = next
	}
	return dst, nil
}
