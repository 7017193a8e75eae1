package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Ownership is what can be seen from outside of who owns an image.
type Ownership struct {
	Record RecordPlace
	Owner  *OwnerRecord // nil if there is no record
	// RecordErr is why what stands at Record.Path is no record, LocksErr why
	// it is not known what is locked.
	RecordErr, LocksErr error
	Locks               []int64 // bytes that somebody holds, in order
	Scope               string  // as of Owned.LockScope
	// Holders have these locks; those that can be seen.
	Holders []Holder
	// Stale: the locks of one who writes are not those of the process that Owner
	// names, although that lives: whoever has them could not write the record.
	Stale bool
}

// Written reports whether somebody holds the locks of one who writes. Other
// locks are those of readers.
func (o *Ownership) Written() bool { return ofWriter(o.Locks) }

// Writers are those of Holders that hold the locks of one who writes.
func (o *Ownership) Writers() (w []Holder) {
	for _, h := range o.Holders {
		if ofWriter(h.Locks) {
			w = append(w, h)
		}
	}
	return w
}

func ofWriter(locks []int64) bool {
	return slices.ContainsFunc(locks, func(b int64) bool { return b > lockUses && b < lockUses+int64(len(permNames)) })
}

// Who looks at the owner record and the locks of the image at path. It takes
// no lock and changes nothing. ownerRecord is as Options.OwnerRecord.
func Who(path, ownerRecord string) (*Ownership, error) {
	f, err := openFile(path, openHow{})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	place := placeRecord(path, ownerRecord, f.traits.BlockDevice)
	for try := 0; ; try++ {
		o := &Ownership{Record: place, Scope: f.lockScope()}
		if place.Path != "" {
			o.Owner, _, o.RecordErr = readRecord(place.Path, nil)
		}
		o.Locks, o.LocksErr = f.allHeldElsewhere()
		if len(o.Locks) > 0 {
			o.Holders = f.holders(o.Locks)
		}
		r := o.Owner
		if r == nil || r.Clean || !o.Written() || !r.lacksLocks(f) {
			return o, nil
		}
		// It may have let go meanwhile, and another have written its own.
		now, _, err := readRecord(place.Path, nil)
		if err == nil && now != nil && now.sameOwner(r) && !now.Clean || try == whoTries {
			o.Stale = true
			return o, nil
		}
	}
}

// whoTries bounds how often Who begins anew while owners change.
const whoTries = 10

// allHeldElsewhere lists the lock bytes that others hold.
func (f *File) allHeldElsewhere() (held []int64, err error) {
	all := 1<<len(permNames) - 1
	look := func(b lockByte) error {
		is, err := f.heldElsewhere(f.fd, b)
		if is && err == nil {
			held = append(held, int64(b))
		}
		return err
	}
	var s lockSet
	if err = s.each(lockUses, all, look); err == nil {
		err = s.each(lockForbids, all, look)
	}
	return held, err
}

// lacksLocks reports whether it is certain that the process that r names lives
// and has not locked f as one who writes: /proc tells, of a process of the same
// user, and of file systems whose locks the kernel has.
func (r *OwnerRecord) lacksLocks(f *File) bool {
	if r.Process() != ProcessLives || !f.traits.coherent && !f.traits.BlockDevice {
		return false
	}
	proc := fmt.Sprintf("/proc/%d/", r.PID)
	fds, err := os.ReadDir(proc + "fdinfo")
	if err != nil {
		return false
	}
	for _, fd := range fds {
		info, err := os.ReadFile(proc + "fdinfo/" + fd.Name())
		if errors.Is(err, fs.ErrNotExist) || err == nil && !listsLock(string(info), lockUses+1) {
			continue
		}
		var st unix.Stat_t
		if err != nil || unix.Stat(proc+"fd/"+fd.Name(), &st) != nil || inodeOf(&st) == f.id {
			return false
		}
	}
	return true
}
