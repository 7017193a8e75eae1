package qcow2

import (
	"encoding/binary"
)

// openBitmaps is called before the disk is changed: the bitmaps in the file are
// durably marked as in use afterwards.
func (im *Image) openBitmaps() error {
	bs := &im.bitmaps
	bs.storing.Lock()
	defer bs.storing.Unlock()
	if !bs.closed.Load() {
		return nil
	}
	return im.markOpen()
}

// markOpen marks those of bitmaps.open. The caller holds bitmaps.storing.
func (im *Image) markOpen() error {
	bs := &im.bitmaps
	bs.flag(true)
	bs.unsettled = true
	if err := im.writeDirectory(); err != nil {
		return err
	}
	bs.closed.Store(false)
	return nil
}

// flag marks those of open as in use, or as consistent.
func (bs *bitmaps) flag(inUse bool) {
	for _, b := range bs.open {
		flags := binary.BigEndian.Uint32(bs.raw[b.at+offBitmapFlags:]) &^ bitmapInUse
		if inUse {
			flags |= bitmapInUse
		}
		binary.BigEndian.PutUint32(bs.raw[b.at+offBitmapFlags:], flags)
	}
}

// writeDirectory makes the directory durable, in its place. A crash leaves some
// fields as they were, which is why one write changes either the places of tables
// or their lengths and flags.
func (im *Image) writeDirectory() error {
	if err := im.writeTable(im.bitmaps.raw, im.h.Bitmaps.DirectoryOffset); err != nil {
		return err
	}
	return im.f.Sync()
}

// settleBitmaps puts the bitmaps into the file, while nothing changes the disk:
// the bits and their tables in new clusters and these clusters' refcounts; when
// that is durable, the tables' offsets; when they are, their lengths and that the
// bitmaps are consistent. Until then the directory says that they are in use; a
// table may be longer there than it says, and never shorter. The clusters
// of former tables are dropped when the file does not name them any more.
//
// After an error that is no failed sync it can be called again, whatever was
// changed meanwhile.
//
// Of an image that was marked corrupt they stay in use.
func (im *Image) settleBitmaps() error {
	bs := &im.bitmaps
	bs.storing.Lock()
	defer bs.storing.Unlock()
	if !bs.unsettled || im.broken.Load() {
		return nil
	}
	im.at(StepStoreBitmaps)
	if bs.sizeUnsure {
		if err := im.writeSize(); err != nil {
			return err
		}
	}
	stored, err := im.storeBits()
	if err == nil {
		err = im.Flush()
	}
	if err != nil {
		for _, s := range stored {
			for _, x := range s.clusters {
				im.giveBackMetadata(x)
			}
		}
		return err
	}
	for _, s := range stored {
		bs.gone = append(bs.gone, im.bitmapClusters(s.b)...)
		s.b.TableOffset, s.b.TableEntries, s.b.table = s.offset, int64(len(s.table)), s.table
		binary.BigEndian.PutUint64(bs.raw[s.b.at+offBitmapTable:], uint64(s.offset))
		s.b.changed.Store(false)
	}
	bs.flag(true)
	im.at(StepBitmapTables)
	if err := im.writeDirectory(); err != nil {
		return err
	}
	im.dropped(bs.gone)
	bs.gone = nil
	for _, b := range bs.open {
		binary.BigEndian.PutUint32(bs.raw[b.at+offBitmapEntries:], uint32(b.TableEntries))
	}
	im.at(StepBitmapFlags)
	bs.flag(false)
	// Even if it fails some may be marked as consistent from here on.
	bs.closed.Store(true)
	if err := im.writeDirectory(); err != nil {
		return err
	}
	bs.unsettled, bs.open = false, bs.auto
	return nil
}

// storedBitmap is where a bitmap was written to.
type storedBitmap struct {
	b        *bitmap
	offset   int64 // of its table
	table    []uint64
	clusters []run // all it has taken
}

// storeBits writes what has changed to new clusters, which nothing names yet.
// With an error the last of stored is not whole.
func (im *Image) storeBits() (stored []storedBitmap, err error) {
	for _, b := range im.bitmaps.open {
		if !b.changed.Load() {
			continue
		}
		stored = append(stored, storedBitmap{b: b})
		if err := im.storeOne(&stored[len(stored)-1]); err != nil {
			return stored, err
		}
	}
	return stored, nil
}

func (im *Image) storeOne(s *storedBitmap) error {
	s.table = make([]uint64, s.b.tableEntries(im.g, im.Size()))
	raw := make([]byte, im.g.ClusterSize())
	for i := range s.table {
		var host bool
		if s.table[i], host = im.encodeBits(s.b, int64(i), raw); !host {
			continue
		}
		got, err := im.take(1, MayBlock)
		if err != nil {
			return err
		}
		s.table[i] = uint64(got.first << im.g.ClusterBits)
		if err := im.writeNew(s, raw, got); err != nil {
			return err
		}
	}
	table := make([]byte, 0, 8*len(s.table))
	for _, e := range s.table {
		table = binary.BigEndian.AppendUint64(table, e)
	}
	got, err := im.takeNeighbours(im.g.Clusters(int64(len(table))))
	if err != nil {
		return err
	}
	s.offset = got.first << im.g.ClusterBits
	return im.writeNew(s, table, got)
}

// encodeBits fills raw with the bits that entry i of a bitmap's table is for.
// If they are all clear, or all set, the entry says so without a host cluster.
// Not so if they are set up to the end of the disk and that is inside a word: to
// QEMU the rest of the word is set too, and comes to light when the disk grows.
func (im *Image) encodeBits(b *bitmap, i int64, raw []byte) (entry uint64, host bool) {
	per := im.g.ClusterSize() / 8 // words
	part := b.words[min(i*per, int64(len(b.words))):min((i+1)*per, int64(len(b.words)))]
	some, every := uint64(0), ^uint64(0)
	clear(raw)
	for k, w := range part {
		binary.LittleEndian.PutUint64(raw[8*k:], w)
		some |= w
		every &= w
	}
	switch {
	case some == 0:
		return 0, false
	case every == ^uint64(0):
		return bitmapAllOnes, false
	}
	return 0, true
}

// writeNew writes metadata to clusters that were taken for it.
func (im *Image) writeNew(s *storedBitmap, raw []byte, x run) error {
	x.zero = false
	s.clusters = append(s.clusters, x)
	im.refs.mu.Lock()
	for c := x.first; c < x.first+x.n; c++ {
		im.refs.metadata.add(c)
	}
	im.refs.mu.Unlock()
	return im.writeTable(raw, x.first<<im.g.ClusterBits)
}

// giveBackMetadata is giveBack for what writeNew wrote to.
func (im *Image) giveBackMetadata(x run) {
	im.refs.mu.Lock()
	for c := x.first; c < x.first+x.n; c++ {
		im.refs.metadata.remove(c)
	}
	im.refs.mu.Unlock()
	im.giveBack(x)
}

// bitmapClusters are those of a bitmap's table and bits.
func (im *Image) bitmapClusters(b *bitmap) []hostRange {
	all := []hostRange{{b.TableOffset, im.g.Clusters(8*b.TableEntries) << im.g.ClusterBits}}
	for _, e := range b.table {
		if off := hostOffset(e); off != 0 {
			all = append(all, hostRange{off, im.g.ClusterSize()})
		}
	}
	return all
}

// addBitmaps adds the directory, and the tables and bits of all bitmaps, which
// beginBitmaps has read.
func (im *Image) addBitmaps(add func(string, int, int64, int64) error) error {
	if !im.h.HasBitmaps() {
		return nil
	}
	if err := add("the bitmap directory", 0, im.h.Bitmaps.DirectoryOffset, im.h.Bitmaps.DirectorySize); err != nil {
		return err
	}
	for i, b := range im.bitmaps.all {
		if err := add("the table of bitmap %[1]d", i+1, b.TableOffset, 8*b.TableEntries); err != nil {
			return err
		}
		for _, e := range b.table {
			if off := hostOffset(e); off != 0 {
				if err := add("a part of bitmap %[1]d", i+1, off, im.g.ClusterSize()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
