package backend

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

const (
	// OwnerRecordOff as Options.OwnerRecord keeps no record.
	OwnerRecordOff = "off"

	recordSuffix = ".owner"
	recordTemp   = ".tmp"
	recordWas    = ".was"
	recordMax    = 64 << 10 // bytes read of a record
	epochMax     = 1 << 53  // what every reader of JSON can hold
)

// OwnerRecord is what IMAGE.owner says: who owns the image, or owned it last.
// It names the holder of the locks to others and counts owners; what keeps two
// owners apart are the locks. Members that are not known are ignored.
type OwnerRecord struct {
	Host    string    `json:"host"`
	PID     int       `json:"pid"`
	BootID  string    `json:"boot-id"`           // of the kernel that PID belongs to
	Control string    `json:"control,omitempty"` // absolute path of the control socket
	Since   time.Time `json:"since"`             // when it became the owner
	Epoch   uint64    `json:"epoch"`             // each owner's is higher than the last one's
	// Clean: the owner let go, and everything it wrote is durable.
	Clean bool   `json:"clean"`
	Nonce string `json:"nonce,omitempty"` // proves to a peer that both see one storage
	// Image is the size and the times of the image that was let go clean, ""
	// where others may not see the same. As long as they are those, and the
	// kernel is the one of BootID, nothing has to be synced.
	Image string `json:"image,omitempty"`
}

// Owner is the owner in words: "nbd-export on a, pid 812, since 10:02, epoch
// 7 (control /run/a.ctl)".
func (r *OwnerRecord) Owner(now time.Time) string {
	since, layout := r.Since.In(now.Location()), "2006-01-02 15:04"
	if since.Year() == now.Year() && since.YearDay() == now.YearDay() {
		layout = "15:04"
	}
	s := fmt.Sprintf("nbd-export on %s, pid %d, since %s, epoch %d", Printable(r.Host), r.PID, since.Format(layout), r.Epoch)
	if r.Control != "" {
		s += fmt.Sprintf(" (control %s)", Printable(r.Control))
	}
	return s
}

// Printable keeps a record from writing on somebody's terminal.
func Printable(s string) string {
	return strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return '?'
		}
		return c
	}, s)
}

// Process tells what is known of the process that a record names.
type Process string

const (
	ProcessLives   Process = "alive"
	ProcessEnded   Process = "ended"
	ProcessUnknown Process = "unknown" // it is, or was, another host's
)

// Process looks for the process that r names. A pid that lives may be another
// process by now.
func (r *OwnerRecord) Process() Process {
	me := thisProcess()
	switch {
	case r.Host != me.Host || r.BootID == "" || me.BootID == "":
		return ProcessUnknown
	case r.BootID != me.BootID:
		return ProcessEnded // that host has been started anew
	case unix.Kill(r.PID, 0) == unix.ESRCH:
		return ProcessEnded
	}
	return ProcessLives
}

// thisProcess is who a record of ours names.
var thisProcess = sync.OnceValue(func() OwnerRecord {
	me := OwnerRecord{PID: os.Getpid()}
	if me.Host, _ = os.Hostname(); me.Host == "" {
		me.Host = "localhost"
	}
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		me.BootID = strings.TrimSpace(string(b))
	}
	return me
})

// sameOwner tells whether two records are of one ownership. The time tells
// processes apart that two containers number alike.
func (r *OwnerRecord) sameOwner(o *OwnerRecord) bool {
	return r.Host == o.Host && r.PID == o.PID && r.BootID == o.BootID && r.Since.Equal(o.Since)
}

// RecordError says that an owner record cannot be used: something else stands
// at its place, or it cannot be read.
type RecordError struct {
	Path string
	Err  error
}

func (e *RecordError) Error() string {
	return fmt.Sprintf("owner record %s: %v; it guards against two owners, so make sure that nobody owns the image, and remove it, or choose another with --owner-record PATH, or none with --owner-record off", e.Path, e.Err)
}

func (e *RecordError) Unwrap() error { return e.Err }

// errNotARecord is the cause of a RecordError for what never was one.
func notARecord(format string, args ...any) error {
	return fmt.Errorf("this is no owner record: %s: %w", fmt.Sprintf(format, args...), unix.EINVAL)
}

// parseRecord judges the content of a record.
func parseRecord(b []byte) (*OwnerRecord, error) {
	if len(b) > recordMax {
		return nil, notARecord("it is longer than %d bytes", recordMax)
	}
	var m struct {
		OwnerRecord
		PID   *int       `json:"pid"`
		Since *time.Time `json:"since"`
		Epoch *uint64    `json:"epoch"`
		Clean *bool      `json:"clean"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, notARecord("%v", err)
	}
	switch {
	case m.Host == "":
		return nil, notARecord("it names no host")
	case m.PID == nil || *m.PID <= 0:
		return nil, notARecord("it names no process")
	case m.Since == nil || m.Clean == nil:
		return nil, notARecord("it does not say since when, or whether it is clean")
	case m.Epoch == nil || *m.Epoch == 0 || *m.Epoch >= epochMax:
		return nil, notARecord("it has no epoch")
	}
	r := m.OwnerRecord
	r.PID, r.Since, r.Epoch, r.Clean = *m.PID, *m.Since, *m.Epoch, *m.Clean
	return &r, nil
}

// readRecord reads the record at path: nil without an error if there is none.
// An empty file is none: records are not synced, so that is what a loss of
// power can leave of one. raw are its bytes, nil if the file does not exist.
func readRecord(path string, h faults) (r *OwnerRecord, raw []byte, err error) {
	raw, err = readBounded(path, h)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err == nil && len(raw) > 0 {
		r, err = parseRecord(raw)
	}
	if err != nil {
		return nil, nil, &RecordError{Path: path, Err: err}
	}
	return r, raw, nil
}

func readBounded(path string, h faults) ([]byte, error) {
	fd, err := h.open(opRecordOpen, path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err == unix.ELOOP {
		return nil, notARecord("it is a symbolic link")
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, notARecord("it is not a regular file")
	}
	b := make([]byte, min(max(st.Size, 0), recordMax)+1)
	n := 0
	for n < len(b) {
		var k int
		err := retry(func() (err error) {
			if err = h.check(opRecordRead, int64(n)); err == nil {
				k, err = unix.Read(fd, b[n:])
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		if k == 0 {
			break
		}
		n += k
	}
	return b[:n:n], nil
}

// scratch is where a record is made before it is put in its place.
type scratch struct {
	path  string
	image *unix.Stat_t // whose mode the record gets and, where that is allowed, owner
	// exchange has the new record and the old one change places: the old one is
	// at path then, and is removed later, when nobody waits for it. To remove a
	// file takes ext4 0.1 to 0.25 ms, and to exchange two 0.01.
	exchange bool
}

// replaceRecord puts b at path by renaming, so that nobody ever reads half of
// it. It is not synced: what a loss of power takes with it, it takes from all
// owners. written is the new file as it was then, nil where that is not to be
// relied on; left tells that the old one is where the new one was made.
func replaceRecord(path string, b []byte, s scratch, h faults) (written *filePrint, left bool, err error) {
	fd, err := s.create(h)
	if err != nil {
		return nil, false, err
	}
	open := true
	shut := func() error {
		open = false
		if err := unix.Close(fd); err != unix.EINTR {
			return err
		}
		return nil
	}
	defer func() {
		if open {
			_ = shut()
		}
	}()
	st, err := fillRecord(fd, b, s.image, h)
	near := s.exchange && st.Dev == s.image.Dev
	if err == nil && !near {
		// What NFS could not write it says here.
		if err = h.check(opRecordClose, 0); err == nil || err == unix.EINTR {
			err = shut()
		}
	}
	if err == nil {
		left, err = s.rename(path, h)
	}
	if err == unix.ENOENT {
		// NFS says so of a request that was carried out and sent again.
		if got, e := readBounded(path, h); e == nil && bytes.Equal(got, b) {
			err = nil
		}
	}
	if err == nil && near && unix.Fstat(fd, &st) == nil {
		print := printOf(&st)
		written = &print
	}
	if err != nil {
		_ = h.unlink(s.path)
	}
	return written, left, err
}

// rename puts what was made in its place. left tells that what stood there
// stands at s.path.
func (s scratch) rename(path string, h faults) (left bool, err error) {
	err = retry(func() error {
		if err := h.check(opRecordRename, 0); err != nil {
			return err
		}
		if s.exchange {
			err := unix.Renameat2(unix.AT_FDCWD, s.path, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
			if left = err == nil; left || err == unix.EINTR {
				return err
			}
			// There is no record yet, or it cannot be done here.
		}
		return unix.Rename(s.path, path)
	})
	return left, err
}

// create makes the file. What stands there was left by an owner that died.
func (s scratch) create(h faults) (fd int, err error) {
	try := func() error {
		if err := h.check(opRecordCreate, 0); err != nil {
			return err
		}
		fd, err = unix.Open(s.path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, s.image.Mode&0o666)
		return err
	}
	err = retry(try)
	if err == unix.EEXIST {
		if err := h.unlink(s.path); err != nil && err != unix.ENOENT {
			return -1, err
		}
		err = retry(try)
	}
	return fd, err
}

func (h faults) unlink(path string) error {
	return retry(func() error {
		if err := h.check(opRecordUnlink, 0); err != nil {
			return err
		}
		return unix.Unlink(path)
	})
}

// fillRecord writes b to the new file fd.
func fillRecord(fd int, b []byte, image *unix.Stat_t, h faults) (st unix.Stat_t, err error) {
	// Whoever can open the image has to be able to read its record; where
	// the file system has no such modes or owners, it does without.
	if unix.Fstat(fd, &st) != nil || st.Uid != image.Uid || st.Gid != image.Gid {
		_ = unix.Fchown(fd, int(image.Uid), int(image.Gid))
	}
	if mode := image.Mode & 0o666; st.Mode&0o7777 != mode {
		_ = unix.Fchmod(fd, mode)
	}
	for off := 0; off < len(b); {
		n := len(b) - off
		if h != nil {
			if n, err = h(opRecordWrite, int64(off), n); err == unix.EINTR {
				continue
			} else if err != nil {
				return st, err
			}
		}
		n, err = unix.Write(fd, b[off:off+n])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return st, err
		case n == 0:
			return st, unix.ENOSPC
		}
		off += n
	}
	return st, nil
}

// RecordPlace says where an image's epochs are kept: Path, or if that is "",
// nowhere, for the reason PerProcess.
type RecordPlace struct{ Path, PerProcess string }

// String is the path, or "per process (why)".
func (p RecordPlace) String() string {
	if p.Path != "" {
		return p.Path
	}
	return fmt.Sprintf("per process (%s)", p.PerProcess)
}

// placeRecord finds the place of the record of the image at path, device if
// it is a block device. explicit is Options.OwnerRecord.
func placeRecord(path, explicit string, device bool) RecordPlace {
	switch {
	case explicit == OwnerRecordOff:
		return RecordPlace{PerProcess: "--owner-record off"}
	case explicit != "":
		if target, err := filepath.EvalSymlinks(explicit); err == nil {
			explicit = target
		}
		abs, err := filepath.Abs(explicit)
		if err != nil {
			return RecordPlace{PerProcess: err.Error()}
		}
		return RecordPlace{Path: abs}
	case device:
		return RecordPlace{PerProcess: "a block device needs --owner-record PATH"}
	}
	// Beside the file itself, where exporters meet that know it by other
	// names.
	target, err := filepath.EvalSymlinks(path)
	if err == nil {
		target, err = filepath.Abs(target)
	}
	if err != nil {
		return RecordPlace{PerProcess: fmt.Sprintf("the image has no path: %v", err)}
	}
	return RecordPlace{Path: target + recordSuffix}
}

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
	// to be read to know that it is still the same.
	written *filePrint
	left    bool           // there are files to be removed
	tidying sync.WaitGroup // who removes them
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

// holder names, to somebody whom the locks refuse, who has them; "" if the
// record does not know.
func (o *ownerRecord) holder() string {
	if r := o.claimed(); r != nil && r.Process() != ProcessEnded {
		return r.Owner(time.Now())
	}
	return ""
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

// replace writes the record anew. What it was is removed by tidy.
func (o *ownerRecord) replace(path, temp string, b []byte) error {
	written, left, err := replaceRecord(path, b, scratch{path: path + temp, image: &o.stat, exchange: o.near}, o.faults)
	o.written = written
	o.left = o.left || left
	return err
}

// manyTidy is how many records are tidied up at once by a process that owns many
// images.
var manyTidy = make(chan struct{}, 4)

// tidy removes what this claim, and the last owner's release, have left. It
// waits for nothing, as it is called when the image has just been taken.
func (o *ownerRecord) tidy() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.left || o.mine == nil {
		return
	}
	epoch := o.mine.Epoch
	o.tidying.Go(func() {
		manyTidy <- struct{}{}
		defer func() { <-manyTidy }()
		o.mu.Lock() // the locks do not go while it is held and there is a claim
		defer o.mu.Unlock()
		if o.mine != nil && o.mine.Epoch == epoch {
			o.tidyLocked()
		}
	})
}

func (o *ownerRecord) tidyLocked() {
	if path := o.place.Load().Path; path != "" && o.left {
		_ = unix.Unlink(path + recordTemp)
		_ = unix.Unlink(path + recordWas)
	}
	o.left = false
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
	durable = last != nil && last.leaves(&me, print)
	o.stat = *stat
	if err := o.replace(p.Path, recordTemp, me.bytes()); err != nil {
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

// unwritable tells errors of a place where nothing can be written from those
// of storage that does not work.
func unwritable(err error) bool {
	for _, errno := range [...]unix.Errno{
		unix.EACCES, unix.EPERM, unix.EROFS, unix.ENOSPC, unix.EDQUOT, unix.ENAMETOOLONG,
	} {
		if isErrno(err, errno) {
			return true
		}
	}
	return false
}

func (r *OwnerRecord) bytes() []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(r); err != nil {
		panic(err) // a time past the year 9999
	}
	return b.Bytes()
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
		if err := o.replace(path, recordTemp, o.mine.bytes()); err != nil {
			o.tell("owner record %s was removed and cannot be written again: %v", path, err)
			break
		}
		o.tidyLocked()
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
// the image, and what the record was is removed too; otherwise the next owner
// does that.
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
	if err := o.replace(path, recordWas, me.bytes()); err != nil {
		return &fs.PathError{Op: "write owner record", Path: path, Err: fmt.Errorf("%w; it does not say that the image was let go in order", err)}
	}
	if last {
		o.tidyLocked()
	}
	return nil
}

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
		err = o.replace(path, recordTemp, o.before)
	}
	o.tidyLocked()
	if err != nil {
		return &fs.PathError{Op: "put back owner record", Path: path, Err: fmt.Errorf("%w; it names this process, which does not own the image", err)}
	}
	return nil
}
