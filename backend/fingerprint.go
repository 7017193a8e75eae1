package backend

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// fingerprint tells whether a file was changed. It does not notice bytes
// changed in place within one tick of the file system's clock, or on a block
// device.
type fingerprint struct {
	id           inode
	size         int64
	mtime, ctime unix.Timespec
}

func fingerprintOf(st *unix.Stat_t) *fingerprint {
	return &fingerprint{id: inodeOf(st), size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

// String is all of it but which file it is of.
func (p *fingerprint) String() string {
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

// fingerprint of the file as it is now, or nil if it cannot be had.
func (f *File) fingerprint() *fingerprint {
	var st unix.Stat_t
	if f.fstat(&st) != nil {
		return nil
	}
	p := fingerprintOf(&st)
	if f.traits.BlockDevice {
		size, err := f.currentSize()
		if err != nil {
			return nil
		}
		// The times are those of the node.
		*p = fingerprint{id: f.id, size: size}
	}
	return p
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
	var what []string
	for _, c := range [...]struct {
		name string
		same bool
	}{
		{"another file", p.id == was.id},
		{"size", p.size == was.size},
		{"mtime", p.mtime == was.mtime},
		{"ctime", p.ctime == was.ctime},
	} {
		if !c.same {
			what = append(what, c.name)
		}
	}
	if len(what) == 0 {
		return nil
	}
	return &ModifiedError{Path: path, What: strings.Join(what, ", ")}
}
