package backend

import (
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"
)

// maxRequest is the largest request in bytes that is advertised.
const maxRequest = 32 << 20

// Owned is an image that this process has open, whatever its format. It is an
// Image, and has the storage side of ownership (owner.go).
type Owned struct {
	opts   Options // settled
	info   Info
	id     inode
	scope  string
	format format
	faults faults
	record *ownerRecord

	// cur is what requests use; it is loaded once for each.
	cur  atomic.Pointer[view]
	held atomic.Pointer[string] // LocksHeld

	repair atomic.Pointer[Progress]

	unmapping sync.WaitGroup // what Release left

	// The rest belongs to the one goroutine that changes ownership.
	next   *view // acquired or settled, to be published
	old    *view // published over, to be closed
	print  *fingerprint
	clean  bool // settled: what follows is the end of this ownership
	warned bool // about the scope of locks
	// spare is, while the image is active, the description of the last inactive
	// view, which the next one uses again; nil if that is opened anew. Opening
	// it took 20 us of a handover.
	spare  *File
	listed bool // the kernel lists the locks of the image's file in fdinfo
}

var (
	_ Image    = (*Owned)(nil)
	_ Receiver = (*Owned)(nil)
)

// newOwned makes the image of f, which is open for reading, and of what format
// makes of it.
func newOwned(f *File, o Options, h faults) *Owned {
	t := f.Traits()
	i := &Owned{
		opts:   o,
		id:     f.id,
		scope:  scopeOff,
		faults: h,
		info: Info{
			Path:           o.Path,
			ReadOnly:       o.ReadOnly,
			MinBlock:       1,
			PreferredBlock: uint32(max(t.BlockSize, pageSize)),
			MaxBlock:       maxRequest,
			Rotational:     t.Rotational,
			CanTrim:        t.trims,
			CanFastZero:    t.fastZeros,
			Cached:         !t.Direct && !t.Tmpfs,
			InMemory:       t.Tmpfs,
			WriteThrough:   o.Cache == CacheWritethrough,
		},
	}
	if o.Locking != LockingOff {
		i.scope = f.lockScope()
	}
	i.record = newOwnerRecord(o, t, h, i.warnf)
	i.noteLocks(nil)
	return i
}

func (o *Owned) fail(op string, err error) error {
	return &fs.PathError{Op: op, Path: o.opts.Path, Err: err}
}

// later has f run when nobody waits for it any more; done waits for that.
func (o *Owned) later(done *sync.WaitGroup, f func()) { later(o.opts.Later, done, f) }

func later(run func(func()), done *sync.WaitGroup, f func()) {
	done.Add(1)
	g := func() {
		defer done.Done()
		f()
	}
	if run == nil {
		go g()
		return
	}
	run(g)
}

func (o *Owned) warnf(format string, args ...any) { o.opts.Warn(fmt.Sprintf(format, args...)) }

// warn tells an error that stops nothing.
func (o *Owned) warn(err error) {
	if err != nil {
		o.warnf("%v", err)
	}
}

// measure tells of a file that has shrunk; see File.remeasure.
func (o *Owned) measure(f *File) (sparse bool, err error) {
	size, length, sparse, err := f.remeasure()
	if err == nil && size < length {
		o.warnf("%s has shrunk to %d bytes while it is served as %d: reads and writes past its end fail", f.path, size, length)
	}
	return sparse, err
}

// Info implements Image.
func (o *Owned) Info() Info { return o.info }

// Size implements Image.
func (o *Owned) Size() int64 { return o.cur.Load().Size() }

// Map implements Image.
func (o *Owned) Map(p *Plan, off, n int64, mode Mode) error {
	p.view = o.cur.Load()
	return p.view.Map(p, off, n, mode)
}

// Unmap implements Image.
func (o *Owned) Unmap(p *Plan) { p.take().Unmap(p) }

// ReadOpaque implements Image.
func (o *Owned) ReadOpaque(p *Plan, i int, skip int64, dst []byte) error {
	return p.view.ReadOpaque(p, i, skip, dst)
}

// Prepare implements Image.
func (o *Owned) Prepare(p *Plan, off int64, payload []byte, mode Mode) error {
	p.view = o.cur.Load()
	return p.view.Prepare(p, off, payload, mode)
}

// PrepareUnseen implements Receiver.
func (o *Owned) PrepareUnseen(p *Plan, off, n int64) error {
	p.view = o.cur.Load()
	return p.view.prepareUnseen(p, off, n)
}

// Commit implements Image.
func (o *Owned) Commit(p *Plan) (durable bool) { return p.take().Commit(p) }

// Abort implements Image.
func (o *Owned) Abort(p *Plan) { p.take().Abort(p) }

// Flush implements Image. It also looks at the files' sizes.
func (o *Owned) Flush() error {
	v := o.cur.Load()
	if !v.writable() {
		return nil // nothing is dirty
	}
	v.measure()
	return v.sync()
}

// Discard implements Image.
func (o *Owned) Discard(off, n int64) error { return o.cur.Load().Discard(off, n) }

// Zero implements Image.
func (o *Owned) Zero(off, n int64, flags ZeroFlags) error { return o.cur.Load().Zero(off, n, flags) }

// Cache implements Image.
func (o *Owned) Cache(off, n int64) error { return o.cur.Load().Cache(off, n) }

// Status implements Image.
func (o *Owned) Status(dst []Status, off, n int64, max int) ([]Status, error) {
	return o.cur.Load().Status(dst, off, n, max)
}
