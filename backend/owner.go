package backend

import (
	"errors"

	"golang.org/x/sys/unix"
)

// What changes ownership, in activate.go and inactivate.go, is called by one
// goroutine, one call at a time, while data methods go on unless a comment says
// otherwise.
//
//	inactivate  SyncAhead Settle       (Unsettle | PublishInactive Release)
//	give up               Abandon                  PublishInactive Release
//	activate    Acquire Load Claim     (Withdraw | PublishActive Retire)

// Key orders the images of a group for locking: by device, then inode.
func (o *Owned) Key() (dev, ino uint64) { return o.id.dev, o.id.ino }

// Name is the image's path as given, for messages.
func (o *Owned) Name() string { return o.opts.Path }

// LocksHeld lists the lock bytes held, as in "100,101,103,201,203", or says
// "none". It may be called at any time.
func (o *Owned) LocksHeld() string { return *o.held.Load() }

// LockScope says how far the image's locks reach: "cluster" (everybody who
// can open it), "host-local" or "off". It may be called at any time.
func (o *Owned) LockScope() string { return o.scope }

// RecordPlace says where the owner record is, or why there is none. It may be
// called at any time.
func (o *Owned) RecordPlace() RecordPlace { return *o.record.place.Load() }

func (o *Owned) noteLocks(f *File) {
	s := "none"
	if f != nil {
		s = f.heldText()
	}
	o.held.Store(&s)
}

func (o *Owned) how(write bool) openHow {
	return openHow{write: write, direct: o.opts.Cache == CacheNone, overwrites: !o.opts.ReadOnly, faults: o.faults}
}

// dropNext closes what was to be published, if there is any.
func (o *Owned) dropNext() {
	if v := o.next; v != nil {
		o.next = nil
		if v.active {
			o.warn(v.close())
		} else {
			o.closeInactive(v)
		}
	}
}

func (o *Owned) publish() {
	if o.next == nil || o.old != nil {
		panic("backend: published out of order")
	}
	o.old, o.next = o.cur.Swap(o.next), nil
}

// Close closes whatever is open, writing nothing to the image; the locks go
// with the descriptions. Of a settled image the owner record says before that it was let go in
// order; of one that is being activated, what it said before. No data method
// may be running or called again. It may be called twice.
func (o *Owned) Close() error {
	var errs []error
	o.unmapping.Wait()
	if o.next != nil && o.next.active {
		errs = append(errs, o.record.withdraw())
	} else {
		errs = append(errs, o.endClaim(o.cur.Load(), true))
	}
	errs = append(errs, closeAll(o.next, o.old, o.cur.Load()))
	if o.spare != nil {
		errs = append(errs, o.spare.Close())
	}
	o.next, o.old, o.spare = nil, nil, nil
	o.noteLocks(nil)
	return errors.Join(errs...)
}

// isErrno reports whether err wraps errno.
func isErrno(err error, errno unix.Errno) bool { return errors.Is(err, errno) }
