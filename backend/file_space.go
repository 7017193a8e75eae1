package backend

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	modePunch     = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	modeZeroRange = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
	modeAllocate  = unix.FALLOC_FL_KEEP_SIZE

	// allocateStep bounds one allocation in bytes: tmpfs undoes the whole
	// of one that a signal interrupts.
	allocateStep = 64 << 20
)

// unsupported reports whether a fallocate failed because that mode is not
// there, and not because of the file.
func unsupported(err error) bool {
	return err == unix.EOPNOTSUPP || err == unix.ENOSYS
}

// once is fn, unless it was found not supported before.
func once(not *atomic.Bool, fn func() error) error {
	if not.Load() {
		return unix.EOPNOTSUPP
	}
	err := fn()
	if unsupported(err) {
		not.Store(true)
		err = unix.EOPNOTSUPP
	}
	return err
}

func (f *File) punch(off, n int64) error {
	return once(&f.noPunch, func() error { return f.fallocate(opPunch, modePunch, off, n) })
}

func (f *File) zeroRange(off, n int64) error {
	return once(&f.noZeroRange, func() error { return f.fallocate(opZeroRange, modeZeroRange, off, n) })
}

// allocate gives a range of zeros and holes its space.
func (f *File) allocate(off, n int64) error {
	for n > 0 {
		step := min(n, allocateStep)
		if err := f.fallocate(opAllocate, modeAllocate, off, step); err != nil {
			if unsupported(err) {
				err = unix.EOPNOTSUPP
			}
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

// Preallocate takes the space of a range, which reads as zeros before and
// afterwards; with write by writing it. unix.EOPNOTSUPP, wrapped, says that this
// file system does it by writing only.
func (f *File) Preallocate(off, n int64, write bool) error {
	if err := f.inside("preallocate", off, n); err != nil {
		return err
	}
	if write {
		return f.writeZeros(off, n)
	}
	if err := f.allocate(off, n); err != nil {
		return f.fail("preallocate", err)
	}
	return nil
}

// inner is the part of a range that fallocate takes.
func (f *File) inner(off, n int64) (lo, hi int64) {
	a := int64(f.traits.spaceAlign)
	return (off + a - 1) / a * a, (off + n) / a * a
}

// Punch gives the range's space back; it then reads as zeros. unix.EOPNOTSUPP,
// wrapped, says that this file cannot, as a block device with a range that is not
// of whole sectors, and that nothing was changed.
func (f *File) Punch(off, n int64) error {
	if err := f.inside("discard", off, n); err != nil {
		return err
	}
	if lo, hi := f.inner(off, n); lo != off || hi != off+n {
		return f.fail("discard", unix.EOPNOTSUPP)
	}
	defer f.lockRange(off, n)()
	if err := f.punch(off, n); err != nil {
		return f.fail("discard", err)
	}
	return nil
}

// Discard is Punch of what is of whole sectors in a range.
func (f *File) Discard(off, n int64) error {
	if err := f.inside("discard", off, n); err != nil {
		return err
	}
	lo, hi := f.inner(off, n)
	if lo >= hi {
		return nil
	}
	return f.Punch(lo, hi-lo)
}

// Zero makes the range read as zeros, by the cheapest means there are:
// punching (not with NoHole, and then the range is allocated), zeroing by the
// file system, writing. With FastZero unix.EOPNOTSUPP, wrapped, says that only
// writing is left, or is not worse, and that nothing was changed. It may
// block. After another error any part of the range may have been zeroed.
func (f *File) Zero(off, n int64, flags ZeroFlags) error {
	if err := f.inside("zero", off, n); err != nil {
		return err
	}
	lo, hi := f.inner(off, n)
	err := error(unix.EOPNOTSUPP)
	if lo < hi {
		err = f.zeroInner(lo, hi-lo, flags)
	}
	switch {
	case err == unix.EOPNOTSUPP && flags&FastZero != 0:
		return f.fail("zero", err)
	case err == unix.EOPNOTSUPP:
		return f.writeZeros(off, n)
	case err != nil:
		return f.fail("zero", err)
	}
	if err := f.writeZeros(off, lo-off); err != nil {
		return err
	}
	return f.writeZeros(hi, off+n-hi)
}

func (f *File) zeroInner(off, n int64, flags ZeroFlags) error {
	defer f.lockRange(off, n)()
	// A device may carry out a zero range by writing zeros.
	slow := f.traits.BlockDevice && flags&FastZero != 0
	if flags&NoHole == 0 {
		if err := f.punch(off, n); err != unix.EOPNOTSUPP {
			return err
		}
	}
	if !slow {
		if err := f.zeroRange(off, n); err != unix.EOPNOTSUPP {
			return err
		}
	}
	switch {
	case f.traits.BlockDevice && !slow:
		r := [2]uint64{uint64(off), uint64(n)}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f.fd), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&r)))
		switch errno {
		case 0:
			return nil
		case unix.EIO, unix.ENOSPC, unix.EBADF:
			return errno
		}
	case flags&NoHole != 0 && (f.traits.Tmpfs || flags&FastZero == 0):
		// With FastZero only where allocating after punching is known to
		// work: it must fail before anything is changed.
		if err := f.punch(off, n); err != nil {
			return err
		}
		return f.allocate(off, n)
	}
	return unix.EOPNOTSUPP
}

var zeros = alignedBytes(bounceSize) // never written

func (f *File) writeZeros(off, n int64) error {
	for n > 0 {
		step := min(n, int64(len(zeros)))
		if err := f.WriteAt(zeros[:step], off, false); err != nil {
			return err
		}
		off, n = off+step, n-step
	}
	return nil
}

// smallFolios asks that reading does not fill the page cache with large folios.
// To overwrite 4 KiB in one of 2 MiB, as readahead makes them, ext4 looks at each
// of its 512 blocks. Cached 4 KiB writes at depth 32 through the server (Linux
// 6.18, two cores): 68k/s at 15 us of processor time, and so 311k/s at 3.2. The
// price is the kernel's readahead, and some more pages to count for large reads.
func (f *File) smallFolios() {
	if t := &f.traits; t.coherent && !t.Tmpfs && !t.Direct {
		_ = unix.Fadvise(f.fd, 0, 0, unix.FADV_RANDOM) // a hint
	}
}

// readahead asks for the range to be read into the page cache; a hint.
func (f *File) readahead(off, n int64) error {
	if f.traits.Direct {
		return nil
	}
	if err := f.fadvise(off, n, unix.FADV_WILLNEED); err != nil && !unsupported(err) && err != unix.EINVAL {
		return f.fail("readahead", err)
	}
	return nil
}

// extent tells what lies at off: a hole that reads as zeros, or something
// else, and where that ends, at most at end. What cannot be told is no hole.
func (f *File) extent(off, end int64) (next int64, hole bool) {
	if f.traits.BlockDevice {
		return end, false
	}
	d, err := f.seek(off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		// No data up to the end of the file. Past it there is no hole
		// either: a file that has shrunk does not read as zeros.
		var st unix.Stat_t
		if f.fstat(&st) != nil || st.Size <= off {
			return end, false
		}
		return min(st.Size, end), true
	case err != nil:
		return end, false
	case d > off:
		return min(d, end), true
	}
	h, err := f.seek(off, unix.SEEK_HOLE)
	if err != nil || h <= off {
		return end, false
	}
	return min(h, end), false
}

// measure returns the file's size now, and whether it may have holes because
// fewer bytes are allocated than it is long.
func (f *File) measure() (size int64, sparse bool, err error) {
	if f.traits.BlockDevice {
		size, err = f.currentSize()
		return size, false, err
	}
	var st unix.Stat_t
	if err := f.fstat(&st); err != nil {
		return 0, false, f.fail("stat", err)
	}
	return st.Size, st.Blocks*512 < st.Size, nil
}

// Allocated is how many bytes of space the file takes on the host.
func (f *File) Allocated() (int64, error) {
	var st unix.Stat_t
	if err := f.fstat(&st); err != nil {
		return 0, f.fail("stat", err)
	}
	return st.Blocks * 512, nil
}

// dropCache drops the file's page cache, so that what is read from now on
// comes from the storage; dirty pages (of others on this host) are written
// back first. Somebody may be reading: a page under way is not dropped, and
// could hold bytes from before. Only a moment without any cached page proves
// that none is left (cachestat counts pages under way), so it tries up to
// tries times. left is the number of pages there at the last try, and 0 also
// where the kernel cannot tell (before Linux 6.5).
func (f *File) dropCache(tries int, pause func(try int)) (left uint64, err error) {
	if err := f.fdatasync(); err != nil {
		return 0, f.fail("sync", err)
	}
	for try := range tries {
		if try > 0 {
			pause(try)
		}
		if err := f.fadvise(0, 0, unix.FADV_DONTNEED); err != nil {
			return 0, f.fail("drop the page cache of", err)
		}
		var cs unix.Cachestat_t
		if err := unix.Cachestat(uint(f.fd), &unix.CachestatRange{}, &cs, 0); err != nil {
			return 0, nil
		}
		if left = cs.Cache; left == 0 {
			break
		}
	}
	return left, nil
}
