package qcow2

import (
	"encoding/binary"
	"fmt"
)

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
}

// What QEMU takes at most (block/qcow2-bitmap.c), and so do we.
const (
	maxBitmaps         = 65535
	maxBitmapDirectory = 65535 * 1024 // bytes
	maxBitmapTable     = 0x8000000    // entries
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
	x := h.Bitmaps
	if x == nil {
		return nil, nil
	}
	damaged := func(format string, args ...any) error {
		return &FormatError{Path: f.Path(), What: "bitmap directory: " + fmt.Sprintf(format, args...)}
	}
	g := h.Geometry()
	switch {
	case x.Count == 0 || x.Count > maxBitmaps:
		return nil, damaged("%d bitmaps are not possible", x.Count)
	case x.DirectorySize <= 0 || x.DirectorySize > maxBitmapDirectory || !g.tableOK(x.DirectoryOffset) ||
		x.DirectoryOffset > f.Length()-x.DirectorySize:
		return nil, damaged("%d bytes at %#x are not possible", x.DirectorySize, uint64(x.DirectoryOffset))
	}
	b := make([]byte, x.DirectorySize)
	if err := f.ReadAt(b, x.DirectoryOffset); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	var all []BitmapEntry
	names := make(map[string]bool)
	for len(b) > 0 {
		const fixed = 24
		if len(all) == x.Count || len(b) < fixed {
			return nil, damaged("it does not end after %d bitmaps", x.Count)
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
		}
		switch {
		case n > int64(len(b)):
			return nil, damaged("bitmap %d is cut off", len(all))
		case flags&bitmapReserved != 0 || typ != bitmapDirtyTracking:
			return nil, damaged("bitmap %d has flags %#x and type %d, which are not known", len(all), flags, typ)
		case granularity < minGranularity || granularity > maxGranularity:
			return nil, damaged("bitmap %d has a granularity of 2^%d bytes", len(all), granularity)
		case name == 0 || name > maxBitmapName:
			return nil, damaged("bitmap %d has a name of %d bytes", len(all), name)
		case e.TableEntries == 0 || e.TableEntries > maxBitmapTable || !g.tableOK(e.TableOffset) ||
			e.TableOffset > f.Length()-8*e.TableEntries:
			return nil, damaged("the table of bitmap %d, %d entries at %#x, is not possible", len(all), e.TableEntries, uint64(e.TableOffset))
		}
		e.Extra = append([]byte(nil), b[fixed:fixed+extra]...)
		e.Name = string(b[fixed+extra:][:name])
		if names[e.Name] {
			return nil, damaged("there are two bitmaps %q", e.Name)
		}
		names[e.Name] = true
		all = append(all, e)
		b = b[n:]
	}
	if len(all) != x.Count {
		return nil, damaged("it has %d bitmaps instead of %d", len(all), x.Count)
	}
	return all, nil
}

// readBitmapTable reads the table of a bitmap, decoded.
func readBitmapTable(f File, e *BitmapEntry) ([]uint64, error) {
	raw := make([]byte, 8*e.TableEntries)
	if err := f.ReadAt(raw, e.TableOffset); err != nil {
		return nil, err
	}
	t := make([]uint64, e.TableEntries)
	for i := range t {
		t[i] = binary.BigEndian.Uint64(raw[8*i:])
	}
	return t, nil
}
