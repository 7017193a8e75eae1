package backend

import "golang.org/x/sys/unix"

// Asynchronous I/O is done by the caller, with an io_uring, on Fd. What is not
// one plain system call (edges of blocks, the tail, a file system that cannot)
// is left to ReadAt and WriteAt, and so is everything that does not go as
// expected: they finish the work, or find out what is wrong.

// AsyncRead reports whether reading p from off is one system call on Fd that
// the kernel can do without keeping a thread waiting. If it reads less than p
// or fails, ReadAt is to be called.
func (f *File) AsyncRead(p []byte, off int64) bool {
	switch {
	case f.faults != nil || len(p) == 0 || off < 0:
		return false
	case f.traits.Direct:
		return f.straight(p, off)
	}
	return f.traits.NowaitReads
}

// straight reports whether p goes between memory and device in one piece.
func (f *File) straight(p []byte, off int64) bool {
	return (off|int64(len(p)))&int64(f.traits.Align-1) == 0 && f.memAligned(p) && off+int64(len(p)) <= f.tail.Load()
}

// AsyncWrite is a write under way.
type AsyncWrite struct{ span *span }

// StartWrite reports whether writing p at off is one system call on Fd that
// the kernel can do without keeping a thread waiting, with flags as those of
// pwritev2. Then EndWrite must follow, when the system call has ended. It does
// not wait: where it would, or for a range past the end, the answer is no.
func (f *File) StartWrite(p []byte, off int64, durable bool) (w AsyncWrite, flags int, ok bool) {
	n := int64(len(p))
	if f.faults != nil || !f.traits.Direct || n == 0 || off < 0 || off > f.limit.Load()-n || !f.straight(p, off) {
		return w, 0, false
	}
	if durable {
		if f.noDsync.Load() || f.syncer.failed() != nil {
			return w, 0, false
		}
		flags = unix.RWF_DSYNC
	}
	w.span = f.ranges.tryEnter(off, off+n)
	return w, flags, w.span != nil
}

// EndWrite ends what StartWrite began.
func (f *File) EndWrite(w AsyncWrite) { f.ranges.leave(w.span) }

// DurableWriteFailed says what a write of p at off with RWF_DSYNC that ended
// with errno means, which for WriteAt to try again would hide: a SyncError, or
// that only the write failed. It may block. nil means that WriteAt is to be
// called, as for any other write.
func (f *File) DurableWriteFailed(p []byte, off int64, errno unix.Errno) error {
	switch errno {
	case unix.EINTR, unix.EAGAIN, unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL:
		return nil
	}
	return f.dsyncFailed(f.fd, p, off, errno)
}
