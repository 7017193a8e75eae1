package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Incompatible features (section "Header"): who does not know one must not
// open the image.
const (
	Dirty       = 1 << 0 // refcounts may be wrong
	Corrupt     = 1 << 1 // only reading is allowed
	DataFile    = 1 << 2 // guest clusters are in another file
	Compression = 1 << 3 // compression type is not zlib
	ExtendedL2  = 1 << 4 // L2 entries have subclusters

	knownIncompatible = Dirty | Corrupt | DataFile | Compression | ExtendedL2
)

// LazyRefcounts is the compatible feature that allows refcounts to be wrong
// while the image is Dirty.
const LazyRefcounts = 1 << 0

// Autoclear features: who does not know one clears it with the first write.
const (
	BitmapsConsistent = 1 << 0 // the bitmaps extension can be trusted
	DataFileRaw       = 1 << 1 // the data file reads as a raw image

	knownAutoclear = BitmapsConsistent | DataFileRaw
)

// Compression types.
const (
	Zlib = 0
	Zstd = 1
)

const (
	magic         = 0x514649fb // "QFI\xfb"
	headerLength2 = 72
	headerLength3 = 104

	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extEncryption    = 0x0537be77
	extDataFile      = 0x44415441

	// What QEMU (block/qcow2.h) takes at most, and so do we: hostile images
	// cost no more memory than that.
	minClusterBits   = 9
	maxClusterBits   = 21
	maxL1Size        = 32 << 20 // bytes
	maxRefcountTable = 8 << 20  // bytes
	maxSnapshots     = 65536
	maxBackingName   = 1023
	maxBackingFormat = 15
)

// Offsets in the header of fields that are also written on their own.
const (
	offSize          = 24
	offL1Size        = 36
	offL1Offset      = 40
	offRefcountTable = 48
	offIncompatible  = 72
	offAutoclear     = 88
)

// Header is a decoded header with its extensions.
type Header struct {
	Version     int // 2 or 3
	ClusterBits int
	Size        int64 // of the guest's disk, bytes

	L1Entries       int   // of the active L1 table
	L1Offset        int64 // bytes
	RefcountOffset  int64 // of the refcount table, bytes
	RefcountLength  int64 // of the refcount table, clusters
	RefcountOrder   int   // a refcount has 1<<RefcountOrder bits
	Snapshots       int
	SnapshotsOffset int64

	Incompatible, Compatible, Autoclear uint64
	CompressionType                     uint8
	Length                              int // of the fixed part in bytes

	// Backing file name as it stands in the header, "" for none.
	Backing string
	// BackingFormat is "" where none is recorded.
	BackingFormat string
	// DataFileName is "" where none is recorded.
	DataFileName string
	// FeatureNames are those of the feature name table by type<<8|bit.
	FeatureNames map[uint16]string
	Bitmaps      *BitmapsExtension // nil for none
}

// BitmapsExtension says where the bitmap directory is (section "Bitmaps
// extension").
type BitmapsExtension struct {
	Count           int
	DirectorySize   int64 // bytes
	DirectoryOffset int64
}

// FormatError says that an image is not well-formed, or uses what is not
// served.
type FormatError struct {
	Path string
	What string
	// Unsupported: the image may be fine; otherwise it is damaged.
	Unsupported bool
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("qcow2 image %s: %s", e.Path, e.What)
}

// Unwrap is EOPNOTSUPP for what is not supported, and EIO for damage.
func (e *FormatError) Unwrap() error {
	if e.Unsupported {
		return unix.EOPNOTSUPP
	}
	return unix.EIO
}

// damaged is the *FormatError of what cannot be right in f.
func damaged(f File, format string, args ...any) error {
	return &FormatError{Path: f.Path(), What: fmt.Sprintf(format, args...)}
}

// unsupported is that of what f uses and is not served.
func unsupported(f File, format string, args ...any) error {
	return &FormatError{Path: f.Path(), What: fmt.Sprintf(format, args...), Unsupported: true}
}

// ReadHeader reads and checks the header of f. It writes nothing. The error
// is a *FormatError, or what reading said.
func ReadHeader(f File) (*Header, error) {
	h := &Header{}
	if err := h.readFixed(f); err != nil {
		return nil, err
	}
	h, err := h.withRest(f)
	if err != nil {
		return nil, err
	}
	if err := h.checkFeatures(f); err != nil {
		return nil, err
	}
	if err := h.checkTables(f); err != nil {
		return nil, err
	}
	return h, nil
}

// readFixed reads the fixed part of the header, and checks what the rest is read by.
func (h *Header) readFixed(f File) error {
	var fixed [headerLength3 + 8]byte
	n := min(int64(len(fixed)), f.Length())
	if n < headerLength2 {
		return damaged(f, "it has only %d bytes, which is too short for a header; it was cut off, or is not qcow2", f.Length())
	}
	if err := f.ReadAt(fixed[:n], 0); err != nil {
		return err
	}
	be := binary.BigEndian
	if be.Uint32(fixed[0:]) != magic {
		return damaged(f, "it does not begin with qcow2's magic number; it is of another format")
	}
	h.Version = int(be.Uint32(fixed[4:]))
	if h.Version != 2 && h.Version != 3 {
		return unsupported(f, "version %d is not known; versions 2 and 3 are", h.Version)
	}
	bits := be.Uint32(fixed[20:])
	if bits < minClusterBits || bits > maxClusterBits {
		return damaged(f, "cluster size 2^%d is not between 512 bytes and 2 MiB", bits)
	}
	h.ClusterBits = int(bits)
	cluster := int64(1) << bits
	size := be.Uint64(fixed[offSize:])
	if size > 1<<63-1-uint64(cluster) {
		return damaged(f, "a disk of %d bytes is too large", size)
	}
	h.Size = int64(size)
	if m := be.Uint32(fixed[32:]); m != 0 {
		name := fmt.Sprintf("method %d", m)
		switch m {
		case 1:
			name = "AES"
		case 2:
			name = "LUKS"
		}
		return unsupported(f, "it is encrypted (%s), which nbd-export does not serve; serve it with qemu-nbd, or convert it with qemu-img", name)
	}
	h.L1Entries, h.L1Offset = int(be.Uint32(fixed[offL1Size:])), int64(be.Uint64(fixed[offL1Offset:]))
	h.RefcountOffset, h.RefcountLength = int64(be.Uint64(fixed[offRefcountTable:])), int64(be.Uint32(fixed[offRefcountTable+8:]))
	h.Snapshots, h.SnapshotsOffset = int(be.Uint32(fixed[60:])), int64(be.Uint64(fixed[64:]))
	h.RefcountOrder, h.Length = 4, headerLength2
	if h.Version == 2 {
		return nil
	}
	if n < headerLength3 {
		return damaged(f, "it has only %d bytes, which is too short for a header", n)
	}
	h.Incompatible, h.Compatible, h.Autoclear = be.Uint64(fixed[offIncompatible:]), be.Uint64(fixed[80:]), be.Uint64(fixed[offAutoclear:])
	order, length := be.Uint32(fixed[96:]), be.Uint32(fixed[100:])
	if order > 6 {
		return damaged(f, "refcounts of 2^%d bits are wider than 64", order)
	}
	if length < headerLength3 || int64(length) > cluster {
		return damaged(f, "a header of %d bytes is not possible", length)
	}
	h.RefcountOrder, h.Length = int(order), int(length)
	if length > headerLength3 && n > headerLength3 {
		h.CompressionType = fixed[104]
	}
	return nil
}

// withRest is h with what stands behind the fixed part. That is in the first
// cluster, which may be cut off in a file without any data: zeros follow then,
// which end the extensions. Hardly ever is more of it used than headerGuess.
func (h *Header) withRest(f File) (*Header, error) {
	cluster := int64(1) << h.ClusterBits
	whole := min(cluster, f.Length())
	if int64(h.Length) > whole {
		return nil, damaged(f, "its header of %d bytes is cut off", h.Length)
	}
	for n := min(max(headerGuess, int64(h.Length)), whole); ; n = whole {
		first := make([]byte, n, n+8)
		if err := f.ReadAt(first, 0); err != nil {
			return nil, err
		}
		if n == whole {
			first = first[:min(n+8, cluster)]
		}
		with := *h
		ended, err := with.readRest(f, first)
		if n < whole && (err != nil || !ended) {
			continue
		}
		return &with, err
	}
}

// checkFeatures refuses what is not known, and what contradicts itself.
func (h *Header) checkFeatures(f File) error {
	if unknown := h.Incompatible &^ knownIncompatible; unknown != 0 {
		var names []string
		for bit := range 64 {
			if unknown>>bit&1 != 0 {
				name := h.FeatureNames[uint16(bit)]
				if name == "" {
					name = fmt.Sprintf("bit %d", bit)
				}
				names = append(names, name)
			}
		}
		return unsupported(f, "it uses features that nbd-export does not know: %s", strings.Join(names, ", "))
	}
	switch {
	case h.CompressionType > Zstd:
		return unsupported(f, "compression type %d is not known; zlib and zstd are", h.CompressionType)
	case (h.CompressionType != Zlib) != (h.Incompatible&Compression != 0):
		return damaged(f, "compression type %d and the feature bit for it contradict each other", h.CompressionType)
	case h.Incompatible&ExtendedL2 != 0 && h.ClusterBits < 14:
		return damaged(f, "subclusters need clusters of 16 KiB or more, and these have %d bytes", int64(1)<<h.ClusterBits)
	case h.Incompatible&DataFile == 0 && h.Autoclear&DataFileRaw != 0:
		return damaged(f, "it says that its data file is raw, and has none")
	}
	return nil
}

// checkTables checks where the header says that tables are, and how long.
func (h *Header) checkTables(f File) error {
	g := h.Geometry()
	need := g.L1Needed(h.Size)
	switch {
	case int64(h.L1Entries)*8 > maxL1Size:
		return damaged(f, "an L1 table of %d entries is too large", h.L1Entries)
	case need > int64(h.L1Entries):
		return damaged(f, "its L1 table has %d entries, and a disk of %d bytes needs %d", h.L1Entries, h.Size, need)
	case h.L1Entries > 0 && !g.tableOK(h.L1Offset), g.Within(h.L1Offset) != 0:
		return damaged(f, "the L1 table's offset %#x is not the beginning of a cluster", uint64(h.L1Offset))
	case h.RefcountLength > maxRefcountTable>>h.ClusterBits:
		return damaged(f, "a refcount table of %d clusters is too large", h.RefcountLength)
	case h.RefcountOffset < 0 || g.Within(h.RefcountOffset) != 0:
		return damaged(f, "the refcount table's offset %#x is not the beginning of a cluster", uint64(h.RefcountOffset))
	case h.Snapshots > maxSnapshots:
		return damaged(f, "%d internal snapshots are too many", h.Snapshots)
	case h.Snapshots > 0 && !g.tableOK(h.SnapshotsOffset), g.Within(h.SnapshotsOffset) != 0:
		return damaged(f, "the snapshot table's offset %#x is not the beginning of a cluster", uint64(h.SnapshotsOffset))
	}
	return nil
}

// headerGuess is how many bytes of the first cluster are read at first: all of a
// cluster of 64 KiB, twice in a handover, was a third of what that allocated.
const headerGuess = 4 << 10

// readRest reads, from the first bytes of the file, what stands behind the fixed
// part of the header. ended says that there was no sign of more beyond them.
func (h *Header) readRest(f File, first []byte) (ended bool, err error) {
	be := binary.BigEndian
	end := int64(len(first))
	if off, n := be.Uint64(first[8:]), be.Uint32(first[16:]); off != 0 {
		if n > maxBackingName || off > uint64(end) || uint64(n) > uint64(end)-off || off < uint64(h.Length) {
			return false, damaged(f, "the backing file's name (%d bytes at %d) does not lie in the first cluster", n, off)
		}
		h.Backing = string(first[off : off+uint64(n)])
		if strings.ContainsRune(h.Backing, 0) {
			return false, damaged(f, "the backing file's name has a zero byte")
		}
		end = int64(off)
	}
	ended, err = h.readExtensions(f, first[h.Length:end])
	return ended || end < int64(len(first)), err
}

// readExtensions decodes the extensions in b. ended says that there was their
// end.
func (h *Header) readExtensions(f File, b []byte) (ended bool, err error) {
	be := binary.BigEndian
	for len(b) > 0 {
		if len(b) < 8 {
			return false, damaged(f, "header extensions end after %d bytes of one", len(b))
		}
		typ, n := be.Uint32(b), int64(be.Uint32(b[4:]))
		b = b[8:]
		if n > int64(len(b)) {
			return false, damaged(f, "header extension %#x of %d bytes reaches past the header", typ, n)
		}
		if typ == extEnd {
			return true, nil
		}
		data := b[:n]
		b = b[min((n+7)&^7, int64(len(b))):]
		switch typ {
		case extBackingFormat:
			if n > maxBackingFormat {
				return false, damaged(f, "the name of the backing file's format has %d bytes, more than %d", n, maxBackingFormat)
			}
			h.BackingFormat = string(data)
		case extDataFile:
			h.DataFileName = string(data)
		case extFeatureNames:
			h.FeatureNames = make(map[uint16]string)
			for r := data; len(r) >= 48; r = r[48:] {
				name, _, _ := bytes.Cut(r[2:48], []byte{0})
				h.FeatureNames[uint16(r[0])<<8|uint16(r[1])] = string(name)
			}
		case extEncryption:
			return false, damaged(f, "it has an encryption header and is not encrypted")
		case extBitmaps:
			if n != 24 {
				return false, damaged(f, "its bitmaps extension has %d bytes instead of 24", n)
			}
			if be.Uint32(data[4:]) != 0 && h.Autoclear&BitmapsConsistent != 0 {
				return false, damaged(f, "a reserved field of its bitmaps extension is not zero")
			}
			h.Bitmaps = &BitmapsExtension{
				Count:           int(be.Uint32(data)),
				DirectorySize:   int64(be.Uint64(data[8:])),
				DirectoryOffset: int64(be.Uint64(data[16:])),
			}
		}
	}
	return false, nil
}
