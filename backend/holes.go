package backend

import "sync/atomic"

const (
	// holeMin is the shortest read in bytes for which looking for holes
	// costs less than sending zeros.
	holeMin = 64 << 10
	// maxHoles bounds the extents of one read; the rest is sent as data.
	maxHoles = 64
	// fullBits bounds the memory for remembering where no holes are.
	fullBits = 8 << 20
	fullMin  = 64 << 10
)

// full remembers chunks of a file that had no hole when they were looked at,
// so that reads there need not ask (asking may wait for a device). It may be
// wrong: then a hole is read and sent as zeros.
type full struct {
	chunk int64 // bytes
	bits  []atomic.Uint64
}

func newFull(size int64) *full {
	f := &full{chunk: fullMin}
	for size/f.chunk >= fullBits {
		f.chunk *= 2
	}
	f.bits = make([]atomic.Uint64, (size/f.chunk)/64+1)
	return f
}

// has reports whether all of [off, off+n) is known to be without holes.
func (f *full) has(off, n int64) bool {
	for c := off / f.chunk; c <= (off+n-1)/f.chunk; c++ {
		if int(c/64) >= len(f.bits) || f.bits[c/64].Load()>>(c%64)&1 == 0 {
			return false
		}
	}
	return true
}

// add notes data from off to end; chunks at either end only if they are
// covered.
func (f *full) add(off, end int64) {
	for c := (off + f.chunk - 1) / f.chunk; (c+1)*f.chunk <= end && int(c/64) < len(f.bits); c++ {
		f.bits[c/64].Or(1 << (c % 64))
	}
}

// remove forgets what overlaps [off, off+n).
func (f *full) remove(off, n int64) {
	for c := off / f.chunk; c <= (off+n-1)/f.chunk && int(c/64) < len(f.bits); c++ {
		f.bits[c/64].And(^(uint64(1) << (c % 64)))
	}
}
