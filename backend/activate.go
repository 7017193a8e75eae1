package backend

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const dropTries = 16 // in 0.1 s

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
	set := lockReadOnly
	if writes {
		set = lockActive
	}
	err := f.lock(set)
	for try := 0; try < lingerTries && o.lingers(err); try++ {
		time.Sleep(lingerPause)
		f.unlock(f.fd)
		f.unlock(f.tailFd)
		f.held = nil
		err = f.lock(set)
	}
	if le, ok := errors.AsType[*LockError](err); ok {
		o.record.name(le, f)
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
	return o.fail("activate", &refusal{"the image was removed or renamed while this process had it open" + where, unix.ENOENT})
}

// procPath is where others find what is open as fd.
func procPath(fd int) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd) }

func (o *Owned) replaced() error {
	return o.fail("activate", &refusal{"the path names another file than the one being served, which was replaced; restart nbd-export to serve the new one", unix.ESTALE})
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
		o.next.file.dirt.Store(dirtNone)
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
// PublishActive. It closes that, or keeps its file for the next one.
func (o *Owned) Retire() {
	if v := o.old; v != nil {
		o.old = nil
		o.closeInactive(v)
	}
}
