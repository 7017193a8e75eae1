package qcow2

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Resize makes the disk larger; what is new reads as zeros and is clean in its
// bitmaps. Nothing else may run meanwhile but BitmapInfos. After an error the disk
// is what it was.
func (im *Image) Resize(size int64) error {
	if err := im.writable(); err != nil {
		return err
	}
	old := im.Size()
	switch {
	case size == old:
		return nil
	case size < old:
		return fmt.Errorf("qcow2 image %s cannot be made smaller while it is in use, use qemu-img resize --shrink: %w", im.f.Path(), unix.EOPNOTSUPP)
	case size%512 != 0:
		return fmt.Errorf("qcow2 image %s: a size of %d bytes is no multiple of 512: %w", im.f.Path(), size, unix.EINVAL)
	case im.h.Snapshots > 0 && im.h.Version < 3:
		return fmt.Errorf("qcow2 image %s of version 2 has internal snapshots, which do not record their size: %w", im.f.Path(), unix.EOPNOTSUPP)
	}
	if err := im.canGrowBitmaps(size); err != nil {
		return err
	}
	im.stopTimer()
	defer im.allowTimer()
	if err := im.Flush(); err != nil {
		return err
	}
	if need := im.g.L1Needed(size); need > int64(im.h.L1Entries) {
		if err := im.growL1(need); err != nil {
			return err
		}
	}
	if err := im.growData(old, size); err != nil {
		return err
	}
	if err := im.openAllBitmaps(); err != nil {
		return err
	}
	if err := im.enlarge(old, size); err != nil {
		return err
	}
	im.growBitmaps()
	if err := im.settleBitmaps(); err != nil {
		// They are whole in memory, and stored with the next Settle.
		im.opts.Warn(err.Error())
	}
	return nil
}

// growData makes a data file reach to the end of the larger disk, and read as that
// does if it has to.
func (im *Image) growData(old, size int64) error {
	if !im.g.External {
		return nil
	}
	if n := min(im.data.Length(), size) - old; n > 0 && im.h.Autoclear&DataFileRaw != 0 {
		if err := im.data.ZeroAt(old, n); err != nil {
			return err
		}
	}
	if im.data.Length() < size {
		return im.data.Resize(size)
	}
	return nil
}

// enlarge gives the disk its new size, for which there is room in the tables.
func (im *Image) enlarge(old, size int64) error {
	auto := im.bitmaps.auto
	im.bitmaps.auto = nil
	defer func() { im.bitmaps.auto = auto }()
	im.h.Size = size
	// What is behind the image must not come to light, nor what the rest of the
	// last cluster may hold.
	hidden := min(size, im.g.Clusters(old)<<im.g.ClusterBits)
	if b := im.opts.Backing; b != nil {
		hidden = max(hidden, min(b.Size(), size))
	}
	var err error
	if im.h.Autoclear&DataFileRaw != 0 {
		err = im.mapData(old, size)
	} else {
		err = im.Zero(old, hidden-old, false)
	}
	if err == nil {
		err = im.Flush()
	}
	if err != nil {
		im.h.Size = old
		return err
	}
	if err = im.writeSize(); err == nil {
		err = im.f.Sync()
	}
	if err != nil {
		im.h.Size = old
	}
	return err
}

// mapData has the disk show what the data file has from..to, which are zeros, and
// what anybody writes to it there, as in a new image.
func (im *Image) mapData(from, to int64) error {
	var p Plan
	for from < to {
		n := min(to-from, zeroStep)
		if err := im.Prepare(&p, from, n, MayBlock); err != nil {
			return err
		}
		im.Commit(&p)
		from += n
	}
	return nil
}

// writeSize makes the header name the disk's size.
func (im *Image) writeSize() error {
	im.bitmaps.sizeUnsure = true
	if err := im.f.WriteAt(be64(uint64(im.h.Size)), offSize, false); err != nil {
		return err
	}
	im.bitmaps.sizeUnsure = false
	return nil
}

// growL1 makes a larger L1 table in a new place.
func (im *Image) growL1(need int64) error {
	if 8*need > maxL1Size {
		return fmt.Errorf("qcow2 image %s cannot become that large with clusters of %d bytes: %w", im.f.Path(), im.g.ClusterSize(), unix.EFBIG)
	}
	clusters := im.g.Clusters(8 * need)
	got, err := im.takeNeighbours(clusters)
	if err != nil {
		return err
	}
	host, named := got.first<<im.g.ClusterBits, false
	defer func() {
		if !named {
			im.refs.mu.Lock()
			for c := range clusters {
				im.refs.metadata.remove(got.first + c)
			}
			im.refs.mu.Unlock()
			im.giveBack(run{got.first, clusters, false})
		}
	}()
	entries := clusters << im.g.ClusterBits / 8
	raw := make([]byte, 0, 8*entries)
	for _, e := range im.l1 {
		raw = binary.BigEndian.AppendUint64(raw, e)
	}
	raw = raw[:8*entries]
	im.refs.mu.Lock()
	for c := range clusters {
		im.refs.metadata.add(got.first + c)
	}
	im.refs.mu.Unlock()
	if err := im.writeTable(raw, host); err != nil {
		return err
	}
	// The refcounts of the new table first.
	if err := im.Flush(); err != nil {
		return err
	}
	named = true
	if err := im.nameL1(int(entries), host); err != nil {
		im.l1Unsure = append(im.l1Unsure, hostRange{host, clusters << im.g.ClusterBits})
		return err
	}
	im.drop(hostRange{im.h.L1Offset, im.g.Clusters(8*int64(im.h.L1Entries)) << im.g.ClusterBits})
	im.h.L1Entries, im.h.L1Offset = int(entries), host
	l1, dirs := make([]uint64, entries), make([]atomic.Pointer[table], entries)
	copy(l1, im.l1)
	for i := range im.dirs {
		dirs[i].Store(im.dirs[i].Load())
	}
	im.l1, im.dirs = l1, dirs
	return nil
}

// nameL1 has the header durably name an L1 table. Both fields are in one sector.
func (im *Image) nameL1(entries int, off int64) error {
	field := binary.BigEndian.AppendUint32(nil, uint32(entries))
	field = binary.BigEndian.AppendUint64(field, uint64(off))
	if err := im.f.WriteAt(field, offL1Size, false); err != nil {
		return err
	}
	return im.f.Sync()
}

// sureOfL1 is called before L1 entries are written: the header names the table
// they are in afterwards.
func (im *Image) sureOfL1() error {
	if len(im.l1Unsure) == 0 {
		return nil
	}
	if err := im.nameL1(im.h.L1Entries, im.h.L1Offset); err != nil {
		return err
	}
	im.dropped(im.l1Unsure)
	im.l1Unsure = nil
	return nil
}

// takeNeighbours takes n clusters that lie side by side. Nobody else takes any
// meanwhile.
func (im *Image) takeNeighbours(n int64) (run, error) {
	// Where the file has become longer before, every refcount block lies among the
	// clusters that it counts.
	if n >= im.g.refcountsPerBlock() && !im.alloc.fixed {
		if err := im.growTogether(n); err != nil {
			return run{}, err
		}
	}
	var got run
	for try := 0; ; try++ {
		more, err := im.take(n-got.n, MayBlock)
		if err != nil {
			im.giveBack(got)
			return run{}, err
		}
		if more.first == got.first+got.n {
			got.n += more.n
			got.zero = got.zero && more.zero
		} else {
			// What is ready is in pieces; the end of the file is not.
			defer im.giveBack(got)
			got = more
		}
		if got.n == n {
			return got, nil
		}
		if try == 1<<16 || im.alloc.fixed && try == 1<<10 {
			im.giveBack(got)
			return run{}, fmt.Errorf("qcow2 image %s has no %d free clusters side by side: %w", im.f.Path(), n, unix.ENOSPC)
		}
	}
}

func (im *Image) growTogether(n int64) error {
	im.alloc.filling.Lock()
	defer im.alloc.filling.Unlock()
	return im.grow(n, true)
}
