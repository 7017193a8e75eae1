package ioloop

import "github.com/nbd-export/nbd-export/backend"

// A read that is larger than what goes through the reply buffer has a send of its own,
// by reference as in pages.go: of a file as it is (sendfile.go), spliced (splice.go),
// or of pages. What that leaves is read into a buffer under the same admission.

// sendByReference answers the read t, which has no buffer yet, if that can be
// done by reference now, or when those before it are sent: see later.go. Otherwise
// the answer is false, and t is as before.
func (c *conn) sendByReference(t *task) bool {
	pages := c.out.pages
	switch {
	case pages == nil:
		return false
	case !c.out.hold():
		if !pages.takesFiles(t.req.Length) || !t.staysInFile() {
			return false
		}
		c.out.enqueue(segment{task: t, later: true})
		return true
	}
	sent, later, rest := t.refer(c.r < c.w)
	switch {
	case later:
		c.out.resume(segment{task: t, later: true})
	case !sent:
		c.out.pump()
		return false
	case rest != nil:
		c.out.resume(rest...)
	default:
		c.out.pump()
		t.free()
	}
	return true
}

// refer sends the read t by reference. more says that other requests have come. The
// caller is the sender. If nothing was sent t is as before; later says that it is worth
// waiting until it fits the socket. What that did not take of the reply is rest.
func (t *task) refer(more bool) (sent, later bool, rest []segment) {
	c, r := t.conn, &t.req
	g := c.lane.EnterRead()
	defer c.lane.LeaveRead(g)
	if !t.mapPages() {
		return false, false, nil
	}
	defer c.disk.Image.Unmap(&t.plan)
	way := notAsFile
	if t.stays() {
		way = c.out.pages.fileWay(r.Length, more)
	}
	if way == whenItFits {
		return false, true, nil
	}
	// Counted before the client can know.
	c.disk.counts.reads.Add(1)
	c.disk.counts.bytesRead.Add(uint64(r.Length))
	n, total := t.send(way == asFile)
	var err error
	if n > 0 && n < total {
		rest, err = t.fetchRest(n)
	}
	if n == 0 || err != nil {
		c.disk.counts.unread(r)
	}
	if err != nil {
		c.out.fail(begunError(err))
		return true, false, nil
	}
	return n > 0, false, rest
}

// send sends what is laid out by reference, with file as a file. The caller is the
// sender.
func (t *task) send(file bool) (sent, total int) {
	c := t.conn
	segs := c.out.scratch[:0]
	for i := range t.segs {
		segs = append(segs, t.segs[i].b)
		total += len(t.segs[i].b)
	}
	waits := false
	for i := range t.plan.Extents {
		e := &t.plan.Extents[i]
		waits = waits || e.Kind == backend.Data && !e.File.Traits().InlineReads
	}
	e := &t.plan.Extents[0]
	switch {
	case file:
		sent = c.out.sendFile(segs[0], e.File.Fd(), e.Offset, e.Length, waits)
	case t.stays() && c.out.pages.prefersSplice(e.Length, false):
		sent = c.splice(segs, total, len(segs[1]), waits)
	default:
		sent = c.out.sendPages(segs, total, waits)
	}
	clear(segs)
	return sent, total
}

// stays reports whether the reply that is laid out is one piece of a file that stays
// where it is.
func (t *task) stays() bool {
	return len(t.segs) == 2 && len(t.plan.Extents) == 1 && t.plan.Extents[0].Fixed
}

// mapPages maps the admitted read t and lays out its reply by reference. If
// that cannot be done nothing is mapped.
func (t *task) mapPages() bool {
	if t.conn.mapRead(&t.plan, &t.req, 0) != nil {
		return false
	}
	if t.lay(true) {
		return true
	}
	t.conn.disk.Image.Unmap(&t.plan)
	return false
}

// fetchRest reads what is missing of a reply by reference, of which sent bytes
// are sent, into a buffer, and returns what is left to send.
func (t *task) fetchRest(sent int) ([]segment, error) {
	t.buf = t.conn.e.buffers.get(t.req.Length)
	t.lay(false)
	at, k := 0, 0 // piece k begins at byte at of the reply
	next := func() { at, k = at+len(t.segs[k].b), k+1 }
	chunks := t.hasHoles()
	for i := range t.plan.Extents {
		e := &t.plan.Extents[i]
		if chunks || i == 0 {
			next() // a header
		}
		if e.Kind == backend.Zero {
			continue
		}
		b := t.segs[k].b
		if skip := max(sent-at, 0); skip < len(b) {
			if err := readNow(e.File, b[skip:], e.Offset+int64(skip)); err != nil {
				return nil, err
			}
		}
		next()
	}
	rest := t.segs
	for sent >= len(rest[0].b) {
		sent -= len(rest[0].b)
		rest = rest[1:]
	}
	rest[0].b = rest[0].b[sent:]
	rest[len(rest)-1].task = t
	return rest, nil
}
