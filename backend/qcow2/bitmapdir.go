package qcow2

import "encoding/binary"

// BitmapEntry is an entry of the bitmap directory (section "Bitmap directory").
type BitmapEntry struct {
	Name            string
	InUse           bool // it was not stored since it was last changed: not to be trusted
	Auto            bool // it is to be updated while the image is written
	ExtraCompatible bool // who does not know the extra data may use the bitmap
	Granularity     int  // bits: a bit stands for 1<<Granularity bytes
	TableOffset     int64
	TableEntries    int64
	Extra           []byte

	at int64 // of the entry in the directory, bytes
}

// Offsets in an entry of fields that are written on their own. Entries lie at
// multiples of 8 bytes, so that neither the first field nor the other two
// together can be torn between sectors.
const (
	offBitmapTable   = 0
	offBitmapEntries = 8
	offBitmapFlags   = 12
)

// What QEMU takes at most (block/qcow2-bitmap.c), and so do we.
const (
	maxBitmaps         = 65535
	maxBitmapDirectory = 65535 * 1024 // bytes
	maxBitmapTable     = 0x8000000    // entries
	maxBitmapBytes     = 512 << 20    // bytes of the clusters of one bitmap
	maxBitmapName      = 1023
	minGranularity     = 9
	maxGranularity     = 31

	bitmapInUse           = 1 << 0
	bitmapAuto            = 1 << 1
	bitmapExtraCompatible = 1 << 2
	bitmapReserved        = ^uint32(bitmapInUse | bitmapAuto | bitmapExtraCompatible)
	bitmapDirtyTracking   = 1 // type

	// An entry of a bitmap table: a host offset, or without one whether all
	// bits are set.
	bitmapAllOnes       = 1 << 0
	bitmapTableReserved = 0xff000000000001fe
)

// Bitmaps reads the bitmap directory. It does not look at the autoclear bit
// that says whether it can be trusted.
func Bitmaps(f File, h *Header) ([]BitmapEntry, error) {
	all, _, err := readBitmaps(f, h)
	return all, err
}

// readBitmaps also returns the directory as it stands in the file.
func readBitmaps(f File, h *Header) (all []BitmapEntry, raw []byte, err error) {
	x := h.Bitmaps
	if x == nil {
		return nil, nil, nil
	}
	bad := func(format string, args ...any) ([]BitmapEntry, []byte, error) {
		return nil, nil, damaged(f, "bitmap directory: "+format, args...)
	}
	g := h.Geometry()
	switch {
	case x.Count == 0 || x.Count > maxBitmaps:
		return bad("%d bitmaps are not possible", x.Count)
	case x.DirectorySize <= 0 || x.DirectorySize > maxBitmapDirectory || !g.tableOK(x.DirectoryOffset) ||
		x.DirectoryOffset > f.Length()-x.DirectorySize:
		return bad("%d bytes at %#x are not possible", x.DirectorySize, uint64(x.DirectoryOffset))
	}
	raw = make([]byte, x.DirectorySize)
	if err := f.ReadAt(raw, x.DirectoryOffset); err != nil {
		return nil, nil, err
	}
	b, be := raw, binary.BigEndian
	names := make(map[string]bool)
	for len(b) > 0 {
		const fixed = 24
		if len(all) == x.Count || len(b) < fixed {
			return bad("it does not end after %d bitmaps", x.Count)
		}
		flags, typ, granularity := be.Uint32(b[12:]), b[16], int(b[17])
		name, extra := int64(be.Uint16(b[18:])), int64(be.Uint32(b[20:]))
		n := (fixed + extra + name + 7) &^ 7
		e := BitmapEntry{
			TableOffset:     int64(be.Uint64(b)),
			TableEntries:    int64(be.Uint32(b[8:])),
			InUse:           flags&bitmapInUse != 0,
			Auto:            flags&bitmapAuto != 0,
			ExtraCompatible: flags&bitmapExtraCompatible != 0,
			Granularity:     granularity,
			at:              int64(len(raw) - len(b)),
		}
		switch {
		case n > int64(len(b)):
			return bad("bitmap %d is cut off", len(all))
		case flags&bitmapReserved != 0 || typ != bitmapDirtyTracking:
			return bad("bitmap %d has flags %#x and type %d, which are not known", len(all), flags, typ)
		case granularity < minGranularity || granularity > maxGranularity:
			return bad("bitmap %d has a granularity of 2^%d bytes", len(all), granularity)
		case name == 0 || name > maxBitmapName:
			return bad("bitmap %d has a name of %d bytes", len(all), name)
		case e.TableEntries == 0 || e.TableEntries > maxBitmapTable || !g.tableOK(e.TableOffset) ||
			e.TableOffset > f.Length()-8*e.TableEntries:
			return bad("the table of bitmap %d, %d entries at %#x, is not possible", len(all), e.TableEntries, uint64(e.TableOffset))
		}
		if size := e.TableEntries << g.ClusterBits; size > maxBitmapBytes || !e.InUse && size < e.bytes(h.Size) {
			return bad("bitmap %d, of %d bytes, does not fit the disk", len(all), size)
		}
		e.Extra = append([]byte(nil), b[fixed:fixed+extra]...)
		e.Name = string(b[fixed+extra:][:name])
		if names[e.Name] {
			return bad("there are two bitmaps %q", e.Name)
		}
		names[e.Name] = true
		all = append(all, e)
		b = b[n:]
	}
	if len(all) != x.Count {
		return bad("it has %d bitmaps instead of %d", len(all), x.Count)
	}
	return all, raw, nil
}

// bytes is how many bytes of bits the bitmap of a disk of size bytes has.
func (e *BitmapEntry) bytes(size int64) int64 { return (e.bits(size) + 7) >> 3 }

// countWords is how many words of 64 bits these are.
func (e *BitmapEntry) countWords(size int64) int64 { return (e.bytes(size) + 7) >> 3 }

// bits is how many bits it has.
func (e *BitmapEntry) bits(size int64) int64 {
	return size>>e.Granularity + min(1, size&(1<<e.Granularity-1))
}

// readBitmapTable reads the table of a bitmap, decoded.
func readBitmapTable(f File, e *BitmapEntry) ([]uint64, error) {
	t := make([]uint64, e.TableEntries)
	return t, readWords(f, t, e.TableOffset)
}
