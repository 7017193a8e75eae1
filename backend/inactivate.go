package backend

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// SyncAhead makes durable what there is while writes are still served. The
// sync itself does not look at ctx.
func (o *Owned) SyncAhead(ctx context.Context) error {
	v := o.cur.Load()
	_ = v.files(func(f *File) error { f.trimPages(); return nil })
	if err := ctx.Err(); err != nil || !v.writable() {
		return err
	}
	_ = v.files(func(f *File) error { f.thinPlace(); return nil })
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
		v.stamp()
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

// Unsettle undoes Settle: the image stays active. It cannot fail; what closing
// the read-only description says goes to Warn.
func (o *Owned) Unsettle() error {
	o.clean = false
	o.dropNext()
	return nil
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

// Release is called when no request uses the view before the last
// PublishInactive. It notes in the owner record that a settled image was let go
// in order, and then closes every writable description, with which the locks
// go. All happens whatever fails; an error is for the log. What was mapped for
// reading is unmapped later: a GiB of pages takes 30 ms.
func (o *Owned) Release() error {
	v := o.old
	if v == nil {
		return nil
	}
	o.old = nil
	err := errors.Join(o.endClaim(v, false), v.release())
	o.later(&o.unmapping, func() { o.warn(v.unmap()) })
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
