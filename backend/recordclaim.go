package backend

import (
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// ownerRecord is an image's owner record as its exporter sees it.
type ownerRecord struct {
	image    string // path as given
	explicit string // Options.OwnerRecord
	device   bool
	near     bool // its file system is this kernel's alone
	readOnly bool
	control  string
	faults   faults
	warn     func(format string, args ...any)

	place atomic.Pointer[RecordPlace]

	mu     sync.Mutex   // Check runs beside transitions; no lock is taken below it
	mine   *OwnerRecord // as claimed, nil if none is
	stat   unix.Stat_t  // of the image, for its mode
	before []byte       // what stood there before the claim, nil for nothing
	told   string       // the last warning, so that it is not given each second
	// written is the record's file as this process put it there, nil if it has
	// to be read to know that it is still the same: also where it was written over,
	// as another owner could do within one tick of the file system's clock.
	written *filePrint
}

func newOwnerRecord(o Options, t Traits, h faults, warn func(string, ...any)) *ownerRecord {
	r := &ownerRecord{
		image: o.Path, explicit: o.OwnerRecord, device: t.BlockDevice, near: t.coherent, readOnly: o.ReadOnly,
		control: o.ControlAddress, faults: h, warn: warn,
	}
	r.find()
	return r
}

// find looks for the place anew: links may lead elsewhere than before.
func (o *ownerRecord) find() RecordPlace {
	p := placeRecord(o.image, o.explicit, o.device)
	if o.readOnly {
		p = RecordPlace{PerProcess: "a read-only export writes none"}
	}
	o.place.Store(&p)
	return p
}

// perProcess does without a record from now on.
func (o *ownerRecord) perProcess(why string) {
	o.place.Store(&RecordPlace{PerProcess: why})
}

// tell gives a warning unless it was the last one.
func (o *ownerRecord) tell(format string, args ...any) {
	if s := fmt.Sprintf(format, args...); s != o.told {
		o.told = s
		o.warn("%s", s)
	}
}

// holder names, to somebody whom the locks of f refuse, who has them, and what
// has them let go; "" if the record does not know.
func (o *ownerRecord) holder(f *File) (who, order string) {
	if r := o.claimed(); r != nil && r.Process() != ProcessEnded && !r.lacksLocks(f) {
		return r.Owner(time.Now()), r.release()
	}
	return "", ""
}

// name completes the error of locks that were refused to f: who has them.
func (o *ownerRecord) name(e *LockError, f *File) {
	if e.Holder, e.Order = o.holder(f); e.Holder == "" {
		e.Programs = holdersText(f.holders([]int64{e.Byte}))
	}
}

// ownerEnded reports whether the record names a process of this host that
// ended without giving the image up.
func (o *ownerRecord) ownerEnded() bool {
	r := o.claimed()
	return r != nil && r.Process() == ProcessEnded
}

// claimed is the record of an ownership that has not ended in order; nil if
// there is none.
func (o *ownerRecord) claimed() *OwnerRecord {
	p := placeRecord(o.image, o.explicit, o.device)
	if p.Path == "" {
		return nil
	}
	r, _, err := readRecord(p.Path, o.faults)
	if err != nil || r == nil || r.Clean {
		return nil
	}
	return r
}

// replace writes the record anew.
func (o *ownerRecord) replace(path string, b []byte) error {
	b = padded(b)
	written, err := recordSpot{path, &o.stat, o.near}.replace(b, o.faults)
	if err != nil && unwritable(err) && overwriteRecord(path, b, o.faults) == nil {
		err = nil
	}
	o.written = written
	return err
}

// claim writes that this process owns the image, whose locks it holds and
// whose own last epoch was own. print is the image's state, nil where it is
// not to be relied on; durable tells that nothing of it has to be synced. On
// failure the record is as it was.
func (o *ownerRecord) claim(own uint64, stat *unix.Stat_t, print *filePrint) (epoch uint64, durable bool, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := o.find()
	if p.Path == "" {
		if !o.readOnly && o.explicit != OwnerRecordOff {
			o.tell("epochs of %s count only the owners of this process: %s", o.image, p.PerProcess)
		}
		return own + 1, false, nil
	}
	last, before, err := readRecord(p.Path, o.faults)
	if err != nil {
		return 0, false, err
	}
	me := thisProcess()
	me.Control, me.Since, me.Epoch = o.control, time.Now().Round(0), own+1
	switch {
	case last != nil:
		me.Epoch = max(last.Epoch, own) + 1
		if !last.Clean {
			o.warn("the last owner of %s did not let go in order: %s", o.image, last.Owner(time.Now()))
		}
	case before != nil:
		o.warn("owner record %s is empty, as a loss of power can leave it; epochs go on from %d", p.Path, me.Epoch)
	}
	if me.Epoch >= epochMax { // what nobody could read must not be written
		return 0, false, &RecordError{Path: p.Path, Err: notARecord("no epoch can follow %d", me.Epoch-1)}
	}
	durable = last != nil && last.leaves(&me, print)
	o.stat = *stat
	if err := o.replace(p.Path, me.bytes()); err != nil {
		if o.explicit != "" || !unwritable(err) {
			return 0, false, &fs.PathError{Op: "write owner record", Path: p.Path, Err: fmt.Errorf(
				"%w; make that possible, or choose another place with --owner-record PATH, or none with --owner-record off", err)}
		}
		// The disk may be full, but its owner has to be able to change.
		why := fmt.Sprintf("%s cannot be written: %v", p.Path, err)
		o.perProcess(why)
		o.tell("epochs of %s count only the owners of this process: %s; give --owner-record PATH", o.image, why)
		return me.Epoch, false, nil
	}
	o.mine, o.before, o.told = &me, before, ""
	return me.Epoch, durable, nil
}

// leaves reports whether everything in the page cache of an image that is as
// print says was on the disk when r was written, and this is still the kernel
// that has it there.
func (r *OwnerRecord) leaves(me *OwnerRecord, print *filePrint) bool {
	return r.Clean && r.BootID != "" && r.BootID == me.BootID && print != nil && r.Image == print.String()
}

// verdict is what a look at one's own record says.
type verdict uint8

const (
	stillMine verdict = iota
	gone              // somebody removed it, or put back an older one
	unknown           // it cannot be read
)

// look reads the claimed record again. The error is a *FencedError.
//
// Where nobody can have replaced the file unnoticed, its state tells that it is
// the one that was written: a stat takes 2 us of a handover, which looks
// twice, and reading it anew 25.
func (o *ownerRecord) look(path string) (verdict, error) {
	if o.written != nil && o.unchanged(path) {
		return stillMine, nil
	}
	r, _, err := readRecord(path, o.faults)
	switch {
	case err != nil:
		o.tell("cannot tell whether %s still is ours: %v", o.image, err)
		return unknown, nil
	case r == nil || r.Epoch < o.mine.Epoch:
		return gone, nil
	case r.Epoch > o.mine.Epoch || !r.sameOwner(o.mine):
		return unknown, &FencedError{Path: o.image, Record: path, Owner: r.Owner(time.Now()), Epoch: o.mine.Epoch}
	}
	return stillMine, nil
}

func (o *ownerRecord) unchanged(path string) bool {
	var st unix.Stat_t
	err := retry(func() error {
		if err := o.faults.check(opRecordStat, 0); err != nil {
			return err
		}
		return unix.Lstat(path, &st)
	})
	return err == nil && printOf(&st) == *o.written
}

// check is look for an owner that goes on. A record that was removed is put
// back: the locks, which the caller has seen to be there, say whose image it
// is.
func (o *ownerRecord) check() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mine == nil {
		return nil
	}
	path := o.place.Load().Path
	v, err := o.look(path)
	switch v {
	case stillMine:
		o.told = ""
	case gone:
		if err := o.replace(path, o.mine.bytes()); err != nil {
			o.tell("owner record %s was removed and cannot be written again: %v", path, err)
			break
		}
		o.warn("owner record %s was removed or set back while this process owns the image; it is there again", path)
	}
	return err
}

// settled is look at the end of an ownership, which changes nothing yet.
func (o *ownerRecord) settled() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mine == nil {
		return nil
	}
	_, err := o.look(o.place.Load().Path)
	return err
}

// release ends the claim, while the locks are still held. With clean the
// record says so, unless it has become another's; otherwise it stays as it is,
// and says that this owner did not let go in order. print is the state of the
// settled image, nil where others may see another. With last nobody waits for
// the image, and what the record was is removed too.
func (o *ownerRecord) release(clean bool, print *filePrint, last bool) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	me := o.mine
	if me == nil {
		return nil
	}
	path := o.place.Load().Path
	defer func() { o.mine, o.before, o.written = nil, nil, nil }()
	if !clean {
		return nil
	}
	v, err := o.look(path)
	if err != nil || v == unknown {
		return err
	}
	me.Clean = true
	if print != nil {
		me.Image = print.String()
	}
	if err := o.replace(path, me.bytes()); err != nil {
		return &RecordNotCleanError{Image: o.image, Record: path, Err: err}
	}
	if last {
		_ = o.faults.unlink(path + recordWas)
	}
	return nil
}

// RecordNotCleanError says that an image was let go in order, and that its owner
// record could not be made to say so, as on a full disk.
type RecordNotCleanError struct {
	Image, Record string
	Err           error
}

func (e *RecordNotCleanError) Error() string {
	return fmt.Sprintf("everything written to %s is on disk, and it is let go; but owner record %s cannot say so, and the next owner will warn of that: %v",
		e.Image, e.Record, e.Err)
}

func (e *RecordNotCleanError) Unwrap() error { return e.Err }

// Durable marks the error: nothing is lost.
func (e *RecordNotCleanError) Durable() bool { return true }

// withdraw takes the claim back, while the locks are still held: what stood
// there before stands there again.
func (o *ownerRecord) withdraw() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mine == nil {
		return nil
	}
	path := o.place.Load().Path
	defer func() { o.mine, o.before, o.written = nil, nil, nil }()
	v, err := o.look(path)
	if err != nil || v != stillMine {
		return err
	}
	if o.before == nil {
		err = o.faults.unlink(path)
	} else {
		err = o.replace(path, o.before)
	}
	if err != nil {
		return &fs.PathError{Op: "put back owner record", Path: path, Err: fmt.Errorf("%w; it names this process, which does not own the image", err)}
	}
	return nil
}
