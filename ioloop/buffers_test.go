package ioloop

import (
	"math/rand/v2"
	"testing"
	"unsafe"
)

func TestBufferClasses(t *testing.T) {
	p := pool{keep: 1 << 30}
	for class := minClass; class <= maxClass; class++ {
		for _, n := range []int64{1<<class - 1, 1 << class, 1<<class + 1} {
			want := class
			if n > 1<<class {
				want++
			}
			if want > maxClass {
				continue
			}
			b := p.get(n)
			if b.class != want {
				t.Fatalf("%d bytes: class %d, want %d", n, b.class, want)
			}
			if a := uintptr(unsafe.Pointer(&b.payload(1)[0])); a%pageSize != 0 {
				t.Fatalf("%d bytes: the payload is at %#x", n, a)
			}
			if got := b.payload(n); int64(len(got)) != n || int64(cap(got)) != n {
				t.Fatalf("%d bytes: payload of %d, capacity %d", n, len(got), cap(got))
			}
			if c := int64(cap(b.raw)); c > b.cost() || int64(len(b.raw)) != headRoom+1<<want {
				t.Fatalf("%d bytes: %d raw, capacity %d, counted %d", n, len(b.raw), c, b.cost())
			}
			p.put(b)
		}
	}
	for _, n := range []int64{1, 2, 4095, 4096} {
		if c := classOf(n); c != minClass {
			t.Fatalf("%d bytes: class %d", n, c)
		}
	}
}

func TestBufferFramed(t *testing.T) {
	b := newBuffer(minClass)
	copy(b.payload(5), "hello")
	if got := string(b.framed([]byte("header:"), 5)); got != "header:hello" {
		t.Fatal(got)
	}
	full := b.framed(make([]byte, MaxHeader), 4096)
	if len(full) != MaxHeader+4096 {
		t.Fatal(len(full))
	}
}

// The pool hands out what it was given, nothing twice, and keeps no more than
// it should.
func TestPool(t *testing.T) {
	p := pool{keep: 1 << 20}
	out := map[*buffer]bool{}
	var list []*buffer
	for range 10_000 {
		if len(list) > 0 && rand.IntN(2) == 0 {
			i := rand.IntN(len(list))
			b := list[i]
			list[i] = list[len(list)-1]
			list = list[:len(list)-1]
			delete(out, b)
			p.put(b)
		} else {
			b := p.get(1 + rand.Int64N(64<<10))
			if out[b] {
				t.Fatal("the same buffer twice")
			}
			if b.link != nil {
				t.Fatal("still linked")
			}
			out[b] = true
			list = append(list, b)
		}
		var idle int64
		for _, b := range p.free {
			for ; b != nil; b = b.link {
				idle += b.cost()
			}
		}
		if idle != p.idle || idle > p.keep {
			t.Fatalf("%d bytes idle, counted %d, may keep %d", idle, p.idle, p.keep)
		}
	}
	if n := testing.AllocsPerRun(100, func() { p.put(p.get(32 << 10)) }); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}
