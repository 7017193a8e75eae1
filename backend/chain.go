package backend

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2"
)

// maxChain bounds the files of one image.
const maxChain = 256

// chain opens the files that a qcow2 image consists of: the one that is served,
// its data file, and the backing files with theirs. Their names stand in the
// images, where a guest may have put them: so they may lead only to directories
// that the user has named, and nothing is guessed.
type chain struct {
	opts Options
	how  openHow // of the data file; others are only read
	// taken is called for each file but the first when it is open, before
	// anything is read of it: to lock it and so on. writes says that the owner
	// writes it.
	taken func(f *File, writes bool) error

	roots   []string // directories; found when the first name is followed
	files   []*File
	links   []*Link // the images among them, that in front first
	backing int64   // qcow2 images behind the first
}

// ChainError says what is wrong with a name that stands in an image.
type ChainError struct {
	Image string // that names it
	What  string // "backing file" or "data file"
	Name  string // as it stands there
	Err   error
}

func (e *ChainError) Error() string {
	return fmt.Sprintf("qcow2 image %s names %s %q: %v", e.Image, e.What, e.Name, e.Err)
}

func (e *ChainError) Unwrap() error { return e.Err }

// open opens what f leads to, which is open as path, and makes the image of
// all. On failure it has closed what it opened; f stays open.
func (c *chain) open(f *File, path string) (im *qcow2.Image, err error) {
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	c.files = []*File{f}
	im, err = c.image(f, path)
	if err != nil || c.opts.Snapshot == "" {
		return im, err
	}
	return im.Snapshot(c.opts.Snapshot)
}

// findRoots fills roots, which takes a look at every directory on the way there:
// most images lead nowhere and do without.
func (c *chain) findRoots() (err error) {
	f, path := c.files[0], c.links[0].Path
	for _, dir := range append([]string{filepath.Dir(path)}, c.opts.AllowBacking...) {
		if dir, err := filepath.EvalSymlinks(dir); err == nil {
			c.roots = append(c.roots, dir)
		}
	}
	// Not that of a device, /dev, where all others are too.
	if target, err := filepath.EvalSymlinks(path); err == nil && !f.traits.BlockDevice {
		c.roots = append(c.roots, filepath.Dir(target))
	}
	for i, dir := range c.roots {
		if c.roots[i], err = filepath.Abs(dir); err != nil {
			return err
		}
	}
	return nil
}

// close closes all files but the first.
func (c *chain) close() {
	for _, f := range c.files[min(1, len(c.files)):] {
		f.Close()
	}
	c.files = nil
}

// image makes the image in f, which is known as path, with all behind it.
func (c *chain) image(f *File, path string) (*qcow2.Image, error) {
	h, err := qcow2.ReadHeader(f)
	if err != nil {
		return nil, err
	}
	o := qcow2.Options{
		L2Cache: c.opts.L2Cache, KeepSpace: c.opts.IgnoreDiscard, NoRepair: c.opts.NoRepair,
		Fixed: f.traits.BlockDevice, Warn: c.opts.Warn,
	}
	first := f == c.files[0]
	if first && c.opts.step != nil {
		o.Step = func(s qcow2.Step) { c.opts.step(string(s)) }
	}
	l := &Link{Path: path, Format: "qcow2", File: f, Header: h}
	c.links = append(c.links, l)
	if h.Incompatible&qcow2.DataFile != 0 {
		how := c.how
		how.write = how.write && first
		data, below, err := c.follow(path, "data file", h.DataFileName, how)
		if err != nil {
			return nil, err
		}
		o.Data, l.Data, l.DataPath = data, data, below
	}
	if h.Backing != "" && !(first && c.opts.NoBacking) {
		if o.Backing, err = c.behind(path, h); err != nil {
			return nil, err
		}
	}
	if !first {
		// The images behind share what the one in front may have.
		o.L2Cache = max(cmp.Or(o.L2Cache, qcow2.DefaultL2Cache)/c.backing, 1)
	}
	l.Image, err = qcow2.New(f, h, o)
	return l.Image, err
}

// behind opens the backing file that the image at path names.
func (c *chain) behind(path string, h *qcow2.Header) (qcow2.Backing, error) {
	const what = "backing file"
	refuse := func(err error) error { return &ChainError{path, what, h.Backing, err} }
	switch h.BackingFormat {
	case "raw", "host_device", "file", "qcow2":
	case "":
		return nil, refuse(fmt.Errorf("its format is not recorded, and is not guessed: a guest could have made it look like another; record it with qemu-img rebase -u -b %s -F FORMAT %s: %w",
			h.Backing, path, unix.EINVAL))
	default:
		return nil, refuse(fmt.Errorf("its format is %s, which nbd-export does not know; raw and qcow2 are: %w", h.BackingFormat, unix.EOPNOTSUPP))
	}
	how := c.how
	how.write = false
	f, below, err := c.follow(path, what, h.Backing, how)
	if err != nil {
		return nil, err
	}
	if h.BackingFormat != "qcow2" {
		c.links = append(c.links, &Link{Path: below, Format: "raw", File: f})
		return qcow2.NewRawBacking(f), nil
	}
	c.backing++
	im, err := c.image(f, below)
	if err != nil {
		return nil, refuse(err)
	}
	return im.AsBacking(), nil
}

// follow opens the file that the image at path names, and returns its path.
func (c *chain) follow(path, what, name string, how openHow) (*File, string, error) {
	refuse := func(err error) error { return &ChainError{path, what, name, err} }
	if c.roots == nil {
		if err := c.findRoots(); err != nil {
			return nil, "", err
		}
	}
	below, target, err := c.resolve(path, name)
	if err != nil {
		return nil, "", refuse(err)
	}
	if len(c.files) == maxChain {
		return nil, "", refuse(fmt.Errorf("a chain of more than %d files is too long: %w", maxChain, unix.ELOOP))
	}
	f, err := openFile(target, how)
	if err != nil {
		return nil, "", refuse(pathErr(err))
	}
	for _, other := range c.files {
		if other.id == f.id {
			err = fmt.Errorf("that is %s, which is part of this image already: %w", other.path, unix.ELOOP)
		}
	}
	if err == nil {
		err = c.opts.reserved(f)
	}
	if err == nil && c.taken != nil {
		err = c.taken(f, how.write)
	}
	if err == nil {
		err = f.load()
	}
	if err != nil {
		f.Close()
		return nil, "", refuse(err)
	}
	c.files = append(c.files, f)
	return f, below, nil
}

// pathErr is what is said of a file without its path, which the caller names.
func pathErr(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return fmt.Errorf("%s: %w", e.Path, e.Err)
	}
	return err
}

// resolve makes a path of a name that stands in the image at path: relative
// names begin beside it. target is where that leads, by symbolic links too, and
// no further than names may.
func (c *chain) resolve(path, name string) (named, target string, err error) {
	if name == "" {
		return "", "", fmt.Errorf("it has no name: %w", unix.EINVAL)
	}
	if strings.HasPrefix(name, "json:") {
		return "", "", fmt.Errorf("names of this kind (json:) are not followed; give it a plain path with qemu-img rebase -u: %w", unix.EOPNOTSUPP)
	}
	name = strings.TrimPrefix(name, "file:")
	if i := strings.IndexAny(name, ":/"); i >= 0 && name[i] == ':' {
		return "", "", fmt.Errorf("this is no file but protocol %s, which nbd-export does not open: %w", name[:i], unix.EOPNOTSUPP)
	}
	if !filepath.IsAbs(name) {
		name = filepath.Join(filepath.Dir(path), name)
	}
	target, err = filepath.EvalSymlinks(name)
	if err == nil {
		target, err = filepath.Abs(target)
	}
	if err != nil {
		return "", "", pathErr(err)
	}
	// The names of logical volumes lead to /dev.
	judged := target
	if dir, err := filepath.EvalSymlinks(filepath.Dir(name)); err == nil && strings.HasPrefix(dir, "/dev/") && filepath.Dir(target) == "/dev" {
		judged = filepath.Join(dir, filepath.Base(name))
	}
	for _, dir := range c.roots {
		if in, err := filepath.Rel(dir, judged); err == nil && filepath.IsLocal(in) {
			return name, target, nil
		}
	}
	return "", "", &refusal{fmt.Sprintf("it lies outside the image's directory, in %s; if that is meant, give --allow-backing %s",
		filepath.Dir(judged), filepath.Dir(judged)), unix.EACCES}
}
