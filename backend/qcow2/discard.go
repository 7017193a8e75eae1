package qcow2

import "unsafe"

// Discard drops what the image has of the whole clusters in a range: they read
// as zeros afterwards, or as before where that cannot be had for nothing.
// It may block. It is durable after the next Flush.
func (im *Image) Discard(off, n int64) error {
	if err := im.change(off, n, MayBlock); err != nil {
		return err
	}
	pin := im.pins.enter(unsafe.Pointer(&n)) // as Status
	defer im.pins.leave(&pin)
	if im.h.Autoclear&DataFileRaw != 0 {
		return im.writeZeros(off, n) // the data file is to read as the disk does
	}
	// The last cluster of the disk need not be whole.
	end := off + n
	if end == im.Size() {
		end = im.g.Clusters(end) << im.g.ClusterBits
	}
	first := im.g.Clusters(off) << im.g.ClusterBits
	return im.eachCluster(first, end&^(im.g.ClusterSize()-1), func(base int64, was cell) (cell, bool) {
		return im.discarded(base, was)
	})
}

// discarded is the cell of a cluster after a discard, and whether there is a
// change.
func (im *Image) discarded(base int64, was cell) (cell, bool) {
	through := im.opts.Backing != nil && base < im.opts.Backing.Size()
	switch {
	case !through:
		return cell{}, was != cell{}
	case im.g.Version < 3:
		return was, false // nothing could say that it reads as zeros
	case im.g.Extended:
		return cell{bits: allZero}, was != cell{bits: allZero}
	case was.entry == 0 || was.entry == entryZero:
		// Unallocated: the guest gave up what is behind the image.
		return cell{entry: entryZero}, was.entry == 0
	}
	return cell{entry: entryZero}, true
}

// Zero makes a range read as zeros, with keep without giving up clusters that
// are there. It may block. It is durable after the next Flush.
func (im *Image) Zero(off, n int64, keep bool) error {
	if err := im.change(off, n, MayBlock); err != nil {
		return err
	}
	pin := im.pins.enter(unsafe.Pointer(&n)) // as Status
	defer im.pins.leave(&pin)
	if im.h.Autoclear&DataFileRaw != 0 {
		return im.writeZeros(off, n) // the data file is to read as the disk does
	}
	end := off + n
	// What is not whole is written. The last cluster of the disk counts as
	// whole.
	unit := im.g.SubclusterSize()
	first := (off + unit - 1) &^ (unit - 1)
	last := end &^ (unit - 1)
	if end == im.Size() {
		last = (end + unit - 1) &^ (unit - 1)
	}
	if first >= last || im.g.Version < 3 && im.opts.Backing != nil {
		return im.writeZeros(off, n)
	}
	if err := im.writeZeros(off, first-off); err != nil {
		return err
	}
	if err := im.writeZeros(last, end-last); err != nil {
		return err
	}
	if im.g.Version < 3 {
		if keep {
			return im.writeZeros(first, min(last, end)-first)
		}
		return im.eachCluster(first, last, func(int64, cell) (cell, bool) { return cell{}, true })
	}
	return im.eachCluster(first, last, func(base int64, was cell) (cell, bool) {
		return im.zeroed(base, was, max(first-base, 0), min(last-base, im.g.ClusterSize()), keep)
	})
}

// zeroed is the cell of a cluster after bytes from..to of it, whole
// subclusters, were made zeros, and whether there is a change.
func (im *Image) zeroed(base int64, was cell, from, to int64, keep bool) (cell, bool) {
	through := im.opts.Backing != nil && base < im.opts.Backing.Size()
	own := was.entry&entryCopied != 0 && im.g.hasHost(was)
	if !im.g.Extended {
		is := cell{entry: entryZero}
		switch {
		case keep && own:
			is.entry = was.entry | entryZero
		case !through && was.entry == 0:
			return was, false
		}
		return is, is != was
	}
	if was.entry&entryCompressed != 0 {
		// The caller writes zeros to a part of a compressed cluster.
		was = cell{entry: was.entry, bits: 0}
		if from > 0 || to < im.g.ClusterSize() {
			return was, false
		}
		return cell{bits: allZero}, true
	}
	is := was
	for sub := from >> im.subBits; sub < to>>im.subBits; sub++ {
		is.bits = is.bits&^(1<<sub) | 1<<(32+sub)
	}
	if is.bits&allAllocated == 0 && !(keep && own) {
		is.entry = 0
	}
	return is, is != was
}

// eachCluster gives the entries of the clusters in [off, end) what change says.
// Where it is part of a cluster that cannot be told apart, zeros are written.
func (im *Image) eachCluster(off, end int64, change func(base int64, was cell) (is cell, changed bool)) error {
	through := im.opts.Backing != nil
	for off < end {
		base := off &^ (im.g.ClusterSize() - 1)
		next := min(end, base+im.g.ClusterSize())
		if s, _, err := im.find(off, MayBlock); err != nil {
			return err
		} else if s == nil && !through {
			off = min(end, (off>>im.l1Shift+1)<<im.l1Shift) // nothing is there
			continue
		}
		if err := im.changeCluster(base, off, next, change); err != nil {
			return err
		}
		off = next
	}
	return nil
}

func (im *Image) changeCluster(base, off, next int64, change func(base int64, was cell) (is cell, changed bool)) error {
	if s, i, err := im.find(base, MayBlock); err != nil {
		return err
	} else if s == nil {
		if _, changed := change(base, cell{}); !changed {
			return nil
		}
	} else if _, changed := change(base, im.cell(s, i)); !changed && !im.partCompressed(s, i, off, next) {
		return nil
	}
	cluster := base >> im.g.ClusterBits
	if err := im.makeRoom(); err != nil {
		return err
	}
	if err := im.ensureTable(base, MayBlock); err != nil {
		return err
	}
	im.busy.enter(cluster, true)
	s, i, err := im.holdEntry(base, MayBlock)
	if err != nil {
		im.busy.leave(cluster)
		return err
	}
	if im.partCompressed(s, i, off, next) {
		im.release(s)
		im.busy.leave(cluster)
		return im.writeZeros(off, min(next, im.Size())-off)
	}
	was := im.cell(s, i)
	is, changed := change(base, was)
	if changed {
		im.setCell(s, i, is)
		if was.entry&^(entryZero|entryCopied) != is.entry&^(entryZero|entryCopied) || im.g.hasHost(was) != im.g.hasHost(is) {
			im.dropCell(was)
		}
	}
	im.release(s)
	im.busy.leave(cluster)
	return nil
}

// partCompressed reports whether a part of a compressed cluster is meant.
func (im *Image) partCompressed(s *slice, i int, off, next int64) bool {
	return next-off < im.g.ClusterSize() && im.cell(s, i).entry&entryCompressed != 0
}

// writeZeros writes zeros where there are none. The range is short, or the
// format has no other way.
func (im *Image) writeZeros(off, n int64) error {
	var p Plan
	for end := off + n; off < end; {
		part := min(end-off, zeroStep)
		ext, err := im.appendExtents(nil, off, part, MayBlock)
		if err != nil {
			return err
		}
		if ext[0].Kind == Zero {
			off += ext[0].Length
			continue
		}
		part = min(part, ext[0].Length)
		if err := im.Prepare(&p, off, part, MayBlock); err != nil {
			return err
		}
		for i := range p.Extents {
			e := &p.Extents[i]
			if err := e.File.ZeroAt(e.Offset, e.Length); err != nil {
				im.Abort(&p)
				return err
			}
		}
		im.Commit(&p)
		off += part
	}
	return nil
}

// zeroStep is how many bytes of a long range are planned at once: a plan remembers
// every cluster that is new in it.
const zeroStep = 8 << 20
