package qcow2

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// step is a part of a write: where a piece of the guest's range goes.
type step struct {
	n      int64
	host   int64 // offset in the data file
	change int   // index of the change that brings the cluster, -1 for none
}

// change is the new entry of a cluster that is being written.
type change struct {
	cluster int64 // of the guest
	slice   *slice
	index   int
	was, is cell
	// new: is names a cluster that was taken, and was does not.
	new     bool
	zero    bool // which reads as zeros
	touched bool // not any more
}

// Prepare plans the write of [off, off+n), which lies inside Size: every
// extent is Data, and the caller puts the bytes there. Then exactly one of
// Commit or Abort follows. Where only whole clusters are written, or nothing
// but zeros shows through and a cluster that reads as zeros is ready, it does
// no I/O; otherwise it needs MayBlock, and copies what is around the write.
func (im *Image) Prepare(p *Plan, off, n int64, mode Mode) error {
	if err := im.change(off, n, mode); err != nil {
		return err
	}
	err := im.prepare(p, off, n, mode)
	if errors.Is(err, unix.ENOSPC) && mode&MayBlock != 0 && im.dropsWait() {
		// What was discarded is free after a flush, unless it is still read.
		if im.Flush() == nil {
			err = im.prepare(p, off, n, mode)
		}
	}
	return err
}

func (im *Image) prepare(p *Plan, off, n int64, mode Mode) error {
	p.reset()
	p.pin = im.pins.enter(unsafe.Pointer(p))
	done, err := im.prepareInPlace(p, off, n, mode)
	if err == nil && !done {
		p.reset()
		err = im.prepareChanges(p, off, n, mode)
	}
	if err != nil {
		im.pins.leave(&p.pin)
		return err
	}
	return nil
}

func (p *Plan) reset() {
	clear(p.changes)
	p.Extents, p.changes, p.steps, p.pieces = p.Extents[:0], p.changes[:0], p.steps[:0], p.pieces[:0]
	p.unsynced = false
}

// prepareInPlace plans a write to clusters that are there and not shared. It
// reports false at the first that is not.
func (im *Image) prepareInPlace(p *Plan, off, n int64, mode Mode) (bool, error) {
	for end := off + n; off < end; {
		s, i, err := im.find(off, mode)
		if s == nil || err != nil {
			return false, err
		}
		c := im.cell(s, i)
		within := im.g.Within(off)
		next := min(end, off-within+im.g.ClusterSize())
		if !im.inPlace(c, within, within+next-off) {
			return false, nil
		}
		if s.unsynced.Load() {
			p.unsynced = true
		}
		if err := im.extend(p, hostOffset(c.entry)+within, next-off); err != nil {
			return false, err
		}
		off = next
	}
	return true, nil
}

// inPlace reports whether bytes from..to of a cluster can be written where
// they are, without a change of its entry.
func (im *Image) inPlace(c cell, from, to int64) bool {
	if c.entry&entryCopied == 0 || !im.g.hasHost(c) {
		return false
	}
	if !im.g.Extended {
		return im.g.kind(c, 0) == data
	}
	first, last := from>>im.subBits, (to-1)>>im.subBits
	mask := uint64(1)<<(last+1) - uint64(1)<<first
	return c.bits&mask == mask
}

// extend adds a piece of the data file to the plan's extents.
func (im *Image) extend(p *Plan, host, n int64) error {
	if host > im.data.Length()-n {
		return im.odd("a cluster at %#x lies past the end of %s, which has %d bytes", host, im.data.Path(), im.data.Length())
	}
	if k := len(p.Extents) - 1; k >= 0 && p.Extents[k].Offset+p.Extents[k].Length == host {
		p.Extents[k].Length += n
		return nil
	}
	p.Extents = append(p.Extents, Extent{Kind: Data, File: im.data, Offset: host, Length: n, Allocated: true})
	return nil
}

// prepareChanges plans a write that changes entries. What it holds of busy
// clusters and slices is in p.changes, for Commit and Abort.
func (im *Image) prepareChanges(p *Plan, off, n int64, mode Mode) (err error) {
	defer func() {
		if err != nil {
			im.undoChanges(p)
		}
	}()
	if mode&MayBlock != 0 {
		if err := im.makeRoom(); err != nil {
			return err
		}
	}
	start, end := off, off+n
	for off < end {
		within := im.g.Within(off)
		next := min(end, off-within+im.g.ClusterSize())
		if err := im.prepareCluster(p, off, next, mode); err != nil {
			return err
		}
		off = next
	}
	// What has to wait is known before clusters are taken, which would be given
	// back.
	for i := range p.changes {
		if err := im.findAround(p, i, start, end, mode); err != nil {
			return err
		}
	}
	if err := im.takeFor(p, mode); err != nil {
		return err
	}
	if err := im.copyPieces(p, mode); err != nil {
		return err
	}
	for _, s := range p.steps {
		host := s.host
		if s.change >= 0 {
			host += hostOffset(p.changes[s.change].is.entry)
		}
		if err := im.extend(p, host, s.n); err != nil {
			return err
		}
	}
	return nil
}

// prepareCluster plans the write of [off, next), which lies in one cluster.
func (im *Image) prepareCluster(p *Plan, off, next int64, mode Mode) error {
	if err := im.ensureTable(off, mode); err != nil {
		return err
	}
	within, to := im.g.Within(off), im.g.Within(next-1)+1
	cluster := off >> im.g.ClusterBits
	s, i, err := im.find(off, mode)
	if err != nil {
		return err
	}
	if c := im.cell(s, i); im.inPlace(c, within, to) {
		p.unsynced = p.unsynced || s.unsynced.Load()
		p.steps = append(p.steps, step{next - off, hostOffset(c.entry) + within, -1})
		return nil
	}
	if !im.busy.enter(cluster, mode&MayBlock != 0) {
		return ErrWait
	}
	if s, i, err = im.holdEntry(off, mode); err != nil {
		im.busy.leave(cluster)
		return err
	}
	was := im.cell(s, i)
	if im.inPlace(was, within, to) {
		im.busy.leave(cluster)
		im.release(s)
		p.unsynced = p.unsynced || s.unsynced.Load()
		p.steps = append(p.steps, step{next - off, hostOffset(was.entry) + within, -1})
		return nil
	}
	c := change{cluster: cluster, slice: s, index: i, was: was}
	switch {
	case im.g.External:
		// The data file has each cluster where the guest has it.
		c.is.entry = uint64(cluster<<im.g.ClusterBits) | entryCopied
	case was.entry&entryCopied != 0 && im.g.hasHost(was):
		c.is.entry = was.entry &^ entryZero
	default:
		c.new = true
	}
	c.is.bits = im.bitsAfter(was, within, to)
	p.steps = append(p.steps, step{next - off, within, len(p.changes)})
	p.changes = append(p.changes, c)
	return nil
}

// bitsAfter is the second word of a cell when bytes from..to were written, and
// what a new cluster needs was copied.
func (im *Image) bitsAfter(was cell, from, to int64) uint64 {
	if !im.g.Extended {
		return 0
	}
	bits := was.bits
	if was.entry&entryCompressed != 0 {
		bits = allAllocated
	}
	for sub := from >> im.subBits; sub <= (to-1)>>im.subBits; sub++ {
		bits = bits&^(1<<(32+sub)) | 1<<sub
	}
	return bits
}

// takeFor takes the clusters that the changes need, neighbours where it can.
func (im *Image) takeFor(p *Plan, mode Mode) error {
	for i := 0; i < len(p.changes); {
		if !p.changes[i].new {
			i++
			continue
		}
		n := int64(1)
		for i+int(n) < len(p.changes) && p.changes[i+int(n)].new {
			n++
		}
		got, err := im.take(n, mode)
		if err != nil {
			return err
		}
		for k := range got.n {
			c := &p.changes[i]
			c.is.entry = uint64((got.first+k)<<im.g.ClusterBits) | entryCopied
			c.zero = got.zero
			i++
		}
	}
	return nil
}

// Commit publishes the mapping, when all bytes are in place. It does no I/O and
// cannot fail. durable says that the mapping was in the file already: the bytes
// need only be synced.
func (im *Image) Commit(p *Plan) (durable bool) {
	durable = !p.unsynced && len(p.changes) == 0
	for i := range p.changes {
		c := &p.changes[i]
		im.setCell(c.slice, c.index, c.is)
		if c.new {
			im.dropCell(c.was)
		}
		im.busy.leave(c.cluster)
		im.release(c.slice)
	}
	im.pins.leave(&p.pin)
	return durable
}

// Abort publishes nothing and gives back what Prepare took.
func (im *Image) Abort(p *Plan) {
	for i := range p.changes {
		p.changes[i].touched = true
	}
	im.undoChanges(p)
	im.pins.leave(&p.pin)
}

func (im *Image) undoChanges(p *Plan) {
	for i := range p.changes {
		c := &p.changes[i]
		if c.new && c.is.entry != 0 {
			im.giveBack(run{hostOffset(c.is.entry) >> im.g.ClusterBits, 1, c.zero && !c.touched})
		}
		im.busy.leave(c.cluster)
		im.release(c.slice)
	}
	p.reset()
}

// change is called before a range of the disk changes. It refuses that, or
// sees to it that bitmaps tell of it.
func (im *Image) change(off, n int64, mode Mode) error {
	if err := im.writable(); err != nil {
		return err
	}
	bs := &im.bitmaps
	if len(bs.auto) == 0 {
		return nil
	}
	if bs.closed.Load() {
		if mode&MayBlock == 0 {
			return ErrWait
		}
		if err := im.openBitmaps(); err != nil {
			return err
		}
	}
	if n > 0 {
		bs.mark(off, n)
	}
	return nil
}

// writable refuses changes of an image that is not begun, or is damaged.
func (im *Image) writable() error {
	switch {
	case im.closed.Load():
		return im.lost()
	case !im.begun.Load():
		return im.refused(unix.EPERM, "it is not open for writing")
	case im.broken.Load():
		return im.refused(unix.EIO, "it is marked corrupt and takes no more writes; look at it with nbd-export check")
	}
	return nil
}
