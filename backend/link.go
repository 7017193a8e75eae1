package backend

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2"
)

// ChainOptions say how the files of an image are opened to be looked at.
type ChainOptions struct {
	// AllowBacking is as Options.AllowBacking.
	AllowBacking []string
	// Lock: nobody may write the files meanwhile. They are locked as by one who
	// only reads; the error is a *LockError if somebody has one of them.
	Lock bool
}

// Link is an image of a chain, open for reading.
type Link struct {
	Path   string // as given, or as the image in front leads to it
	Format string // "raw" or "qcow2"
	File   *File
	Header *qcow2.Header // nil of a raw image, as Data and Image are
	Data   *File         // external data file, nil without
	// DataPath is where the image leads to Data.
	DataPath string
	Image    *qcow2.Image
}

// Close closes the image's file. Nothing may use it any more.
func (l *Link) Close() error { return l.File.Close() }

// OpenLink opens an image alone, to be looked at, and none of the files that it
// leads to: Data and Image are nil. format is "raw", "qcow2", or "auto", which
// takes what is of no known format to be raw. Errors wrap a syscall.Errno.
func OpenLink(path, format string, o ChainOptions) (*Link, error) {
	f, err := openFile(path, openHow{})
	if err != nil {
		return nil, err
	}
	l := &Link{Path: path, Format: format, File: f}
	if err := l.load(o); err != nil {
		f.Close()
		return nil, err
	}
	return l, nil
}

func (l *Link) load(o ChainOptions) error {
	f := l.File
	if o.Lock {
		if err := f.lockToLook(); err != nil {
			return err
		}
		if err := f.load(); err != nil {
			return err
		}
	}
	if l.Format == "auto" {
		first, err := readFirst(f)
		if err != nil {
			return err
		}
		if l.Format = Probe(first); l.Format == "" {
			l.Format = "raw"
		}
	}
	switch l.Format {
	case "raw":
		return nil
	case "qcow2":
		var err error
		l.Header, err = qcow2.ReadHeader(f)
		return err
	}
	return &fs.PathError{Op: "open image", Path: l.Path, Err: &refusal{
		fmt.Sprintf("this is a %s image; nbd-export knows raw and qcow2", l.Format), unix.EOPNOTSUPP}}
}

// lockToLook locks a file as one who only reads.
func (f *File) lockToLook() error {
	err := f.lock(lockReadOnly)
	if le, ok := errors.AsType[*LockError](err); ok {
		(&ownerRecord{image: f.path, device: f.traits.BlockDevice}).name(le, f)
	}
	return err
}

// Chain is an image and the images behind it, open to be looked at.
type Chain struct {
	// Links are the images, that in front first.
	Links []*Link
	files *chain
}

// OpenChain opens an image as OpenLink does, and all files that it leads to.
func OpenChain(path, format string, o ChainOptions) (*Chain, error) {
	first, err := OpenLink(path, format, o)
	if err != nil {
		return nil, err
	}
	if first.Header == nil {
		return &Chain{Links: []*Link{first}, files: &chain{}}, nil
	}
	c := &chain{opts: Options{AllowBacking: o.AllowBacking}}
	if o.Lock {
		c.taken = func(f *File, _ bool) error { return f.lockToLook() }
	}
	if _, err := c.open(first.File, path); err != nil {
		return nil, errors.Join(err, first.Close())
	}
	return &Chain{Links: c.links, files: c}, nil
}

// Close closes all files. Nothing may use the chain any more.
func (c *Chain) Close() error {
	c.files.close()
	return c.Links[0].Close()
}
