package backend

import (
	"hash/maphash"
	"io/fs"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2"
)

// qcowFormat is for qcow2 images.
type qcowFormat struct {
	image  *Owned
	probed bool // the format was guessed
}

// qcow is the content of a qcow2 image's view.
type qcow struct {
	*qcowFormat
	disk   *qcow2.Image
	file   *File   // of the image
	all    []*File // with what it leads to
	size   atomic.Int64
	active bool
	about  QcowInfo // as it was opened
	// silent has the names of bitmaps that have told nothing, which is logged
	// once.
	silent sync.Map
}

var (
	_ format  = (*qcowFormat)(nil)
	_ content = (*qcow)(nil)
)

// view opens what f leads to. The files of a view that is active are locked:
// those that the owner writes as f is, the others as one who only reads.
func (q *qcowFormat) view(f *File, active bool) (*view, error) {
	o := q.image
	if err := q.checkProbed(f); err != nil {
		return nil, err
	}
	c := chain{opts: o.opts, how: o.how(active && !o.opts.ReadOnly)}
	if active {
		c.how.pages = true
		c.taken = func(f *File, writes bool) error {
			if o.opts.Locking != LockingOff {
				if err := o.lockFile(f, writes); err != nil {
					return err
				}
			}
			return o.refresh(f)
		}
	}
	disk, err := c.open(f, o.opts.Path)
	if err != nil {
		return nil, err
	}
	if active {
		// Tables take 1/8000 of the disk with clusters of 64 KiB.
		size := disk.Size()
		for _, f := range c.files {
			if f.writable {
				f.expectLength(size + size/64 + 64<<20)
			}
		}
	}
	v := &qcow{qcowFormat: q, disk: disk, file: f, all: c.files, active: active}
	v.size.Store(disk.Size())
	v.about = *newLayers(c.links)[0].Qcow2
	return &view{file: f, others: c.files[1:], active: active, content: v}, nil
}

// checkProbed keeps an image whose format was guessed from leading to other
// files: a guest that has a raw disk could have written its header.
func (q *qcowFormat) checkProbed(f *File) error {
	if !q.probed {
		return nil
	}
	h, err := qcow2.ReadHeader(f)
	if err == nil && (h.Backing != "" || h.Incompatible&qcow2.DataFile != 0) {
		err = &fs.PathError{Op: "open image", Path: f.path, Err: &refusal{
			"this looks like a qcow2 image that leads to other files, and its format was not given but guessed; serve it with -f qcow2 if that is right", unix.EPERM}}
	}
	return err
}

// check implements format.
func (q *qcowFormat) check(f *File) (size int64, err error) {
	v, err := q.view(f, false)
	if err != nil {
		return 0, err
	}
	defer func() {
		for _, f := range v.others {
			f.Close()
		}
	}()
	if h := v.content.(*qcow).disk.Header(); h.Incompatible&qcow2.DataFile != 0 && !q.image.opts.ReadOnly {
		data := v.others[0].path
		if err := retry(func() error { return unix.Faccessat(unix.AT_FDCWD, data, unix.W_OK, unix.AT_EACCESS) }); err != nil {
			return 0, openError(data, q.image.how(true), err)
		}
	}
	return v.Size(), nil
}

// open implements format.
func (q *qcowFormat) open(f *File, was *view) (*view, error) { return q.view(f, false) }

// load implements format.
func (q *qcowFormat) load(f *File) (*view, error) { return q.view(f, true) }

// Size implements content.
func (q *qcow) Size() int64 { return q.size.Load() }

// plan is the qcow2 plan that p has, so that it is used again with p.
func plan(p *Plan) *qcow2.Plan {
	if have, ok := p.Pin.(*qcow2.Plan); ok {
		return have
	}
	made := new(qcow2.Plan)
	p.Pin = made
	return made
}

// qcowMode is what of mode the format knows.
func qcowMode(mode Mode) qcow2.Mode {
	if mode&MayBlock != 0 {
		return qcow2.MayBlock
	}
	return 0
}

// fill makes p's extents of those of its qcow2 plan.
func fill(p *Plan, from *qcow2.Plan) {
	p.Extents = p.Extents[:0]
	for i := range from.Extents {
		e := &from.Extents[i]
		x := Extent{Kind: Zero, Length: e.Length}
		switch e.Kind {
		case qcow2.Data:
			x.Kind, x.File, x.Offset = Data, e.File.(*File), e.Offset
		case qcow2.Compressed:
			x.Kind = Opaque
		}
		p.Extents = append(p.Extents, x)
	}
}

// wrap is an error of the format, which names the file, for a caller of ours.
func wrap(err error) error {
	if err == qcow2.ErrWait {
		return ErrWait
	}
	return err
}

// within refuses what lies past the end.
func (q *qcow) within(op string, off, n int64) error {
	if off < 0 || n < 0 || off > q.Size()-n {
		return q.image.fail(op, errPastEnd)
	}
	return nil
}

// Map implements content. Whoever is not the owner sees tables as they were
// when they were first read, which may be EIO where the owner has changed them
// meanwhile.
func (q *qcow) Map(p *Plan, off, n int64, mode Mode) error {
	if err := q.within("read", off, n); err != nil {
		return err
	}
	if !q.active && mode&MayBlock != 0 {
		if err := q.file.follow(); err != nil { // the owner may have made it longer
			return err
		}
	}
	d := plan(p)
	if err := q.disk.Map(d, off, n, qcowMode(mode)); err != nil {
		return wrap(err)
	}
	fill(p, d)
	return nil
}

// Unmap implements content.
func (q *qcow) Unmap(p *Plan) { q.disk.Unmap(plan(p)) }

// ReadOpaque implements content.
func (q *qcow) ReadOpaque(p *Plan, i int, skip int64, dst []byte) error {
	return q.disk.ReadCompressed(plan(p), i, skip, dst)
}

// Prepare implements content.
func (q *qcow) Prepare(p *Plan, off int64, payload []byte, mode Mode) error {
	n := int64(len(payload))
	if err := q.within("write", off, n); err != nil {
		return err
	}
	d := plan(p)
	if err := q.disk.Prepare(d, off, n, qcowMode(mode)); err != nil {
		return wrap(err)
	}
	fill(p, d)
	if d.Fresh() {
		for i := range p.Extents {
			p.Extents[i].Fresh = true
		}
	}
	return nil
}

// prepareUnseen implements content. What is in pieces is not received in place.
func (q *qcow) prepareUnseen(p *Plan, off, n int64) error {
	if err := q.within("write", off, n); err != nil {
		return err
	}
	d := plan(p)
	if err := q.disk.Prepare(d, off, n, 0); err != nil {
		return wrap(err)
	}
	if len(d.Extents) != 1 {
		q.disk.Abort(d)
		return ErrWait
	}
	fill(p, d)
	return nil
}

// Commit implements content.
func (q *qcow) Commit(p *Plan) (durable bool) {
	q.dirtied()
	return q.disk.Commit(plan(p))
}

// Abort implements content.
func (q *qcow) Abort(p *Plan) {
	q.dirtied()
	q.disk.Abort(plan(p))
}

// dirtied is File.dirtied of all that the owner writes.
func (q *qcow) dirtied() {
	for _, f := range q.all {
		if f.writable {
			f.dirtied()
		}
	}
}

// Discard implements content.
func (q *qcow) Discard(off, n int64) error {
	if q.image.opts.IgnoreDiscard {
		return nil
	}
	if err := q.within("discard", off, n); err != nil {
		return err
	}
	defer q.dirtied()
	return q.disk.Discard(off, n)
}

// Zero implements content. With FastZero only entries of tables are changed,
// but for what is less than a cluster at either end.
func (q *qcow) Zero(off, n int64, flags ZeroFlags) error {
	if err := q.within("zero", off, n); err != nil {
		return err
	}
	if h := q.disk.Header(); flags&FastZero != 0 && (h.Version < 3 || h.Autoclear&qcow2.DataFileRaw != 0) {
		return q.image.fail("zero", unix.EOPNOTSUPP)
	}
	defer q.dirtied()
	return q.disk.Zero(off, n, flags&NoHole != 0 || q.image.opts.IgnoreDiscard)
}

// Cache implements content.
func (q *qcow) Cache(off, n int64) error {
	var p Plan
	if err := q.Map(&p, off, n, MayBlock); err != nil {
		return err
	}
	defer q.Unmap(&p)
	for _, e := range p.Extents {
		if e.Kind == Data {
			if err := e.File.readahead(e.Offset, e.Length); err != nil {
				return err
			}
		}
	}
	return nil
}

// statusStep is how much is asked for at once, in bytes: what is not needed was
// looked up for nothing.
const statusStep = 256 << 20

// Status implements content: what has data, in whichever file of the chain, is
// neither a hole nor zero.
func (q *qcow) Status(dst []Status, off, n int64, max int) ([]Status, error) {
	if err := q.within("status", off, n); err != nil {
		return dst, err
	}
	first := len(dst)
	var ext []qcow2.Extent
	for end := off + n; off < end; {
		var err error
		step := min(end-off, statusStep)
		if ext, err = q.disk.Status(ext[:0], off, step); err != nil {
			return dst, wrap(err)
		}
		for i := range ext {
			var flags StatusFlags
			if ext[i].Kind == qcow2.Zero {
				flags = StatusHole | StatusZero
			}
			if k := len(dst) - 1; k >= first && dst[k].Flags == flags {
				dst[k].Length += ext[i].Length
			} else if len(dst)-first == max {
				return dst, nil
			} else {
				dst = append(dst, Status{Length: ext[i].Length, Flags: flags})
			}
		}
		off += step
	}
	return dst, nil
}

// sync implements content.
func (q *qcow) sync() error { return q.disk.Flush() }

// settle implements content.
func (q *qcow) settle() error { return q.disk.Settle() }

// begin implements content.
func (q *qcow) begin(progress func(done, total int64)) error { return q.disk.Begin(progress) }

// unbegin implements content.
func (q *qcow) unbegin() error { return q.disk.Settle() }

// freeze implements content.
func (q *qcow) freeze() { q.disk.Close() }

// measure implements content.
func (q *qcow) measure() {
	for _, f := range q.all {
		_, _ = q.image.measure(f)
	}
}

// resize implements content.
func (q *qcow) resize(size int64) (content, error) {
	if err := q.disk.Resize(size); err != nil {
		return nil, err
	}
	q.size.Store(q.disk.Size())
	return q, nil
}

// tablesSeed makes the hashes of tables comparable within this process, which
// alone compares them.
var tablesSeed = maphash.MakeSeed()

// tables implements content: header, L1 table and refcount table. It is called
// while the gate is closed: with SHA-256 it took 100 us of a handover, so 30.
func (q *qcow) tables() (sum uint64, err error) {
	h := q.disk.Header()
	var hash maphash.Hash
	hash.SetSeed(tablesSeed)
	b := make([]byte, 16<<10)
	for _, part := range [...]struct{ off, n int64 }{
		{0, h.Geometry().ClusterSize()},
		{h.L1Offset, int64(h.L1Entries) * 8},
		{h.RefcountOffset, h.RefcountLength << h.ClusterBits},
	} {
		// The first cluster may be cut off in a file without any data.
		end := min(part.off+part.n, q.file.Length())
		for off := part.off; off < end; off += int64(len(b)) {
			piece := b[:min(int64(len(b)), end-off)]
			if err := q.file.ReadAt(piece, off); err != nil {
				return 0, err
			}
			_, _ = hash.Write(piece)
		}
	}
	return hash.Sum64(), nil
}
