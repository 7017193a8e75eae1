package backend

import (
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets travel in one register; a 32-bit system would cut them short.
const _ = uint(^uintptr(0)>>63) - 1

// sysop names a kind of system call for the fault seam.
type sysop uint8

const (
	opOpen sysop = iota
	opReopen
	opClose
	opRead
	opTryRead
	opWrite
	opTryWrite
	opWriteDsync
	opSync
	opPunch
	opZeroRange
	opAllocate
	opTruncate
	opSeek
	opStat
	opAdvise
	opLock
	opTestLock
	opListLocks
	opRecordStat
	opRecordOpen
	opRecordRead
	opRecordUnlink
	opRecordCreate
	opRecordWrite
	opRecordClose
	opRecordRename
	opRecordOverwrite
)

// faults is the seam by which tests make system calls fail. It runs before
// the call: an error is returned in its stead, and a smaller n makes the
// transfer short. In production it is nil and costs one comparison.
type faults func(op sysop, off int64, n int) (int, error)

func (h faults) check(op sysop, off int64) error {
	if h == nil {
		return nil
	}
	_, err := h(op, off, 0)
	return err
}

// retry calls fn until it is not interrupted by a signal.
func retry(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR {
			return err
		}
	}
}

func (h faults) open(op sysop, name string, flags int) (int, error) {
	for {
		if err := h.check(op, 0); err != nil {
			if err == unix.EINTR {
				continue
			}
			return -1, err
		}
		fd, err := unix.Open(name, flags|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

func (f *File) pread(fd int, p []byte, off int64) (int, error) {
	if f.faults != nil {
		n, err := f.faults(opRead, off, len(p))
		if err != nil {
			return 0, err
		}
		p = p[:n]
	}
	return unix.Pread(fd, p, off)
}

func (f *File) pwrite(fd int, p []byte, off int64) (int, error) {
	f.slots.take()
	defer f.slots.give()
	if f.faults != nil {
		n, err := f.faults(opWrite, off, len(p))
		if err != nil {
			return 0, err
		}
		p = p[:n]
	}
	c := f.unclaimed(off, int64(len(p)))
	defer c.changed()
	return unix.Pwrite(fd, p, off)
}

// pwriteDsync is pwritev2 with RWF_DSYNC. (unix.Pwritev2 wants a slice of
// slices.) It takes no slot: it syncs, while others may write. It looks for no claims:
// where there are some nothing is to be synced.
func (f *File) pwriteDsync(fd int, p []byte, off int64) (int, error) {
	if f.faults != nil {
		n, err := f.faults(opWriteDsync, off, len(p))
		if err != nil {
			return 0, err
		}
		p = p[:n]
	}
	if len(p) == 0 {
		return 0, nil
	}
	iov := unix.Iovec{Base: &p[0], Len: uint64(len(p))}
	n, _, errno := unix.Syscall6(unix.SYS_PWRITEV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, uintptr(off), 0, unix.RWF_DSYNC)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// rawPreadNowait is preadv2 with RWF_NOWAIT, which never sleeps, so it does
// without the scheduler's bookkeeping around a system call. p is not empty.
func rawPreadNowait(fd int, p []byte, off int64) (int, unix.Errno) {
	iov := unix.Iovec{Base: &p[0], Len: uint64(len(p))}
	n, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, uintptr(off), 0, unix.RWF_NOWAIT)
	return int(n), errno
}

// rawPread is pread for files whose reads never sleep. p is not empty.
func rawPread(fd int, p []byte, off int64) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), uintptr(off), 0, 0)
	return int(n), errno
}

// rawPwrite is pwrite for files whose writes never sleep. p is not empty.
func rawPwrite(fd int, p []byte, off int64) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_PWRITE64, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), uintptr(off), 0, 0)
	return int(n), errno
}

// fallocate retries what a signal interrupts.
func (f *File) fallocate(op sysop, mode uint32, off, n int64) error {
	return retry(func() error {
		if err := f.faults.check(op, off); err != nil {
			return err
		}
		c := f.unclaimed(off, n)
		defer c.changed()
		return unix.Fallocate(f.fd, mode, off, n)
	})
}

func (f *File) fstat(st *unix.Stat_t) error {
	return retry(func() error {
		if err := f.faults.check(opStat, 0); err != nil {
			return err
		}
		return unix.Fstat(f.fd, st)
	})
}

func (f *File) seek(off int64, whence int) (int64, error) {
	if err := f.faults.check(opSeek, off); err != nil {
		return 0, err
	}
	return unix.Seek(f.fd, off, whence)
}

// deviceSize is the size of a block device in bytes. It moves the file
// position, which nothing here uses.
func deviceSize(fd int) (int64, error) {
	return unix.Seek(fd, 0, io.SeekEnd)
}

func (f *File) fadvise(off, n int64, advice int) error {
	return retry(func() error {
		if err := f.faults.check(opAdvise, off); err != nil {
			return err
		}
		return unix.Fadvise(f.fd, off, n, advice)
	})
}
