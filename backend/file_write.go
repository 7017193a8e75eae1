package backend

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// InlineWrite reports whether a write of n bytes at off is expected not to
// wait for a device: on tmpfs up to 256 KiB; into the page cache of a local
// file system whole pages (so that none is read first) up to 64 KiB. It is a
// guess: the kernel slows writers down when too much is dirty.
func (f *File) InlineWrite(off int64, n int) bool {
	switch {
	case !f.writable:
		return false
	case f.traits.Tmpfs:
		return n <= inlineTmpfs
	default:
		return f.traits.inlineWrites && n <= inlineCached && (off|int64(n))&(cachePage-1) == 0
	}
}

// TryWriteAt writes p at off if InlineWrite says so. It returns ErrWait if
// not all of p was written: p[:n] was, and WriteAt puts the rest there or
// finds out what is wrong. It returns no other error and allocates nothing. It may
// wait for other writes of the file (slots), or for who has claimed the range.
//
// On tmpfs it uses RawSyscall. Elsewhere the kernel may put the writer to
// sleep (balance_dirty_pages), which would stop garbage collection and with
// it the process, so there Syscall is worth its price: of a 4 KiB pwrite to
// ext4 826 ns, with RawSyscall 797.
func (f *File) TryWriteAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if !f.InlineWrite(off, len(p)) || off+int64(len(p)) > f.limit.Load() {
		return 0, ErrWait
	}
	f.slots.take()
	defer f.slots.give()
	q := p
	if f.faults != nil {
		n, err := f.faults(opTryWrite, off, len(p))
		if err != nil || n == 0 {
			return 0, ErrWait
		}
		q = p[:n]
	}
	c := f.unclaimed(off, int64(len(q)))
	defer c.changed()
	for {
		var n int
		var errno unix.Errno
		if f.traits.Tmpfs {
			n, errno = rawPwrite(f.fd, q, off)
		} else {
			r, _, e := unix.Syscall6(unix.SYS_PWRITE64, uintptr(f.fd), uintptr(unsafe.Pointer(&q[0])), uintptr(len(q)), uintptr(off), 0, 0)
			n, errno = int(r), e
		}
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return 0, ErrWait
		case n < len(p):
			return n, ErrWait
		}
		return n, nil
	}
}

// MaxVector is the most pieces that TryWriteVector takes.
const MaxVector = 64

// TryWriteVector is TryWriteAt for pieces that follow each other in the file,
// each of which InlineWrite says yes to, in one system call. n counts the bytes
// of all.
func (f *File) TryWriteVector(pieces [][]byte, off int64) (n int, err error) {
	var iov [MaxVector]unix.Iovec
	total := 0
	for i, p := range pieces {
		if !f.InlineWrite(off+int64(total), len(p)) {
			return 0, ErrWait
		}
		iov[i].Base = unsafe.SliceData(p)
		iov[i].SetLen(len(p))
		total += len(p)
	}
	if off+int64(total) > f.limit.Load() {
		return 0, ErrWait
	}
	f.slots.take()
	defer f.slots.give()
	if f.faults != nil {
		k, err := f.faults(opTryWrite, off, total)
		if err != nil || k < total {
			return 0, ErrWait
		}
	}
	c := f.unclaimed(off, int64(total))
	defer c.changed()
	for {
		r, _, errno := unix.Syscall6(unix.SYS_PWRITEV, uintptr(f.fd), uintptr(unsafe.Pointer(&iov)), uintptr(len(pieces)), uintptr(off), 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return 0, ErrWait
		case int(r) < total:
			return int(r), ErrWait
		}
		return total, nil
	}
}

// WriteAt writes all of p at off. It may block. With durable it returns when
// the bytes would survive power loss (RWF_DSYNC). A range that ends past the
// end of the file gives EIO: a file that shrank is not grown back. After an
// error any part of p may have been written; if it satisfies SyncFailed, see
// Sync.
func (f *File) WriteAt(p []byte, off int64, durable bool) error {
	if err := f.inside("write", off, int64(len(p))); err != nil {
		return err
	}
	if durable {
		if err := f.syncer.failed(); err != nil {
			return err
		}
	}
	if f.traits.Direct {
		return f.directWrite(p, off, durable)
	}
	return f.writeFull(f.fd, p, off, durable)
}

// inside checks a range that is about to be changed.
func (f *File) inside(op string, off, n int64) error {
	if off < 0 || n < 0 || off > f.limit.Load()-n {
		return f.fail(op, errPastEnd)
	}
	return nil
}

// writeFull makes a durable write by RWF_DSYNC, which syncs what it writes alone. An
// error of that may be one of writing or one of syncing. So once there was no room,
// which may come and go from one call to the next, it writes and then syncs. In memory
// there is nothing to sync.
func (f *File) writeFull(fd int, p []byte, off int64, durable bool) error {
	durable = durable && !f.traits.Tmpfs
	dsync := durable && !f.noDsync.Load()
	for len(p) > 0 {
		var n int
		var err error
		if dsync {
			n, err = f.pwriteDsync(fd, p, off)
		} else {
			n, err = f.pwrite(fd, p, off)
		}
		switch {
		case err == unix.EINTR:
			continue
		case dsync && (err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.EINVAL):
			f.noDsync.Store(true)
			dsync = false
			continue
		case err != nil && dsync:
			return f.dsyncFailed(fd, p, off, err)
		case err != nil:
			f.noteFull(err)
			return f.fail("write", err)
		case n == 0:
			return f.fail("write", unix.ENOSPC)
		}
		p, off = p[n:], off+int64(n)
	}
	if durable && !dsync {
		return f.Sync()
	}
	return nil
}

// dsyncFailed tells whether a durable write failed in writing, which the
// client hears of and that is all, or in syncing, when the kernel may have
// dropped dirty bytes of others and will not say so again. It is a failed
// write if the same write without RWF_DSYNC fails too, and not by EIO. Past the page
// cache, if there is no tail in it, no dirty bytes of others are to be dropped: what
// there was no room for there, and is now, it makes durable.
func (f *File) dsyncFailed(fd int, p []byte, off int64, err error) error {
	full := f.noteFull(err)
	if err != unix.EIO {
		if _, again := f.pwrite(fd, p, off); again != nil && again != unix.EINTR && again != unix.EIO {
			return f.fail("write", again)
		}
	}
	if full && f.traits.Direct && f.tailFd < 0 {
		return f.writeFull(fd, p, off, true)
	}
	return f.syncer.fail(f.path, err)
}

// noteFull reports whether err says that there is no room, and if so has durable
// writes do without RWF_DSYNC from now on.
func (f *File) noteFull(err error) bool {
	full := err == unix.ENOSPC || err == unix.EDQUOT
	if full {
		f.noDsync.Store(true)
	}
	return full
}
