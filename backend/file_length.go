package backend

import (
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2"
)

// A File may be a file of a qcow2 image, which grows and shrinks as it is used.
var _ qcow2.File = (*File)(nil)

// Length is how far the file reaches in bytes: as it was at load, or as Resize
// made it, or less once it was seen shorter.
func (f *File) Length() int64 { return f.limit.Load() }

// Resize makes the file length bytes long, beside I/O inside the shorter of
// both lengths; what is added reads as zeros. A block device keeps its size:
// ENOSPC if it is to grow. A file that has shrunk by itself stays as it is, and
// gives EIO.
func (f *File) Resize(length int64) error {
	f.sizing.Lock()
	defer f.sizing.Unlock()
	was := f.length
	switch {
	case f.traits.BlockDevice && length > was:
		return f.fail("grow", fmt.Errorf("a block device keeps its size: %w", unix.ENOSPC))
	case f.traits.BlockDevice:
		return nil
	case f.limit.Load() < was:
		return f.fail("resize", errPastEnd)
	}
	if a := int64(f.traits.Align); was%a != 0 || length%a != 0 {
		// A block becomes part of the tail, or ceases to be.
		defer f.ranges.leave(f.ranges.enter(0, math.MaxInt64, true))
	}
	f.limit.Store(min(length, was))
	if err := f.truncate(length); err != nil {
		f.limit.Store(was)
		return f.fail("resize", err)
	}
	return f.setLength(length)
}

func (f *File) truncate(length int64) error {
	err := retry(func() error {
		if err := f.faults.check(opTruncate, length); err != nil {
			return err
		}
		return unix.Ftruncate(f.fd, length)
	})
	f.dirtied()
	return err
}

// remeasure looks at the file's size: where it has shrunk, writes end at its
// new end instead of growing it back. It returns the size, and length if that
// is news, else the size again. A size that cannot be had changes nothing.
func (f *File) remeasure() (size, length int64, sparse bool, err error) {
	f.sizing.Lock()
	defer f.sizing.Unlock()
	size, sparse, err = f.measure()
	if err != nil {
		return 0, 0, false, err
	}
	limit := min(size, f.length)
	if was := f.limit.Swap(limit); limit < was {
		return size, f.length, sparse, nil
	}
	return size, size, sparse, nil
}

// follow notes what another has made of the length of a file that is only read.
func (f *File) follow() error {
	f.sizing.Lock()
	defer f.sizing.Unlock()
	size, err := f.currentSize()
	if err != nil || size == f.length {
		return err
	}
	return f.setLength(size)
}

// ZeroAt makes the range read as zeros by the cheapest means there is.
func (f *File) ZeroAt(off, n int64) error { return f.Zero(off, n, 0) }
