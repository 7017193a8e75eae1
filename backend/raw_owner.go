package backend

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// What follows is called by the one goroutine that changes ownership, one
// call at a time, while data methods go on unless a comment says otherwise.
//
//	inactivate  SyncAhead Settle       (Unsettle | PublishInactive Release)
//	give up               Abandon                  PublishInactive Release
//	activate    Acquire Load Claim     (Withdraw | PublishActive Retire)

const dropTries = 16 // in 0.1 s

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

// RecordPlace says where the owner record is, or why there is none. It may be
// called at any time.
func (r *Raw) RecordPlace() RecordPlace { return *r.record.place.Load() }

func (r *Raw) noteLocks(f *File) {
	s := "none"
	if f != nil {
		s = f.heldText()
	}
	r.held.Store(&s)
}

// SyncAhead makes durable what there is while writes are still served. The
// sync itself does not look at ctx.
func (r *Raw) SyncAhead(ctx context.Context) error {
	v := r.cur.Load()
	v.file.trimPages()
	if err := ctx.Err(); err != nil || !v.file.writable {
		return err
	}
	if err := v.file.Sync(); err != nil {
		return err
	}
	return ctx.Err()
}

// Settle is called with the gate closed and no write-class request under way.
// It makes everything durable, opens the read-only description of the inactive
// image and takes the fingerprint. An error leaves the image active; one
// that satisfies SyncFailed means that it can never be handed over as clean,
// a *FencedError that somebody else took it, and a *ViewError that all is
// durable and only the opening failed.
func (r *Raw) Settle() error {
	if err := r.record.settled(); err != nil {
		return err
	}
	v := r.cur.Load()
	if v.file.writable {
		if err := v.file.Sync(); err != nil {
			return err
		}
	}
	next, err := r.openInactive(v)
	if err != nil {
		return &ViewError{Path: r.opts.Path, Err: err}
	}
	r.print = v.file.fingerprint()
	r.next, r.clean = next, true
	return nil
}

// ViewError says that an image was made durable, and then could not be opened
// for reading, as it is while inactive.
type ViewError struct {
	Path string
	Err  error
}

func (e *ViewError) Error() string {
	return fmt.Sprintf("everything written to %s is on disk, but it cannot be opened read-only: %v", e.Path, e.Err)
}

func (e *ViewError) Unwrap() error { return e.Err }

// Durable marks the error: nothing is lost.
func (e *ViewError) Durable() bool { return true }

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
	r.clean = false
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
	if v.file.syncer.failed() != nil {
		// Whatever comes of it: what is still dirty is to be written now, and
		// not once another owns the image.
		_ = v.file.fdatasync()
	}
	if e := v.file.fadvise(0, 0, unix.FADV_DONTNEED); e != nil {
		err = errors.Join(err, v.file.fail("drop the page cache of", e))
	}
	r.print = nil
	r.next, r.clean = next, false
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
// PublishInactive. It notes in the owner record that a settled image was let go
// in order, and then closes every writable description, with which the locks
// go. All happens whatever fails; an error is for the log.
func (r *Raw) Release() error {
	v := r.old
	if v == nil {
		return nil
	}
	r.old = nil
	err := errors.Join(r.endClaim(), v.file.Close())
	r.noteLocks(nil)
	return err
}

// endClaim is what the owner record learns when an ownership ends.
func (r *Raw) endClaim() error {
	clean := r.clean
	r.clean = false
	return r.record.release(clean)
}

// Acquire opens the image anew, for writing unless it is read-only, locks that
// description, and sees that the path still names the inode being served. On
// failure nothing is held; the error is a *LockError if somebody else has the
// image.
func (r *Raw) Acquire() (err error) {
	if r.next != nil {
		return r.fail("activate", fmt.Errorf("another transition is under way: %w", unix.EBUSY))
	}
	how := r.how(!r.opts.ReadOnly)
	how.pages = true
	f, err := openFile(r.opts.Path, how)
	if isErrno(err, unix.ENOENT) {
		return r.removed()
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
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
		err := lock()
		for try := 0; try < lingerTries && r.lingers(err); try++ {
			time.Sleep(lingerPause)
			f.unlock(f.fd)
			f.unlock(f.tailFd)
			f.held = nil
			err = lock()
		}
		if err != nil {
			if le, ok := errors.AsType[*LockError](err); ok {
				le.Holder = r.record.holder()
			}
			return err
		}
		// Who replaces an image by renaming may have done so meanwhile.
		var st unix.Stat_t
		err = retry(func() error { return unix.Stat(r.opts.Path, &st) })
		if err == unix.ENOENT {
			return r.removed()
		}
		if err != nil {
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

// The locks of a process that was killed stay until the kernel has ended the
// I/O it had submitted to an io_uring, a moment after the process.
const (
	lingerTries = 100
	lingerPause = 10 * time.Millisecond
)

// lingers reports whether err is a lock whose owner has ended.
func (r *Raw) lingers(err error) bool {
	_, ok := errors.AsType[*LockError](err)
	return ok && r.record.ownerEnded()
}

func (r *Raw) removed() error {
	where := ""
	if fd := r.cur.Load().file.fd; fd >= 0 {
		where = "; its bytes are still at " + procPath(fd)
	}
	return r.fail("activate", fmt.Errorf("the image was removed or renamed while this process had it open%s: %w", where, unix.ENOENT))
}

// procPath is where others find what is open as fd.
func procPath(fd int) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd) }

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

// Claim writes into the owner record that this process owns the loaded image,
// and returns its epoch: one more than the highest of own, the last that this
// process had, and the record's. Without a record that is own+1. A record that
// cannot be read, or is none, is a *RecordError. After an error Withdraw must
// follow.
func (r *Raw) Claim(own uint64) (epoch uint64, err error) {
	if r.next == nil || !r.next.active {
		return 0, r.fail("activate", unix.EINVAL)
	}
	var st unix.Stat_t
	if err := r.next.file.fstat(&st); err != nil {
		return 0, r.fail("stat", err)
	}
	return r.record.claim(own, &st)
}

// PublishActive makes requests use the acquired description. It cannot fail.
func (r *Raw) PublishActive() { r.publish() }

// Check looks at the active image's file, about once a second, for what no
// request would notice: that it has shrunk, which ends writes there; that the
// path no longer names it, which is told once; and that the kernel no longer
// has our locks, that somebody writes in spite of them, or that the owner
// record names another, which is the error *FencedError. A record that was removed it writes again. It may
// run beside anything but Release, Retire and Close.
func (r *Raw) Check() error {
	v := r.cur.Load()
	if !v.active {
		return nil
	}
	r.measure(v)
	r.checkName(v)
	var failed error
	if len(v.file.held) > 0 {
		kept, err := v.file.locksKept()
		if err == nil && !kept {
			return &FencedError{Path: r.opts.Path}
		}
		failed = err
		strange, err := v.file.stranger()
		switch {
		case err != nil:
			failed = errors.Join(failed, err)
		case !strange:
			v.strange.Store(0)
		case v.strange.Add(1) >= strangerTimes:
			return &FencedError{Path: r.opts.Path}
		}
	}
	if err := r.record.check(); err != nil {
		return err
	}
	return failed
}

// checkName tells, once, that the path names the active image no longer: what
// is written goes when the last descriptor does.
func (r *Raw) checkName(v *view) {
	var st unix.Stat_t
	err := retry(func() error { return unix.Stat(r.opts.Path, &st) })
	gone := err == unix.ENOENT || err == nil && inodeOf(&st) != r.id
	if gone && !v.nameless.Swap(true) {
		r.warnf("%s: the path no longer names the image that is being served; its bytes are still reachable as %s; copy them before the server stops",
			r.opts.Path, procPath(v.file.fd))
	}
}

// FencedError says that another process may own an active image: its locks
// are gone, or the owner record names another owner.
type FencedError struct {
	Path   string
	Record string // path of the owner record, "" where the locks are lost
	Owner  string // whom it names
	Epoch  uint64 // ours
}

func (e *FencedError) Error() string {
	if e.Record == "" {
		return fmt.Sprintf("the locks on %s are lost; another process may own it", e.Path)
	}
	return fmt.Sprintf("%s has another owner, although this process did not let it go (epoch %d): owner record %s names %s",
		e.Path, e.Epoch, e.Record, e.Owner)
}

// Unwrap is ENOLCK where the locks are lost, otherwise ESTALE.
func (e *FencedError) Unwrap() error {
	if e.Record == "" {
		return unix.ENOLCK
	}
	return unix.ESTALE
}

// Fenced marks the error.
func (e *FencedError) Fenced() bool { return true }

// Withdraw undoes Acquire, Load and Claim: nothing is held, and the owner
// record says what it said before. What fails goes to Warn.
func (r *Raw) Withdraw() {
	if v := r.next; v != nil {
		r.warn(r.record.withdraw())
	}
	r.dropNext()
	r.noteLocks(nil)
}

// Retire is called when no request uses the view before the last
// PublishActive. It closes that.
func (r *Raw) Retire() {
	if v := r.old; v != nil {
		r.old = nil
		r.warn(v.file.Close())
	}
}

// Close closes whatever is open, writing nothing to the image; the locks go
// with the descriptions. Of a settled image the owner record says before that it was let go in
// order; of one that is being activated, what it said before. No data method
// may be running or called again. It may be called twice.
func (r *Raw) Close() error {
	var errs []error
	if r.next != nil && r.next.active {
		errs = append(errs, r.record.withdraw())
	} else {
		errs = append(errs, r.endClaim())
	}
	for _, v := range [...]*view{r.next, r.old, r.cur.Load()} {
		if v != nil {
			errs = append(errs, v.file.Close())
		}
	}
	r.next, r.old = nil, nil
	r.noteLocks(nil)
	return errors.Join(errs...)
}

// isErrno reports whether err wraps errno.
func isErrno(err error, errno unix.Errno) bool { return errors.Is(err, errno) }
