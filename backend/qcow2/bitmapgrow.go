package qcow2

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// A disk that becomes larger takes its bitmaps along; what is new is clean, as in
// QEMU. Tables that fit the larger disk are another length, and one that does not
// fit the disk is possible only for a bitmap that is in use. So all are marked as
// in use before the header names the new size (openAllBitmaps), and stored
// afterwards; a crash in between makes all inconsistent.

// canGrowBitmaps reads the bits of all bitmaps, and reports what keeps these from
// a disk of size bytes. It writes nothing.
func (im *Image) canGrowBitmaps(size int64) error {
	bs := &im.bitmaps
	bs.mu.Lock()
	defer bs.mu.Unlock()
	memory, tables := int64(0), int64(0)
	for _, b := range bs.all {
		if err := im.trusted(b); err != nil {
			return err
		}
		if err := im.readBits(b); err != nil {
			return err
		}
		entries := b.tableEntries(im.g, size)
		if entries<<im.g.ClusterBits > maxBitmapBytes {
			return im.refused(unix.EFBIG, fmt.Sprintf("bitmap %q cannot have a bit for every %d bytes of a disk that large; remove it with qemu-img bitmap --remove", b.Name, int64(1)<<b.Granularity))
		}
		memory += 8 * b.countWords(size)
		tables += entries
	}
	if memory > maxBitmapMemory || tables > maxBitmapTables {
		return im.refused(unix.EFBIG, "its bitmaps cannot be that large together; remove some with qemu-img bitmap --remove")
	}
	return nil
}

// openAllBitmaps has all bitmaps durably marked as in use afterwards.
func (im *Image) openAllBitmaps() error {
	bs := &im.bitmaps
	bs.storing.Lock()
	defer bs.storing.Unlock()
	if len(bs.all) == 0 {
		return nil
	}
	bs.open = bs.all
	return im.markOpen()
}

// growBitmaps makes their bits reach to the size that the disk has now. Nothing
// marks them meanwhile.
func (im *Image) growBitmaps() {
	bs := &im.bitmaps
	bs.mu.Lock()
	defer bs.mu.Unlock()
	for _, b := range bs.all {
		words := make([]uint64, b.countWords(im.Size()))
		bs.memory += 8 * int64(len(words)-len(b.words))
		copy(words, b.words)
		b.words = words
		b.changed.Store(true)
	}
}
