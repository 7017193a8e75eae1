package backend

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// What follows is called by the one goroutine that changes ownership, one
// call at a time, while data methods go on unless a comment says otherwise.
//
//	inactivate  SyncAhead Settle (Unsettle |                        PublishInactive Release)
//	give up               Abandon                                   PublishInactive Release
//	activate    Acquire Load     (Withdraw | PublishActive Retire)

const (
	// A sync ahead that took no longer leaves little.
	littleLeft = 20 * time.Millisecond
	maxAhead   = 5

	dropTries = 16 // in 0.1 s
)

// Key orders the images of a group for locking: by device, then inode.
func (r *Raw) Key() (dev, ino uint64) { return r.id.dev, r.id.ino }

// Name is the image's path as given, for messages.
func (r *Raw) Name() string { return r.opts.Path }

// LocksHeld lists the lock bytes held, as in "100,101,103,201,203", or says
// "none". It may be called at any time.
func (r *Raw) LocksHeld() string { return *r.held.Load() }

// LockScope says how far the image's locks reach: "cluster" (everybody who
// can open it), "host-local" or "off". It may be called at any time.
func (r *Raw) LockScope() string { return r.scope }

func (r *Raw) noteLocks(f *File) {
	s := "none"
	if f != nil {
		s = f.heldText()
	}
	r.held.Store(&s)
}

// SyncAhead makes durable what there is while writes are still served, again
// and again until the last time took no more than 20 ms, so that little is left
// for Settle. ctx is looked at between the steps.
func (r *Raw) SyncAhead(ctx context.Context) error {
	v := r.cur.Load()
	if !v.file.writable {
		return ctx.Err()
	}
	for range maxAhead {
		if err := ctx.Err(); err != nil {
			return err
		}
		start := time.Now()
		if err := v.file.Sync(); err != nil {
			return err
		}
		if time.Since(start) <= littleLeft {
			break
		}
	}
	return ctx.Err()
}

// Settle is called with the gate closed and no write-class request under way.
// It opens the read-only description of the inactive image, makes everything
// durable and takes the fingerprint. An error leaves the image active; one
// that satisfies SyncFailed means that it can never be handed over as clean.
func (r *Raw) Settle() error {
	v := r.cur.Load()
	next, err := r.openInactive(v)
	if err != nil {
		return err
	}
	if v.file.writable {
		if err := v.file.Sync(); err != nil {
			next.file.Close()
			return err
		}
	}
	r.print = v.file.fingerprint()
	r.next = next
	return nil
}

// openInactive opens a view of the same inode for reading, without locks. Its
// size stays that of v, which clients know.
func (r *Raw) openInactive(v *view) (*view, error) {
	if r.next != nil {
		return nil, r.fail("inactivate", fmt.Errorf("another transition is under way: %w", unix.EBUSY))
	}
	f, err := v.file.reopen(r.how(false))
	if err != nil {
		return nil, err
	}
	return newView(f, v.size, false), nil
}

func (r *Raw) how(write bool) openHow {
	return openHow{write: write, direct: r.opts.Cache == CacheNone, faults: r.faults}
}

// Unsettle undoes Settle: the image stays active. It cannot fail; what closing
// the read-only description says goes to Warn.
func (r *Raw) Unsettle() error {
	r.dropNext()
	return nil
}

// dropNext closes what was to be published, if there is any.
func (r *Raw) dropNext() {
	if v := r.next; v != nil {
		r.next = nil
		r.warn(v.file.Close())
	}
}

// Abandon gives up an image that cannot be settled: it drops the page cache
// where that is possible, and opens the read-only description. What was not
// durable may be lost. PublishInactive and Release follow whatever it returns:
// where the file cannot be opened, reads give EIO from then on.
func (r *Raw) Abandon() error {
	v := r.cur.Load()
	r.dropNext()
	next, err := r.openInactive(v)
	if err != nil {
		next = &view{file: deadFile(r.opts.Path, r.id), size: v.size}
	}
	if e := v.file.fadvise(0, 0, unix.FADV_DONTNEED); e != nil {
		err = errors.Join(err, v.file.fail("drop the page cache of", e))
	}
	r.print = nil
	r.next = next
	return err
}

// PublishInactive makes requests use the read-only description that Settle or
// Abandon opened. It cannot fail.
func (r *Raw) PublishInactive() { r.publish() }

func (r *Raw) publish() {
	if r.next == nil || r.old != nil {
		panic("backend: published out of order")
	}
	r.old, r.next = r.cur.Swap(r.next), nil
}

// Release is called when no request uses the view before the last
// PublishInactive. It drops the locks and closes every writable description.
// Both happen whatever fails; an error is for the log.
func (r *Raw) Release() error {
	v := r.old
	if v == nil {
		return nil
	}
	r.old = nil
	err := errors.Join(v.file.Unlock(), v.file.Close())
	r.noteLocks(nil)
	return err
}

// Acquire opens the image anew, for writing unless it is read-only, locks that
// description, and sees that the path still names the inode being served. On
// failure nothing is held; the error is a *LockError if somebody else has the
// image.
func (r *Raw) Acquire() (err error) {
	if r.next != nil {
		return r.fail("activate", fmt.Errorf("another transition is under way: %w", unix.EBUSY))
	}
	f, err := openFile(r.opts.Path, r.how(!r.opts.ReadOnly))
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Unlock()
			f.Close()
		}
	}()
	if f.id != r.id {
		return r.replaced()
	}
	if r.dropsCache(f) {
		// In bulk ahead, so that little is left to drop under the locks.
		f.fadvise(0, 0, unix.FADV_DONTNEED)
	}
	if r.opts.Locking != LockingOff {
		lock := f.LockActive
		if r.opts.ReadOnly {
			lock = f.LockReadOnly
		}
		if err := lock(); err != nil {
			return err
		}
		// Who replaces an image by renaming may have done so meanwhile.
		var st unix.Stat_t
		if err := retry(func() error { return unix.Stat(r.opts.Path, &st) }); err != nil {
			return r.fail("stat", err)
		}
		if inodeOf(&st) != r.id {
			return r.replaced()
		}
		if r.scope == scopeHost && r.opts.Locking == LockingAuto && !r.warned {
			r.warned = true
			r.warnf("locks on %s keep away only programs of this host; see to it that no other host writes to it (--locking on silences this)", r.opts.Path)
		}
	}
	r.noteLocks(f)
	r.next = &view{file: f, active: true}
	return nil
}

func (r *Raw) replaced() error {
	return r.fail("activate", fmt.Errorf("the path names another file than the one being served, which was replaced; restart nbd-export to serve the new one: %w", unix.ESTALE))
}

func (r *Raw) dropsCache(f *File) bool {
	switch {
	case f.traits.Tmpfs:
		return false // it is the storage
	case r.opts.DropCache == DropCacheOn:
		return true
	case r.opts.DropCache == DropCacheOff:
		return false
	}
	return !f.traits.coherent
}

// Load reads what the acquired image is like now: its size, and with
// ifUnchanged whether it is as this process last settled it, or opened it if
// it never did; if not the error is a *ModifiedError. It drops the page cache
// as --drop-cache says. After an error Withdraw must follow.
func (r *Raw) Load(ifUnchanged bool) error {
	if r.next == nil || !r.next.active {
		return r.fail("activate", unix.EINVAL)
	}
	f := r.next.file
	if ifUnchanged {
		if err := f.fingerprint().compare(r.opts.Path, r.print); err != nil {
			return err
		}
	}
	if r.dropsCache(f) {
		left, err := f.dropCache(dropTries, func(try int) { time.Sleep(min(time.Duration(try), 10) * time.Millisecond) })
		if err != nil {
			return err
		}
		if left > 0 {
			r.warnf("%d pages of %s stay in the page cache, because somebody reads or maps them; they may be older than the image", left, r.opts.Path)
		}
	}
	if err := f.load(); err != nil {
		return err
	}
	if r.guard.on {
		first, err := readFirst(f)
		if err != nil {
			return err
		}
		if format := Probe(first); format != "" {
			return r.fail("activate", fmt.Errorf("the image was guessed to be raw and has become %s while inactive; restart nbd-export with -f: %w", format, unix.EOPNOTSUPP))
		}
	}
	r.next = newView(f, f.size, true)
	return nil
}

// PublishActive makes requests use the acquired description. It cannot fail.
func (r *Raw) PublishActive() { r.publish() }

// Check looks at the active image's file, about once a second, for what no
// request would notice: that it has shrunk, which ends writes there, and that
// the kernel no longer has our locks, which is the error *FencedError. It may
// run beside anything but Release, Retire and Close.
func (r *Raw) Check() error {
	v := r.cur.Load()
	if !v.active {
		return nil
	}
	r.measure(v)
	if len(v.file.held) == 0 {
		return nil
	}
	if seen, err := v.file.locksSeen(); err != nil || seen {
		return err
	}
	return &FencedError{Path: r.opts.Path}
}

// FencedError says that an active image's locks are gone, so that another
// process may own it by now.
type FencedError struct{ Path string }

func (e *FencedError) Error() string {
	return fmt.Sprintf("the locks on %s are lost; another process may own it", e.Path)
}

// Unwrap is ENOLCK.
func (e *FencedError) Unwrap() error { return unix.ENOLCK }

// Fenced marks the error.
func (e *FencedError) Fenced() bool { return true }

// Withdraw undoes Acquire and Load: nothing is held. What fails goes to Warn.
func (r *Raw) Withdraw() {
	if v := r.next; v != nil {
		r.warn(v.file.Unlock())
		r.noteLocks(nil)
	}
	r.dropNext()
}

// Retire is called when no request uses the view before the last
// PublishActive. It closes that.
func (r *Raw) Retire() {
	if v := r.old; v != nil {
		r.old = nil
		r.warn(v.file.Close())
	}
}

// Close closes whatever is open, writing nothing, and drops the locks. No
// data method may be running or called again. It may be called twice.
func (r *Raw) Close() error {
	var errs []error
	for _, v := range [...]*view{r.next, r.old, r.cur.Load()} {
		if v != nil {
			errs = append(errs, v.file.Unlock(), v.file.Close())
		}
	}
	r.next, r.old = nil, nil
	r.noteLocks(nil)
	return errors.Join(errs...)
}

// isErrno reports whether err wraps errno.
func isErrno(err error, errno unix.Errno) bool { return errors.Is(err, errno) }
