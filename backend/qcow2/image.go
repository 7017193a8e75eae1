package qcow2

import (
	"encoding/binary"
)

// Options of an Image.
type Options struct {
	// Data is the external data file, nil if the guest's clusters are in the
	// image itself.
	Data File
	// Backing shows through what the image has not, nil for zeros.
	Backing Backing
	// L2Cache is how many bytes of L2 tables are kept in memory, 0 for
	// DefaultL2Cache.
	L2Cache int64
	// KeepSpace: what is discarded keeps its space on the host.
	KeepSpace bool
	// Warn gets a line about what the user should know; nil drops them. It may
	// be called by any goroutine.
	Warn func(string)
}

// DefaultL2Cache in bytes: it maps 256 GiB with clusters of 64 KiB.
const DefaultL2Cache = 32 << 20

// Image is an open qcow2 image.
type Image struct {
	f    File
	h    *Header
	g    Geometry
	opts Options
	l1   []uint64
}

// New makes an Image for reading from a file and its header. It writes
// nothing, and does not own the files.
func New(f File, h *Header, o Options) (*Image, error) {
	if o.L2Cache == 0 {
		o.L2Cache = DefaultL2Cache
	}
	if o.Warn == nil {
		o.Warn = func(string) {}
	}
	im := &Image{f: f, h: h, g: h.Geometry(), opts: o}
	raw := make([]byte, 8*h.L1Entries)
	if err := f.ReadAt(raw, h.L1Offset); err != nil {
		return nil, err
	}
	im.l1 = make([]uint64, h.L1Entries)
	for i := range im.l1 {
		im.l1[i] = binary.BigEndian.Uint64(raw[8*i:])
	}
	return im, nil
}

// Size of the guest's disk in bytes.
func (im *Image) Size() int64 { return im.h.Size }
