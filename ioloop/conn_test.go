package ioloop

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
)

// mix is a little of everything, with what must come back.
func mix(t *testing.T, c *client) (wire []byte, want map[uint64]answer) {
	want = map[uint64]answer{}
	add := func(op Op, f Flags, off, n int64, payload []byte, a answer) {
		b, cookie := c.header(op, f, off, n)
		wire = append(append(wire, b...), payload...)
		want[cookie] = a
	}
	add(OpRead, 0, 0, 100, nil, answer{data: contents[:100]})
	add(OpWrite, 0, 1<<20, 1000, contents[:1000], answer{kind: kindDone})
	add(OpReject, 0, 0, 5000, make([]byte, 5000), answer{kind: kindError, errno: unix.EINVAL})
	add(OpWrite, FUA, 1<<20+1000, smallPayload, contents[1000:1000+smallPayload], answer{kind: kindDone})
	add(OpRead, 0, 100, smallPayload+1, nil, answer{data: contents[100 : 101+smallPayload]})
	add(OpWrite, 0, 1<<21, smallPayload+1, contents[:smallPayload+1], answer{kind: kindDone})
	add(OpFlush, 0, 0, 0, nil, answer{kind: kindDone})
	add(OpReject, 0, 0, smallPayload+100, make([]byte, smallPayload+100), answer{kind: kindError, errno: unix.EINVAL})
	add(OpWrite, 0, 3<<20, 0, nil, answer{kind: kindDone})
	add(OpZero, 0, 3<<20, 4096, nil, answer{kind: kindDone})
	add(OpRead, 0, 3, 1, nil, answer{data: contents[3:4]})
	return wire, want
}

func check(t *testing.T, c *client, want map[uint64]answer) {
	t.Helper()
	for len(want) > 0 {
		a := c.next()
		w, ok := want[a.cookie]
		if !ok {
			t.Fatalf("a reply to %d", a.cookie)
		}
		delete(want, a.cookie)
		if a.errno != w.errno || a.kind != w.kind || !bytes.Equal(a.data, w.data) {
			t.Fatalf("reply to %d: kind %d, %v %s, %d bytes; want kind %d, %v, %d bytes", a.cookie, a.kind, a.errno, a.text, len(a.data), w.kind, w.errno, len(w.data))
		}
	}
}

// Requests may arrive in pieces of any size.
func TestAnyPieces(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{tmpfs: true, size: 4 << 20})
			c := r.connectOver(&testCodec{}, link)
			c.ok(OpWrite, 0, 0, 200_000, contents[:200_000])
			for seed := range uint64(12) {
				rnd := rand.New(rand.NewPCG(seed, 0))
				wire, want := mix(t, c)
				sent := background(func() {
					for len(wire) > 0 {
						n := 1 // byte by byte, except sometimes a run
						if seed > 0 {
							n = 1 + rnd.IntN(1<<(rnd.IntN(17)))
						} else if rnd.IntN(50) == 0 {
							n = 1 + rnd.IntN(1000)
						}
						n = min(n, len(wire))
						if _, err := c.nc.Write(wire[:n]); err != nil {
							t.Error(err)
							return
						}
						wire = wire[n:]
					}
				})
				check(t, c, want)
				await(t, sent, "the client")
			}
			c.send(OpDisconnect, 0, 0, 0, nil)
			must(t, c.end())
		})
	}
}

// Every request is cut at every byte of its header, and around its payload.
func TestCutAnywhere(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	c := r.connectOver(&testCodec{}, links["pipe"]) // a write is a receive
	for _, n := range []int64{1, 700, smallPayload, smallPayload + 1, 100_000} {
		for cut := 1; cut <= reqSize+2; cut++ {
			for _, op := range []Op{OpWrite, OpReject} {
				if op == OpReject && cut < reqSize-1 {
					continue
				}
				b, cookie := c.header(op, 0, 0, n)
				b = append(b, contents[:n]...)
				at := cut
				if at > reqSize { // before the last byte, after it
					at = len(b) - (reqSize + 2 - at)
				}
				c.write(b[:at])
				if at < len(b) {
					c.write(b[at:])
				}
				if a := c.next(); a.cookie != cookie || (a.errno != 0) != (op == OpReject) {
					t.Fatalf("%v of %d cut at %d: %+v", op, n, at, a)
				}
			}
		}
	}
	if a := c.ok(OpRead, 0, 0, 100_000, nil); !bytes.Equal(a.data, contents[:100_000]) {
		t.Fatal("other bytes")
	}
}

// One slow block stops nobody: replies overtake each other.
func TestOutOfOrder(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true, workers: 5}) // four for one connection
	slow := newBlocker()
	r.img.set(func(h *hooked) {
		h.mapping = func(off, n int64, m backend.Mode) error {
			if off == 8192 {
				return slow.mode(m)
			}
			return nil
		}
		h.flushing = func() error { slow.wait(); return nil }
	})
	c, other := r.connect(&testCodec{}), r.connect(&testCodec{})
	read := c.send(OpRead, 0, 8192, 4096, nil)
	large := c.send(OpRead, 0, 8192, 1<<20, nil)
	flush := c.send(OpFlush, 0, 0, 0, nil)
	for range 3 {
		await(t, slow.entered, "the slow ones")
	}
	for range 50 {
		c.ok(OpRead, 0, 0, 4096, nil)
		c.ok(OpWrite, 0, 0, 4096, contents[:4096])
		c.ok(OpDiscard, 0, 65536, 4096, nil)
		c.ok(OpRead, 0, 16384, 300_000, nil)
		other.ok(OpRead, 0, 16384, 300_000, nil)
	}
	if s := r.d.Stats(); s.InFlight != 3 || s.Connections != 2 {
		t.Fatalf("%+v", s)
	}
	if what, _ := c.conn.oldest(); what != "read of 4096 bytes at 8192 from "+c.conn.name {
		t.Fatalf("oldest: %q", what)
	}
	close(slow.leave)
	left := map[uint64]bool{read: true, large: true, flush: true}
	for range 3 {
		a := c.next()
		if !left[a.cookie] || a.errno != 0 {
			t.Fatalf("%+v", a)
		}
		delete(left, a.cookie)
	}
	if s := r.d.Stats(); s.Flushes != 1 || s.Reads != 152 || s.Writes != 50 || s.Others != 50 || s.Errors != 0 {
		t.Fatalf("%+v", s)
	}
}

// Holes are told apart where the codec can, and nowhere else.
func TestHoles(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	for _, chunked := range []bool{false, true} {
		c := r.connect(&testCodec{chunked: chunked})
		c.ok(OpWrite, 0, 1<<20, 1<<16, contents[:1<<16])
		c.ok(OpWrite, 0, 3<<20, 1<<16, contents[:1<<16])
		want := make([]byte, r.size)
		copy(want[1<<20:], contents[:1<<16])
		copy(want[3<<20:], contents[:1<<16])
		for _, f := range []Flags{0, OneChunk} {
			for _, n := range []int64{100_000, 200_000, r.size} {
				a := c.ok(OpRead, f, 0, n, nil)
				if !bytes.Equal(a.data, want[:n]) {
					t.Fatal("other bytes")
				}
				if (a.holes > 0) != (chunked && f == 0) {
					t.Fatalf("chunked %v, flags %v: %d bytes of holes", chunked, f, a.holes)
				}
			}
		}
	}
}

// Random operations of several connections at once; each looks after regions
// of its own.
func TestRandom(t *testing.T) {
	for _, cfg := range []struct {
		name  string
		link  string
		cfg   rigConfig
		waits int // one map in so many has to wait
	}{
		{"tmpfs", "unix", rigConfig{tmpfs: true}, 4},
		{"disk", "unix", rigConfig{}, 0},
		{"direct", "unix", rigConfig{cache: backend.CacheNone}, 0},
		{"writethrough", "tcp", rigConfig{cache: backend.CacheWritethrough}, 0},
		{"pipe", "pipe", rigConfig{tmpfs: true}, 3},
		{"little memory", "unix", rigConfig{tmpfs: true, Config: Config{Memory: 300_000}}, 2},
		{"no memory", "unix", rigConfig{tmpfs: true, Config: Config{Memory: 1}, workers: 1}, 2},
	} {
		t.Run(cfg.name, func(t *testing.T) {
			const conns, region = 4, 1 << 20
			cfg.cfg.size = conns * region
			r := newRig(t, cfg.cfg)
			if cfg.waits > 0 {
				var mu sync.Mutex
				rnd := rand.New(rand.NewPCG(1, 2))
				wait := func(m backend.Mode) error {
					mu.Lock()
					defer mu.Unlock()
					if m&backend.MayBlock == 0 && rnd.IntN(cfg.waits) == 0 {
						return backend.ErrWait
					}
					return nil
				}
				r.img.set(func(h *hooked) {
					h.mapping = func(_, _ int64, m backend.Mode) error { return wait(m) }
					h.preparing = func(_ int64, m backend.Mode) error { return wait(m) }
				})
			}
			var wg sync.WaitGroup
			for i := range int64(conns) {
				c := r.connectOver(&testCodec{chunked: i%2 == 0}, links[cfg.link])
				wg.Go(func() {
					if err := randomOps(c, i*region, region, uint64(i), 300); err != nil {
						t.Error(err)
					}
				})
			}
			await(t, background(wg.Wait), "the clients")
		})
	}
}

// randomOps keeps several requests under way, none of which touches what
// another changes, and compares with a copy of its own.
func randomOps(c *client, base, size int64, seed uint64, count int) error {
	rnd := rand.New(rand.NewPCG(seed, 77))
	shadow := make([]byte, size)
	type pending struct {
		op       Op
		off, n   int64
		changes  bool
		expected []byte
	}
	open := map[uint64]pending{}
	depth := make(chan struct{}, 16)
	var mu sync.Mutex
	failed := make(chan error, 2)
	go func() {
		for range count {
			a, err := c.receive()
			if err != nil {
				failed <- err
				return
			}
			mu.Lock()
			p, ok := open[a.cookie]
			delete(open, a.cookie)
			mu.Unlock()
			switch {
			case !ok:
				err = fmt.Errorf("a reply to %d", a.cookie)
			case a.errno != 0:
				err = fmt.Errorf("%v %d+%d: %v %s", p.op, p.off, p.n, a.errno, a.text)
			case p.op == OpRead && p.n > 0 && !bytes.Equal(a.data, p.expected):
				err = fmt.Errorf("read %d+%d: other bytes", p.off, p.n)
			case p.op != OpRead && p.op != OpStatus && a.kind != kindDone:
				err = fmt.Errorf("%v %d+%d: kind %d", p.op, p.off, p.n, a.kind)
			}
			if err != nil {
				failed <- err
				return
			}
			<-depth
		}
		failed <- nil
	}()
	for range count {
		select {
		case depth <- struct{}{}:
		case err := <-failed:
			return err
		}
		ops := []Op{OpRead, OpRead, OpRead, OpWrite, OpWrite, OpWrite, OpZero, OpFlush, OpStatus, OpCache, OpDiscard}
		p := pending{op: ops[rnd.IntN(len(ops))]}
		mu.Lock()
		for { // until it is in nobody's way
			p.n = rnd.Int64N(1 << (rnd.IntN(18) + 1))
			p.off = rnd.Int64N(size - p.n)
			if rnd.IntN(2) == 0 {
				p.off &^= 4095
				p.n = min((p.n+4095)&^4095, size-p.off)
			}
			if p.op == OpFlush {
				p.off, p.n = 0, 0
			}
			p.changes = p.op == OpWrite || p.op == OpZero || p.op == OpDiscard
			free := true
			for _, o := range open {
				if (o.changes || p.changes) && o.off < p.off+p.n && p.off < o.off+o.n {
					free = false
				}
			}
			if free {
				break
			}
		}
		f := Flags(0)
		if rnd.IntN(8) == 0 {
			f = FUA
		}
		var payload []byte
		area := shadow[p.off : p.off+p.n]
		switch p.op {
		case OpWrite:
			payload = contents[rnd.IntN(1000):][:p.n]
			copy(area, payload)
		case OpZero, OpDiscard: // a raw image reads zeros after a discard
			clear(area)
		case OpRead:
			p.expected = bytes.Clone(area)
		}
		off := base + p.off
		if p.op == OpFlush {
			off = 0
		}
		b, cookie := c.header(p.op, f, off, p.n)
		open[cookie] = p
		mu.Unlock()
		if _, err := c.nc.Write(append(b, payload...)); err != nil {
			return errors.Join(err, <-failed)
		}
	}
	return <-failed
}

// A client that ends in order gets all its replies first.
func TestDisconnectAnswersAll(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{tmpfs: true})
			slow := newBlocker()
			r.img.set(func(h *hooked) {
				h.mapping = func(off, n int64, m backend.Mode) error {
					if off >= 1<<20 {
						return slow.mode(m)
					}
					return nil
				}
				h.flushing = func() error { slow.wait(); return nil }
			})
			c := r.connectOver(&testCodec{}, link)
			want := map[uint64]bool{}
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				for i := range 20 {
					want[c.send(OpRead, 0, 1<<20+int64(i), 100_000, nil)] = true
					want[c.send(OpFlush, 0, 0, 0, nil)] = true
					want[c.send(OpWrite, 0, 0, 1000, contents[:1000])] = true
				}
				c.send(OpDisconnect, 0, 0, 0, nil)
				if name == "unix" { // nothing after it counts
					c.nc.Write(make([]byte, 1000))
				}
			}()
			if name != "pipe" {
				await(t, sent, "the client")
			}
			for range 21 { // the reads, and one flush for all
				await(t, slow.entered, "workers")
			}
			close(slow.leave)
			got := 0
			for {
				a, err := c.receive()
				if err != nil {
					if got != 60 {
						t.Fatalf("%d of 60 replies, then %v", got, err)
					}
					break
				}
				got++
				if a.errno != 0 {
					t.Fatalf("%+v", a)
				}
			}
			must(t, c.end())
			await(t, sent, "the client")
		})
	}
}

// Garbage ends the connection, after the replies to what came before it.
func TestGarbage(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	c := r.connect(&testCodec{})
	b, _ := c.header(OpRead, 0, 0, 4096)
	c.write(append(b, "what is this?"...))
	c.next()
	if _, err := c.receive(); err != io.EOF && !errors.Is(err, unix.ECONNRESET) {
		t.Fatal(err)
	}
	if err := c.end(); err != errGarbage {
		t.Fatal(err)
	}
}

// A client that vanishes in the middle of a payload has written nothing.
func TestVanishInPayload(t *testing.T) {
	for _, n := range []int64{4096, smallPayload, smallPayload + 1, 1 << 20} {
		for _, part := range []int64{0, 1, n / 2, n - 1} {
			r := newRig(t, rigConfig{tmpfs: true})
			c := r.connect(&testCodec{})
			b, _ := c.header(OpWrite, 0, 4096, 4096)
			b = append(b, contents[:4096]...) // this one is complete
			h, _ := c.header(OpWrite, 0, 1<<20, n)
			c.write(append(append(b, h...), contents[:part]...))
			if part%2 == 0 {
				must(t, c.nc.(*net.UnixConn).CloseWrite())
				c.next() // of the complete one
			} else {
				must(t, c.nc.Close())
			}
			if err := c.end(); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
				t.Fatal(err)
			}
			got, err := os.ReadFile(r.path)
			must(t, err)
			want := make([]byte, r.size)
			copy(want[4096:], contents[:4096])
			if !bytes.Equal(got, want) {
				t.Fatalf("%d of %d bytes of a payload: the image has changed", part, n)
			}
		}
	}
}

// A client that takes no replies any more, but still owes a payload: the
// failing send must not wait for the receive that notices it.
func TestSendFailsInsidePayload(t *testing.T) {
	for _, n := range []int64{4096, 1 << 20} {
		for _, op := range []Op{OpWrite, OpReject} {
			r := newRig(t, rigConfig{tmpfs: true})
			c := r.connect(&testCodec{})
			must(t, c.nc.(*net.UnixConn).CloseRead())
			b, _ := c.header(OpRead, 0, 0, 4096)
			h, _ := c.header(op, 0, 0, n)
			c.write(append(append(b, h...), 1, 2, 3))
			if c.end() == nil {
				t.Fatal("ended in order")
			}
		}
	}
}

// A client that waits for earlier replies before it sends the rest of a
// payload gets them.
func TestRepliesBeforePayload(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{tmpfs: true})
			c := r.connectOver(&testCodec{}, link)
			for _, n := range []int64{100, smallPayload + 1, 1 << 20} {
				for _, op := range []Op{OpWrite, OpReject} {
					b, first := c.header(OpRead, 0, 0, 4096)
					h, second := c.header(op, 0, 0, n)
					c.write(append(append(b, h...), contents[:10]...))
					if a := c.next(); a.cookie != first {
						t.Fatalf("%+v", a)
					}
					c.write(contents[10:n])
					if a := c.next(); a.cookie != second {
						t.Fatalf("%+v", a)
					}
				}
			}
		})
	}
}
