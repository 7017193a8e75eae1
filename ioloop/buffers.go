package ioloop

import (
	"math/bits"
	"sync"
	"unsafe"
)

const (
	pageSize = 4096
	// headRoom is what lies before a buffer's payload, so that a reply's
	// header and payload are one piece for the send, with the payload aligned
	// for O_DIRECT.
	headRoom = pageSize

	minClass = 12 // 4 KiB
	maxClass = 25 // 32 MiB
)

// buffer is payload space with headRoom bytes before it. It has one owner at
// a time, who gives it back with pool.put.
type buffer struct {
	raw   []byte // headRoom + size bytes, page aligned
	class int
	link  *buffer // in the pool's free list
}

// payload is the first n bytes after the head room.
func (b *buffer) payload(n int64) []byte { return b.raw[headRoom : headRoom+n : headRoom+n] }

// framed puts header directly before n bytes of payload and returns both.
func (b *buffer) framed(header []byte, n int64) []byte {
	start := headRoom - len(header)
	copy(b.raw[start:], header)
	return b.raw[start : headRoom+int(n)]
}

// cost is what the buffer counts in the budget.
func (b *buffer) cost() int64 { return bufferCost(b.class) }

// classOf is the smallest class that holds n > 0 bytes.
func classOf(n int64) int {
	return max(minClass, bits.Len64(uint64(n-1)))
}

// bufferCost is what a buffer takes, in bytes.
func bufferCost(class int) int64 { return 1<<class + headRoom + pageSize }

// pool recycles buffers by class, so that the steady state allocates nothing.
// What lies idle in it is bounded; beyond that buffers go to the garbage
// collector.
type pool struct {
	mu   sync.Mutex // leaf
	free [maxClass + 1]*buffer
	idle int64 // bytes in free
	keep int64 // bound of idle
}

func (p *pool) get(n int64) *buffer {
	class := classOf(n)
	p.mu.Lock()
	b := p.free[class]
	if b != nil {
		p.free[class] = b.link
		p.idle -= b.cost()
	}
	p.mu.Unlock()
	if b == nil {
		b = newBuffer(class)
	}
	b.link = nil
	return b
}

func (p *pool) put(b *buffer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.idle+b.cost() > p.keep {
		return
	}
	p.idle += b.cost()
	b.link = p.free[b.class]
	p.free[b.class] = b
}

// newBuffer aligns the payload to a page by hand: the Go heap promises no
// alignment, and O_DIRECT needs one.
func newBuffer(class int) *buffer {
	size := headRoom + 1<<class
	space := make([]byte, bufferCost(class))
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(space))) & (pageSize - 1)
	return &buffer{raw: space[skip : int(skip)+size], class: class}
}
