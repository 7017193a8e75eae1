package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxBitmapMemory is how many bytes of bits all bitmaps of an image take in
// memory at most. Memory of bits that were never set is not touched.
const maxBitmapMemory = 1 << 30

// bitmaps are the persistent dirty bitmaps of an image (section "Bitmaps
// extension"). Which of them a write marks is fixed by Begin.
//
// In the file they are marked as being in use before the first change of the
// disk after Begin or Settle, and stored and marked as consistent by Settle. So
// whoever changes nothing writes nothing of them, and after a crash nobody
// trusts what is older than the disk. Resize does both: see bitmapgrow.go.
type bitmaps struct {
	// closed: they must be marked as in use before the disk is changed.
	closed atomic.Bool
	auto   []*bitmap // those that writes mark; none while the disk grows

	// storing is held while those of open are marked as in use, or stored, and
	// guards what is only about that: their tables, and the following.
	storing sync.Mutex // see cache for the order
	// open are those that are marked and stored with auto: these, and all from
	// when the disk grows until they are stored.
	open []*bitmap
	raw  []byte // the directory as it is to be in the file
	// unsettled: the file may have a directory that is not raw.
	unsettled bool
	gone      []hostRange // of former tables, which the file may still name
	// sizeUnsure: the header may have another size than the disk, which was to
	// become larger, and the write has failed.
	sizeUnsure bool

	// mu is held while they are read, and never during a flush, so that whoever
	// asks for them waits for no transition. A leaf, during I/O.
	mu     sync.Mutex
	read   bool // the directory was
	all    []*bitmap
	memory int64 // bytes of bits
}

// bitmap is one of them.
type bitmap struct {
	BitmapEntry
	table []uint64 // as the directory names it, decoded; nil before it was read
	// words are the bits, the first one lowest; nil before they were read. They
	// are changed and read atomically.
	words []uint64
	// changed: a bit was set since the words were read or stored.
	changed atomic.Bool
}

// HasBitmaps reports whether the image has bitmaps that can be told to fit it.
func (h *Header) HasBitmaps() bool {
	return h.Bitmaps != nil && h.Autoclear&BitmapsConsistent != 0
}

// readDirectory reads the directory, once. The caller holds bitmaps.mu.
func (im *Image) readDirectory() error {
	bs := &im.bitmaps
	if bs.read || !im.h.HasBitmaps() {
		return nil
	}
	entries, raw, err := readBitmaps(im.f, im.h)
	if err != nil {
		return err
	}
	bs.read, bs.raw = true, raw
	for _, e := range entries {
		bs.all = append(bs.all, &bitmap{BitmapEntry: e})
	}
	return nil
}

// trusted reports why the bits of a bitmap cannot be used, nil if they can.
func (im *Image) trusted(b *bitmap) error {
	switch {
	case b.InUse:
		return im.refused(unix.EINVAL, fmt.Sprintf("bitmap %q is inconsistent: the last program that had it was not closed in order; remove it with qemu-img bitmap --remove", b.Name))
	case len(b.Extra) > 0 && !b.ExtraCompatible:
		return im.refused(unix.EOPNOTSUPP, fmt.Sprintf("bitmap %q has data of a kind that is not known; remove it with the program that made it", b.Name))
	}
	return nil
}

// readTable reads and checks the table of a bitmap, once. The caller holds
// bitmaps.mu.
func (im *Image) readTable(b *bitmap) error {
	if b.table != nil {
		return nil
	}
	t, err := readBitmapTable(im.f, &b.BitmapEntry)
	if err != nil {
		return err
	}
	for i, e := range t {
		if im.g.bitmapFault(e) {
			return b.fault(im.f, i, e)
		}
	}
	b.table = t
	return nil
}

// tableEntries is how many entries the table of a bitmap has for a disk of size
// bytes.
func (e *BitmapEntry) tableEntries(g Geometry, size int64) int64 {
	return max(g.Clusters(e.bytes(size)), 1)
}

// sizeFault is the error of a table that is not as long as a disk of size bytes
// wants it, nil if it is.
func (e *BitmapEntry) sizeFault(f File, g Geometry, size int64) error {
	if want := e.tableEntries(g, size); e.TableEntries != want {
		return damaged(f, "bitmap %q: its table has %d entries instead of %d", e.Name, e.TableEntries, want)
	}
	return nil
}

// fault is the error of entry i of its table, which is none.
func (e *BitmapEntry) fault(f File, i int, entry uint64) error {
	return damaged(f, "bitmap %q: entry %d of its table, %#x, is not possible", e.Name, i, entry)
}

// bitmapFault reports whether an entry of a bitmap table is none.
func (g Geometry) bitmapFault(e uint64) bool {
	off := hostOffset(e)
	return e&bitmapTableReserved != 0 || off != 0 && (e&bitmapAllOnes != 0 || g.Within(off) != 0)
}

// readBits reads the bits of a bitmap that can be trusted, once. The caller
// holds bitmaps.mu.
func (im *Image) readBits(b *bitmap) error {
	if b.words != nil {
		return nil
	}
	if err := im.readTable(b); err != nil {
		return err
	}
	if err := b.sizeFault(im.f, im.g, im.Size()); err != nil {
		return err
	}
	words := b.countWords(im.Size())
	if im.bitmaps.memory+8*words > maxBitmapMemory {
		return im.refused(unix.EFBIG, fmt.Sprintf("its bitmaps take more than %d MiB; remove some with qemu-img bitmap --remove", maxBitmapMemory>>20))
	}
	w := make([]uint64, words)
	var raw []byte
	for i, e := range b.table {
		part := w[min(int64(i)<<im.g.ClusterBits/8, words):min(int64(i+1)<<im.g.ClusterBits/8, words)]
		switch off := hostOffset(e); {
		case off != 0:
			if off > im.f.Length()-im.g.ClusterSize() {
				return im.damaged("bitmap %q: entry %d of its table, %#x, lies past the end of the file", b.Name, i, e)
			}
			if raw == nil {
				raw = make([]byte, im.g.ClusterSize())
			}
			if err := im.f.ReadAt(raw, off); err != nil {
				return err
			}
			for k := range part {
				part[k] = binary.LittleEndian.Uint64(raw[8*k:])
			}
		case e&bitmapAllOnes != 0:
			for k := range part {
				part[k] = ^uint64(0)
			}
		}
	}
	// What is past the end of the disk has no meaning.
	if past := b.bits(im.Size()) & 63; past != 0 {
		w[words-1] &= 1<<past - 1
	}
	im.bitmaps.memory += 8 * words
	b.words = w
	return nil
}

// beginBitmaps reads what Begin needs of the bitmaps. It writes nothing.
func (im *Image) beginBitmaps() error {
	bs := &im.bitmaps
	bs.mu.Lock()
	defer bs.mu.Unlock()
	// What was read before may be older than the locks.
	bs.read, bs.raw, bs.all, bs.auto, bs.open, bs.memory = false, nil, nil, nil, nil, 0
	if im.h.Bitmaps != nil && !im.h.HasBitmaps() {
		im.opts.Warn(im.damaged("a program that does not know its bitmaps has changed it, so they are not used any more").Error())
	}
	if err := im.readDirectory(); err != nil {
		return err
	}
	tables := int64(0)
	for _, b := range bs.all {
		if tables += b.TableEntries; tables > maxBitmapTables {
			return im.refused(unix.EFBIG, fmt.Sprintf("the tables of its bitmaps have more than %d entries; remove some with qemu-img bitmap --remove", maxBitmapTables))
		}
		if err := im.readTable(b); err != nil {
			return err
		}
		if !b.Auto || b.InUse {
			continue
		}
		if err := im.trusted(b); err != nil {
			return err
		}
		if err := im.readBits(b); err != nil {
			return err
		}
		bs.auto = append(bs.auto, b)
	}
	bs.open = bs.auto
	bs.closed.Store(len(bs.auto) > 0)
	return nil
}

// maxBitmapTables is how many entries the tables of all bitmaps have at most:
// they are kept in memory while the image is begun.
const maxBitmapTables = 1 << 20

// mark sets the bits of [off, off+n), which is not empty and lies inside the
// disk. It is called before the range changes, by any number of goroutines;
// where the bits are set already nothing is written to memory.
func (bs *bitmaps) mark(off, n int64) {
	for _, b := range bs.auto {
		b.mark(off, n)
	}
}

func (b *bitmap) mark(off, n int64) {
	first, last := off>>b.Granularity, (off+n-1)>>b.Granularity
	for w := first >> 6; w <= last>>6; w++ {
		mask := ^uint64(0)
		if w == first>>6 {
			mask <<= first & 63
		}
		if w == last>>6 {
			mask &= ^uint64(0) >> (63 - last&63)
		}
		if atomic.LoadUint64(&b.words[w])&mask == mask {
			continue
		}
		atomic.OrUint64(&b.words[w], mask)
		if !b.changed.Load() {
			b.changed.Store(true)
		}
	}
}

// BitmapInfo is a persistent dirty bitmap.
type BitmapInfo struct {
	Name         string
	Granularity  int64 // bytes that a bit stands for
	Auto         bool  // it is updated while the image is written
	Inconsistent bool  // it is not to be trusted
	Dirty        int64 // bytes that its set bits stand for; 0 if it is inconsistent
}

// BitmapInfos are the image's bitmaps, in the order of the directory. Of an
// image that is not begun they are what was first read. If the bits of some
// cannot be read they are inconsistent, and the error says why.
func (im *Image) BitmapInfos() (infos []BitmapInfo, err error) {
	bs := &im.bitmaps
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if err := im.readDirectory(); err != nil {
		return nil, err
	}
	for _, b := range bs.all {
		i := BitmapInfo{Name: b.Name, Granularity: 1 << b.Granularity, Auto: b.Auto, Inconsistent: b.InUse}
		if im.trusted(b) == nil {
			if e := im.readBits(b); e != nil {
				i.Inconsistent, err = true, errors.Join(err, e)
			}
			for w := range b.words {
				i.Dirty += int64(bits.OnesCount64(atomic.LoadUint64(&b.words[w]))) << b.Granularity
			}
		}
		infos = append(infos, i)
	}
	return infos, err
}

// DirtyRuns calls yield with the runs of dirty and clean bytes that
// [off, off+n) is made of by the bitmap of that name, in order, neighbours
// differing, until it returns false. The range lies inside Size. It may block.
// The error is ENOENT for no such bitmap, and EINVAL for an inconsistent one.
func (im *Image) DirtyRuns(name string, off, n int64, yield func(n int64, dirty bool) bool) error {
	b, err := im.bitmapOf(name)
	if err != nil {
		return err
	}
	for end := off + n; off < end; {
		next, dirty := b.run(off, end)
		if !yield(next-off, dirty) {
			return nil
		}
		off = next
	}
	return nil
}

// bitmapOf is the bitmap of that name, with its bits.
func (im *Image) bitmapOf(name string) (*bitmap, error) {
	bs := &im.bitmaps
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if err := im.readDirectory(); err != nil {
		return nil, err
	}
	for _, b := range bs.all {
		if b.Name != name {
			continue
		}
		if err := im.trusted(b); err != nil {
			return nil, err
		}
		return b, im.readBits(b)
	}
	return nil, im.missing("bitmap", name)
}

// run is how far from off, up to end, the bits are as off's.
func (b *bitmap) run(off, end int64) (next int64, dirty bool) {
	first, last := off>>b.Granularity, (end-1)>>b.Granularity
	flip := uint64(0) // makes the bits of the run 0
	if dirty = atomic.LoadUint64(&b.words[first>>6])>>(first&63)&1 != 0; dirty {
		flip = ^flip
	}
	above := ^uint64(0) << (first & 63)
	for w := first >> 6; w <= last>>6; w++ {
		if other := (atomic.LoadUint64(&b.words[w]) ^ flip) & above; other != 0 {
			i := w<<6 + int64(bits.TrailingZeros64(other))
			return min(i<<b.Granularity, end), dirty
		}
		above = ^uint64(0)
	}
	return end, dirty
}
