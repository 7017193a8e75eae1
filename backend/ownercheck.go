package backend

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Check looks at the active image's file, about once a second, for what no
// request would notice: that it has shrunk, which ends writes there; that the
// path no longer names it, which is told once; and that the kernel no longer
// has our locks, that somebody writes in spite of them, or that the owner
// record names another, which is the error *FencedError. A record that was
// removed it writes again. It may run beside anything but Release, Retire and
// Close.
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

// PathLost is "" unless the path names the active image no longer, as Check has
// found out, since somebody removed, moved or replaced it. Then it is where its
// bytes are, as long as this process has it open. It may be called at any time.
func (o *Owned) PathLost() string {
	if where := o.cur.Load().lost.Load(); where != nil {
		return *where
	}
	return ""
}

// checkName tells that the path names the active image no longer: what is
// written goes when the last descriptor does.
func (o *Owned) checkName(v *view) {
	var st unix.Stat_t
	err := retry(func() error { return unix.Stat(o.opts.Path, &st) })
	switch {
	case err == nil && inodeOf(&st) == o.id:
		v.lost.Store(nil) // it may have been put back
	case (err == nil || err == unix.ENOENT) && v.lost.Load() == nil:
		where := procPath(v.file.fd)
		v.lost.Store(&where)
		o.warnf("%s: the path no longer names the image that is being served; its bytes are still reachable as %s; copy them before the server stops",
			o.opts.Path, where)
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
