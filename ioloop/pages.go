package ioloop

import (
	"fmt"

	"github.com/nbd-export/nbd-export/backend"
)

// A read of what is in the page cache is answered by reference: the send takes
// the bytes from the file's map (backend.File.Pages), so they are copied once,
// into the socket, and never into a buffer of ours. Operations/s and server's
// processor time in microseconds for each, tmpfs, Unix socket, one connection
// (nbd-export bench, two cores), with pread and so: 4k at depth 32 265k @3.6 and
// 380k @2.5, 16k at depth 16 105k @10 and 175k @5.9, 1M at depth 4 2.7k @414 and
// 3.5k @300, 1M at depth 1 2.1k @470 and 3.2k @290.
//
// The reply is laid out as if the bytes were copied, with the buffer for them
// counted in the budget before anything is admitted, but the buffer stays
// empty. The read keeps its admission, and its plan the pins, until the send
// has returned. What the socket has not taken by then, or the kernel could not
// read, is read into the buffer before the admission is left: none waits for a
// client.

// maxGaps bounds the gaps of one reply buffer: each is a piece of the send, and
// so is what lies before it, and the end.
const maxGaps = (maxSegments - 1) / 2

// gap is a part of the reply buffer that stays empty unless it has to be read
// after all.
type gap struct {
	at    int    // in the reply buffer
	pages []byte // what belongs there; for system calls only
	file  *backend.File
	off   int64
	read  int // in conn.pinned
}

// pinnedRead is a read whose reply has gaps: admitted and mapped.
type pinnedRead struct {
	req        Request
	plan       backend.Plan
	generation uint32
	from, to   int // the reply in the reply buffer
	failed     error
}

// pin returns a free place in pinned, which is taken by counting pins up.
func (c *conn) pin() *pinnedRead {
	if c.pins == len(c.pinned) {
		c.pinned = append(c.pinned, pinnedRead{})
	}
	return &c.pinned[c.pins]
}

// gather is fetch without waiting, for the reply that ends dst with room for
// the plan's bytes. What is in the page cache it leaves as gaps.
func (c *conn) gather(p *backend.Plan, dst []byte, at int) error {
	before, spliced := len(c.gaps), c.spliced
	refer := c.out.pages != nil && before+len(p.Extents) <= maxGaps
	for i := range p.Extents {
		e := &p.Extents[i]
		part := dst[at : at+int(e.Length)]
		var err error
		switch e.Kind {
		case backend.Zero:
			clear(part)
		case backend.Opaque:
			err = backend.ErrWait
		default:
			if refer {
				if b := e.File.Pages(e.Offset, e.Length); b != nil {
					c.gaps = append(c.gaps, gap{at, b, e.File, e.Offset, c.pins})
					c.spliced.add(e)
					break
				}
			}
			_, err = e.File.TryReadAt(part, e.Offset)
		}
		if err != nil {
			c.gaps, c.spliced = c.gaps[:before], spliced
			return err
		}
		at += len(part)
	}
	return nil
}

// sendGaps sends the reply buffer, with its gaps' bytes, as far as the socket
// takes it. The caller is the sender.
func (c *conn) sendGaps() (sent int) {
	ok, waits := c.reach()
	if !ok {
		return 0
	}
	segs, at := c.out.scratch[:0], 0
	for i := range c.gaps {
		g := &c.gaps[i]
		segs = append(segs, c.reply.raw[at:g.at], g.pages)
		at = g.at + len(g.pages)
	}
	segs = append(segs, c.reply.raw[at:c.filled])
	if c.splices() {
		sent = c.splice(segs, c.filled, c.spliced.bytes, waits)
	} else {
		sent = c.out.sendPages(segs, c.filled, waits)
	}
	clear(segs)
	return sent
}

// reach reports whether the files still have all that the gaps refer to. Were
// that left to the send to find, a reply might have begun by then. waits says
// that reading them may wait.
func (c *conn) reach() (ok, waits bool) {
	for i := 0; i < len(c.gaps); {
		f, end := c.gaps[i].file, int64(0)
		for ; i < len(c.gaps) && c.gaps[i].file == f; i++ {
			end = max(end, c.gaps[i].off+int64(len(c.gaps[i].pages)))
		}
		if !f.Reaches(end) {
			return false, false
		}
		waits = waits || !f.Traits().InlineReads
	}
	return true, waits
}

// fillGaps ends the pinned reads: it reads what has not been sent, and takes
// replies that become errors out of the reply buffer. It returns how many
// reads there were.
func (c *conn) fillGaps(sent int) (reads int) {
	bad := false
	for i := range c.gaps {
		g := &c.gaps[i]
		skip := max(sent-g.at, 0)
		if skip >= len(g.pages) {
			continue
		}
		if err := readNow(g.file, c.reply.raw[g.at+skip:g.at+len(g.pages)], g.off+int64(skip)); err != nil {
			c.pinned[g.read].failed, bad = err, true
		}
	}
	clear(c.gaps)
	c.gaps, c.spliced = c.gaps[:0], toSplice{}
	reads, c.pins = c.pins, 0
	for i := range c.pinned[:reads] {
		c.disk.Image.Unmap(&c.pinned[i].plan)
		c.lane.LeaveRead(c.pinned[i].generation)
	}
	if bad {
		c.cutFailed(c.pinned[:reads], sent)
	}
	return reads
}

// readNow is for what was in the page cache a moment ago.
func readNow(f *backend.File, p []byte, off int64) error {
	n, err := f.TryReadAt(p, off)
	if err != nil {
		err = f.ReadAt(p[n:], off+int64(n))
	}
	return err
}

// cutFailed takes the replies to failed reads out of the reply buffer. One that
// has begun cannot be taken back: that ends the connection.
func (c *conn) cutFailed(reads []pinnedRead, sent int) {
	b, kept, at := c.reply.raw, 0, 0
	for i := range reads {
		k := &reads[i]
		if k.failed == nil {
			continue
		}
		if k.from < sent {
			c.out.fail(begunError(k.failed))
		}
		kept += copy(b[kept:], b[at:k.from])
		at = k.to
	}
	c.filled = kept + copy(b[kept:], b[at:c.filled])
}

func begunError(err error) error {
	return fmt.Errorf("a read failed after its reply had begun: %w", err)
}

// answerFailed replies to those that failed of the reads that fillGaps ended.
func (c *conn) answerFailed(reads int) {
	for i := range reads {
		k := &c.pinned[i]
		if err := k.failed; err != nil {
			k.failed = nil
			c.disk.counts.unread(&k.req)
			c.replyError(&k.req, err)
		}
	}
}
