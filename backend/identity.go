package backend

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Identity is what tells an image from others, as this process sees its
// storage now.
type Identity struct {
	// BootID is of this kernel, Dev and Ino are of the file, or, with Ino 0,
	// of the device behind a node. Within one boot they name the image.
	BootID   string
	Dev, Ino uint64
	Size     int64 // bytes
	// OpenErr is why activation could not open the image, nil if it could, or
	// if the image is active.
	OpenErr error

	// Record is where the owner record is. Epoch, Since and Nonce are what it
	// says now, zero if there is none.
	Record RecordPlace
	Epoch  uint64
	Since  time.Time
	Nonce  string
	// RecordErr is why what stands there is no record.
	RecordErr error
	// Lags: the file system may show an older record for a while.
	Lags bool
}

// Identify looks at the image anew. Of an inactive one it sees whether
// activation could open it for writing, without doing so: while it is inactive
// this process has no descriptor that could write, not even for a moment. It
// may be called at any time, and blocks for as long as the storage does.
func (o *Owned) Identify() Identity {
	v := o.cur.Load()
	id := Identity{
		BootID: thisProcess().BootID, Dev: o.id.dev, Ino: o.id.ino, Size: v.Size(),
		Record: o.RecordPlace(), Lags: !v.file.traits.coherent && !v.file.traits.Tmpfs,
	}
	if !v.active {
		id.Size, id.OpenErr = o.tryOpen(v.Size())
		if !o.opts.ReadOnly {
			// Where its next activation looks for it.
			id.Record = placeRecord(o.opts.Path, o.opts.OwnerRecord, v.file.traits.BlockDevice)
		}
	}
	if path := id.Record.Path; path != "" {
		if id.Lags {
			lookAgain(filepath.Dir(path))
		}
		rec, _, err := readRecord(path, o.faults)
		id.RecordErr = err
		if rec != nil {
			id.Epoch, id.Since, id.Nonce = rec.Epoch, rec.Since, rec.Nonce
		}
	}
	return id
}

// tryOpen opens the image as Acquire does, but for reading, and asks whether
// it could be written. It returns the image's size, or that given if it cannot
// be had.
func (o *Owned) tryOpen(size int64) (int64, error) {
	f, err := openFile(o.opts.Path, o.how(false))
	if isErrno(err, unix.ENOENT) {
		return size, o.removed()
	}
	if err != nil {
		return size, err
	}
	err = o.replaced()
	if f.id == o.id {
		var now int64
		if now, err = o.format.check(f); err == nil {
			size = now
		}
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return size, err
	}
	if !o.opts.ReadOnly {
		err := retry(func() error { return unix.Faccessat(unix.AT_FDCWD, o.opts.Path, unix.W_OK, unix.AT_EACCESS) })
		if err != nil {
			return size, openError(o.opts.Path, o.how(true), err)
		}
	}
	return size, nil
}

// lookAgain has a network file system ask its server what is in a directory:
// it does when one is opened, and keeps names it has seen for up to a minute
// otherwise.
func lookAgain(dir string) {
	if fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
		unix.Close(fd)
	}
}

// Note writes nonce into the owner record, for others to find beside their
// image. It stays there until the next owner writes its own record. noted is
// false, without an error, where this process is not the owner or keeps no
// record. An error is a *FencedError where the record names another owner. It
// may be called at any time, and blocks for as long as the storage does.
func (o *Owned) Note(nonce string) (noted bool, err error) { return o.record.note(nonce) }

func (o *ownerRecord) note(nonce string) (bool, error) {
	o.mu.Lock() // the locks do not go while it is held and there is a claim
	defer o.mu.Unlock()
	if o.mine == nil {
		return false, nil
	}
	path := o.place.Load().Path
	v, err := o.look(path)
	if err == nil && v == unknown {
		err = fmt.Errorf("owner record %s cannot be read", path)
	}
	if err != nil {
		return false, err
	}
	next := *o.mine
	next.Nonce = nonce
	if err := o.replace(path, next.bytes()); err != nil {
		return false, &fs.PathError{Op: "write owner record", Path: path, Err: fmt.Errorf(
			"%w; without it nobody can tell that two exporters have the same image; make room for it, or give --assume-same-image", err)}
	}
	o.mine = &next
	return true, nil
}
