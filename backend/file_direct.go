package backend

import (
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bounceSize is the largest piece that goes through an aligned buffer, in
// bytes: it stays in the second-level cache.
const bounceSize = 128 << 10

// bounces holds aligned buffers for O_DIRECT.
var bounces = sync.Pool{New: func() any {
	b := alignedBytes(bounceSize)
	return &b
}}

// alignedBytes is n zeroed bytes at a page boundary.
func alignedBytes(n int) []byte {
	b := make([]byte, n+pageSize)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (pageSize - 1)
	return b[skip : skip+n : skip+n]
}

// memAligned reports whether p starts where O_DIRECT wants it.
func (f *File) memAligned(p []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))&uintptr(f.traits.memAlign-1) == 0
}

// split divides a range at the tail: the first n bytes go through the
// O_DIRECT description, the others through the buffered one. The tail block
// is never accessed directly, so its bytes are where everybody looks.
func (f *File) split(off int64, n int) int {
	return int(min(max(f.tail.Load()-off, 0), int64(n)))
}

// step is the length of the piece of p to move next, and whether it can go
// straight between p and the device.
func (f *File) step(p []byte, off int64) (n int, straight bool) {
	a := int64(f.traits.Align)
	if off%a == 0 && len(p) >= int(a) {
		if f.memAligned(p) {
			return len(p) &^ int(a-1), true
		}
		return min(len(p)&^int(a-1), bounceSize), false
	}
	// An edge: up to the end of its block.
	return int(min(a-off%a, int64(len(p)))), false
}

func (f *File) directRead(p []byte, off int64) error {
	n := f.split(off, len(p))
	p, tail := p[:n], p[n:]
	tailOff := off + int64(n)
	var bounce *[]byte
	for len(p) > 0 {
		n, straight := f.step(p, off)
		if straight {
			if err := f.readDirect(p[:n], off, n); err != nil {
				return err
			}
		} else {
			if bounce == nil {
				bounce = bounces.Get().(*[]byte)
				defer bounces.Put(bounce)
			}
			b, skip, err := f.readBlocks(*bounce, off, n, false)
			if err != nil {
				return err
			}
			copy(p[:n], b[skip:])
		}
		p, off = p[n:], off+int64(n)
	}
	switch {
	case len(tail) == 0:
		return nil
	case f.tailFd < 0:
		return f.fail("read", errPastEnd)
	}
	return f.readFull(f.tailFd, tail, tailOff)
}

// readDirect reads blocks into b, until it has at least need bytes.
func (f *File) readDirect(b []byte, off int64, need int) error {
	for got := 0; got < need; {
		n, err := f.pread(f.fd, b[got:], off+int64(got))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return f.fail("read", err)
		}
		got += n
		// Only the end of the file is between blocks.
		if n == 0 || got < need && got%f.traits.Align != 0 {
			return f.fail("read", errPastEnd)
		}
	}
	return nil
}

// readBlocks reads the whole blocks around [off, off+n) into buf, where the
// range starts skip bytes into b. Unless whole, it does without the bytes past
// the range, where a file that shrank may end.
func (f *File) readBlocks(buf []byte, off int64, n int, whole bool) (b []byte, skip int, err error) {
	a := int64(f.traits.Align)
	skip = int(off % a)
	b = buf[:(int64(skip+n)+a-1)&^(a-1)]
	need := skip + n
	if whole {
		need = len(b) // or writing it back would grow a file that shrank
	}
	err = f.readDirect(b, off-int64(skip), need)
	return b, skip, err
}

// directWrite writes aligned pieces straight, and edges by reading the block,
// changing it and writing it, while nobody else writes that block.
func (f *File) directWrite(p []byte, off int64, durable bool) error {
	if len(p) == 0 {
		return nil
	}
	a := int64(f.traits.Align)
	end := off + int64(len(p))
	s := f.ranges.enter(off&^(a-1), (end+a-1)&^(a-1), (off|end)%a != 0)
	defer f.ranges.leave(s)
	n := f.split(off, len(p)) // the tail stays where it is while s is held
	if tail := p[n:]; len(tail) > 0 {
		if err := f.writeFull(f.tailFd, tail, off+int64(n), durable); err != nil {
			return err
		}
	}
	p = p[:n]
	var bounce *[]byte
	for len(p) > 0 {
		n, straight := f.step(p, off)
		b, at := p[:n], off
		if !straight {
			if bounce == nil {
				bounce = bounces.Get().(*[]byte)
				defer bounces.Put(bounce)
			}
			if off%a == 0 && int64(n)%a == 0 {
				b = (*bounce)[:n]
				copy(b, p)
			} else {
				var skip int
				var err error
				if b, skip, err = f.readBlocks(*bounce, off, n, true); err != nil {
					return err
				}
				copy(b[skip:], p[:n])
				at -= int64(skip)
			}
		}
		if err := f.writeFull(f.fd, b, at, durable); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// ranges keeps a read-modify-write apart from every other change of the same
// blocks. Changes that are whole blocks do not exclude each other.
type ranges struct {
	mu       sync.Mutex // a leaf
	wake     sync.Cond
	waiting  int
	rmws     int   // in the list
	old, new *span // in order of arrival
	free     *span
}

// span is a range of blocks being changed.
type span struct {
	lo, hi     int64
	rmw        bool
	prev, next *span
}

// enter waits until no earlier conflicting span is left. Spans wait only for
// earlier ones, so there is no cycle, and none is overtaken for ever.
func (r *ranges) enter(lo, hi int64, rmw bool) *span {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.addLocked(lo, hi, rmw)
	for r.blocked(s) {
		r.wake.L = &r.mu
		r.waiting++
		r.wake.Wait()
		r.waiting--
	}
	return s
}

// tryEnter is enter for whole blocks; nil if it would have to wait.
func (r *ranges) tryEnter(lo, hi int64) *span {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.addLocked(lo, hi, false)
	if r.blocked(s) {
		r.leaveLocked(s)
		return nil
	}
	return s
}

func (r *ranges) addLocked(lo, hi int64, rmw bool) *span {
	s := r.free
	if s == nil {
		s = new(span)
	} else {
		r.free = s.next
	}
	*s = span{lo: lo, hi: hi, rmw: rmw, prev: r.new}
	if r.new == nil {
		r.old = s
	} else {
		r.new.next = s
	}
	r.new = s
	if rmw {
		r.rmws++
	}
	return s
}

func (r *ranges) blocked(s *span) bool {
	if r.rmws == 0 {
		return false // the common case, without a look at each
	}
	for o := s.prev; o != nil; o = o.prev {
		if (o.rmw || s.rmw) && o.lo < s.hi && s.lo < o.hi {
			return true
		}
	}
	return false
}

func (r *ranges) leave(s *span) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaveLocked(s)
	if r.waiting > 0 {
		r.wake.Broadcast()
	}
}

func (r *ranges) leaveLocked(s *span) {
	if s.rmw {
		r.rmws--
	}
	if s.prev == nil {
		r.old = s.next
	} else {
		s.prev.next = s.next
	}
	if s.next == nil {
		r.new = s.prev
	} else {
		s.next.prev = s.prev
	}
	*s = span{next: r.free}
	r.free = s
}

// lockRange excludes read-modify-writes from [off, off+n) while it is
// changed by other means than WriteAt. The returned function ends it.
func (f *File) lockRange(off, n int64) func() {
	if !f.traits.Direct {
		return func() {}
	}
	a := int64(f.traits.Align)
	s := f.ranges.enter(off&^(a-1), (off+n+a-1)&^(a-1), false)
	return func() { f.ranges.leave(s) }
}

// findAlign finds what O_DIRECT asks of offsets, lengths (align) and memory:
// by statx, by the device's sector size, or by trying.
func (f *File) findAlign() (align, mem int, err error) {
	var sx unix.Statx_t
	if err := unix.Statx(f.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &sx); err == nil && sx.Mask&unix.STATX_DIOALIGN != 0 {
		if sx.Dio_offset_align == 0 {
			return 0, 0, f.fail("open", errNoDirect)
		}
		return int(sx.Dio_offset_align), max(int(sx.Dio_mem_align), 1), nil
	}
	if f.traits.BlockDevice {
		if n, err := unix.IoctlGetInt(f.fd, unix.BLKSSZGET); err == nil && n >= 512 {
			return n, n, nil
		}
	}
	buf := alignedBytes(pageSize)
	if n, err := unix.Pread(f.fd, buf[:512], 0); err == nil && n == 512 {
		return 512, 512, nil
	}
	return pageSize, pageSize, nil
}
