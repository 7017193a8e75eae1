package backend

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// readRecord reads the record at path: nil without an error if there is none.
// An empty file is none: records are not synced, so that is what a loss of
// power can leave of one. raw are its bytes, nil if the file does not exist.
//
// It may be called beside the owner, who may have written two more since it was opened:
// the second goes into the same file, so that half of one may be read. Then it is read
// anew.
func readRecord(path string, h faults) (r *OwnerRecord, raw []byte, err error) {
	for try := 0; ; try++ {
		was := raw
		raw, err = readBounded(path, h)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil, nil
		}
		if err != nil {
			break
		}
		if len(raw) == 0 {
			return nil, raw, nil
		}
		if r, err = parseRecord(raw); err == nil {
			return r, raw, nil
		}
		if bytes.Equal(raw, was) || try == recordTries {
			break
		}
	}
	return nil, nil, &RecordError{Path: path, Err: err}
}

// recordTries bounds how often what is no record is read anew.
const recordTries = 5

func readBounded(path string, h faults) ([]byte, error) {
	fd, err := h.open(opRecordOpen, path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err == unix.ELOOP {
		return nil, notARecord("it is a symbolic link")
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, notARecord("it is not a regular file")
	}
	b := make([]byte, min(max(st.Size, 0), recordMax)+1)
	n := 0
	for n < len(b) {
		var k int
		err := retry(func() (err error) {
			if err = h.check(opRecordRead, int64(n)); err == nil {
				k, err = unix.Read(fd, b[n:])
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		asked := len(b) - n
		if n += k; k == 0 || k < asked && int64(n) >= st.Size {
			break // its end, without another call to say so
		}
	}
	return b[:n:n], nil
}

// recordWas follows the path of a record. There is what it was before, which is what
// the next one is written into: to make a file takes 50 us of a handover on tmpfs, and
// ext4 0.1 to 0.25 ms to remove one. Then the two change places.
const recordWas = ".was"

// recordSpot is where a record is, and what it is about.
type recordSpot struct {
	path  string
	image *unix.Stat_t // whose mode the record gets and, where that is allowed, owner
	// near: the file system is this kernel's alone. On others files change no places,
	// and each record is a new one.
	near bool
}

// replace puts b at the path by renaming, so that whoever opens it finds it whole. It is
// not synced: what a loss of power takes with it, it takes from all owners. written is
// the file as it was then, nil where that is not to be relied on.
func (s recordSpot) replace(b []byte, h faults) (written *filePrint, err error) {
	fd, st, err := s.openWas(len(b), h)
	if err != nil {
		return nil, err
	}
	open := true
	shut := func() error {
		open = false
		if err := unix.Close(fd); err != unix.EINTR {
			return err
		}
		return nil
	}
	defer func() {
		if open {
			_ = shut()
		}
	}()
	err = s.fill(fd, &st, b, h)
	near := s.near && st.Dev == s.image.Dev
	if err == nil && !near {
		// What NFS could not write it says here.
		if err = h.check(opRecordClose, 0); err == nil || err == unix.EINTR {
			err = shut()
		}
	}
	if err == nil {
		err = s.rename(h)
	}
	if err == unix.ENOENT {
		// NFS says so of a request that was carried out and sent again.
		if got, e := readBounded(s.path, h); e == nil && bytes.Equal(got, b) {
			err = nil
		}
	}
	if err == nil && near && unix.Fstat(fd, &st) == nil {
		print := printOf(&st)
		written = &print
	}
	if err != nil {
		_ = h.unlink(s.path + recordWas)
	}
	return written, err
}

// recordSector is what a disk writes as a whole, in bytes. Records are as long,
// if they are not longer, so that one can be overwritten by another.
const recordSector = 512

// padded is the record b with spaces before its last newline, up to recordSector.
func padded(b []byte) []byte {
	n := recordSector - len(b)
	if n <= 0 || len(b) == 0 {
		return b
	}
	p := append(make([]byte, 0, recordSector), b[:len(b)-1]...)
	return append(append(p, bytes.Repeat([]byte(" "), n)...), b[len(b)-1])
}

// overwriteRecord puts b over the record at path, for where there is no room for
// another file: a full disk has given the record its sector already, and a directory
// that cannot be written may have a record that can. It is one write within one page,
// which a process that is killed has done or not, and within one sector, which a loss
// of power leaves as it was or as it is to be. Who reads meanwhile may see both, and
// no owner does: only who has the locks writes.
func overwriteRecord(path string, b []byte, h faults) (err error) {
	fd, err := h.open(opRecordOverwrite, path, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return err
	}
	defer func() {
		// What NFS could not write it says here.
		if e := unix.Close(fd); err == nil && e != unix.EINTR {
			err = e
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 || st.Size != recordSector || len(b) != recordSector {
		return unix.EINVAL
	}
	var n int
	if err = retry(func() error { n, err = unix.Pwrite(fd, b, 0); return err }); err != nil {
		return err
	}
	if n < len(b) {
		return unix.EIO
	}
	return nil
}

// rename puts what was made in its place, and what stood there in that of it.
func (s recordSpot) rename(h faults) error {
	was := s.path + recordWas
	return retry(func() error {
		if err := h.check(opRecordRename, 0); err != nil {
			return err
		}
		if s.near {
			err := unix.Renameat2(unix.AT_FDCWD, was, unix.AT_FDCWD, s.path, unix.RENAME_EXCHANGE)
			if err == nil || err == unix.EINTR {
				return err
			}
			// There is no record yet, or it cannot be done here.
		}
		return unix.Rename(was, s.path)
	})
}

// openWas opens what a record of size bytes is to be written into: what the record
// was before, if that can be written over, or a new file. What else stands there was
// left by an owner that died.
func (s recordSpot) openWas(size int, h faults) (fd int, st unix.Stat_t, err error) {
	was := s.path + recordWas
	open := func(flags int) error {
		return retry(func() error {
			if err := h.check(opRecordCreate, 0); err != nil {
				return err
			}
			fd, err = unix.Open(was, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC|flags, s.image.Mode&0o666)
			return err
		})
	}
	const anew = unix.O_CREAT | unix.O_EXCL
	stands := false
	if s.near {
		err = open(0)
		stands = err != unix.ENOENT
		if err == nil {
			if unix.Fstat(fd, &st) == nil && s.reuses(&st, size) {
				return fd, st, nil
			}
			unix.Close(fd)
		}
	}
	if !stands {
		err = open(anew)
		stands = err == unix.EEXIST
	}
	if stands {
		if err := h.unlink(was); err != nil && err != unix.ENOENT {
			return -1, st, fmt.Errorf("%s is in the way, and cannot be removed: %w", was, err)
		}
		err = open(anew)
	}
	if err != nil {
		return -1, st, err
	}
	if unix.Fstat(fd, &st) != nil {
		st = unix.Stat_t{}
	}
	return fd, st, nil
}

// reuses reports whether a record of size bytes is written over a file: only if that is
// certain to be no other file's other name, if no other user has made it, who could have
// it open and write into it at any time, and if it has the mode and the group of the
// image, which of a file that is not one's own cannot be changed.
func (s recordSpot) reuses(st *unix.Stat_t, size int) bool {
	return st.Mode == unix.S_IFREG|s.image.Mode&0o666 && st.Nlink == 1 && st.Size == int64(size) &&
		st.Gid == s.image.Gid && (st.Uid == s.image.Uid || st.Uid == uint32(unix.Geteuid()))
}

func (h faults) unlink(path string) error {
	return retry(func() error {
		if err := h.check(opRecordUnlink, 0); err != nil {
			return err
		}
		return unix.Unlink(path)
	})
}

// fill writes b to the file fd, which is as st says.
func (s recordSpot) fill(fd int, st *unix.Stat_t, b []byte, h faults) (err error) {
	// Whoever can open the image has to be able to read its record; where
	// the file system has no such modes or owners, it does without.
	if st.Uid != s.image.Uid || st.Gid != s.image.Gid {
		if unix.Fchown(fd, int(s.image.Uid), int(s.image.Gid)) != nil && st.Gid != s.image.Gid {
			_ = unix.Fchown(fd, -1, int(s.image.Gid)) // who is not root may change that
		}
	}
	if mode := s.image.Mode & 0o666; st.Mode&0o7777 != mode {
		_ = unix.Fchmod(fd, mode)
	}
	for off := 0; off < len(b); {
		n := len(b) - off
		if h != nil {
			if n, err = h(opRecordWrite, int64(off), n); err == unix.EINTR {
				continue
			} else if err != nil {
				return err
			}
		}
		n, err = unix.Write(fd, b[off:off+n])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return unix.ENOSPC
		}
		off += n
	}
	return nil
}

// unwritable tells errors of a place where nothing can be written from those
// of storage that does not work.
func unwritable(err error) bool {
	for _, errno := range [...]unix.Errno{
		unix.EACCES, unix.EPERM, unix.EROFS, unix.ENOSPC, unix.EDQUOT, unix.ENAMETOOLONG,
	} {
		if isErrno(err, errno) {
			return true
		}
	}
	return false
}
