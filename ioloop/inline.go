package ioloop

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// execute runs one request whose payload is complete, inline if it cannot
// wait, or hands it to a worker. payload is only valid during the call.
func (c *conn) execute(r *Request, payload []byte) error {
	switch r.Op {
	case OpDisconnect:
		return errDisconnect
	case OpReject:
		c.replyError(r, r.Err)
		return nil
	case OpRead:
		if r.Length == 0 {
			c.replyDone(r)
			return nil
		}
		c.sequence.note(r)
		return c.read(r)
	case OpWrite:
		return c.write(r, payload)
	default:
		return c.dispatch(r)
	}
}

// read serves a READ from what is in memory, or hands it to a worker.
func (c *conn) read(r *Request) error {
	if r.Length > inlineRead {
		return c.readLarge(r)
	}
	if len(c.gaps) == maxGaps {
		c.flush()
	}
	c.readAhead(r, false)
	dst := c.space(MaxHeader + int(r.Length))
	n, err := c.tryRead(dst, r)
	switch err {
	case nil:
		c.filled = n
		c.batch.reads++
		c.batch.bytesRead += uint64(r.Length)
		return nil
	case backend.ErrWait:
		c.readAhead(r, true)
		t, ok := c.newTask(r, r.Length)
		if !ok {
			return errGone
		}
		c.startRead(t)
		return nil
	}
	c.replyError(r, err)
	return nil
}

// tryRead appends the whole reply to dst, or fails with ErrWait if any of it
// is not in memory. It returns the new length of dst. If that has gaps the
// read stays admitted, as the next of the pinned ones.
func (c *conn) tryRead(dst []byte, r *Request) (int, error) {
	k := c.pin()
	k.generation = c.lane.EnterRead()
	err := c.mapRead(&k.plan, r, 0)
	if err != nil {
		c.lane.LeaveRead(k.generation)
		return 0, err
	}
	gaps := len(c.gaps)
	k.from = len(dst)
	dst = c.codec.AppendData(dst, r, 0, r.Length, true)
	start := len(dst)
	dst = dst[: start+int(r.Length) : cap(dst)]
	if err = c.gather(&k.plan, dst, start); len(c.gaps) > gaps {
		k.req, k.to = *r, len(dst)
		c.pins++
		return len(dst), nil
	}
	c.disk.Image.Unmap(&k.plan)
	c.lane.LeaveRead(k.generation)
	return len(dst), err
}

// mapRead plans the read r, for which the lane was entered, with its holes where
// the reply tells them. Unless it fails the caller unmaps p.
func (c *conn) mapRead(p *backend.Plan, r *Request, mode backend.Mode) error {
	if c.lane.Stopping() {
		return state.ErrStopping
	}
	img := c.disk.Image
	if err := checkRange(img, r); err != nil {
		return err
	}
	if c.findsHoles(r) {
		mode |= backend.FindHoles
	}
	return img.Map(p, r.Offset, r.Length, mode)
}

// findsHoles reports whether the holes of a read are worth finding.
func (c *conn) findsHoles(r *Request) bool { return r.Length >= findHolesAt && c.codec.Chunked(r) }

// fetch moves the bytes of a mapped plan into dst, which is exactly as long
// as the plan. With now it returns ErrWait rather than wait for a device.
func fetch(img backend.Image, p *backend.Plan, dst []byte, now bool) error {
	for i := range p.Extents {
		e := &p.Extents[i]
		part := dst[:e.Length]
		dst = dst[e.Length:]
		var err error
		switch e.Kind {
		case backend.Zero:
			clear(part)
		case backend.Opaque:
			if now {
				return backend.ErrWait
			}
			err = img.ReadOpaque(p, i, 0, part)
		default:
			if now {
				_, err = e.File.TryReadAt(part, e.Offset)
			} else {
				err = e.File.ReadAt(part, e.Offset)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readLarge is read for what would fill the reply buffer.
func (c *conn) readLarge(r *Request) error {
	c.readAhead(r, false)
	t, ok := c.lendTask(r, r.Length)
	if !ok {
		return errGone
	}
	c.flush()
	if c.sendByReference(t) {
		giveWay(r.Length)
		return nil
	}
	t.buf = c.e.buffers.get(r.Length)
	if r.Length <= inlineLarge {
		switch err := t.fetch(true); err {
		case nil:
			c.batch.reads++
			c.batch.bytesRead += uint64(r.Length)
			c.flush()
			t.sendData()
			return nil
		case backend.ErrWait:
		default:
			t.free()
			c.replyError(r, err)
			return nil
		}
	}
	c.startRead(t)
	c.readAhead(r, true) // after it, which is waited for
	return nil
}

// write serves a WRITE whose payload lies in the input buffer.
func (c *conn) write(r *Request, payload []byte) error {
	admitted, done, err := c.admit(r)
	if done {
		c.answer(r, err)
		return nil
	}
	if admitted {
		if c.putOff(r, payload) {
			return nil
		}
		err := c.tryWrite(r, payload, &c.plan)
		c.lane.Leave()
		if err != backend.ErrWait {
			c.answerWrite(r, err)
			return nil
		}
		// The copy for the worker may have to wait for memory, which must not
		// happen under an admission; the worker asks again.
	}
	t, ok := c.newTask(r, r.Length)
	if !ok {
		return errGone
	}
	t.passed = admitted
	copy(t.buf.payload(r.Length), payload)
	if admitted {
		c.start(t)
	} else {
		c.wait(t)
	}
	return nil
}

// writeLarge is write for a payload in a buffer of its own. The request is
// answered without that: the reply may have to wait for memory.
func (c *conn) writeLarge(r *Request, t *task) {
	admitted, done, err := c.admit(r)
	if done {
		t.free()
		c.answer(r, err)
		return
	}
	if admitted && r.Length <= inlineLarge {
		err := c.tryWrite(r, t.buf.payload(r.Length), &c.plan)
		if err != backend.ErrWait {
			c.lane.Leave()
			t.free()
			c.answerWrite(r, err)
			return
		}
	}
	c.goOn(t, admitted)
}

// goOn has a worker execute t, or keeps it until the gate lets it in.
func (c *conn) goOn(t *task, admitted bool) {
	t.admitted = admitted
	if admitted {
		c.start(t)
	} else {
		c.wait(t)
	}
}

func (c *conn) answerWrite(r *Request, err error) {
	if err != nil {
		c.replyError(r, err)
		return
	}
	c.batch.writes++
	c.batch.bytesWritten += uint64(r.Length)
	if c.pace != nil {
		c.batch.dirtied += uint64(c.pace.dirties(r))
	}
	c.replyDone(r)
}

// admit asks the gate for a request. done means that err, or success, is its
// answer. Neither admitted nor done: it has to wait; the task will ask.
func (c *conn) admit(r *Request) (admitted, done bool, err error) {
	if r.Length == 0 && r.Op != OpFlush {
		return false, true, nil
	}
	var v state.Verdict
	switch v, c.since = c.lane.EnterAgain(classOp(r.Op), 0); v {
	case state.Admitted:
		if !c.pass(r) {
			c.lane.Leave() // while it waits
			return false, false, nil
		}
		return true, false, nil
	case state.Nothing:
		return false, true, nil
	case state.Wait, state.Hold:
		return false, false, nil
	}
	return false, true, c.refusal(v)
}

func (c *conn) answer(r *Request, err error) {
	if err != nil {
		c.replyError(r, err)
		return
	}
	c.replyDone(r)
}

// tryWrite writes an admitted payload if that cannot wait for a device;
// otherwise ErrWait, and nothing is published.
func (c *conn) tryWrite(r *Request, payload []byte, p *backend.Plan) error {
	img := c.disk.Image
	if err := checkRange(img, r); err != nil {
		return err
	}
	if err := img.Prepare(p, r.Offset, payload, 0); err != nil {
		return err
	}
	durable := c.durable(r)
	for i := range p.Extents {
		e := &p.Extents[i]
		if !c.writesHere(e, durable) {
			img.Abort(p)
			return backend.ErrWait
		}
	}
	for i := range p.Extents {
		e := &p.Extents[i]
		n, err := e.File.TryWriteAt(payload[:e.Length], e.Offset)
		if err == backend.ErrWait && (i > 0 || n > 0) {
			// Rare, and begun: it ends under this admission, or a refusal later
			// would leave half of a refused write in the image.
			err = e.File.WriteAt(payload[n:e.Length], e.Offset+int64(n), durable)
		}
		if err != nil {
			img.Abort(p)
			return err
		}
		payload = payload[e.Length:]
	}
	img.Commit(p) // what is durable here is so without a Flush
	return nil
}

// writesHere reports whether a write of e is not expected to wait for a device. Where
// it is to be durable that takes a file and a mapping that are so without a sync.
func (c *conn) writesHere(e *backend.Extent, durable bool) bool {
	return e.File.InlineWrite(e.Offset, int(e.Length)) && (!durable || e.File.Traits().Tmpfs && !c.disk.Image.Info().Mapped)
}

// durable reports whether the reply to r promises that its effect is on disk.
func (c *conn) durable(r *Request) bool {
	return r.Flags&FUA != 0 || c.disk.Image.Info().WriteThrough
}

// dispatch hands what always may block to a worker.
func (c *conn) dispatch(r *Request) error {
	// First the memory, then the admission: the other way round it would be
	// held while waiting.
	t, ok := c.newTask(r, 0)
	if !ok {
		return errGone
	}
	admitted, done, err := c.admit(r)
	if done {
		t.free()
		c.answer(r, err)
		return nil
	}
	c.goOn(t, admitted)
	return nil
}

func classOp(op Op) state.Class {
	switch op {
	case OpFlush:
		return state.Flush
	case OpCache, OpStatus:
		return state.Query
	}
	return state.Mutate
}

// checkRange compares an admitted request with the image's present size,
// which may have become smaller since the connection was told (activation of
// a shrunk image). The errors are those of a request past the end of an
// export (NBD specification, "Error values").
func checkRange(img backend.Image, r *Request) error {
	size := img.Size()
	if r.Offset <= size && r.Length <= size-r.Offset {
		return nil
	}
	errno := unix.EINVAL
	if r.Op == OpWrite || r.Op == OpZero {
		errno = unix.ENOSPC
	}
	return fmt.Errorf("range %d+%d lies past the end of image %s, which has only %d bytes since it was activated: %w",
		r.Offset, r.Length, img.Info().Path, size, errno)
}
