package client

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
)

// Conn is a connection to one export. All methods may be called by any number
// of goroutines at once; their requests share the connection and may be
// answered in any order. After a broken connection or a protocol violation
// every call fails with that error.
//
// Requests go to the server as they are: ranges, lengths and flags are its to
// check. One call is one request, so no length may exceed what the server
// takes (32 MiB unless it says otherwise).
type Conn struct {
	link

	send struct {
		sync.Mutex
		head [wire.RequestSize]byte
	}

	mu      sync.Mutex // guards what follows
	pending map[uint64]*call
	next    uint64 // cookie
	err     error  // why the connection is no longer usable

	gone chan struct{} // closed when the reader has ended
}

// call is a request someone waits for.
type call struct {
	Op
	answered chan struct{} // receives one value when Op is answered, closed never
	err      error
}

var calls = sync.Pool{New: func() any { return &call{answered: make(chan struct{}, 1)} }}

// Dial connects to the export a URI names and negotiates. ctx bounds the
// handshake only.
func Dial(ctx context.Context, uri string, opt Options) (*Conn, error) {
	l, err := dial(ctx, uri, opt)
	if err != nil {
		return nil, err
	}
	c := &Conn{link: *l, pending: map[uint64]*call{}, gone: make(chan struct{})}
	go c.read()
	return c, nil
}

// Info is what was negotiated.
func (c *Conn) Info() Info { return c.info }

// ReadAt fills p from offset off, in bytes. A range past the export's end is an
// *Error with EINVAL, not io.EOF.
func (c *Conn) ReadAt(p []byte, off int64) (int, error) {
	return c.whole(wire.CmdRead, 0, off, p)
}

// WriteAt writes p at offset off, in bytes. With fua the data is on stable
// storage when it returns.
func (c *Conn) WriteAt(p []byte, off int64, fua bool) (int, error) {
	return c.whole(wire.CmdWrite, fuaFlag(fua), off, p)
}

// Flush puts all writes that were answered before it on stable storage.
func (c *Conn) Flush() error {
	return c.do(wire.CmdFlush, 0, 0, 0, nil, nil)
}

// Trim tells the server that length bytes at off are no longer needed.
func (c *Conn) Trim(off int64, length uint32, fua bool) error {
	return c.do(wire.CmdTrim, fuaFlag(fua), off, length, nil, nil)
}

// WriteZeroes makes length bytes at off read as zeroes. flags are
// wire.CmdFlagFUA, CmdFlagNoHole and CmdFlagFastZero.
func (c *Conn) WriteZeroes(off int64, length uint32, flags uint16) error {
	return c.do(wire.CmdWriteZeroes, flags, off, length, nil, nil)
}

// Cache asks the server to have length bytes at off ready for reading.
func (c *Conn) Cache(off int64, length uint32) error {
	return c.do(wire.CmdCache, 0, off, length, nil, nil)
}

// BlockStatus returns the allocation of length bytes at off as base:allocation
// has it: at least one extent, from off on. The server may describe less than
// was asked for, and its last extent may reach past the end. flags are 0 or
// wire.CmdFlagReqOne.
func (c *Conn) BlockStatus(off int64, length uint32, flags uint16) ([]Extent, error) {
	var extents []Extent
	err := c.do(wire.CmdBlockStatus, flags, off, length, nil, &extents)
	return extents, err
}

// Do sends any request, for tests of a server: command, flags, offset, length
// and payload go out as they are given. data is the payload of a WRITE and the
// destination of a READ, of length bytes.
func (c *Conn) Do(cmd, flags uint16, off uint64, length uint32, data []byte) error {
	return c.do(cmd, flags, int64(off), length, data, nil)
}

// Close tells the server goodbye (DISC), waits up to a second for it to close,
// and closes the connection. Calls in flight are answered if the server does so
// before it closes, the others fail with ErrClosed. It returns nil also for a
// connection that broke before.
func (c *Conn) Close() error {
	c.fail(ErrClosed)
	_ = c.nc.SetDeadline(time.Now().Add(partTime))
	c.send.Lock()
	c.part()
	c.send.Unlock()
	<-c.gone
	return nil
}

// Abort closes the connection without a word, as a dying client does. Calls in
// flight fail with ErrClosed.
func (c *Conn) Abort() {
	c.fail(ErrClosed)
	_ = c.nc.Close()
	<-c.gone
}

func fuaFlag(fua bool) uint16 {
	if fua {
		return wire.CmdFlagFUA
	}
	return 0
}

func (c *Conn) whole(cmd, flags uint16, off int64, p []byte) (int, error) {
	if uint64(len(p)) > 1<<32-1 {
		return 0, errors.New("NBD request of 4 GiB or more")
	}
	if err := c.do(cmd, flags, off, uint32(len(p)), p, nil); err != nil {
		return 0, err
	}
	return len(p), nil
}

// do is one request and its reply.
func (c *Conn) do(cmd, flags uint16, off int64, length uint32, data []byte, extents *[]Extent) error {
	k := calls.Get().(*call)
	k.reset()
	k.err = nil
	k.Cmd, k.Flags, k.Offset, k.Length, k.Data = cmd, flags, uint64(off), length, data
	if err := c.start(k); err != nil {
		return err
	}
	<-k.answered
	err := k.err
	if err == nil {
		err = k.Err()
	}
	if extents != nil && err == nil {
		*extents = append(*extents, k.Extents...)
	}
	k.Data = nil
	calls.Put(k)
	return err
}

// start registers and sends a request. On an error it is not registered.
func (c *Conn) start(k *call) error {
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return c.err
	}
	k.cookie = c.next
	c.next++
	c.pending[k.cookie] = k
	c.mu.Unlock()

	c.send.Lock()
	head := c.send.head[:]
	putRequest(head, k.Cmd, k.Flags, k.cookie, k.Offset, k.Length)
	var err error
	if k.Cmd == wire.CmdWrite {
		bufs := net.Buffers{head, k.Data}
		_, err = bufs.WriteTo(c.nc)
	} else {
		_, err = c.nc.Write(head)
	}
	c.send.Unlock()
	if err != nil {
		// What the server said before it closed is for the reader to find, which then
		// ends and answers k too.
		_ = c.nc.SetReadDeadline(time.Now().Add(partTime))
	}
	return nil
}

// fail notes why the connection ends; the first cause counts.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
}

// read runs on a goroutine of its own until the connection ends, then fails
// what is still in flight.
func (c *Conn) read() {
	defer close(c.gone)
	err := c.receive()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = ErrServerClosed // it took no more requests, or no goodbye
	}
	c.fail(err)
	_ = c.nc.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for cookie, k := range c.pending {
		delete(c.pending, cookie)
		k.err = c.err
		k.answered <- struct{}{}
	}
}

func (c *Conn) receive() error {
	d := c.decoder((*connRequests)(c))
	buf := make([]byte, 64<<10)
	have := 0
	for {
		// A payload with more to come than the buffer is worth goes straight to its
		// place.
		if dst := d.direct(); len(dst) >= 4096 {
			n, err := c.nc.Read(dst)
			if n > 0 {
				if err := d.wrote(n); err != nil {
					return err
				}
			}
			if err != nil {
				return eof(err)
			}
			continue
		}
		n, err := c.nc.Read(buf[have:])
		have += n
		used, derr := d.feed(buf[:have])
		if derr != nil {
			return derr
		}
		have = copy(buf, buf[used:have])
		if err != nil {
			return eof(err)
		}
	}
}

// connRequests is Conn as its decoder sees it.
type connRequests Conn

func (c *connRequests) lookup(cookie uint64) *Op {
	c.mu.Lock()
	defer c.mu.Unlock()
	if k := c.pending[cookie]; k != nil {
		return &k.Op
	}
	return nil
}

func (c *connRequests) done(op *Op) {
	c.mu.Lock()
	k := c.pending[op.cookie]
	delete(c.pending, op.cookie)
	c.mu.Unlock()
	k.answered <- struct{}{}
}

// putRequest writes a request header of wire.RequestSize bytes.
func putRequest(b []byte, cmd, flags uint16, cookie, offset uint64, length uint32) {
	_ = b[wire.RequestSize-1]
	binary.BigEndian.PutUint32(b, wire.MagicRequest)
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], cmd)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint64(b[16:], offset)
	binary.BigEndian.PutUint32(b[24:], length)
}
