package backend

import (
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2"
)

// CacheMode says how the host's page cache is used.
type CacheMode string

const (
	// CacheWriteback, the default: writes are in the page cache when they
	// are acknowledged, and on the disk after a flush.
	CacheWriteback CacheMode = "writeback"
	// CacheNone goes around the page cache (O_DIRECT).
	CacheNone CacheMode = "none"
	// CacheWritethrough: writes are on the disk when they are acknowledged.
	CacheWritethrough CacheMode = "writethrough"
)

// LockingMode says whether an active image is locked.
type LockingMode string

const (
	// LockingAuto, the default: activation locks the image, refuses where
	// locks do not work, and warns where they do not reach other hosts.
	LockingAuto LockingMode = "auto"
	// LockingOn is LockingAuto without that warning.
	LockingOn LockingMode = "on"
	// LockingOff takes no locks. Who uses it sees to it that nobody else
	// writes.
	LockingOff LockingMode = "off"
)

// DropCacheMode says whether activation drops the page cache.
type DropCacheMode string

const (
	// DropCacheAuto, the default, drops it where not all openers share one
	// cache: everywhere but on ext4, xfs, btrfs and tmpfs.
	DropCacheAuto DropCacheMode = "auto"
	DropCacheOn   DropCacheMode = "on"
	DropCacheOff  DropCacheMode = "off"
)

// DefaultL2Cache is Options.L2Cache where that is 0, in bytes.
const DefaultL2Cache = qcow2.DefaultL2Cache

// Options describe the image to open. The zero value of each mode is its
// default.
type Options struct {
	Path      string
	Format    string // "raw", "qcow2", "auto" or "" for auto
	ReadOnly  bool   // never open it for writing
	Cache     CacheMode
	Locking   LockingMode
	DropCache DropCacheMode
	// IgnoreDiscard: Discard does nothing, and Zero keeps the range allocated.
	IgnoreDiscard bool
	// AllowBacking are directories, beside that of the image, in which its
	// backing files and data files may be.
	AllowBacking []string
	// L2Cache is how many bytes of a qcow2 image's L2 tables are kept in
	// memory, and as many again of those behind it; 0 for 32 MiB.
	L2Cache int64
	// NoBacking: what a qcow2 image has not reads as zeros, whatever backing
	// file it names.
	NoBacking bool
	// NoRepair: a qcow2 image that its last owner left dirty is not activated.
	NoRepair bool
	// Snapshot is the name or ID of an internal snapshot of a qcow2 image to
	// serve instead, read-only; "" for none.
	Snapshot string
	// OwnerRecord is the path of the owner record, "" for IMAGE.owner beside
	// an image that is a file, or OwnerRecordOff. A read-only image has none.
	OwnerRecord string
	// ControlAddress is told to others in the record, as the way to reach this
	// process.
	ControlAddress string
	// Reserved says what else the process writes into the file with this device and
	// inode, "" for nothing: that is no image, nor part of one. nil for nothing at all.
	Reserved func(dev, ino uint64) string
	// Warn gets a line about what the user should know and what does not
	// keep the image from being served. It may be called by any goroutine,
	// also later. nil drops them.
	Warn func(string)
	// Later runs what a change of owner leaves to be done, so that nobody waits
	// for it; Close does. nil starts it at once, on a goroutine of its own.
	Later func(func())

	step func(string) // see OpenHooked
}

// settle replaces zero values by the defaults and refuses what is unknown.
func (o *Options) settle() error {
	choose := func(flag string, v *string, all ...string) error {
		if *v == "" {
			*v = all[0]
		}
		for _, a := range all {
			if *v == a {
				return nil
			}
		}
		return fmt.Errorf("%s %q: must be one of %q: %w", flag, *v, all, unix.EINVAL)
	}
	if err := choose("--format", &o.Format, "auto", "raw", "qcow2"); err != nil {
		return err
	}
	if err := choose("--cache", (*string)(&o.Cache), string(CacheWriteback), string(CacheNone), string(CacheWritethrough)); err != nil {
		return err
	}
	if err := choose("--locking", (*string)(&o.Locking), string(LockingAuto), string(LockingOn), string(LockingOff)); err != nil {
		return err
	}
	if err := choose("--drop-cache", (*string)(&o.DropCache), string(DropCacheAuto), string(DropCacheOn), string(DropCacheOff)); err != nil {
		return err
	}
	if o.Warn == nil {
		o.Warn = func(string) {}
	}
	return nil
}

// reserved refuses a file that the process writes something else into.
func (o *Options) reserved(f *File) error {
	if o.Reserved == nil {
		return nil
	}
	if what := o.Reserved(f.id.dev, f.id.ino); what != "" {
		return &refusal{"it is " + what + ", and what is written there would end up in the image; choose another file for one of them", unix.EBUSY}
	}
	return nil
}

// Open opens the image inactive: for reading only, without locks, changing
// nothing. It may block for as long as the storage does. Errors wrap a
// syscall.Errno and say what to do.
func Open(o Options) (*Owned, error) { return open(o, nil) }

func open(o Options, h faults) (*Owned, error) {
	if err := o.settle(); err != nil {
		return nil, err
	}
	f, err := openFile(o.Path, openHow{direct: o.Cache == CacheNone, overwrites: !o.ReadOnly, faults: h})
	if err != nil {
		return nil, err
	}
	var format string
	var probed bool
	if err = o.reserved(f); err != nil {
		err = &fs.PathError{Op: "open image", Path: f.path, Err: err}
	} else {
		format, probed, err = findFormat(f, o)
	}
	if err == nil && o.Snapshot != "" && (format != "qcow2" || !o.ReadOnly) {
		err = &fs.PathError{Op: "open image", Path: f.path, Err: &refusal{"a snapshot can only be served of a qcow2 image, and read-only", unix.EINVAL}}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	if o.Locking == LockingOff && !o.ReadOnly {
		o.Warn(fmt.Sprintf("locking of %s is off: nothing but your own care keeps a second writer away", f.path))
	}
	image := newOwned(f, o, h)
	image.info.Format = format
	switch format {
	case "raw":
		image.format = &rawFormat{image: image, guard: guard{on: probed}}
	case "qcow2":
		image.format = &qcowFormat{image: image, probed: probed}
		image.info.Mapped, image.info.CanTrim, image.info.CanFastZero = true, true, true
	}
	v, err := image.format.open(f, nil)
	if err != nil {
		f.Close()
		return nil, err
	}
	image.cur.Store(v)
	image.print = v.fingerprint()
	return image, nil
}

// findFormat says what f is to be served as, and refuses what it cannot be.
// probed says that it is a guess.
func findFormat(f *File, o Options) (format string, probed bool, err error) {
	if o.Format == "raw" {
		return "raw", false, nil
	}
	first, err := readFirst(f)
	if err != nil {
		return "", false, err
	}
	format = Probe(first)
	var hint string
	switch {
	case o.Format == "qcow2" && format != "qcow2":
		return "", false, &fs.PathError{Op: "open image", Path: f.path, Err: ErrNotQcow2}
	case format == "qcow2":
		return format, o.Format != "qcow2", nil
	case format == "":
		o.Warn(fmt.Sprintf("the format of %s was not given and is taken to be raw; writes that would make it look like another format are refused; give -f raw to allow them", f.path))
		return "raw", true, nil
	default:
		hint = fmt.Sprintf("this looks like a %s image, which nbd-export cannot serve; convert it with qemu-img convert -O raw, or give -f raw if it is a raw disk all the same", format)
	}
	return "", false, &fs.PathError{Op: "open image", Path: f.path, Err: &refusal{hint, unix.EOPNOTSUPP}}
}

// ErrNotQcow2 is why what was said to be qcow2 cannot be opened.
var ErrNotQcow2 error = &refusal{"this is not a qcow2 image; give -f raw to serve it as it is", unix.EOPNOTSUPP}

// refusal is an error whose text says all; the errno is for programs.
type refusal struct {
	text  string
	errno syscall.Errno
}

func (e *refusal) Error() string { return e.text }
func (e *refusal) Unwrap() error { return e.errno }

// refuseKind lets only regular files and block devices through.
func refuseKind(path string, mode uint32) error {
	var what string
	errno := unix.EINVAL
	switch mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
		return nil
	case unix.S_IFDIR:
		what, errno = "a directory", unix.EISDIR
	case unix.S_IFIFO:
		what = "a FIFO"
	case unix.S_IFSOCK:
		what = "a socket"
	case unix.S_IFCHR:
		what = "a character device"
	default:
		what = "not a file"
	}
	return &fs.PathError{Op: "open image", Path: path, Err: &refusal{fmt.Sprintf("this is %s; an image is a regular file or a block device", what), errno}}
}

// openError adds to a failed open what can be done about it.
func openError(path string, how openHow, err error) error {
	hint := ""
	switch {
	case err == unix.ENOENT && (strings.Contains(path, "://") || strings.HasPrefix(path, "json:")):
		hint = "; an image is a file or a block device, given by its path; of what a server exports, nbdinfo and qemu-img tell"
	case err == unix.ENOENT:
		hint = "; an image has to exist, nbd-export create -f raw (or qcow2) makes an empty one"
	case err == unix.EROFS || (err == unix.EACCES || err == unix.EPERM) && how.write:
		hint = "; make it writable or serve it with --read-only"
	case err == unix.EACCES:
		hint = "; make it readable for the user that runs nbd-export"
	case err == unix.EINVAL && how.direct:
		return &fs.PathError{Op: "open image", Path: path, Err: fmt.Errorf("%w: %w", errNoDirect, err)}
	case err == unix.ESTALE:
		hint = "; the path names another file now"
	}
	return &fs.PathError{Op: "open image", Path: path, Err: fmt.Errorf("%w%s", err, hint)}
}
