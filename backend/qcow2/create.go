package qcow2

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"
)

// CreateOptions describe an image to be made. Zero values are QEMU's defaults.
type CreateOptions struct {
	Size         int64 // of the disk, bytes; rounded up to sectors of 512, which QEMU counts in
	Version      int   // 2 or 3; 0 is 3
	ClusterSize  int64 // bytes, a power of two from 512 to 2 MiB; 0 is 64 KiB
	RefcountBits int   // a power of two from 1 to 64; 0 is 16

	LazyRefcounts, ExtendedL2 bool
	CompressionType           uint8

	// Backing is recorded as it stands, with its format.
	Backing, BackingFormat string
	// DataFile is the recorded name of an external data file, which DataFileRaw
	// keeps readable as a raw image.
	DataFile    string
	DataFileRaw bool

	Preallocation Preallocation
}

// Preallocation says what a new disk has of what its bytes will need.
type Preallocation uint8

const (
	// PreallocateNothing: with DataFileRaw the tables are made all the same.
	PreallocateNothing Preallocation = iota
	// PreallocateMetadata: every cluster has its place.
	PreallocateMetadata
	// PreallocateSpace: and its space on the host, as far as that can tell.
	PreallocateSpace
	// PreallocateWritten: and was written, with zeros.
	PreallocateWritten
)

// NewFile is a file in which an image is made.
type NewFile interface {
	File
	// Preallocate takes the space of a range, which reads as zeros before and
	// afterwards; with write by writing it. EOPNOTSUPP, wrapped, says that this
	// works by writing only.
	Preallocate(off, n int64, write bool) error
}

// OptionError says what cannot be in CreateOptions. Option is its name in
// qemu-img's -o, or "size".
type OptionError struct{ Option, What string }

func (e *OptionError) Error() string { return e.Option + ": " + e.What }

// Unwrap is EINVAL.
func (e *OptionError) Unwrap() error { return unix.EINVAL }

const sector = 512

// blueprint is where everything of a new image goes; offsets and lengths are in
// clusters.
type blueprint struct {
	h             *Header
	g             Geometry
	table, blocks int64 // of refcounts
	l1, l1Length  int64
	l2, l2Tables  int64
	data, total   int64  // guest clusters, in order, from data on; to total
	first         []byte // the header as it will be
}

// plan checks o and lays the image out.
func (o CreateOptions) plan() (*blueprint, error) {
	h, err := o.newHeader()
	if err != nil {
		return nil, err
	}
	return o.layOut(h)
}

func refuseOption(option, format string, args ...any) error {
	return &OptionError{option, fmt.Sprintf(format, args...)}
}

// newHeader checks what goes together, and makes a header of it that lacks the
// places of tables.
func (o CreateOptions) newHeader() (*Header, error) {
	h := &Header{Version: cmp.Or(o.Version, 3), Length: headerLength3 + 8, CompressionType: o.CompressionType}
	cluster, width := cmp.Or(o.ClusterSize, 64<<10), cmp.Or(o.RefcountBits, 16)
	var err error
	switch {
	case h.Version != 2 && h.Version != 3:
		err = refuseOption("compat", "version %d is not known; 2 (0.10) and 3 (1.1) are", o.Version)
	case cluster < 1<<minClusterBits || cluster > 1<<maxClusterBits || cluster&(cluster-1) != 0:
		err = refuseOption("cluster_size", "%d is not a power of two from 512 to 2M", cluster)
	case width < 1 || width > 64 || width&(width-1) != 0:
		err = refuseOption("refcount_bits", "%d is not a power of two from 1 to 64", width)
	case h.Version == 2 && width != 16:
		err = refuseOption("refcount_bits", "widths other than 16 need compat=1.1")
	case h.Version == 2 && o.LazyRefcounts:
		err = refuseOption("lazy_refcounts", "it needs compat=1.1")
	case h.Version == 2 && o.ExtendedL2:
		err = refuseOption("extended_l2", "it needs compat=1.1")
	case o.ExtendedL2 && cluster < 16<<10:
		err = refuseOption("extended_l2", "it needs clusters of 16k or more")
	case o.CompressionType > Zstd:
		err = refuseOption("compression_type", "type %d is not known", o.CompressionType)
	case h.Version == 2 && o.CompressionType != Zlib:
		err = refuseOption("compression_type", "types other than zlib need compat=1.1")
	case h.Version == 2 && o.DataFile != "":
		err = refuseOption("data_file", "it needs compat=1.1")
	case o.DataFileRaw && o.DataFile == "":
		err = refuseOption("data_file_raw", "it needs data_file=")
	case o.DataFileRaw && o.Backing != "":
		err = refuseOption("data_file_raw", "a data file that reads as a raw image cannot have a backing file")
	case o.Preallocation > PreallocateWritten:
		err = refuseOption("preallocation", "mode %d is not known", o.Preallocation)
	case o.Preallocation != PreallocateNothing && o.Backing != "" && !o.ExtendedL2:
		err = refuseOption("preallocation", "with a backing file it needs extended_l2=on: other clusters that are allocated hide what is behind them")
	case o.Backing != "" && o.BackingFormat == "":
		err = refuseOption("backing_fmt", "a backing file needs its format recorded; guessing it later is not safe")
	case len(o.Backing) > maxBackingName:
		err = refuseOption("backing_file", "a name of %d bytes is longer than %d", len(o.Backing), maxBackingName)
	case o.Size < 0:
		err = refuseOption("size", "%d is negative", o.Size)
	}
	if err != nil {
		return nil, err
	}
	h.ClusterBits, h.RefcountOrder = bits.TrailingZeros64(uint64(cluster)), bits.TrailingZeros(uint(width))
	if h.Version == 2 {
		h.Length = headerLength2
	}
	set := func(field *uint64, bit uint64, on bool) {
		if on {
			*field |= bit
		}
	}
	set(&h.Incompatible, DataFile, o.DataFile != "")
	set(&h.Incompatible, Compression, o.CompressionType != Zlib)
	set(&h.Incompatible, ExtendedL2, o.ExtendedL2)
	set(&h.Compatible, LazyRefcounts, o.LazyRefcounts)
	set(&h.Autoclear, DataFileRaw, o.DataFileRaw)
	return h, nil
}

// layOut gives everything its place, and h the places of its tables.
func (o CreateOptions) layOut(h *Header) (*blueprint, error) {
	g := h.Geometry()
	tooLarge := int64(maxL1Size/8) * g.L2Coverage()
	if o.Size > tooLarge {
		return nil, refuseOption("size", "a disk of %d bytes is too large for clusters of %d, which reach to %d; choose a larger cluster_size", o.Size, g.ClusterSize(), tooLarge)
	}
	h.Size = (o.Size + sector - 1) &^ (sector - 1)
	p := &blueprint{h: h, g: g}
	h.L1Entries = int(g.L1Needed(h.Size))
	p.l1Length = g.Clusters(8 * int64(h.L1Entries))
	clusters := int64(0) // of the guest in f
	if o.DataFileRaw || o.Preallocation != PreallocateNothing {
		p.l2Tables = int64(h.L1Entries)
		if o.DataFile == "" {
			clusters = g.Clusters(h.Size)
		}
	}
	// The refcounts count themselves too.
	p.table, p.blocks = 1, 1
	for {
		p.total = 1 + p.table + p.blocks + p.l1Length + p.l2Tables + clusters
		per := g.refcountsPerBlock()
		blocks := (p.total + per - 1) / per
		table := g.Clusters(8 * blocks)
		if blocks == p.blocks && table == p.table {
			break
		}
		p.blocks, p.table = blocks, table
	}
	if p.table > maxRefcountTable>>g.ClusterBits {
		return nil, refuseOption("size", "a disk of %d bytes needs too many refcounts; choose a larger cluster_size", o.Size)
	}
	p.l1 = 1 + p.table + p.blocks
	p.l2 = p.l1 + p.l1Length
	p.data = p.total - clusters
	h.RefcountOffset, h.RefcountLength = 1<<g.ClusterBits, p.table
	if p.l1Length > 0 {
		h.L1Offset = p.l1 << g.ClusterBits
	}
	if p.first = o.header(h); int64(len(p.first)) > g.ClusterSize() {
		return nil, refuseOption("cluster_size", "the names of the backing and the data file do not fit into a header of %d bytes; choose larger clusters", g.ClusterSize())
	}
	return p, nil
}

// header encodes h with the extensions that o asks for.
func (o CreateOptions) header(h *Header) []byte {
	be := binary.BigEndian
	b := make([]byte, h.Length)
	be.PutUint32(b[0:], magic)
	be.PutUint32(b[4:], uint32(h.Version))
	be.PutUint32(b[20:], uint32(h.ClusterBits))
	be.PutUint64(b[offSize:], uint64(h.Size))
	be.PutUint32(b[offL1Size:], uint32(h.L1Entries))
	be.PutUint64(b[offL1Offset:], uint64(h.L1Offset))
	be.PutUint64(b[offRefcountTable:], uint64(h.RefcountOffset))
	be.PutUint32(b[offRefcountTable+8:], uint32(h.RefcountLength))
	if h.Version == 3 {
		be.PutUint64(b[offIncompatible:], h.Incompatible)
		be.PutUint64(b[80:], h.Compatible)
		be.PutUint64(b[offAutoclear:], h.Autoclear)
		be.PutUint32(b[96:], uint32(h.RefcountOrder))
		be.PutUint32(b[100:], uint32(h.Length))
		b[104] = h.CompressionType
	}
	extension := func(typ uint32, data []byte) {
		b = be.AppendUint32(b, typ)
		b = be.AppendUint32(b, uint32(len(data)))
		b = append(b, data...)
		b = append(b, make([]byte, -len(data)&7)...)
	}
	if o.Backing != "" {
		extension(extBackingFormat, []byte(o.BackingFormat))
	}
	if o.DataFile != "" {
		extension(extDataFile, []byte(o.DataFile))
	}
	// Names are a courtesy, for which a small cluster has no room.
	if h.Version == 3 && h.ClusterBits >= 12 {
		extension(extFeatureNames, featureNames())
	}
	extension(extEnd, nil)
	if o.Backing != "" {
		be.PutUint64(b[8:], uint64(len(b)))
		be.PutUint32(b[16:], uint32(len(o.Backing)))
		b = append(b, o.Backing...)
	}
	return b
}

// featureNames is the feature name table (section "Feature name table").
func featureNames() []byte {
	var b []byte
	for _, f := range []struct {
		kind, bit byte
		name      string
	}{
		{0, 0, "dirty bit"}, {0, 1, "corrupt bit"}, {0, 2, "external data file"}, {0, 3, "compression type"}, {0, 4, "extended L2 entries"},
		{1, 0, "lazy refcounts"},
		{2, 0, "bitmaps"}, {2, 1, "raw external data"},
	} {
		row := make([]byte, 48)
		row[0], row[1] = f.kind, f.bit
		copy(row[2:], f.name)
		b = append(b, row...)
	}
	return b
}

// CheckCreate says what is wrong with options before any file is made. The
// error is an *OptionError.
func CheckCreate(o CreateOptions) error {
	_, err := o.plan()
	return err
}

// Create makes an image in f, which is empty, and with a data file makes data as
// long as the disk. The header goes last, when everything else is on disk, so
// that a half-made image is none. All is durable on return, but not the names of
// the files. After an error they are to be removed.
func Create(f, data NewFile, o CreateOptions) error {
	p, err := o.plan()
	if err != nil {
		return err
	}
	if f.Length() != 0 {
		return fmt.Errorf("create an image in %s: it is not empty: %w", f.Path(), unix.EEXIST)
	}
	if o.DataFile != "" {
		if err := data.Resize(p.h.Size); err != nil {
			return err
		}
		if err := o.Preallocation.Take(data, 0, p.h.Size); err != nil {
			return err
		}
		if err := data.Sync(); err != nil {
			return err
		}
	}
	if err := f.Resize(p.total << p.g.ClusterBits); err != nil {
		return err
	}
	if err := o.Preallocation.Take(f, p.data<<p.g.ClusterBits, (p.total-p.data)<<p.g.ClusterBits); err != nil {
		return err
	}
	if err := p.writeTables(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.WriteAt(p.first, 0, false); err != nil {
		return err
	}
	return f.Sync()
}

// Take takes the space of a range of zeros.
func (p Preallocation) Take(f NewFile, off, n int64) error {
	if p < PreallocateSpace || n == 0 {
		return nil
	}
	err := f.Preallocate(off, n, p == PreallocateWritten)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w; preallocation=full works everywhere", err)
	}
	return err
}

// writeTables writes everything but the header.
func (p *blueprint) writeTables(f File) error {
	g := p.g
	at := func(cluster int64) int64 { return cluster << g.ClusterBits }
	firstBlock := 1 + p.table
	err := writeWords(f, at(1), p.blocks, func(i int64) uint64 { return uint64(at(firstBlock + i)) })
	if err != nil {
		return err
	}
	block, per := make([]byte, g.ClusterSize()), g.refcountsPerBlock()
	for i := range p.blocks {
		clear(block)
		for k := range min(per, p.total-i*per) {
			g.setRefcount(block, k, 1)
		}
		if err := f.WriteAt(block, at(firstBlock+i), false); err != nil {
			return err
		}
	}
	if p.l2Tables == 0 {
		return nil // all entries of the L1 table are zero
	}
	err = writeWords(f, at(p.l1), p.l2Tables, func(i int64) uint64 { return uint64(at(p.l2+i)) | entryCopied })
	if err != nil {
		return err
	}
	// Guest cluster i is cluster i of the data file, or of those at data.
	width, base, bits := g.EntrySize()/8, int64(0), uint64(0)
	if !g.External {
		base = p.data
	}
	if p.h.Autoclear&DataFileRaw != 0 {
		bits = allAllocated // what anybody writes to the file shows
	}
	return writeWords(f, at(p.l2), g.Clusters(p.h.Size)*width, func(i int64) uint64 {
		if i%width != 0 {
			return bits
		}
		return uint64(at(base+i/width)) | entryCopied
	})
}

// writeWords writes n numbers of a table at off.
func writeWords(f File, off, n int64, word func(i int64) uint64) error {
	const step = 1 << 20
	b := make([]byte, 0, min(8*n, step))
	for i := range n {
		b = binary.BigEndian.AppendUint64(b, word(i))
		if len(b) == step || i == n-1 {
			if err := f.WriteAt(b, off, false); err != nil {
				return err
			}
			off, b = off+int64(len(b)), b[:0]
		}
	}
	return nil
}
