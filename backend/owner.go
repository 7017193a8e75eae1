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

// SyncAhead makes durable what there is while writes are still served. The
// sync itself does not look at ctx.
func (o *Owned) SyncAhead(ctx context.Context) error {
	v := o.cur.Load()
	_ = v.files(func(f *File) error { f.trimPages(); return nil })
	if err := ctx.Err(); err != nil || !v.writable() {
		return err
	}
	v.file.thinPlace()
	if err := v.sync(); err != nil {
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
func (o *Owned) Settle() error {
	if err := o.record.settled(); err != nil {
		return err
	}
	v := o.cur.Load()
	if v.writable() {
		if err := v.settle(); err != nil {
			return err
		}
	}
	next, err := o.openInactive(v)
	if err != nil {
		return &ViewError{Path: o.opts.Path, Err: err}
	}
	o.print = v.fingerprint()
	o.next, o.clean = next, true
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

// openInactive opens a view of the same inode for reading, without locks.
func (o *Owned) openInactive(v *view) (*view, error) {
	if o.next != nil {
		return nil, o.fail("inactivate", fmt.Errorf("another transition is under way: %w", unix.EBUSY))
	}
	f, err := o.inactiveFile(v)
	if err != nil {
		return nil, err
	}
	next, err := o.format.open(f, v)
	if err != nil {
		f.Close()
	}
	return next, err
}

// inactiveFile is open for reading.
func (o *Owned) inactiveFile(v *view) (*File, error) {
	f := o.spare
	if f == nil {
		return v.file.reopen(o.how(false))
	}
	if err := f.load(); err != nil {
		return nil, err
	}
	o.spare = nil
	return f, nil
}

// closeInactive closes an inactive view, but for a file that can be used again.
// On a network file system it cannot: there, opening asks the server.
func (o *Owned) closeInactive(v *view) {
	if o.spare == nil && v.file.keeps() {
		o.spare = v.file
		o.warn(v.closeOthers())
		return
	}
	o.warn(v.close())
}

func (o *Owned) how(write bool) openHow {
	return openHow{write: write, direct: o.opts.Cache == CacheNone, overwrites: !o.opts.ReadOnly, faults: o.faults}
}

// Unsettle undoes Settle: the image stays active. It cannot fail; what closing
// the read-only description says goes to Warn.
func (o *Owned) Unsettle() error {
	o.clean = false
	o.dropNext()
	return nil
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

// Abandon gives up an image that cannot be settled: it drops the page cache
// where that is possible, and opens the read-only description. What was not
// durable may be lost. PublishInactive and Release follow whatever it returns:
// where the file cannot be opened, reads give EIO from then on.
func (o *Owned) Abandon() error {
	v := o.cur.Load()
	v.freeze()
	o.dropNext()
	next, err := o.openInactive(v)
	if err != nil {
		next = o.deadView(v.Size())
	}
	err = errors.Join(err, v.files(func(f *File) error {
		if f.syncer.failed() != nil {
			// Whatever comes of it: what is still dirty is to be written now,
			// and not once another owns the image.
			_ = f.fdatasync()
		}
		if e := f.fadvise(0, 0, unix.FADV_DONTNEED); e != nil {
			return f.fail("drop the page cache of", e)
		}
		return nil
	}))
	o.print = nil
	o.next, o.clean = next, false
	return err
}

// PublishInactive makes requests use the read-only description that Settle or
// Abandon opened. It cannot fail.
func (o *Owned) PublishInactive() { o.publish() }

func (o *Owned) publish() {
	if o.next == nil || o.old != nil {
		panic("backend: published out of order")
	}
	o.old, o.next = o.cur.Swap(o.next), nil
}

// Release is called when no request uses the view before the last
// PublishInactive. It notes in the owner record that a settled image was let go
// in order, and then closes every writable description, with which the locks
// go. All happens whatever fails; an error is for the log. What was mapped for
// reading is unmapped beside what follows: a GiB of pages takes 30 ms.
func (o *Owned) Release() error {
	v := o.old
	if v == nil {
		return nil
	}
	o.old = nil
	err := errors.Join(o.endClaim(v, false), v.release())
	o.unmapping.Go(func() { o.warn(v.unmap()) })
	o.noteLocks(nil)
	return err
}

// endClaim is what the owner record learns when an ownership ends, or with last
// the process.
func (o *Owned) endClaim(v *view, last bool) error {
	clean := o.clean
	o.clean = false
	var print *filePrint
	if o.print != nil && v.file.keeps() {
		print = &o.print.files[0]
	}
	return o.record.release(clean, print, last)
}

// Acquire opens the image anew, for writing unless it is read-only, locks that
// description, and sees that the path still names the inode being served. On
// failure nothing is held; the error is a *LockError if somebody else has the
// image.
func (o *Owned) Acquire() (err error) {
	if o.next != nil {
		return o.fail("activate", fmt.Errorf("another transition is under way: %w", unix.EBUSY))
	}
	how := o.how(!o.opts.ReadOnly)
	how.pages, how.known = true, o.cur.Load().file
	f, err := openFile(o.opts.Path, how)
	if isErrno(err, unix.ENOENT) {
		return o.removed()
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if f.id != o.id {
		return o.replaced()
	}
	if o.dropsCache(f) {
		// In bulk ahead, so that little is left to drop under the locks.
		f.fadvise(0, 0, unix.FADV_DONTNEED)
	}
	if o.opts.Locking != LockingOff {
		f.listed = o.listed
		if err := o.lockFile(f, !o.opts.ReadOnly); err != nil {
			return err
		}
		o.listed, f.peer = f.listed && f.keeps(), nil
		// Who replaces an image by renaming may have done so meanwhile.
		var st unix.Stat_t
		err = retry(func() error { return unix.Stat(o.opts.Path, &st) })
		if err == unix.ENOENT {
			return o.removed()
		}
		if err != nil {
			return o.fail("stat", err)
		}
		if inodeOf(&st) != o.id {
			return o.replaced()
		}
		if o.scope == scopeHost && o.opts.Locking == LockingAuto && !o.warned {
			o.warned = true
			o.warnf("locks on %s keep away only programs of this host; see to it that no other host writes to it (--locking on silences this)", o.opts.Path)
		}
	}
	o.noteLocks(f)
	o.next = &view{file: f, active: true, content: o.deadView(0).content} // until Load
	return nil
}

// lockFile locks a file for an owner, who writes it or not.
func (o *Owned) lockFile(f *File, writes bool) error {
	lock := f.LockReadOnly
	if writes {
		lock = f.LockActive
	}
	err := lock()
	for try := 0; try < lingerTries && o.lingers(err); try++ {
		time.Sleep(lingerPause)
		f.unlock(f.fd)
		f.unlock(f.tailFd)
		f.held = nil
		err = lock()
	}
	if le, ok := errors.AsType[*LockError](err); ok {
		le.Holder = o.record.holder()
	}
	return err
}

// The locks of a process that was killed stay until the kernel has ended the
// I/O it had submitted to an io_uring, a moment after the process.
const (
	lingerTries = 100
	lingerPause = 10 * time.Millisecond
)

// lingers reports whether err is a lock whose owner has ended.
func (o *Owned) lingers(err error) bool {
	_, ok := errors.AsType[*LockError](err)
	return ok && o.record.ownerEnded()
}

func (o *Owned) removed() error {
	where := ""
	if fd := o.cur.Load().file.fd; fd >= 0 {
		where = "; its bytes are still at " + procPath(fd)
	}
	return o.fail("activate", fmt.Errorf("the image was removed or renamed while this process had it open%s: %w", where, unix.ENOENT))
}

// procPath is where others find what is open as fd.
func procPath(fd int) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd) }

func (o *Owned) replaced() error {
	return o.fail("activate", fmt.Errorf("the path names another file than the one being served, which was replaced; restart nbd-export to serve the new one: %w", unix.ESTALE))
}

func (o *Owned) dropsCache(f *File) bool {
	switch {
	case f.traits.Tmpfs:
		return false // it is the storage
	case o.opts.DropCache == DropCacheOn:
		return true
	case o.opts.DropCache == DropCacheOff:
		return false
	}
	return !f.traits.coherent
}

// Load reads what the acquired image is like now: its size, and with
// ifUnchanged whether it is as this process last settled it, or opened it if
// it never did; if not the error is a *ModifiedError. It drops the page cache
// as --drop-cache says. After an error Withdraw must follow.
func (o *Owned) Load(ifUnchanged bool) error {
	if o.next == nil || !o.next.active {
		return o.fail("activate", unix.EINVAL)
	}
	f := o.next.file
	if err := o.refresh(f); err != nil {
		return err
	}
	if err := f.load(); err != nil {
		return err
	}
	next, err := o.format.load(f)
	if err != nil {
		return err
	}
	o.next = next
	if ifUnchanged {
		return next.fingerprint().compare(o.opts.Path, o.print)
	}
	return nil
}

// refresh has what is read of f from now on come from the storage, where it
// might not.
func (o *Owned) refresh(f *File) error {
	if !o.dropsCache(f) {
		return nil
	}
	o.unmapping.Wait() // what is mapped stays in the cache
	left, err := f.dropCache(dropTries, func(try int) { time.Sleep(min(time.Duration(try), 10) * time.Millisecond) })
	if err == nil && left > 0 {
		o.warnf("%d pages of %s stay in the page cache, because somebody reads or maps them; they may be older than the image", left, f.path)
	}
	return err
}

// Claim writes into the owner record that this process owns the loaded image,
// and returns its epoch: one more than the highest of own, the last that this
// process had, and the record's. Without a record that is own+1. A record that
// cannot be read, or is none, is a *RecordError. Then it makes the image ready
// for writing, as its format needs it: from here on a crash leaves it in need of
// that again. After an error Withdraw must follow.
func (o *Owned) Claim(own uint64) (epoch uint64, err error) {
	if o.next == nil || !o.next.active {
		return 0, o.fail("activate", unix.EINVAL)
	}
	var st unix.Stat_t
	if err := o.next.file.fstat(&st); err != nil {
		return 0, o.fail("stat", err)
	}
	epoch, durable, err := o.record.claim(own, &st, o.recorded(o.next.file))
	if durable && len(o.next.file.held) > 0 {
		o.next.file.dirty.Store(false)
	}
	if err != nil || !o.next.writable() {
		return epoch, err
	}
	return epoch, o.next.begin(func(done, total int64) { o.repair.Store(&Progress{done, total}) })
}

// recorded is the state of the image's file that goes into the owner record,
// nil where others do not see the same: a network file system keeps times, and
// pages, for a while.
func (o *Owned) recorded(f *File) *filePrint {
	if !f.keeps() {
		return nil
	}
	p, err := f.fingerprint()
	if err != nil {
		return nil
	}
	return &p
}

// Progress is how far something has come, in bytes.
type Progress struct{ Done, Total int64 }

// Repairing is how far the repair of the image has come that its activation
// has begun, nil where there is none. It may be called at any time.
func (o *Owned) Repairing() *Progress { return o.repair.Load() }

// PublishActive makes requests use the acquired description. It cannot fail.
func (o *Owned) PublishActive() {
	o.repair.Store(nil)
	o.publish()
}

// Check looks at the active image's file, about once a second, for what no
// request would notice: that it has shrunk, which ends writes there; that the
// path no longer names it, which is told once; and that the kernel no longer
// has our locks, that somebody writes in spite of them, or that the owner
// record names another, which is the error *FencedError. A record that was removed it writes again. It may
// run beside anything but Release, Retire and Close.
func (o *Owned) Check() error {
	v := o.cur.Load()
	if !v.active {
		return nil
	}
	err := o.look(v)
	if _, fenced := errors.AsType[*FencedError](err); fenced {
		v.freeze() // at once: nobody orders the tables to be written back
	}
	return err
}

// look is Check of a view that is active.
func (o *Owned) look(v *view) error {
	v.measure()
	o.checkName(v)
	strangers := false
	err := v.files(func(f *File) error {
		// A sync that no request asked for tells nobody else.
		if err := f.syncer.failed(); err != nil || len(f.held) == 0 {
			return err
		}
		kept, err := f.locksKept()
		if err == nil && !kept {
			return &FencedError{Path: f.path}
		}
		strange, e := f.stranger()
		strangers = strangers || strange && e == nil
		return errors.Join(err, e)
	})
	if _, fenced := errors.AsType[*FencedError](err); fenced {
		return err // nor is the record ours to write
	}
	if !strangers {
		v.strange.Store(0)
	} else if v.strange.Add(1) >= strangerTimes {
		return &FencedError{Path: o.opts.Path}
	}
	if e := o.record.check(); e != nil {
		return e
	}
	return err
}

// checkName tells, once, that the path names the active image no longer: what
// is written goes when the last descriptor does.
func (o *Owned) checkName(v *view) {
	var st unix.Stat_t
	err := retry(func() error { return unix.Stat(o.opts.Path, &st) })
	gone := err == unix.ENOENT || err == nil && inodeOf(&st) != o.id
	if gone && !v.nameless.Swap(true) {
		o.warnf("%s: the path no longer names the image that is being served; its bytes are still reachable as %s; copy them before the server stops",
			o.opts.Path, procPath(v.file.fd))
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
func (o *Owned) Withdraw() {
	o.repair.Store(nil)
	if v := o.next; v != nil {
		o.warn(v.unbegin())
		o.warn(o.record.withdraw())
	}
	o.dropNext()
	o.noteLocks(nil)
}

// Retire is called when no request uses the view before the last
// PublishActive. It closes that, or keeps its file for the next one, and has the
// owner record tidied up.
func (o *Owned) Retire() {
	if v := o.old; v != nil {
		o.old = nil
		o.closeInactive(v)
	}
	o.record.tidy()
}

// Close closes whatever is open, writing nothing to the image; the locks go
// with the descriptions. Of a settled image the owner record says before that it was let go in
// order; of one that is being activated, what it said before. No data method
// may be running or called again. It may be called twice.
func (o *Owned) Close() error {
	var errs []error
	o.record.tidying.Wait()
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
