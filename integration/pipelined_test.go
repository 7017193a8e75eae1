package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Many requests of all sizes under way over many connections, none of which writes what
// another touches, while the image goes back and forth between two exporters: every
// byte read is the one written last, and every request is answered, also of clients
// that say that they leave. NBD_EXPORT_SEED repeats what is asked.
func TestPipelinedRequestsAgainstModel(t *testing.T) {
	seed := soakSeed(t)
	media(t, func(t *testing.T, image string, flags ...string) { pipelined(t, seed, image, flags...) })
	t.Run("held", func(t *testing.T) {
		pipelined(t, seed, randomImage(t, tmpfsDir(t), 1, 3*mib), "--inactive-writes", "hold=50ms")
	})
}

func pipelined(t *testing.T, seed uint64, image string, flags ...string) {
	const each, handovers = 250, 4 // requests of a client
	from, to := serve(t, image, flags...), serve(t, image, append(flags, "--inactive")...)
	s := &sharedDisk{bytes: readFile(t, image), busy: map[*claim]bool{}}
	var clients sync.WaitGroup
	kinds := []habits{{depth: 32}, {depth: 8, simple: true, narrow: true}, {depth: 16, narrow: true, leaves: 40}, {depth: 16, pieces: true}}
	errs := make(chan error, 2*len(kinds))
	for i := range 2 * len(kinds) {
		p := &pipeliner{
			habits: kinds[i%len(kinds)], disk: s, left: each, rnd: rand.New(rand.NewPCG(seed, uint64(i))),
			socket: []string{from.socket, to.socket}[i/len(kinds)],
		}
		clients.Go(func() {
			if err := p.run(t); err != nil {
				s.broken.Store(true)
				errs <- err
			}
		})
	}
	for i := range handovers {
		waitFor(t, toolTimeout, "clients go on", func() bool {
			return s.sent.Load() > int64((i+1)*each*len(kinds)/(handovers+1)) || s.broken.Load()
		})
		run(t, program(t), "handover", "--from", from.control, "--to", to.control)
		from, to = to, from
	}
	clients.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	from.stop()
	to.stop()
	sameBytes(t, "the image", readFile(t, image), s.bytes)
}

// sharedDisk is what the image has to be.
type sharedDisk struct {
	sent   atomic.Int64
	broken atomic.Bool
	mu     sync.Mutex // of busy
	busy   map[*claim]bool
	bytes  []byte // each for who has claimed it
}

// claim is a part of the disk that a request is under way for.
type claim struct {
	off, n int
	writes bool
}

// claim takes a part that nobody writes or, to write it, uses; nil if it found none.
func (s *sharedDisk) claim(r *rand.Rand, writes bool) *claim {
	most := []int{1000, 5000, 70_000, 300_000, 1 << 20}[r.IntN(5)]
	c := &claim{n: 1 + r.IntN(most), writes: writes}
	c.off = r.IntN(len(s.bytes) - c.n)
	switch r.IntN(4) {
	case 0:
		c.off, c.n = c.off&^4095, (c.n+4095)&^4095 // it may reach past the end
		c.n = min(c.n, len(s.bytes)-c.off)
	case 1:
		c.off = len(s.bytes) - c.n
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for o := range s.busy {
		if (writes || o.writes) && o.off < c.off+c.n && c.off < o.off+o.n {
			return nil
		}
	}
	s.busy[c] = true
	return c
}

func (s *sharedDisk) release(c *claim) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, c)
}

// habits are a pipeliner's.
type habits struct {
	depth  int  // most requests under way
	simple bool // replies
	narrow bool // its socket takes little at once, and it too
	pieces bool // it sends any number of bytes at once
	leaves int  // says NBD_CMD_DISC after so many requests, without waiting; 0 for never
}

// pipeliner is a client with many requests under way.
type pipeliner struct {
	habits
	disk   *sharedDisk
	socket string
	rnd    *rand.Rand
	left   int // requests to send

	conn  *rawConn
	mu    sync.Mutex // of ops
	ops   map[uint64]*pipedOp
	ended chan struct{} // the reader, for err
	err   error
	room  chan struct{} // an op has ended; capacity 1
	again chan *pipedOp // a TRIM has: what has it left?
}

// pipedOp is a request under way.
type pipedOp struct {
	*claim
	cmd, flags uint16
	data       []byte // to write, or read
	covered    int    // of a read, bytes
	extents    []extent
	errno      uint32
	text       string
	trimmed    bool // a read of what was trimmed
}

func (o *pipedOp) String() string {
	return fmt.Sprintf("command %d, flags %#x, %d+%d: %s %q", o.cmd, o.flags, o.off, o.n, errName(o.errno), o.text)
}

// run asks for all, over as many connections as that takes.
func (p *pipeliner) run(t *testing.T) error {
	for p.left > 0 && !p.disk.broken.Load() {
		n := p.left
		if p.leaves > 0 {
			n = min(n, p.leaves)
		}
		p.left -= n
		if err := p.converse(t, n); err != nil {
			return err
		}
	}
	return nil
}

func (p *pipeliner) converse(t *testing.T, requests int) error {
	dial := dialRaw
	if p.simple {
		dial = dialSimple
	}
	p.conn = dial(t, p.socket, "")
	defer p.conn.Close()
	p.conn.SetDeadline(time.Now().Add(toolTimeout))
	if p.narrow {
		p.conn.Conn.(*net.UnixConn).SetReadBuffer(4096)
		p.conn.Conn.(*net.UnixConn).SetWriteBuffer(4096)
	}
	p.ops, p.err = map[uint64]*pipedOp{}, nil
	p.ended, p.room, p.again = make(chan struct{}), make(chan struct{}, 1), make(chan *pipedOp, p.depth)
	go func() {
		defer close(p.ended)
		p.err = p.receive()
	}()
asking:
	for requests > 0 || p.underWay() > 0 {
		if p.disk.broken.Load() {
			return nil // another says why
		}
		var o *pipedOp
		select {
		case o = <-p.again:
		case <-p.ended:
			return fmt.Errorf("the connection ended: %w", p.err)
		default:
			if requests > 0 && p.underWay() < p.depth {
				o = p.next()
			}
			if o != nil {
				requests--
			} else if requests == 0 && p.leaves > 0 && !p.trims() {
				break asking
			}
		}
		if o == nil {
			select {
			case <-p.room:
			case <-time.After(time.Millisecond): // a part of the disk may be free
			}
			continue
		}
		if err := p.send(o); err != nil {
			<-p.ended
			return errors.Join(err, p.err)
		}
	}
	if _, err := p.conn.Write(requestHeader(cmdDisc, 0, 0, 0, 0)); err != nil {
		return err
	}
	<-p.ended
	if n := p.underWay(); p.err != io.EOF || n > 0 {
		return fmt.Errorf("%d requests unanswered after NBD_CMD_DISC: %w", n, p.err)
	}
	return nil
}

func (p *pipeliner) underWay() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ops) + len(p.again)
}

// trims reports whether there is a TRIM under way, or what it has left to be read.
func (p *pipeliner) trims() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.again) > 0 {
		return true
	}
	for _, o := range p.ops {
		if o.cmd == cmdTrim || o.trimmed {
			return true
		}
	}
	return false
}

// next is another request; nil if there is no part of the disk for it.
func (p *pipeliner) next() *pipedOp {
	r, o := p.rnd, &pipedOp{}
	if r.IntN(8) == 0 {
		o.flags = flagFUA
	}
	switch k := r.IntN(100); {
	case k < 45:
		o.cmd = cmdRead
	case k < 75:
		o.cmd = cmdWrite
	case k < 85:
		o.cmd = cmdWriteZeroes
		o.flags |= []uint16{0, flagNoHole, flagFastZero}[r.IntN(3)]
	case k < 90:
		o.cmd = cmdTrim
	case k < 95 && !p.simple:
		o.cmd = cmdBlockStatus
	default:
		o.cmd, o.flags, o.claim = cmdFlush, 0, &claim{}
		return o
	}
	o.claim = p.disk.claim(r, o.cmd != cmdRead && o.cmd != cmdBlockStatus)
	switch {
	case o.claim == nil:
		return nil
	case o.cmd == cmdRead:
		o.data = make([]byte, o.n)
	case o.cmd == cmdWrite:
		o.data = randomBytes(int64(r.Uint64()>>1), int64(o.n))
	}
	return o
}

func (p *pipeliner) send(o *pipedOp) error {
	p.disk.sent.Add(1)
	p.mu.Lock()
	p.conn.cookie++
	cookie := p.conn.cookie
	p.ops[cookie] = o
	p.mu.Unlock()
	b := requestHeader(o.cmd, o.flags, cookie, uint64(o.off), uint32(o.n))
	if o.cmd == cmdWrite {
		b = append(b, o.data...)
	}
	for len(b) > 0 {
		n := len(b)
		if p.pieces {
			n = min(n, 1+p.rnd.IntN(40_000))
		}
		if _, err := p.conn.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// receive takes replies to the end of the connection.
func (p *pipeliner) receive() error {
	for {
		var h [20]byte
		if _, err := io.ReadFull(p.conn.Conn, h[:16]); err != nil {
			return err
		}
		magic, cookie := binary.BigEndian.Uint32(h[:]), binary.BigEndian.Uint64(h[8:])
		if magic == structuredMagic && !p.simple {
			if _, err := io.ReadFull(p.conn.Conn, h[16:]); err != nil {
				return err
			}
		} else if magic != simpleMagic || !p.simple {
			return fmt.Errorf("reply magic %#x", magic)
		}
		p.mu.Lock()
		o := p.ops[cookie]
		p.mu.Unlock()
		if o == nil {
			return fmt.Errorf("a reply to request %d, which is not under way", cookie)
		}
		last, err := true, error(nil)
		if p.simple {
			if o.errno = binary.BigEndian.Uint32(h[4:]); o.errno == 0 && o.cmd == cmdRead {
				err = p.take(o, o.off, o.n)
			}
		} else {
			last = binary.BigEndian.Uint16(h[4:])&1 != 0
			err = p.takeChunk(o, binary.BigEndian.Uint16(h[6:]), int(binary.BigEndian.Uint32(h[16:])))
		}
		if err == nil && last {
			err = p.complete(cookie, o)
		}
		if err != nil {
			return fmt.Errorf("%v: %w", o, err)
		}
	}
}

// take receives n bytes of a read from off of the disk on.
func (p *pipeliner) take(o *pipedOp, off, n int) error {
	if o.cmd != cmdRead || n <= 0 || off < o.off || off+n > o.off+o.n {
		return fmt.Errorf("a chunk of %d+%d", off, n)
	}
	o.covered += n
	for b := o.data[off-o.off:][:n]; len(b) > 0; {
		part := b
		if p.narrow {
			part = b[:min(len(b), 3000)]
		}
		k, err := p.conn.Conn.Read(part)
		if err != nil {
			return err
		}
		b = b[k:]
	}
	return nil
}

func (p *pipeliner) takeChunk(o *pipedOp, kind uint16, n int) error {
	var b []byte
	if kind == 1 { // OFFSET_DATA
		b = make([]byte, 8)
	} else {
		b = make([]byte, n)
	}
	if _, err := io.ReadFull(p.conn.Conn, b); err != nil {
		return err
	}
	switch kind {
	case 0: // NONE
	case 1:
		return p.take(o, int(binary.BigEndian.Uint64(b)), n-8)
	case 2: // OFFSET_HOLE
		off, size := int(binary.BigEndian.Uint64(b)), int(binary.BigEndian.Uint32(b[8:]))
		if o.cmd != cmdRead || size <= 0 || off < o.off || off+size > o.off+o.n {
			return fmt.Errorf("a hole of %d+%d", off, size)
		}
		clear(o.data[off-o.off:][:size])
		o.covered += size
	case 5: // BLOCK_STATUS
		for b = b[4:]; len(b) >= 8; b = b[8:] {
			o.extents = append(o.extents, extent{binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])})
		}
	case 1<<15 | 1: // ERROR
		o.errno, o.text = binary.BigEndian.Uint32(b), string(b[6:])
	default:
		return fmt.Errorf("chunk type %#x", kind)
	}
	return nil
}

// complete judges an answered request, and follows it.
func (p *pipeliner) complete(cookie uint64, o *pipedOp) error {
	here := p.disk.bytes[o.off:][:o.n]
	switch {
	case o.errno == nbdEPERM && o.cmd != cmdRead && o.cmd != cmdFlush: // inactive
	case o.errno == nbdENOTSUP && o.flags&flagFastZero != 0:
	case o.errno != 0:
		return errors.New("this was not to fail")
	case o.cmd == cmdRead && o.covered != o.n:
		return fmt.Errorf("%d bytes have come", o.covered)
	case o.trimmed: // each byte is what it was, or zero
		for i, b := range o.data {
			if b != 0 && b != here[i] {
				return fmt.Errorf("TRIM has made byte %d %#x, it was %#x", i, b, here[i])
			}
		}
		copy(here, o.data)
	case o.cmd == cmdRead:
		if !bytes.Equal(o.data, here) {
			i := 0
			for o.data[i] == here[i] {
				i++
			}
			return fmt.Errorf("byte %d is %#x, want %#x", i, o.data[i], here[i])
		}
	case o.cmd == cmdWrite:
		copy(here, o.data)
	case o.cmd == cmdWriteZeroes:
		clear(here)
	case o.cmd == cmdBlockStatus:
		for _, x := range o.extents {
			part := here[:min(len(here), int(x.length))]
			if here = here[len(part):]; x.length == 0 || x.flags&2 != 0 && bytes.Count(part, []byte{0}) != len(part) {
				return fmt.Errorf("an extent of %d bytes, flags %d", x.length, x.flags)
			}
		}
	}
	p.mu.Lock()
	delete(p.ops, cookie)
	if o.cmd == cmdTrim && o.errno == 0 {
		p.again <- &pipedOp{claim: o.claim, cmd: cmdRead, data: make([]byte, o.n), trimmed: true} // under mu: see trims
	} else {
		p.disk.release(o.claim)
	}
	p.mu.Unlock()
	select {
	case p.room <- struct{}{}:
	default:
	}
	return nil
}
