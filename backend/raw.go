package backend

import (
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxRequest is the largest request in bytes that is advertised.
const maxRequest = 32 << 20

// Raw is an image whose bytes are those of a regular file or block device. It
// is an Image, and has the storage side of ownership (raw_owner.go).
type Raw struct {
	opts   Options // settled
	info   Info
	id     inode
	scope  string
	guard  guard
	faults faults
	record *ownerRecord

	// cur is what requests use; it is loaded once for each.
	cur  atomic.Pointer[view]
	held atomic.Pointer[string] // LocksHeld

	// The rest belongs to the one goroutine that changes ownership.
	next   *view // acquired or settled, to be published
	old    *view // published over, to be closed
	print  *fingerprint
	clean  bool // settled: what follows is the end of this ownership
	warned bool // about the scope of locks
}

var _ Image = (*Raw)(nil)

// view is an open file as requests see it. It does not change while it is
// published, but for what is atomic.
type view struct {
	file   *File
	size   int64
	active bool
	sparse atomic.Bool // worth asking for holes
	full   *full       // where there are none; nil where asking never waits

	measuring sync.Mutex // one measurement at a time reaches limit

	// What Check has seen.
	strange  atomic.Int32 // times in a row that another held byte 101
	nameless atomic.Bool  // the path names something else; told
}

func newRaw(f *File, o Options, probed bool, h faults) *Raw {
	t := f.Traits()
	r := &Raw{
		opts:   o,
		id:     f.id,
		faults: h,
		info: Info{
			Path:           o.Path,
			Format:         "raw",
			ReadOnly:       o.ReadOnly,
			MinBlock:       1,
			PreferredBlock: uint32(max(t.BlockSize, pageSize)),
			MaxBlock:       maxRequest,
			Rotational:     t.Rotational,
			CanTrim:        t.trims,
			CanFastZero:    t.fastZeros,
			WriteThrough:   o.Cache == CacheWritethrough,
		},
		print: f.fingerprint(),
	}
	r.guard.on = probed
	r.scope = scopeOff
	if o.Locking != LockingOff {
		r.scope = f.lockScope()
	}
	r.record = newOwnerRecord(o, t.BlockDevice, h, r.warnf)
	r.noteLocks(nil)
	r.cur.Store(newView(f, f.size, false))
	return r
}

func newView(f *File, size int64, active bool) *view {
	v := &view{file: f, size: size, active: active}
	if t := f.Traits(); !t.Tmpfs && !t.BlockDevice {
		v.full = newFull(size)
	}
	if _, sparse, err := f.measure(); err == nil {
		v.sparse.Store(sparse)
	}
	return v
}

func (r *Raw) fail(op string, err error) error {
	return &fs.PathError{Op: op, Path: r.opts.Path, Err: err}
}

func (r *Raw) warnf(format string, args ...any) { r.opts.Warn(fmt.Sprintf(format, args...)) }

// warn tells an error that stops nothing.
func (r *Raw) warn(err error) {
	if err != nil {
		r.warnf("%v", err)
	}
}

// Info implements Image.
func (r *Raw) Info() Info { return r.info }

// Size implements Image.
func (r *Raw) Size() int64 { return r.cur.Load().size }

// within reports whether a range lies inside the view.
func (v *view) within(off, n int64) bool { return off >= 0 && n >= 0 && off <= v.size-n }

// Map implements Image. The extents are Data, and with FindHoles also Zero for
// reads of 64 KiB and more. It fails only with ErrWait, or EIO past the end.
func (r *Raw) Map(p *Plan, off, n int64, mode Mode) error {
	v := r.cur.Load()
	p.Extents, p.Pin = p.Extents[:0], nil
	if !v.within(off, n) {
		return r.fail("read", errPastEnd)
	}
	if mode&FindHoles == 0 || n < holeMin || !v.sparse.Load() {
		p.Extents = append(p.Extents, Extent{Kind: Data, File: v.file, Offset: off, Length: n})
		return nil
	}
	return v.findHoles(p, off, n, mode)
}

// findHoles asks the file system. That may wait for its metadata, except on
// tmpfs.
func (v *view) findHoles(p *Plan, off, n int64, mode Mode) error {
	if v.full != nil {
		if v.full.has(off, n) {
			p.Extents = append(p.Extents, Extent{Kind: Data, File: v.file, Offset: off, Length: n})
			return nil
		}
		if mode&MayBlock == 0 {
			return ErrWait
		}
	}
	for end := off + n; off < end; {
		next, hole := end, false
		if len(p.Extents) < maxHoles-1 {
			next, hole = v.file.extent(off, end)
		}
		e := Extent{Kind: Data, File: v.file, Offset: off, Length: next - off}
		if hole {
			e = Extent{Kind: Zero, Length: next - off}
		} else if v.full != nil && next-off >= v.full.chunk {
			v.full.add(off, next)
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

// Unmap implements Image.
func (r *Raw) Unmap(p *Plan) { p.Pin = nil }

// ReadOpaque implements Image; raw has nothing opaque.
func (r *Raw) ReadOpaque(p *Plan, i int, skip int64, dst []byte) error {
	return r.fail("read", unix.EINVAL)
}

// writable checks a range that is about to be changed.
func (r *Raw) writable(v *view, op string, off, n int64) error {
	switch {
	case !v.active || !v.file.writable:
		return r.fail(op, unix.EPERM)
	case !v.within(off, n):
		return r.fail(op, errPastEnd)
	}
	return v.file.inside(op, off, n)
}

// Prepare implements Image. The plan is one Data extent. A write to the first
// 512 bytes of an image whose format was guessed needs MayBlock: it waits for
// others of its kind, and gives EPERM if it would make the image look like
// another format.
func (r *Raw) Prepare(p *Plan, off int64, payload []byte, mode Mode) error {
	v := r.cur.Load()
	n := int64(len(payload))
	p.Extents, p.Pin = p.Extents[:0], nil
	if err := r.writable(v, "write", off, n); err != nil {
		return err
	}
	if r.guard.touches(off) {
		if mode&MayBlock == 0 {
			return ErrWait
		}
		if err := r.guard.enter(v.file, off, payload, n); err != nil {
			return err
		}
		p.Pin = &r.guard
	}
	p.Extents = append(p.Extents, Extent{Kind: Data, File: v.file, Offset: off, Length: n})
	return nil
}

// Commit implements Image.
func (r *Raw) Commit(p *Plan) error {
	r.Abort(p)
	return nil
}

// Abort implements Image.
func (r *Raw) Abort(p *Plan) {
	if p.Pin != nil {
		r.guard.leave()
	}
	r.Unmap(p)
}

// measure looks at the file's size: where it has shrunk, writes end at its new
// end instead of growing it back. A size that cannot be had changes nothing.
func (r *Raw) measure(v *view) {
	v.measuring.Lock()
	defer v.measuring.Unlock()
	size, sparse, err := v.file.measure()
	if err != nil {
		return
	}
	v.sparse.Store(sparse)
	limit := min(size, v.size)
	if was := v.file.limit.Swap(limit); limit < was {
		r.warnf("%s has shrunk to %d bytes while it is served as %d: reads and writes past its end fail", r.opts.Path, size, v.size)
	}
}

// Flush implements Image. It also looks at the file's size.
func (r *Raw) Flush() error {
	v := r.cur.Load()
	if !v.active || !v.file.writable {
		return nil // nothing is dirty
	}
	r.measure(v)
	return v.file.Sync()
}

// Discard implements Image by punching a hole, and does nothing where that
// cannot be done, or is not wanted.
func (r *Raw) Discard(off, n int64) error {
	if r.opts.IgnoreDiscard {
		return nil
	}
	return r.erase("discard", off, n, func(f *File) error {
		err := f.Punch(off, n)
		if isErrno(err, unix.EOPNOTSUPP) {
			return nil
		}
		return err
	})
}

// Zero implements Image; see File.Zero.
func (r *Raw) Zero(off, n int64, flags ZeroFlags) error {
	if r.opts.IgnoreDiscard {
		flags |= NoHole
	}
	return r.erase("zero", off, n, func(f *File) error { return f.Zero(off, n, flags) })
}

func (r *Raw) erase(op string, off, n int64, do func(*File) error) error {
	v := r.cur.Load()
	if err := r.writable(v, op, off, n); err != nil {
		return err
	}
	if r.guard.touches(off) {
		if err := r.guard.enter(v.file, off, nil, n); err != nil {
			return err
		}
		defer r.guard.leave()
	}
	if err := do(v.file); err != nil {
		return err
	}
	v.sparse.Store(!v.file.traits.BlockDevice)
	if v.full != nil {
		v.full.remove(off, n)
	}
	return nil
}

// Cache implements Image.
func (r *Raw) Cache(off, n int64) error {
	v := r.cur.Load()
	if !v.within(off, n) {
		return r.fail("cache", errPastEnd)
	}
	return v.file.Readahead(off, n)
}

// Status implements Image: what SEEK_DATA and SEEK_HOLE say, and nothing
// special where they cannot tell, as on block devices.
func (r *Raw) Status(dst []Status, off, n int64, max int) ([]Status, error) {
	v := r.cur.Load()
	if !v.within(off, n) {
		return dst, r.fail("status", errPastEnd)
	}
	first := len(dst)
	for end := off + n; off < end; {
		next, hole := v.file.extent(off, end)
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
