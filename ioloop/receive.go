package ioloop

import (
	"fmt"
	"io"
)

// How fill looks at what comes next: see inplace.go.
type look uint8

const (
	lookNot     look = iota // receives it
	lookAll                 // sees as much as it would receive
	lookRequest             // sees no more than a request without its payload
)

// requestPeek is what lookRequest looks at, in bytes: a large payload behind it is
// then still to be received, where it belongs.
const requestPeek = MaxHeader

// fill receives more input, at least one byte, or looks at it.
func (c *conn) fill() error {
	if c.in == nil {
		c.takeInput()
	}
	if c.r == c.w {
		c.r, c.w = 0, 0
	} else if c.r > 0 && len(c.in.raw)-c.w < smallPayload {
		c.w = copy(c.in.raw, c.in.raw[c.r:c.w])
		c.r = 0
	}
	idle := c.inPayload
	if c.r == c.w {
		idle = c.atRest
	}
	space := c.in.raw[c.w:min(len(c.in.raw), c.w+inputSize)]
	var n int
	var err error
	switch {
	case c.next == lookAll, c.next == lookRequest && c.r == c.w:
		if c.next == lookRequest {
			space = space[:requestPeek]
		}
		n, err = c.peeker.peek(space, idle)
		c.peeked, c.taken = n > 0, c.w
	default:
		n, err = c.t.recv(space, idle)
		c.owes.move(n)
	}
	if err == errAgain {
		return nil
	}
	if err == io.EOF && c.r < c.w {
		err = io.ErrUnexpectedEOF
	}
	c.w += n
	c.received.Store(c.received.Load() + 1)
	return err
}

// onPayload notes that the client owes the rest of a request.
func (c *conn) onPayload() (released bool) {
	c.busyFrom = 0
	c.owes.wait()
	return false
}

// process decodes and executes every complete request of the input.
func (c *conn) process() error {
	c.next = lookNot
	err := c.processInput()
	c.settle()
	if err != nil {
		c.swallow() // closed with bytes unread, TCP would drop replies on their way
	} else {
		c.unpeek() // if nothing was executed then next is lookNot, and fill waits
	}
	return err
}

func (c *conn) processInput() error {
	for c.in != nil {
		b := c.in.raw[c.r:c.w]
		r := &c.req
		n, err := c.codec.Decode(b, r)
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		if int64(len(b)-n) >= r.Payload {
			c.owes.settled()
			c.r += n + int(r.Payload)
			if c.next == lookRequest {
				c.next = lookNot
			}
			err = c.execute(r, b[n:n+int(r.Payload)])
		} else if r.Payload <= smallPayload {
			return nil // decoded again when the rest is here
		} else {
			c.owes.settled() // from here on it owes the payload
			c.r += n
			err = c.largePayload(r)
			c.owes.settled()
		}
		if err != nil {
			return err
		}
		if c.filledUp() {
			c.flush()
		}
		if c.tasks.Load() >= maxTasks {
			if err := c.awaitTasks(); err != nil {
				return err
			}
		}
	}
	return nil
}

// awaitTasks pauses receiving while the connection has too many tasks. It
// stands between requests, where no admission is held: a parked task may be
// waiting for a transition that waits for admissions.
func (c *conn) awaitTasks() error {
	c.flush()
	for c.tasks.Load() >= maxTasks {
		if !c.awaitRoom() {
			return errGone
		}
	}
	return nil
}

// largePayload receives a payload that does not fit the input buffer and
// executes its request.
func (c *conn) largePayload(r *Request) error {
	c.settle()
	c.unpeek()
	if r.Op != OpWrite {
		if err := c.skip(r.Payload); err != nil {
			return err
		}
		return c.execute(r, nil)
	}
	if c.peeker != nil {
		c.next = lookRequest
	}
	if done, err := c.receiveInPlace(r); done || err != nil {
		return err
	}
	t, ok := c.newTask(r, r.Payload)
	if !ok {
		return errGone
	}
	c.flush() // the client may wait for these before it sends the rest
	p := t.buf.payload(r.Payload)
	have := copy(p, c.in.raw[c.r:c.w])
	c.r += have
	for have < len(p) {
		n, err := c.t.recv(p[have:], c.inPayload)
		c.owes.move(n)
		if err != nil && err != errAgain {
			t.free()
			return unexpected(err)
		}
		have += n
	}
	c.writeLarge(r, t)
	return nil
}

// skip consumes n bytes of the stream.
func (c *conn) skip(n int64) error {
	c.flush() // the client may wait for these before it sends the rest
	for {
		k := min(n, int64(c.w-c.r))
		c.r += int(k)
		if n -= k; n == 0 {
			return nil
		}
		c.r, c.w = 0, 0
		got, err := c.t.recv(c.in.raw[:inputSize], c.inPayload)
		c.owes.move(got)
		if err != nil && err != errAgain {
			return unexpected(err)
		}
		c.w = got
	}
}

// unexpected is err for a stream that ends inside a request.
func unexpected(err error) error {
	if err == io.EOF {
		return fmt.Errorf("client vanished in the middle of a payload: %w", io.ErrUnexpectedEOF)
	}
	return err
}
