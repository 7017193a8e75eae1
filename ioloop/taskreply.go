package ioloop

import "github.com/nbd-export/nbd-export/backend"

// conclude answers the request.
func (t *task) conclude(err error) {
	c, r := t.conn, &t.req
	counts := &c.disk.counts
	switch {
	case err != nil:
		t.sendHead(t.failure(err))
		return
	case r.Op == OpRead:
		counts.reads.Add(1)
		counts.bytesRead.Add(uint64(r.Length))
		t.unlink()
		t.sendData()
		c.ended()
		return
	case r.Op == OpWrite:
		counts.writes.Add(1)
		counts.bytesWritten.Add(uint64(r.Length))
		c.noteDirty(r)
	case r.Op == OpFlush:
		counts.flushes.Add(1)
	default:
		counts.other.Add(1)
		c.noteDirty(r)
	}
	if r.Op == OpStatus {
		t.sendStatus()
		return
	}
	t.sendHead(c.codec.AppendDone(t.heads[:0], r))
}

// failure counts and logs err, and is the reply that says so.
func (t *task) failure(err error) []byte {
	var b batch
	b.count(err)
	b.addTo(&t.conn.disk.counts)
	t.conn.logFault(&t.req, err)
	return t.conn.codec.AppendError(t.heads[:0], &t.req, err)
}

// findStatus gets what an OpStatus asks for, of all contexts before anything is
// sent: an error is the whole reply.
func (t *task) findStatus() (err error) {
	img, codec, r := t.conn.disk.Image, t.conn.codec, &t.req
	limit := codec.MaxStatus(r)
	t.status, t.ends = t.status[:0], t.ends[:0]
	for _, bitmap := range codec.Contexts() {
		if bitmap == "" {
			t.status, err = img.Status(t.status, r.Offset, r.Length, limit)
		} else {
			t.status, err = img.BitmapStatus(t.status, bitmap, r.Offset, r.Length, limit)
		}
		if err != nil {
			return err
		}
		t.ends = append(t.ends, len(t.status))
	}
	return nil
}

func (t *task) sendStatus() {
	head, from := t.heads[:0], 0
	for i, end := range t.ends {
		head = t.conn.codec.AppendStatus(head, &t.req, i, t.status[from:end], i == len(t.ends)-1)
		from = end
	}
	t.sendHead(head)
}

// sendHead sends a reply without payload; the buffer is not needed any more.
func (t *task) sendHead(head []byte) {
	c := t.conn
	t.heads = head
	t.dropBuffer()
	t.unlink()
	c.out.enqueue(segment{b: head, task: t})
	c.ended()
}

// sendData sends a read's reply.
func (t *task) sendData() { t.conn.out.enqueue(t.layData()...) }

// layData is the reply to a read, from its buffer: in one piece, or with its holes
// told apart.
func (t *task) layData() []segment {
	r := &t.req
	if t.hasHoles() {
		t.lay(false)
		t.segs[len(t.segs)-1].task = t
	} else {
		t.heads = t.conn.codec.AppendData(t.heads[:0], r, 0, r.Length, true)
		t.segs = append(t.segs[:0], segment{b: t.buf.framed(t.heads, r.Length), task: t})
	}
	return t.segs
}

// lay makes t.segs the pieces of the reply to a read: its data from the buffer,
// or by reference if the files have all of it in the page cache. If not the
// answer is false.
func (t *task) lay(byReference bool) bool {
	c, r := t.conn, &t.req
	extents := t.plan.Extents
	chunks := t.hasHoles()
	need := MaxHeader
	if chunks {
		need *= len(extents)
	}
	if cap(t.heads) < need {
		t.heads = make([]byte, 0, need)
	}
	heads, segs := t.heads[:0], t.segs[:0]
	if !chunks {
		heads = c.codec.AppendData(heads, r, 0, r.Length, true)
		segs = append(segs, segment{b: heads})
	}
	var off int64
	for i := range extents {
		e := &extents[i]
		if chunks {
			last, from := i == len(extents)-1, len(heads)
			if e.Kind == backend.Zero {
				heads = c.codec.AppendHole(heads, r, off, e.Length, last)
			} else {
				heads = c.codec.AppendData(heads, r, off, e.Length, last)
			}
			segs = append(segs, segment{b: heads[from:]})
		}
		var b []byte
		switch {
		case chunks && e.Kind == backend.Zero:
		case !byReference:
			b = t.buf.payload(r.Length)[off : off+e.Length]
		case e.Kind != backend.Data || !e.File.Reaches(e.Offset+e.Length):
			return false
		default:
			if b = e.File.Pages(e.Offset, e.Length); b == nil {
				return false
			}
		}
		if b != nil {
			segs = append(segs, segment{b: b})
		}
		off += e.Length
	}
	t.heads, t.segs = heads, segs
	return len(segs) <= maxSegments || !byReference
}

// maxChunks is the most pieces that a reply with holes has. One of more, as of
// a fragmented image, is sent whole: a client has work with each.
const maxChunks = 64

// hasHoles reports whether the reply to a read tells its holes.
func (t *task) hasHoles() bool {
	if len(t.plan.Extents) > maxChunks || !t.conn.findsHoles(&t.req) {
		return false
	}
	for i := range t.plan.Extents {
		if t.plan.Extents[i].Kind == backend.Zero {
			return true
		}
	}
	return false
}
