package backend

import (
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// rawFormat is for images whose bytes are those of a regular file or block
// device.
type rawFormat struct {
	image *Owned
	guard guard
}

// raw is the content of a raw image's view.
type raw struct {
	*rawFormat
	file   *File
	size   int64
	active bool
	fixed  bool        // see Extent; not where an activation drops the page cache
	sparse atomic.Bool // worth asking for holes
	full   *full       // where there are none; nil where asking never waits
}

var (
	_ format  = (*rawFormat)(nil)
	_ content = (*raw)(nil)
)

func (r *rawFormat) content(f *File, size int64, active bool) *raw {
	c := &raw{rawFormat: r, file: f, size: size, active: active, fixed: !r.image.dropsCache(f)}
	if t := f.Traits(); !t.Tmpfs && !t.BlockDevice {
		c.full = newFull(size)
	}
	if _, sparse, err := f.measure(); err == nil {
		c.sparse.Store(sparse)
	}
	return c
}

// check implements format.
func (r *rawFormat) check(f *File) (size int64, err error) { return f.size, nil }

// open implements format. The size stays what clients know.
func (r *rawFormat) open(f *File, was *view) (*view, error) {
	size := f.size
	if was != nil {
		size = was.Size()
	}
	return &view{file: f, content: r.content(f, size, false)}, nil
}

// load implements format.
func (r *rawFormat) load(f *File) (*view, error) {
	if r.guard.on {
		first, err := readFirst(f)
		if err != nil {
			return nil, err
		}
		if format := Probe(first); format != "" {
			return nil, r.image.fail("activate", fmt.Errorf("the image was guessed to be raw and has become %s while inactive; restart nbd-export with -f: %w", format, unix.EOPNOTSUPP))
		}
	}
	return &view{file: f, active: true, content: r.content(f, f.size, true)}, nil
}

// Size implements content.
func (r *raw) Size() int64 { return r.size }

// within reports whether a range lies inside the image.
func (r *raw) within(off, n int64) bool { return off >= 0 && n >= 0 && off <= r.size-n }

// Map implements content. The extents are Data, and with FindHoles also Zero for
// reads of 64 KiB and more. It fails only with ErrWait, or EIO past the end.
func (r *raw) Map(p *Plan, off, n int64, mode Mode) error {
	p.Extents, p.Pin = p.Extents[:0], nil
	if !r.within(off, n) {
		return r.image.fail("read", errPastEnd)
	}
	if mode&FindHoles == 0 || n < holeMin || !r.sparse.Load() {
		p.Extents = append(p.Extents, Extent{Kind: Data, File: r.file, Offset: off, Length: n, Fixed: r.fixed})
		return nil
	}
	return r.findHoles(p, off, n, mode)
}

// findHoles asks the file system. That may wait for its metadata, except on
// tmpfs.
func (r *raw) findHoles(p *Plan, off, n int64, mode Mode) error {
	if r.full != nil {
		if r.full.has(off, n) {
			p.Extents = append(p.Extents, Extent{Kind: Data, File: r.file, Offset: off, Length: n, Fixed: r.fixed})
			return nil
		}
		if mode&MayBlock == 0 {
			return ErrWait
		}
	}
	for end := off + n; off < end; {
		next, hole := end, false
		if len(p.Extents) < maxHoles-1 {
			next, hole = r.file.extent(off, end)
		}
		e := Extent{Kind: Data, File: r.file, Offset: off, Length: next - off, Fixed: r.fixed}
		if hole {
			e = Extent{Kind: Zero, Length: next - off}
		} else if r.full != nil && next-off >= r.full.chunk {
			r.full.add(off, next)
		}
		if k := len(p.Extents) - 1; k >= 0 && p.Extents[k].Kind == e.Kind {
			p.Extents[k].Length += e.Length
		} else {
			p.Extents = append(p.Extents, e)
		}
		off = next
	}
	return nil
}

// Unmap implements content.
func (r *raw) Unmap(p *Plan) { p.Pin = nil }

// ReadOpaque implements content; raw has nothing opaque.
func (r *raw) ReadOpaque(p *Plan, i int, skip int64, dst []byte) error {
	return r.image.fail("read", unix.EINVAL)
}

// writable checks a range that is about to be changed.
func (r *raw) writable(op string, off, n int64) error {
	switch {
	case !r.active || !r.file.writable:
		return r.image.fail(op, unix.EPERM)
	case !r.within(off, n):
		return r.image.fail(op, errPastEnd)
	}
	return r.file.inside(op, off, n)
}

// Prepare implements content. The plan is one Data extent. A write to the first
// 512 bytes of an image whose format was guessed needs MayBlock: it waits for
// others of its kind, and gives EPERM if it would make the image look like
// another format.
func (r *raw) Prepare(p *Plan, off int64, payload []byte, mode Mode) error {
	n := int64(len(payload))
	p.Extents, p.Pin = p.Extents[:0], nil
	if err := r.writable("write", off, n); err != nil {
		return err
	}
	if r.guard.touches(off) {
		if mode&MayBlock == 0 {
			return ErrWait
		}
		if err := r.guard.enter(r.file, off, payload, n); err != nil {
			return err
		}
		p.Pin = &r.guard
	}
	p.Extents = append(p.Extents, Extent{Kind: Data, File: r.file, Offset: off, Length: n})
	return nil
}

// prepareUnseen implements content.
func (r *raw) prepareUnseen(p *Plan, off, n int64) error {
	p.Extents, p.Pin = p.Extents[:0], nil
	if err := r.writable("write", off, n); err != nil {
		return err
	}
	if r.guard.touches(off) {
		return ErrWait
	}
	p.Extents = append(p.Extents, Extent{Kind: Data, File: r.file, Offset: off, Length: n})
	return nil
}

// Commit implements content.
func (r *raw) Commit(p *Plan) (durable bool) {
	r.Abort(p)
	return true
}

// Abort implements content.
func (r *raw) Abort(p *Plan) {
	r.file.dirtied()
	if p.Pin != nil {
		r.guard.leave()
	}
	r.Unmap(p)
}

// measure implements content.
func (r *raw) measure() {
	if sparse, err := r.image.measure(r.file); err == nil {
		r.sparse.Store(sparse)
	}
}

// sync implements content.
func (r *raw) sync() error { return r.file.Sync() }

// begin implements content.
func (r *raw) begin(func(done, total int64)) error { return nil }

// unbegin implements content.
func (r *raw) unbegin() error { return nil }

// tables implements content; raw has none.
func (r *raw) tables() (uint64, error) { return 0, nil }

// freeze implements content.
func (r *raw) freeze() {}

// settle implements content.
func (r *raw) settle() error { return r.file.settle() }

// Discard implements content by punching a hole, and does nothing where that
// cannot be done, or is not wanted.
func (r *raw) Discard(off, n int64) error {
	if r.image.opts.IgnoreDiscard {
		return nil
	}
	return r.erase("discard", off, n, func(f *File) error {
		err := f.Discard(off, n)
		if isErrno(err, unix.EOPNOTSUPP) {
			return nil
		}
		return err
	})
}

// Zero implements content; see File.Zero.
func (r *raw) Zero(off, n int64, flags ZeroFlags) error {
	if r.image.opts.IgnoreDiscard {
		flags |= NoHole
	}
	return r.erase("zero", off, n, func(f *File) error { return f.Zero(off, n, flags) })
}

func (r *raw) erase(op string, off, n int64, do func(*File) error) error {
	if err := r.writable(op, off, n); err != nil {
		return err
	}
	if r.guard.touches(off) {
		if err := r.guard.enter(r.file, off, nil, n); err != nil {
			return err
		}
		defer r.guard.leave()
	}
	err := do(r.file)
	r.file.dirtied()
	if err != nil {
		return err
	}
	r.sparse.Store(!r.file.traits.BlockDevice)
	if r.full != nil {
		r.full.remove(off, n)
	}
	return nil
}

// Cache implements content.
func (r *raw) Cache(off, n int64) error {
	if !r.within(off, n) {
		return r.image.fail("cache", errPastEnd)
	}
	return r.file.readahead(off, n)
}

// Status implements content: what SEEK_DATA and SEEK_HOLE say, and nothing
// special where they cannot tell, as on block devices.
func (r *raw) Status(dst []Status, off, n int64, max int) ([]Status, error) {
	if !r.within(off, n) {
		return dst, r.image.fail("status", errPastEnd)
	}
	first := len(dst)
	for end := off + n; off < end; {
		next, hole := r.file.extent(off, end)
		var flags StatusFlags
		if hole {
			flags = StatusHole | StatusZero
		}
		if k := len(dst) - 1; k >= first && dst[k].Flags == flags {
			dst[k].Length += next - off
		} else if len(dst)-first == max {
			break
		} else {
			dst = append(dst, Status{Length: next - off, Flags: flags})
		}
		off = next
	}
	return dst, nil
}
