package backend

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fingerprint tells whether an image was changed. Where this process may not set
// the image's times, it does not notice bytes changed in place within one tick of
// the file system's clock (see stamp); and never those of a block device, but for
// a format's tables.
type fingerprint struct {
	files  []filePrint
	tables uint64 // see content
}

type filePrint struct {
	id           inode
	size         int64
	mtime, ctime unix.Timespec
}

func printOf(st *unix.Stat_t) filePrint {
	return filePrint{id: inodeOf(st), size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// String is all of it but which file it is of.
func (p filePrint) String() string {
	b := make([]byte, 0, 96)
	b = strconv.AppendInt(append(b, "size "...), p.size, 10)
	b = appendTime(append(b, ", mtime "...), p.mtime)
	b = appendTime(append(b, ", ctime "...), p.ctime)
	return string(b)
}

func appendTime(b []byte, t unix.Timespec) []byte {
	b = strconv.AppendInt(b, t.Sec, 10)
	nsec := strconv.AppendInt(nil, 1e9+t.Nsec, 10)
	nsec[0] = '.'
	return append(b, nsec...)
}

// fingerprint of the image as it is now, or nil if it cannot be had.
func (v *view) fingerprint() *fingerprint {
	p := new(fingerprint)
	err := v.files(func(f *File) error {
		one, err := f.fingerprint()
		p.files = append(p.files, one)
		return err
	})
	if err == nil {
		p.tables, err = v.tables()
	}
	if err != nil {
		return nil
	}
	return p
}

func (f *File) fingerprint() (filePrint, error) {
	var st unix.Stat_t
	if err := f.fstat(&st); err != nil {
		return filePrint{}, err
	}
	if f.traits.BlockDevice {
		// The times are those of the node.
		size, err := f.currentSize()
		return filePrint{id: f.id, size: size}, err
	}
	return printOf(&st), nil
}

// tick is longer than that of any kernel's clock of files.
const tick = 20 * time.Millisecond

// stamp dates what this owner has just written to the files of the image that it
// gives up, by the clock itself. Before Linux 6.13 files are dated by the kernel's tick, up to
// 10 ms: what the next owner wrote within the same one would leave all times as they
// are, and the image would count as unchanged. A network file system dates by its
// server's clock.
func (v *view) stamp() {
	_ = v.files(func(f *File) error {
		var st unix.Stat_t
		if f.dirt.Load() != dirtWritten || f.traits.BlockDevice || !f.keeps() || f.fstat(&st) != nil {
			return nil
		}
		now := time.Now()
		if age := now.Sub(time.Unix(st.Mtim.Unix())); age <= 0 || age > tick {
			return nil
		}
		times := [2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(now.UnixNano())}
		// It is the file owner's to do; for others all is as it was.
		_, _, _ = unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(f.fd), 0, uintptr(unsafe.Pointer(&times)), 0, 0, 0)
		return nil
	})
}

// ModifiedError says that the image is not as this process left it.
type ModifiedError struct {
	Path string
	What string // "size, mtime", or "" if that is not known
}

func (e *ModifiedError) Error() string {
	what := e.What
	if what == "" {
		what = "its state then is not known"
	}
	return fmt.Sprintf("image was modified while inactive: %s (%s); activate it without --if-unchanged to go on with what is there", e.Path, what)
}

// Unwrap is ESTALE.
func (e *ModifiedError) Unwrap() error { return unix.ESTALE }

// compare returns a *ModifiedError unless p is what was.
func (p *fingerprint) compare(path string, was *fingerprint) error {
	if p == nil || was == nil {
		return &ModifiedError{Path: path}
	}
	if len(p.files) != len(was.files) {
		return &ModifiedError{Path: path, What: "other files behind it"}
	}
	var what []string
	note := func(name string, same bool) {
		if !same && !slices.Contains(what, name) {
			what = append(what, name)
		}
	}
	for i, a := range p.files {
		b := was.files[i]
		note("another file", a.id == b.id)
		note("size", a.size == b.size)
		note("mtime", a.mtime == b.mtime)
		note("ctime", a.ctime == b.ctime)
	}
	note("tables", p.tables == was.tables)
	if len(what) == 0 {
		return nil
	}
	return &ModifiedError{Path: path, What: strings.Join(what, ", ")}
}
