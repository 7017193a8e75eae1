package qcow2

import "unsafe"

// Plan is one request's mapping and what it holds. The zero value is ready; a
// Plan is used again and again, so that mapping allocates nothing. It belongs
// to one request at a time.
type Plan struct {
	// Extents cover the asked range in order, without gaps.
	Extents []Extent

	pin      pin
	unsynced bool // some entry it relies on may not be on disk
	changes  []change
	steps    []step
	pieces   []piece
	old      []Extent
}

// Fresh reports whether the plan is of a write to a cluster that changes its place
// or what it reads as.
func (p *Plan) Fresh() bool { return len(p.changes) > 0 }

// recycleMax bounds what a plan that rests keeps of its memory, in extents.
const recycleMax = 1024

// Recycle forgets what the plan, which holds nothing, was last used for.
func (p *Plan) Recycle() {
	if cap(p.Extents) > recycleMax || cap(p.changes) > recycleMax {
		*p = Plan{}
		return
	}
	clear(p.Extents)
	p.reset()
}

// Map plans the read of [off, off+n), which lies inside Size. Unmap ends it.
// The error is ErrWait, or wraps a syscall.Errno; nothing is held then.
func (im *Image) Map(p *Plan, off, n int64, mode Mode) error {
	if im.begun.Load() {
		p.pin = im.pins.enter(unsafe.Pointer(p))
	}
	var err error
	if p.Extents, err = im.appendExtents(p.Extents[:0], off, n, mode); err != nil {
		im.pins.leave(&p.pin)
	}
	return err
}

// Unmap gives back what Map pinned. The extents stay readable until the plan
// is used again.
func (im *Image) Unmap(p *Plan) { im.pins.leave(&p.pin) }

// Status appends what Map would say, with Allocated and Depth, without
// pinning anything: the extents' files are not to be read. It may block.
func (im *Image) Status(dst []Extent, off, n int64) ([]Extent, error) {
	// The tables must not be freed while they are read.
	pin := im.pins.enter(unsafe.Pointer(&n))
	defer im.pins.leave(&pin)
	return im.appendExtents(dst, off, n, MayBlock)
}

// appendExtents appends what [off, off+n) is to dst.
func (im *Image) appendExtents(dst []Extent, off, n int64, mode Mode) ([]Extent, error) {
	first := len(dst)
	for end := off + n; off < end; {
		s, i, err := im.find(off, mode)
		if err != nil {
			return dst, err
		}
		if s == nil {
			next := min(end, (off>>im.l1Shift+1)<<im.l1Shift)
			if dst, err = im.appendBehind(dst, first, off, next-off, mode); err != nil {
				return dst, err
			}
			off = next
			continue
		}
		c := im.cell(s, i)
		within := im.g.Within(off)
		sub := within >> im.subBits
		k := im.g.kind(c, int(sub))
		next := min(end, off-within+(sub+1)<<im.subBits)
		if k == unallocated {
			// Neighbours together: the file behind is asked once.
			for next < end {
				s, i, err := im.find(next, mode)
				if err != nil {
					return dst, err
				}
				if s == nil {
					next = min(end, (next>>im.l1Shift+1)<<im.l1Shift)
					continue
				}
				sub := im.g.Within(next) >> im.subBits
				if im.g.kind(im.cell(s, i), int(sub)) != unallocated {
					break
				}
				next = min(end, next+1<<im.subBits)
			}
			if dst, err = im.appendBehind(dst, first, off, next-off, mode); err != nil {
				return dst, err
			}
			off = next
			continue
		}
		e := Extent{Kind: Zero, Length: next - off, Allocated: true}
		switch k {
		case data:
			e.Kind, e.File, e.Offset = Data, im.data, hostOffset(c.entry)+within
		case compressed:
			e.Kind, e.File, e.Offset, e.Image, e.Entry = Compressed, im.f, within, im, c.entry
		}
		dst = im.join(dst, first, e)
		off = next
	}
	return dst, nil
}

// appendBehind appends what shows through a range that the image itself has
// not.
func (im *Image) appendBehind(dst []Extent, first int, off, n int64, mode Mode) ([]Extent, error) {
	b := im.opts.Backing
	if b == nil || off >= b.Size() {
		return im.join(dst, first, Extent{Kind: Zero, Length: n}), nil
	}
	have := min(n, b.Size()-off)
	from := len(dst)
	dst, err := b.Map(dst, off, have, mode)
	if err != nil {
		return dst, err
	}
	for i := from; i < len(dst); i++ {
		dst[i].Depth++
	}
	if have < n {
		dst = im.join(dst, first, Extent{Kind: Zero, Length: n - have})
	}
	return dst, nil
}

// join appends e, or makes the last extent longer if e continues it. Data past
// the end of its file reads as zeros: what wrote the image need not have made
// the last cluster whole.
func (im *Image) join(dst []Extent, first int, e Extent) []Extent {
	if e.Kind == Data {
		if have := e.File.Length() - e.Offset; have < e.Length {
			past := Extent{Kind: Zero, Length: e.Length - max(have, 0), Allocated: true}
			if have <= 0 {
				return im.join(dst, first, past)
			}
			e.Length = have
			return im.join(im.join(dst, first, e), first, past)
		}
	}
	if k := len(dst) - 1; k >= first {
		if l := &dst[k]; l.Kind == e.Kind && l.Allocated == e.Allocated && l.Depth == e.Depth &&
			(e.Kind == Zero || l.File == e.File && l.Offset+l.Length == e.Offset && l.Entry == e.Entry) {
			l.Length += e.Length
			return dst
		}
	}
	return append(dst, e)
}

// AsBacking is the image as what shows through another one. It must not be
// begun.
func (im *Image) AsBacking() Backing { return backing{im} }

type backing struct{ im *Image }

func (b backing) Size() int64 { return b.im.Size() }

func (b backing) Map(dst []Extent, off, n int64, mode Mode) ([]Extent, error) {
	// Not joined with what is there already: the caller tells it apart.
	return b.im.appendExtents(dst, off, n, mode)
}

// NewRawBacking is a raw file as what shows through an image.
func NewRawBacking(f File) Backing { return rawBacking{f} }

type rawBacking struct{ f File }

func (b rawBacking) Size() int64 { return b.f.Length() }

func (b rawBacking) Map(dst []Extent, off, n int64, _ Mode) ([]Extent, error) {
	return append(dst, Extent{Kind: Data, Length: n, File: b.f, Offset: off, Allocated: true}), nil
}
