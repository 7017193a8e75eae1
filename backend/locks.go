package backend

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Image locks are QEMU's (block/file-posix.c, raw_apply_lock_bytes and
// raw_check_lock_bytes): open file description locks of one byte each. Byte
// 100+i says "I use permission i", byte 200+i "I do not let others use
// permission i". All locks are taken shared, first all of them, and then it is
// tested whether anyone else holds a contrary byte: two who try at once may
// both fail, and never both succeed.
const (
	lockUses    = 100
	lockForbids = 200
)

// Permissions, by bit; QEMU's BLK_PERM_*.
const (
	permRead = 1 << iota
	permWrite
	permWriteUnchanged
	permResize
)

var permNames = [...]string{"consistent read", "write", "write unchanged", "resize"}

type lockByte int64

// lockSet is what an owner uses and what it forbids others, in permissions.
type lockSet struct{ uses, forbids int }

var (
	// lockActive is of an owner who writes: 100, 101, 103, 201 and 203, while
	// nobody else holds 200, 201, 203, 101 or 103.
	lockActive = lockSet{permRead | permWrite | permResize, permWrite | permResize}
	// lockReadOnly is of one who only reads: 100, 201 and 203, while nobody else
	// holds 200, 101 or 103.
	lockReadOnly = lockSet{permRead, permWrite | permResize}
)

func (s lockSet) each(base lockByte, perms int, fn func(lockByte) error) error {
	for i := range permNames {
		if perms>>i&1 != 0 {
			if err := fn(base + lockByte(i)); err != nil {
				return err
			}
		}
	}
	return nil
}

// LockError says that somebody else has the image.
type LockError struct {
	Path   string
	Byte   int64  // that is held elsewhere
	Perm   string // as QEMU names it
	Shared bool   // we want to forbid Perm, which somebody uses
	Holder string // who has it, as the owner record says, "" if it does not
	// Programs are the processes that have it, where there is no holder and they can
	// be seen.
	Programs string
	Order    string // what has the holder let go, "" if there is no holder
}

func (e *LockError) Error() string {
	shared := ""
	if e.Shared {
		shared = "shared "
	}
	by, order := "in use by another process", "nbd-export inactivate --control CTL"
	switch {
	case e.Holder != "":
		by, order = "owned by "+e.Holder, e.Order
	case e.Programs != "":
		by += ", " + e.Programs
	}
	advice := fmt.Sprintf("inactivate it there (%s), or stop that program", order)
	if e.Programs != "" && !strings.Contains(e.Programs, "nbd-export") {
		advice = "stop that program" // which takes no such orders
	}
	return fmt.Sprintf("image is %s: Failed to get %s%q lock on %s; %s", by, shared, e.Perm, e.Path, advice)
}

// Unwrap is EBUSY.
func (e *LockError) Unwrap() error { return unix.EBUSY }

func newLockError(path string, b lockByte) *LockError {
	e := &LockError{Path: path, Byte: int64(b)}
	if b >= lockForbids {
		e.Perm = permNames[b-lockForbids]
	} else {
		e.Perm, e.Shared = permNames[b-lockUses], true
	}
	return e
}

// noLocks says that locks cannot protect the image, unless why has nothing to
// do with them, as when there are too many open files.
func noLocks(path string, why error) error {
	errno, ok := errors.AsType[unix.Errno](why)
	if !ok || !slices.Contains([]unix.Errno{unix.ENOLCK, unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL}, errno) {
		return &fs.PathError{Op: "lock", Path: path, Err: why}
	}
	return &fs.PathError{Op: "lock", Path: path, Err: fmt.Errorf(
		"byte-range locks do not work on this file (%w), so another program could write to it unnoticed; if you see to it that none does, use --locking off", why)}
}

// lock takes the bytes of s and sees that nobody holds contrary ones. The error is
// a *LockError if somebody else has the image; f must be closed then, which drops
// what was taken.
func (f *File) lock(s lockSet) error {
	take := func(b lockByte) error {
		err := f.takeLock(f.fd, b)
		if err == unix.EAGAIN || err == unix.EACCES {
			return newLockError(f.path, b)
		}
		if err != nil {
			return noLocks(f.path, err)
		}
		f.held = append(f.held, b)
		return nil
	}
	test := func(b lockByte) error {
		held, err := f.heldElsewhere(f.fd, b)
		if err != nil {
			return noLocks(f.path, err)
		}
		if held {
			return newLockError(f.path, b)
		}
		return nil
	}
	if err := s.each(lockUses, s.uses, take); err != nil {
		return err
	}
	if err := s.each(lockForbids, s.forbids, take); err != nil {
		return err
	}
	// One look at all bytes finds out what mostly is so: nobody else has any.
	others, err := f.rangeHeldElsewhere(f.fd, lockUses, lockForbids-lockUses+lockByte(len(permNames)))
	if err != nil {
		return noLocks(f.path, err)
	}
	if others {
		if err := s.each(lockForbids, s.uses, test); err != nil {
			return err
		}
		if err := s.each(lockUses, s.forbids, test); err != nil {
			return err
		}
	}
	// Some file systems take locks and never compare them.
	var seen bool
	if f.peer != nil {
		seen, err = f.seenFrom(f.peer.fd)
	} else {
		seen, err = f.locksSeen()
	}
	if err == nil && !seen {
		err = fmt.Errorf("two openers do not conflict: %w", unix.ENOLCK)
	}
	if err != nil {
		return noLocks(f.path, err)
	}
	if !f.listed {
		// Where the server keeps the locks (FUSE) the kernel does not list them.
		lists, err := f.listsHeld(f.fd)
		f.listed = err == nil && lists
	}
	return nil
}

// lockTwin gives the buffered twin the locks of f, so that they last as long
// as I/O of either. Nothing is tested: it would find its sibling.
func (f *File) lockTwin() error {
	for _, b := range f.held {
		if err := f.takeLock(f.tailFd, b); err != nil {
			return noLocks(f.path, err)
		}
	}
	return nil
}

// locksSeen reports whether another description of this very file notices the
// locks that f has. Byte 201 tells: had another held it first, an owner who
// writes would have failed; where a second reader holds it too, locks are seen
// between processes. Nothing is taken for it, so nobody is disturbed. It may
// run beside anything but Close.
func (f *File) locksSeen() (bool, error) {
	fd, err := reopenFd(f.fd, f.path, f.id, opReopen, openHow{faults: f.faults})
	if err != nil {
		return false, f.fail("open again", err)
	}
	defer unix.Close(fd)
	return f.seenFrom(fd)
}

// seenFrom is locksSeen for another description that is open already.
func (f *File) seenFrom(fd int) (bool, error) { return f.heldElsewhere(fd, lockForbids+1) }

// locksKept reports whether f still has the locks it took. What its own
// descriptions hold is in fdinfo, whoever else holds the same bytes; where
// that cannot be had, locksSeen has to do. It may run beside anything but
// Close.
func (f *File) locksKept() (bool, error) {
	if !f.listed {
		return f.locksSeen()
	}
	for _, fd := range [...]int{f.fd, f.tailFd} {
		if fd < 0 {
			continue
		}
		kept, err := f.listsHeld(fd)
		if err != nil {
			return f.locksSeen()
		}
		if !kept {
			return false, nil
		}
	}
	return true, nil
}

// listsHeld reports whether the kernel lists all bytes of f.held as locks of
// the description behind fd.
func (f *File) listsHeld(fd int) (bool, error) {
	if err := f.faults.check(opListLocks, 0); err != nil {
		return false, err
	}
	info, err := fdinfo(fd)
	if err != nil {
		return false, err
	}
	for _, b := range f.held {
		if !listsLock(info, b) {
			return false, nil
		}
	}
	return true, nil
}

// fdinfo is what the kernel says of an open file. os.ReadFile does the same in
// twice as many system calls, which counts at a handover.
func fdinfo(fd int) (string, error) {
	info, err := (faults)(nil).open(opOpen, fmt.Sprintf("/proc/self/fdinfo/%d", fd), unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer unix.Close(info)
	var text []byte
	for b := make([]byte, pageSize); ; {
		n := 0
		if err := retry(func() (err error) { n, err = unix.Read(info, b); return err }); err != nil {
			return "", err
		}
		if n <= 0 {
			return string(text), nil
		}
		text = append(text, b[:n]...)
	}
}

// listsLock looks for b in the text of an fdinfo, where neighbouring bytes
// are one range:
//
//	lock:	1: OFDLCK ADVISORY  READ -1 fe:00:9977875 100 101
func listsLock(fdinfo string, b lockByte) bool {
	for line := range strings.Lines(fdinfo) {
		v, ok := strings.CutPrefix(line, "lock:")
		w := strings.Fields(v)
		if !ok || len(w) < 8 || w[1] != "OFDLCK" {
			continue
		}
		first, err := strconv.ParseInt(w[6], 10, 64)
		if err != nil || int64(b) < first {
			continue
		}
		if last, err := strconv.ParseInt(w[7], 10, 64); w[7] == "EOF" || err == nil && int64(b) <= last {
			return true
		}
	}
	return false
}

const (
	// Who tries to lock an owned image holds byte 101 for a moment, until it
	// finds that it may not. Only who holds it for longer than that writes.
	strangerLooks = 5
	strangerPause = 2 * time.Millisecond
	strangerTimes = 3 // calls of Check in a row
)

// stranger reports whether another description holds the byte of those who
// write, although f is locked by one who writes and forbids it. With a twin,
// which holds the byte too, that cannot be told.
func (f *File) stranger() (bool, error) {
	const writes = lockUses + 1
	if f.tailFd >= 0 || !slices.Contains(f.held, writes) {
		return false, nil
	}
	for try := range strangerLooks {
		if try > 0 {
			time.Sleep(strangerPause)
		}
		if held, err := f.heldElsewhere(f.fd, writes); err != nil || !held {
			return false, err
		}
	}
	return true, nil
}

// takeLock takes a byte for the description behind fd.
func (f *File) takeLock(fd int, b lockByte) error {
	return retry(func() error {
		if err := f.faults.check(opLock, int64(b)); err != nil {
			return err
		}
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: int64(b), Len: 1})
	})
}

// unlock gives up the locks of fd, which is about to be closed. Closing alone
// would leave that to the moment when the kernel lets go of the description,
// which for one that io_uring used is a little later than its last completion.
// An error is no matter: then it is that moment.
func (f *File) unlock(fd int) {
	if len(f.held) == 0 || fd < 0 {
		return
	}
	_ = retry(func() error {
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart})
	})
}

// heldElsewhere reports whether a description other than fd's holds b.
func (f *File) heldElsewhere(fd int, b lockByte) (bool, error) { return f.rangeHeldElsewhere(fd, b, 1) }

// rangeHeldElsewhere reports whether one holds any of n bytes from b.
func (f *File) rangeHeldElsewhere(fd int, b, n lockByte) (bool, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: int64(b), Len: int64(n)}
	err := retry(func() error {
		if err := f.faults.check(opTestLock, int64(b)); err != nil {
			return err
		}
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l)
	})
	return l.Type != unix.F_UNLCK, err
}

// heldText lists the bytes f has locked, as in "100,101", or says "none".
func (f *File) heldText() string {
	if len(f.held) == 0 {
		return "none"
	}
	var s []string
	for _, b := range f.held {
		s = append(s, strconv.Itoa(int(b)))
	}
	return strings.Join(s, ",")
}
