package backend

import (
	"errors"
	"sync/atomic"
)

// view is an image's open files as requests see them. It does not change while
// it is published, but for what is atomic.
type view struct {
	file   *File   // that Options.Path names
	others []*File // that it leads to
	active bool
	content

	// What Check has seen.
	strange atomic.Int32           // times in a row that another held byte 101
	lost    atomic.Pointer[string] // the path names something else; see Owned.PathLost
}

// format makes views of an image's files. Its methods are called by the
// goroutine that changes ownership.
type format interface {
	// check sees that f, open for reading and without locks, could be served,
	// and returns the size in bytes that the image would have.
	check(f *File) (size int64, err error)
	// open makes an inactive view of f, which is open for reading and without
	// locks. It changes nothing. was is the view that clients know, nil for
	// the first.
	open(f *File, was *view) (*view, error)
	// load makes the view of an owner, who has f open and locked. It reads
	// everything anew, makes every check that can refuse, and changes nothing.
	load(f *File) (*view, error)
}

// content is what a format makes of a view's files. Its data methods are those
// of Image; they find the view current that they belong to, or one that still
// is in use.
type content interface {
	Size() int64
	Map(p *Plan, off, n int64, mode Mode) error
	Unmap(p *Plan)
	ReadOpaque(p *Plan, i int, skip int64, dst []byte) error
	Prepare(p *Plan, off int64, payload []byte, mode Mode) error
	prepareUnseen(p *Plan, off, n int64) error // of Receiver
	Commit(p *Plan) (durable bool)
	Abort(p *Plan)
	Discard(off, n int64) error
	Zero(off, n int64, flags ZeroFlags) error
	Cache(off, n int64) error
	Status(dst []Status, off, n int64, max int) ([]Status, error)

	// sync is Image.Flush of an image that is written.
	sync() error
	// settle makes everything durable and clean, with no request but reads
	// under way; see Owned.Settle. It is only called of an image that is
	// written.
	settle() error
	// measure looks, beside requests, whether the files have shrunk.
	measure()
	// begin makes what is in the files ready for writing; see Owned.Claim.
	begin(progress func(done, total int64)) error
	// unbegin undoes begin, which may have failed or not been called.
	unbegin() error
	// resize makes the image size bytes long, with no request under way, and
	// returns what it has become.
	resize(size int64) (content, error)
	// tables returns a hash of what says where the image's bytes are, for its
	// fingerprint.
	tables() (uint64, error)
	// freeze ends all writing that no request asks for, beside whatever is under
	// way. Where something is not written that was to be, it is lost, and sync and
	// settle fail from then on. Reads go on.
	freeze()
}

// files are all that the view has open.
func (v *view) files(do func(f *File) error) error {
	errs := []error{do(v.file)}
	for _, f := range v.others {
		errs = append(errs, do(f))
	}
	return errors.Join(errs...)
}

// writable reports whether requests may change the image.
func (v *view) writable() bool { return v.active && v.file.writable }

// deadView stands for an image that cannot be opened: reads fail with EIO.
func (o *Owned) deadView(size int64) *view {
	f := deadFile(o.opts.Path, o.id)
	return &view{file: f, content: &raw{rawFormat: &rawFormat{image: o}, file: f, size: size}}
}

// close closes the files. Nothing may use the view any more.
func (v *view) close() error {
	return errors.Join(v.closeOthers(), v.file.Close())
}

// release is close but for maps for reading, which unmap is to close.
func (v *view) release() error {
	v.freeze()
	return v.files((*File).release)
}

func (v *view) unmap() error { return v.files((*File).unmapPages) }

// closeOthers is close for all but the file that Options.Path names.
func (v *view) closeOthers() error {
	v.freeze()
	var errs []error
	for _, f := range v.others {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// closeAll closes the views that are there.
func closeAll(views ...*view) error {
	var errs []error
	for _, v := range views {
		if v != nil {
			errs = append(errs, v.close())
		}
	}
	return errors.Join(errs...)
}
