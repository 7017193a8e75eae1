package qcow2

import (
	"encoding/binary"
	"errors"
	"unsafe"
)

// ErrWait is returned by Map and Prepare without MayBlock when the answer
// needs a table that is not in memory, another request's allocation, or a
// write. The caller asks again with MayBlock from where waiting hurts nobody.
var ErrWait = errors.New("qcow2: the mapping must wait")

// File is a host file of an image. Its methods may be called by any number of
// goroutines at once. Offsets and lengths are bytes; buffers are the caller's
// again on return; errors wrap a syscall.Errno and name the file.
type File interface {
	// Path is the file's path as the user gave it, for messages.
	Path() string
	// Length is how far the file reaches: reads and writes inside it work.
	Length() int64
	// Resize makes the file that long; new bytes read as zeros. A block device
	// refuses to grow, with ENOSPC.
	Resize(length int64) error
	// ReadAt fills p from off, all of it or an error.
	ReadAt(p []byte, off int64) error
	// WriteAt writes all of p at off, inside Length; with durable it returns
	// when the bytes would survive power loss.
	WriteAt(p []byte, off int64, durable bool) error
	// Punch gives the range's space back, which then reads as zeros.
	// EOPNOTSUPP, wrapped, says that the file cannot, and that nothing was
	// changed.
	Punch(off, n int64) error
	// ZeroAt makes the range read as zeros by the cheapest means there is.
	ZeroAt(off, n int64) error
	// Sync makes every write completed before the call durable. Once it has
	// failed it fails for ever.
	Sync() error
}

// Backing is what shows through where an image has nothing of its own. It
// does not change while it is used.
type Backing interface {
	// Size in bytes; past it zeros show through.
	Size() int64
	// Map appends extents that cover [off, off+n), which lies inside Size, in
	// order and without gaps. Without MayBlock it may answer ErrWait.
	Map(dst []Extent, off, n int64, mode Mode) ([]Extent, error)
}

// Mode says what Map and Prepare may do.
type Mode uint8

const (
	// MayBlock allows waiting for storage or for other requests.
	MayBlock Mode = 1 << iota
)

// Kind says what stands behind an extent.
type Kind uint8

const (
	// Data: the bytes live in File at Offset.
	Data Kind = iota
	// Zero: the range reads as zeros.
	Zero
	// Compressed: only Extent.Read can produce the bytes.
	Compressed
)

// Extent is a contiguous part of a mapped guest range. Neighbours of one kind
// that continue each other in the file are one extent.
type Extent struct {
	Kind   Kind
	Length int64 // bytes, > 0
	File   File  // Data: the file; Compressed: where the compressed bytes are
	Offset int64 // Data: byte offset in File; Compressed: offset of the extent in its decompressed cluster
	// Image and Entry are the compressed cluster, nil and 0 otherwise.
	Image *Image
	Entry uint64
	// Allocated: this image itself, not a file behind it, has something here
	// (which may be zeros). Depth counts the images in front of the one that
	// decides, 0 for this one.
	Allocated bool
	Depth     int
}

// readWords fills words, of which there is at least one, with the big-endian ones
// that f has from off. They are read into place: with a buffer beside it the
// garbage of reading a large image's tables is as large as they are.
func readWords(f File, words []uint64, off int64) error {
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), 8*len(words))
	if err := f.ReadAt(raw, off); err != nil {
		return err
	}
	for i := range words {
		words[i] = binary.BigEndian.Uint64(raw[8*i:])
	}
	return nil
}
