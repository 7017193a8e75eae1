package ioloop

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
)

// fakeSocket is a transport that takes as many bytes as a test allows.
type fakeSocket struct {
	mu      sync.Mutex
	wake    sync.Cond
	room    int
	closed  bool
	sending bool
	onTry   func() // in trySend
	failing error  // of the next call
	rnd     *rand.Rand
	got     bytes.Buffer
	inSend  chan struct{} // gets a value for each send that waits
}

func newFakeSocket(seed uint64) *fakeSocket {
	f := &fakeSocket{rnd: rand.New(rand.NewPCG(seed, 0)), inSend: make(chan struct{}, 1<<16)}
	f.wake.L = &f.mu
	return f
}

func (f *fakeSocket) allow(n int) {
	f.mu.Lock()
	f.room += n
	f.mu.Unlock()
	f.wake.Broadcast()
}

func (f *fakeSocket) recv([]byte, func() bool) (int, error) { panic("not used") }

// take is called with mu held.
func (f *fakeSocket) take(segs [][]byte) int {
	n := 0
	for _, s := range segs {
		k := min(len(s), f.room)
		if f.rnd.IntN(4) == 0 {
			k = min(k, 1+f.rnd.IntN(len(s)))
		}
		f.got.Write(s[:k])
		f.room -= k
		n += k
		if k < len(s) {
			break
		}
	}
	return n
}

func (f *fakeSocket) enter() {
	f.mu.Lock()
	if f.sending {
		panic("two senders")
	}
	f.sending = true
}

func (f *fakeSocket) exit() {
	f.sending = false
	f.mu.Unlock()
	f.wake.Broadcast()
}

func (f *fakeSocket) trySend(segs [][]byte) (int, error) {
	f.enter()
	defer f.exit()
	switch {
	case f.closed:
		return 0, net.ErrClosed
	case f.failing != nil:
		return 0, f.failing
	case f.room == 0:
		return 0, errAgain
	}
	if f.onTry != nil {
		f.onTry()
	}
	return f.take(segs), nil
}

func (f *fakeSocket) send(segs [][]byte) (int, error) {
	f.enter()
	defer f.exit()
	for f.room == 0 && !f.closed && f.failing == nil {
		f.inSend <- struct{}{}
		f.wake.Wait()
	}
	switch {
	case f.closed:
		return 0, net.ErrClosed
	case f.failing != nil:
		return 0, f.failing
	}
	return f.take(segs), nil
}

func (f *fakeSocket) untaken() int64 { return 0 }

func (f *fakeSocket) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	f.wake.Broadcast()
	return nil
}

// newOut is a connection of which only the sending side lives.
func newOut(t transport) *conn {
	c := &conn{e: NewEngine(Config{}), room: make(chan struct{}, 1), t: t}
	c.out.init(t)
	return c
}

// charged is a task that counts one byte in the budget until it is freed.
func (c *conn) charged() *task {
	c.e.budget.mu.Lock()
	c.e.budget.used[general]++
	c.e.budget.mu.Unlock()
	c.held.Add(1)
	return &task{conn: c, lease: lease{1, general}}
}

func checkOut(t *testing.T, c *conn) {
	t.Helper()
	await(t, c.out.flushed(), "everything to be sent or dropped")
	if n, m := c.held.Load(), c.e.budget.inUse(); n != 0 || m != 0 {
		t.Errorf("%d tasks not freed, %d bytes in use", n, m)
	}
	if len(c.out.queue) != 0 || c.out.owes.since.Load() != 0 {
		t.Errorf("queue %d, stalled since %d", len(c.out.queue), c.out.owes.since.Load())
	}
}

// A record is what one call sends: who, which, length, content.
func record(who byte, seq uint32, rnd *rand.Rand) []byte {
	n := rnd.IntN(300)
	switch rnd.IntN(20) {
	case 0:
		n = rnd.IntN(200_000)
	case 1:
		n = 0
	}
	b := []byte{who}
	b = binary.BigEndian.AppendUint32(b, seq)
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	return append(b, contentOf(who, seq, n)...)
}

var contents = pattern(2<<20, 1)

func contentOf(who byte, seq uint32, n int) []byte {
	return contents[int(who)*10_000+int(seq):][:n]
}

// readRecords checks what arrives until it has them all.
func readRecords(r io.Reader, each map[byte]uint32) error {
	br := bufio.NewReader(r)
	next := map[byte]uint32{}
	left := 0
	for _, n := range each {
		left += int(n)
	}
	for ; left > 0; left-- {
		var h [9]byte
		if _, err := io.ReadFull(br, h[:]); err != nil {
			return fmt.Errorf("%d records missing: %w", left, err)
		}
		who, seq, n := h[0], binary.BigEndian.Uint32(h[1:]), binary.BigEndian.Uint32(h[5:])
		if seq != next[who] || seq >= each[who] || n > 200_000 {
			return fmt.Errorf("record %d of %d, %d bytes; want record %d", seq, who, n, next[who])
		}
		next[who]++
		b := make([]byte, n)
		if _, err := io.ReadFull(br, b); err != nil {
			return err
		}
		if !bytes.Equal(b, contentOf(who, seq, int(n))) {
			return fmt.Errorf("record %d of %d: other bytes", seq, who)
		}
	}
	return nil
}

// pieces cuts b at random.
func pieces(b []byte, most int, rnd *rand.Rand) []segment {
	var segs []segment
	for len(b) > 0 && len(segs) < most-1 {
		n := 1 + rnd.IntN(len(b))
		segs = append(segs, segment{b: b[:n]})
		b = b[n:]
	}
	if len(b) > 0 {
		segs = append(segs, segment{b: b})
	}
	return segs
}

// sendRecords sends from three workers and one receiving goroutine at once, as
// a connection does.
func sendRecords(t *testing.T, c *conn, seed uint64, each uint32) map[byte]uint32 {
	var wg sync.WaitGroup
	for who := range byte(3) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(who)))
			for seq := range each {
				segs := pieces(record(who, seq, rnd), 1+rnd.IntN(100), rnd)
				segs[len(segs)-1].task = c.charged()
				c.out.enqueue(segs...)
			}
		})
	}
	wg.Go(func() {
		rnd := rand.New(rand.NewPCG(seed, 3))
		for seq := range each {
			tk := c.charged()
			b := record(3, seq, rnd)
			if c.out.sendOwn(segment{b: b, task: tk}) {
				clear(b) // it may be used again
				tk.free()
			}
		}
	})
	await(t, background(wg.Wait), "the senders, who never wait for the client")
	return map[byte]uint32{0: each, 1: each, 2: each, 3: each}
}

func TestOutgoingOrder(t *testing.T) {
	for seed := range uint64(10) {
		f := newFakeSocket(seed)
		c := newOut(f)
		stop := make(chan struct{})
		client := background(func() {
			rnd := rand.New(rand.NewPCG(seed, 9))
			for {
				select {
				case <-stop:
					return
				case <-f.inSend:
					f.allow(1 + rnd.IntN(50_000))
				}
			}
		})
		f.allow(10_000)
		each := sendRecords(t, c, seed, 100)
		checkOut(t, c)
		close(stop)
		await(t, client, "the client")
		if err := readRecords(&f.got, each); err != nil {
			t.Fatal(err)
		}
		if f.got.Len() != 0 {
			t.Fatalf("%d bytes too many", f.got.Len())
		}
	}
}

// What is left of a piece goes before what came while it was being sent.
func TestOutgoingRest(t *testing.T) {
	f := newFakeSocket(0)
	f.rnd = rand.New(zeroSource{})
	c := newOut(f)
	f.onTry = func() {
		f.onTry = nil
		c.out.enqueue(segment{b: []byte("fg")})
	}
	f.allow(3)
	if c.out.sendOwn(segment{b: []byte("abcde"), task: c.charged()}) {
		t.Fatal("sent more than there was room for")
	}
	f.allow(10)
	checkOut(t, c)
	if got := f.got.String(); got != "abcdefg" {
		t.Fatal(got)
	}
}

// The same over sockets that are always full.
func TestOutgoingFullSocket(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			a, b := link(t)
			smallBuffers(t, a, b)
			c := newOut(newTransport(b))
			result := make(chan error, 1)
			// The client begins when all is queued.
			each := sendRecords(t, c, 1, 300)
			go func() { result <- readRecords(a, each) }()
			must(t, await(t, result, "the client"))
			checkOut(t, c)
			c.out.fail(net.ErrClosed)
			a.Close()
		})
	}
}

// What is being sent is not freed before the call returns, though the
// connection is broken by somebody else: it could be in use for another
// connection by then.
func TestOutgoingFailWhileSending(t *testing.T) {
	f := newFakeSocket(0)
	c := newOut(&stubborn{fakeSocket: f})
	c.out.enqueue(segment{b: []byte("abc"), task: c.charged()}, segment{b: []byte("def"), task: c.charged()})
	await(t, f.inSend, "the writer") // in send, with both
	c.out.fail(errors.New("evicted"))
	await(t, c.out.broken, "the connection to break")
	if n := c.held.Load(); n != 2 {
		t.Fatalf("%d tasks held while their bytes are being sent", n)
	}
	// What comes now is dropped at once.
	c.out.enqueue(segment{b: []byte("ghi"), task: c.charged()})
	if n := c.held.Load(); n != 2 {
		t.Fatalf("%d tasks held", n)
	}
	tk := c.charged()
	if !c.out.sendOwn(segment{b: []byte("jkl"), task: tk}) {
		t.Fatal("queued on a broken connection")
	}
	tk.free()
	select {
	case <-c.out.flushed():
		t.Fatal("flushed while sending")
	default:
	}
	f.close()
	checkOut(t, c)
	if f.got.Len() != 0 {
		t.Fatalf("%d bytes sent", f.got.Len())
	}
}

// stubborn does not end calls by closing.
type stubborn struct{ *fakeSocket }

func (*stubborn) close() error { return nil }

// The connection breaks at any moment, from either side: all is freed, nobody
// hangs.
func TestOutgoingFail(t *testing.T) {
	for seed := range uint64(100) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		f := newFakeSocket(seed)
		c := newOut(f)
		after := rnd.IntN(60_000)
		breaks := background(func() {
			for f.allow(after / 3); ; f.allow(after / 3) {
				select {
				case <-f.inSend:
				case <-c.out.broken:
					return
				}
				if after -= 20_000; after > 0 {
					continue
				}
				if seed%2 == 0 {
					c.out.fail(errors.New("evicted"))
				} else {
					f.mu.Lock()
					f.failing = errors.New("reset")
					f.mu.Unlock()
					f.wake.Broadcast()
				}
				<-c.out.broken
				return
			}
		})
		sendRecords(t, c, seed, 30)
		await(t, breaks, "the connection to break")
		checkOut(t, c)
	}
}

// The stall of a client is seen, and forgotten when it reads.
func TestOutgoingStalledSince(t *testing.T) {
	f := newFakeSocket(0)
	f.rnd = rand.New(zeroSource{})
	c := newOut(f)
	for range 100 {
		f.mu.Lock()
		f.room = 0
		f.mu.Unlock()
		c.out.enqueue(segment{b: []byte("abc"), task: c.charged()})
		await(t, f.inSend, "the writer")
		if c.out.owes.since.Load() == 0 {
			t.Fatal("the client is not seen to be stalled")
		}
		f.allow(3)
		checkOut(t, c)
	}
}

type zeroSource struct{}

func (zeroSource) Uint64() uint64 { return 1 << 63 } // IntN is never 0

// A sender that finds room allocates nothing.
func TestOutgoingAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	f := &devNull{}
	c := newOut(f)
	b := make([]byte, 100)
	tk := c.charged()
	if n := testing.AllocsPerRun(1000, func() {
		c.out.sendOwn(segment{b: b, task: tk})
		c.out.enqueue(segment{b: b})
		c.out.enqueue(segment{b: b}, segment{b: b})
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	tk.free()
	checkOut(t, c)
}

type devNull struct{ fakeSocket }

func (*devNull) trySend(segs [][]byte) (int, error) {
	n := 0
	for _, s := range segs {
		n += len(s)
	}
	return n, nil
}
