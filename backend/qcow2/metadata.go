package qcow2

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// refused is an error about the image.
func (im *Image) refused(errno unix.Errno, what string) error {
	return fmt.Errorf("qcow2 image %s: %s: %w", im.f.Path(), what, errno)
}

// missingError says that an image has no snapshot, or bitmap, of a name. It is an
// ENOENT, whose text is of files.
type missingError struct{ path, kind, name string }

func (im *Image) missing(kind, name string) error { return &missingError{im.f.Path(), kind, name} }

func (e *missingError) Error() string {
	return fmt.Sprintf("qcow2 image %s: it has no %s %q; nbd-export info lists those it has", e.path, e.kind, e.name)
}

func (e *missingError) Unwrap() error { return unix.ENOENT }

// damaged is the error of metadata that cannot be right.
func (im *Image) damaged(format string, args ...any) error {
	return damaged(im.f, format, args...)
}

// odd is damaged, and once the image is begun it is marked corrupt, which ends
// writing: before, the metadata may be about to be changed by its owner.
func (im *Image) odd(format string, args ...any) error {
	err := im.damaged(format, args...)
	if im.begun.Load() {
		im.markCorrupt(err)
	}
	return err
}

// markCorrupt refuses changes from now on, here and by whoever opens the
// image.
func (im *Image) markCorrupt(why error) {
	if im.broken.Swap(true) {
		return
	}
	im.opts.Warn(why.Error() + "; it is marked corrupt, and takes no more writes")
	if im.h.Version < 3 {
		return
	}
	im.headerMu.Lock()
	defer im.headerMu.Unlock()
	im.h.Incompatible |= Corrupt
	err := im.f.WriteAt(be64(im.h.Incompatible), offIncompatible, false)
	if err == nil {
		err = im.f.Sync()
	}
	if err != nil {
		im.opts.Warn(fmt.Sprintf("qcow2 image %s cannot be marked corrupt: %v", im.f.Path(), err))
	}
}

// badCell finds the first cell of a slice that cannot be right, and says what
// is wrong with it, "" for nothing.
func (im *Image) badCell(s *slice) (int, string) {
	im.refs.mu.Lock()
	defer im.refs.mu.Unlock()
	width := int(im.g.EntrySize() / 8)
	key, tables := int64(-1), uint64(0) // the set's last word: entries are mostly neighbours
	for i := range len(s.words) / width {
		c := cell{entry: s.words[i*width]}
		if im.g.Extended {
			c.bits = s.words[i*width+1]
		}
		if what := im.g.fault(c); what != "" {
			return i, what
		}
		off, n := hostOffset(c.entry), int64(1)
		switch {
		case c.entry&entryCompressed != 0:
			off, n = im.g.compressed(c.entry)
		case !im.g.hasHost(c):
			continue
		case im.g.External:
			// Elsewhere is the place of another of the guest's clusters.
			if at := s.guestOffset(im, i); off != at {
				return i, fmt.Sprintf("its place in the data file is %#x, and that of the guest's cluster is %#x", off, at)
			}
			continue
		}
		for host := off >> im.g.ClusterBits; host <= (off+n-1)>>im.g.ClusterBits; host++ {
			if host>>6 != key {
				key, tables = host>>6, im.refs.metadata[host>>6]
			}
			if tables>>(host&63)&1 != 0 {
				return i, fmt.Sprintf("its host cluster at %#x is one of metadata", host<<im.g.ClusterBits)
			}
		}
	}
	return 0, ""
}

// writeTable writes metadata. What is written must lie in clusters that are
// known to be of metadata, or a damaged table would make it overwrite a
// guest's bytes.
func (im *Image) writeTable(raw []byte, off int64) error {
	im.refs.mu.Lock()
	for c := off >> im.g.ClusterBits; c <= (off+int64(len(raw))-1)>>im.g.ClusterBits; c++ {
		if !im.refs.metadata.has(c) {
			im.refs.mu.Unlock()
			return im.odd("metadata would be written to the host cluster at %#x, which is none of it", c<<im.g.ClusterBits)
		}
	}
	im.refs.mu.Unlock()
	return im.f.WriteAt(raw, off, false)
}

// maxMetadata is how many words the set of clusters that metadata is in has at
// most: more than tables and bitmaps can need. The L1 tables of snapshots could be
// as long as the file, which may be sparse.
const maxMetadata = 250 << 20 / 40

// findMetadata fills the set of clusters that metadata is in, which may not
// overlap.
func (im *Image) findMetadata() error {
	set := make(clusterSet)
	length := im.f.Length()
	// There may be millions of them, so what is not needed is not formatted.
	add := func(what string, number int, off, n int64) error {
		if n <= 0 {
			return nil
		}
		if !im.g.tableOK(off) && off != 0 || off > length-n {
			return im.damaged(what+" at %#[2]x is not where one can be", number, off)
		}
		first, last := off>>im.g.ClusterBits, (off+n-1)>>im.g.ClusterBits
		if int64(len(set))+last>>6-first>>6 >= maxMetadata {
			return im.refused(unix.EFBIG, "to keep track of its tables takes too much memory, that of snapshots before all; qemu-img convert makes an image without these")
		}
		if !set.addRange(first, last) {
			return im.damaged(what+" at %#[2]x overlaps with other metadata", number, off)
		}
		return nil
	}
	if err := add("the header", 0, 0, im.g.ClusterSize()); err != nil {
		return err
	}
	if err := add("the L1 table", 0, im.h.L1Offset, 8*int64(im.h.L1Entries)); err != nil {
		return err
	}
	if err := add("the refcount table", 0, im.h.RefcountOffset, im.h.RefcountLength<<im.g.ClusterBits); err != nil {
		return err
	}
	for i, e := range im.refs.table {
		if e == 0 {
			continue
		}
		if e&0x1ff != 0 {
			return im.damaged("entry %d of the refcount table, %#x, has reserved bits", i, e)
		}
		if err := add("refcount block %[1]d", i, int64(e), im.g.ClusterSize()); err != nil {
			return err
		}
	}
	for i, e := range im.l1 {
		if e == 0 {
			continue
		}
		if e&l1Reserved != 0 {
			return im.damaged("entry %d of the L1 table, %#x, has reserved bits", i, e)
		}
		if err := add("L2 table %[1]d", i, hostOffset(e), im.g.ClusterSize()); err != nil {
			return err
		}
	}
	if err := im.addSnapshots(add); err != nil {
		return err
	}
	if err := im.addBitmaps(add); err != nil {
		return err
	}
	im.refs.mu.Lock()
	im.refs.metadata = set
	im.refs.mu.Unlock()
	return nil
}

// addSnapshots adds the snapshot table and the L1 tables of snapshots. Their
// L2 tables are not known: most are also those of the active image.
func (im *Image) addSnapshots(add func(string, int, int64, int64) error) error {
	all, n, err := readSnapshots(im.f, im.h)
	if err != nil {
		return err
	}
	if err := add("the snapshot table", 0, im.h.SnapshotsOffset, n); err != nil {
		return err
	}
	for i := range all {
		if err := add("the L1 table of snapshot %[1]d", i+1, all[i].L1Offset, 8*int64(all[i].L1Entries)); err != nil {
			return err
		}
	}
	return nil
}
