package backend

import (
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"

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
	// lockActive: 100, 101, 103, 201, 203.
	lockActive = lockSet{permRead | permWrite | permResize, permWrite | permResize}
	// lockReadOnly: 100, 201, 203.
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
}

func (e *LockError) Error() string {
	shared := ""
	if e.Shared {
		shared = "shared "
	}
	by := "in use by another process"
	if e.Holder != "" {
		by = "owned by " + e.Holder
	}
	return fmt.Sprintf("image is %s: Failed to get %s%q lock on %s; inactivate it there (nbd-export inactivate --control SOCKET), or stop that program",
		by, shared, e.Perm, e.Path)
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

// noLocks says that locks cannot protect the image.
func noLocks(path string, why error) error {
	return &fs.PathError{Op: "lock", Path: path, Err: fmt.Errorf(
		"byte-range locks do not work on this file (%w), so another program could write to it unnoticed; if you see to it that none does, use --locking off", why)}
}

// LockActive locks f for an owner who writes: it holds 100, 101, 103, 201
// and 203, and nobody else 200, 201, 203, 101 or 103. On failure nothing is
// held, and the error is a *LockError if somebody else has the image.
func (f *File) LockActive() error { return f.lock(lockActive) }

// LockReadOnly locks f for an owner who only reads: it holds 100, 201 and
// 203, and nobody else 200, 101 or 103. Errors are as of LockActive.
func (f *File) LockReadOnly() error { return f.lock(lockReadOnly) }

func (f *File) lock(s lockSet) (err error) {
	defer func() {
		if err != nil {
			f.Unlock()
		}
	}()
	take := func(b lockByte) error {
		err := f.setLock(f.fd, unix.F_RDLCK, b)
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
	if err := s.each(lockForbids, s.uses, test); err != nil {
		return err
	}
	if err := s.each(lockUses, s.forbids, test); err != nil {
		return err
	}
	// Some file systems take locks and never compare them.
	seen, err := f.locksSeen()
	if err == nil && !seen {
		err = fmt.Errorf("two openers do not conflict: %w", unix.ENOLCK)
	}
	if err != nil {
		return noLocks(f.path, err)
	}
	return nil
}

// lockTwin gives the buffered twin the locks of f, so that they last as long
// as I/O of either. Nothing is tested: it would find its sibling.
func (f *File) lockTwin() error {
	for _, b := range f.held {
		if err := f.setLock(f.tailFd, unix.F_RDLCK, b); err != nil {
			return noLocks(f.path, err)
		}
	}
	return nil
}

// locksSeen reports whether another description of this very file notices the
// locks that f has. Byte 201 tells: had another held it first, an owner who
// writes would have failed; where a second reader holds it too, locks are seen
// between processes. Nothing is taken for it, so nobody is disturbed. It may
// run beside anything but Unlock and Close.
func (f *File) locksSeen() (bool, error) {
	fd, err := reopenFd(f.fd, f.path, f.id, opReopen, openHow{faults: f.faults})
	if err != nil {
		return false, f.fail("open again", err)
	}
	defer unix.Close(fd)
	return f.heldElsewhere(fd, lockForbids+1)
}

// setLock takes or drops a byte for the description behind fd.
func (f *File) setLock(fd int, how int16, b lockByte) error {
	op := opLock
	if how == unix.F_UNLCK {
		op = opUnlock
	}
	return retry(func() error {
		if err := f.faults.check(op, int64(b)); err != nil {
			return err
		}
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: how, Whence: io.SeekStart, Start: int64(b), Len: 1})
	})
}

// heldElsewhere reports whether a description other than fd's holds b.
func (f *File) heldElsewhere(fd int, b lockByte) (bool, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: int64(b), Len: 1}
	err := retry(func() error {
		if err := f.faults.check(opTestLock, int64(b)); err != nil {
			return err
		}
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l)
	})
	return l.Type != unix.F_UNLCK, err
}

// Unlock drops all locks of f. An error is the first of those met; what it
// left goes with Close.
func (f *File) Unlock() error {
	var first error
	for _, fd := range [...]int{f.tailFd, f.fd} {
		if fd < 0 {
			continue
		}
		for _, b := range f.held {
			if err := f.setLock(fd, unix.F_UNLCK, b); err != nil && first == nil {
				first = f.fail("unlock", err)
			}
		}
	}
	f.held = nil
	return first
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
