package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Largest writes that are made inline, in bytes: see File.InlineWrite.
const (
	inlineTmpfs  = 256 << 10
	inlineCached = 64 << 10
	pageSize     = 4096
)

// cachePage is the size of what the page cache keeps, in bytes, and cacheShift its
// logarithm: with some arm64 kernels it is 16 or 64 KiB.
var (
	cachePage  = int64(unix.Getpagesize())
	cacheShift = bits.TrailingZeros64(uint64(cachePage))
)

// What File.dirt says.
const (
	dirtOfOthers = iota // what they wrote may not have been on the disk when the file was opened
	dirtNone
	dirtWritten // through this description, or maybe
)

// File is an open host file: one open file description, or with O_DIRECT two
// of the same inode (the second, buffered one is for a tail that fills no
// block). Its methods may be called by any number of goroutines at once, but
// for Close, load and lock, which belong to whoever changes
// ownership. Offsets and lengths are bytes. Errors are *fs.PathError and wrap
// a syscall.Errno; buffers are the caller's again on return.
type File struct {
	fd       int
	tailFd   int // buffered twin of an O_DIRECT description, otherwise -1
	path     string
	id       inode
	writable bool
	traits   Traits

	size  int64        // at load
	limit atomic.Int64 // writes end here: length, or less once seen shrunk
	// Direct only: from here on, bytes go through tailFd. It equals length
	// when that is a multiple of the alignment.
	tail atomic.Int64

	sizing sync.Mutex // before ranges.mu
	length int64      // at load, or as Resize made it; sizing

	placeable bool                   // there may be one
	placed    sync.Once              // somebody has tried to map it
	place     atomic.Pointer[[]byte] // a map of the whole file, or nil; see Place
	expect    int64                  // how long that is at least, see expectLength

	ranges ranges
	slots  slots // of writes
	syncer syncer
	// dirt is what may have to be written to the disk. Whoever writes through this
	// description says so when the write has ended, with dirtied, before it is
	// acknowledged.
	dirt  atomic.Uint32
	pages pageMap

	noPunch, noZeroRange atomic.Bool // found not supported
	noDsync              atomic.Bool // the same, or not to be used: see writeFull

	peer   *File      // another description of the inode until the locks are taken, or nil
	held   []lockByte // bytes locked on fd and tailFd
	listed bool       // the kernel lists them in fdinfo
	faults faults
}

// inode identifies a file: a device node by the device behind it.
type inode struct{ dev, ino uint64 }

func inodeOf(st *unix.Stat_t) inode {
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return inode{dev: st.Rdev}
	}
	return inode{dev: st.Dev, ino: st.Ino}
}

// openHow says how a description is opened.
type openHow struct {
	write, direct bool
	pages         bool // for an owner: see pageMap
	overwrites    bool // of an image that is written: see smallFolios
	faults        faults
	// known is what the inode was opened as before, or nil. Its descriptor
	// stays open until the locks are taken.
	known *File
}

func (h openHow) flags() int {
	flags := unix.O_RDONLY
	if h.write {
		flags = unix.O_RDWR
	}
	if h.direct {
		flags |= unix.O_DIRECT
	}
	return flags
}

// openFile opens the regular file or block device at path. It never creates
// and never waits for the other end of a FIFO.
func openFile(path string, how openHow) (*File, error) {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Stat(path, &st) }); err != nil {
		return nil, openError(path, how, err)
	}
	if err := refuseKind(path, st.Mode); err != nil {
		return nil, err
	}
	flags := how.flags()
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		flags |= unix.O_NONBLOCK // should it have become a FIFO
	}
	fd, err := how.faults.open(opOpen, path, flags)
	if err != nil {
		return nil, openError(path, how, err)
	}
	return newFile(fd, path, how)
}

// reopen opens the very inode of f once more, whatever its path names now,
// as a description of its own that shares no locks with f.
func (f *File) reopen(how openHow) (*File, error) {
	fd, err := reopenFd(f.fd, f.path, f.id, opReopen, how)
	if err != nil {
		return nil, openError(f.path, how, err)
	}
	return newFile(fd, f.path, how)
}

func reopenFd(fd int, path string, id inode, op sysop, how openHow) (int, error) {
	n, err := how.faults.open(op, fmt.Sprintf("/proc/self/fd/%d", fd), how.flags())
	if err != unix.ENOENT {
		return n, err
	}
	// No /proc: by path, if that still names it.
	n, err = how.faults.open(op, path, how.flags()|unix.O_NONBLOCK)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(n, &st); err == nil && inodeOf(&st) != id {
		err = unix.ESTALE
	}
	if err != nil {
		unix.Close(n)
		return -1, err
	}
	return n, nil
}

// newFile takes fd, which it closes on failure.
func newFile(fd int, path string, how openHow) (f *File, err error) {
	f = &File{fd: fd, tailFd: -1, path: path, writable: how.write, faults: how.faults}
	defer func() {
		if err != nil {
			f.Close()
			f = nil
		}
	}()
	var st unix.Stat_t
	if err := f.fstat(&st); err != nil {
		return f, openError(path, how, err)
	}
	if err := refuseKind(path, st.Mode); err != nil {
		return f, err
	}
	// Without O_NONBLOCK, if it was opened so.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, how.flags()); err != nil {
		return f, openError(path, how, err)
	}
	f.id = inodeOf(&st)
	if k := how.known; k != nil && k.id == f.id && k.keeps() && !how.direct {
		// What an inode allows was found when k was opened.
		f.traits, f.peer = k.traits, k
	} else if err := f.findTraits(&st, how.direct); err != nil {
		return f, err
	}
	if how.write {
		f.slots = newSlots(&f.traits)
	}
	if how.overwrites {
		f.smallFolios()
	}
	t := &f.traits
	f.pages.wanted = how.pages && !t.Direct && (t.coherent || t.BlockDevice)
	if t.BlockDevice {
		return f, f.load()
	}
	return f, f.sized(st.Size)
}

// keeps reports whether what was found of the file holds as long as it is
// open: it lies on a file system that this kernel has alone.
func (f *File) keeps() bool { return f.fd >= 0 && f.traits.coherent }

// deadFile stands for a file that cannot be opened: I/O fails with EIO.
func deadFile(path string, id inode) *File {
	return &File{fd: -1, tailFd: -1, path: path, id: id, traits: Traits{FS: "other", Align: 1, BlockSize: pageSize}}
}

// load reads the file's size; I/O goes by it until the next load. It opens
// and locks the buffered twin where there is a tail. Nothing else may use the
// file at that time.
func (f *File) load() error {
	size, err := f.currentSize()
	if err != nil {
		return err
	}
	return f.sized(size)
}

// sized makes I/O go by the size that the file was found to have.
func (f *File) sized(size int64) error {
	f.size = size
	err := f.setLength(size)
	f.resetPlace()
	return err
}

// setLength makes I/O go by a length that the file has.
func (f *File) setLength(length int64) error {
	tail := length
	if f.traits.Direct && length%int64(f.traits.Align) != 0 {
		tail &^= int64(f.traits.tailUnit) - 1
		if f.tailFd < 0 {
			how := openHow{write: f.writable, faults: f.faults}
			fd, err := reopenFd(f.fd, f.path, f.id, opReopen, how)
			if err != nil {
				return openError(f.path, how, err)
			}
			f.tailFd = fd
		}
		if err := f.lockTwin(); err != nil {
			return err
		}
	}
	f.tail.Store(tail)
	f.length = length
	f.limit.Store(length)
	return nil
}

func (f *File) currentSize() (int64, error) {
	if f.traits.BlockDevice {
		if err := f.faults.check(opStat, 0); err != nil {
			return 0, f.fail("stat", err)
		}
		n, err := deviceSize(f.fd)
		if err != nil {
			return 0, f.fail("seek", err)
		}
		return n, nil
	}
	var st unix.Stat_t
	if err := f.fstat(&st); err != nil {
		return 0, f.fail("stat", err)
	}
	return st.Size, nil
}

// Fd is the file's descriptor, O_DIRECT if Traits says so. It stays open as
// long as the File does and is not to be closed or changed.
func (f *File) Fd() int { return f.fd }

// Path is the file's path as the user gave it, for messages.
func (f *File) Path() string { return f.path }

// Traits are what was found at open.
func (f *File) Traits() Traits { return f.traits }

// Writable reports whether the file is open for writing.
func (f *File) Writable() bool { return f.writable }

// Close unlocks and closes the descriptors, and the maps. It writes nothing.
// Nothing may use the file any more.
func (f *File) Close() error {
	return errors.Join(f.release(), f.unmapPages())
}

// release is Close but for the map for reading, which unmapPages is to close:
// that takes long where it is large, and nobody is to wait for it who waits for
// the locks.
func (f *File) release() error {
	f.unmapPlace()
	var errs [2]error
	for i, fd := range [...]*int{&f.tailFd, &f.fd} {
		if *fd < 0 {
			continue
		}
		err := f.faults.check(opClose, 0)
		f.unlock(*fd)
		// The descriptor is gone whatever close says (close(2)).
		if e := unix.Close(*fd); err == nil && e != unix.EINTR {
			err = e
		}
		if err != nil {
			errs[i] = f.fail("close", err)
		}
		*fd = -1
	}
	f.held, f.listed = nil, false
	return errors.Join(errs[:]...)
}

func (f *File) fail(op string, err error) error {
	if f.fd < 0 {
		err = unix.EIO // see deadFile
	}
	return &fs.PathError{Op: op, Path: f.path, Err: err}
}

var errPastEnd = fmt.Errorf("past the end of the file, which has become shorter: %w", unix.EIO)
