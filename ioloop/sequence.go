package ioloop

// The windows of reading ahead, in bytes. What was read ahead of a large read is
// sent from the page cache, not through a buffer. Cold 1M reads in sequence at
// depth 4, ext4, two cores, operations/s and server's processor time in
// microseconds, four runs each: not ahead 0.8k to 1.25k, 2 MiB 0.65k to 1.2k @540
// to 1450, 4 MiB 0.9k to 1.3k @360 to 730, 8 MiB 1.0k to 1.45k @230 to 330, 16 MiB
// 0.6k to 1.3k @310 to 1580.
const (
	leastAhead = 128 << 10
	mostAhead  = 8 << 20
	// aheadPiece is how much is asked for at once. Of more the kernel reads only
	// what the device's read_ahead_kb or max_sectors_kb is, whichever is larger, and
	// leaves out the rest: of 8 MiB 1.25, with the defaults of a disk. Smaller pieces
	// are no slower: of 2 MiB, 1 MiB, 512, 256 and 128 KiB, three runs each on a virtual
	// disk, 128 MiB took 40 to 44, 38 to 45, 37 to 47, 39 to 55 and 37 to 45 ms of
	// processor time.
	aheadPiece = 128 << 10
)

// sequence follows a connection's reads. Where one that is not in the page cache
// continues those before it, what lies behind it is read ahead, and from then on
// more of it before the reads have come to its end: files that are written are
// open in a way that leaves that to us (backend, smallFolios).
type sequence struct {
	end     int64 // of the last read, bytes
	follows bool  // it began where the one before it ended
	window  int64 // bytes last read ahead
	to      int64 // the end of them
}

// span is a range of the export, in bytes.
type span struct{ off, n int64 }

// note is told of each read as it comes.
func (s *sequence) note(r *Request) {
	if s.follows = r.Offset == s.end && r.Offset != 0; !s.follows {
		s.window, s.to = 0, 0
	}
	s.end = r.Offset + r.Length
}

// ahead returns what is to be read ahead now, behind the read noted last, and
// counts on it: nothing if enough is under way. missed says that the read itself
// is not in the cache.
func (s *sequence) ahead(r *Request, missed bool) (a span) {
	if !s.follows || s.window == 0 && !missed || s.to-s.end > s.window/4*3 {
		return span{}
	}
	s.window = min(max(2*s.window, leastAhead, 2*r.Length), mostAhead)
	a.off = max(s.to, s.end)
	s.to = s.end + s.window
	a.n = s.to - a.off
	return a
}

// readAhead has a worker read ahead what goes with r, if anything does and there is
// memory for a task: nothing waits for it.
func (c *conn) readAhead(r *Request, missed bool) {
	if !c.disk.cached {
		return
	}
	a := c.sequence.ahead(r, missed)
	a.n = min(a.n, c.disk.Image.Size()-a.off)
	if a.n <= 0 {
		return
	}
	l, ok := c.tryLend(taskCost)
	if !ok {
		c.sequence.to = a.off // the next read tries again
		return
	}
	t := taskFor(c, &Request{Op: OpCache, Offset: a.off, Length: a.n}, l)
	t.ahead = true
	c.list(t)
	c.e.sched.submit(t)
}

// runAhead executes the task of readAhead. Nobody hears of an error: a read will.
func (t *task) runAhead() {
	left := t.req
	for left.Length > 0 {
		piece := left
		piece.Length = min(left.Length, aheadPiece)
		if !t.conn.cache(&piece) {
			break
		}
		left.Offset, left.Length = left.Offset+piece.Length, left.Length-piece.Length
	}
	t.forget()
}

// cache reads r's range ahead under a read's admission. It reports false if there
// is no point in going on.
func (c *conn) cache(r *Request) bool {
	defer c.lane.LeaveRead(c.lane.EnterRead())
	img := c.disk.Image
	return !c.lane.Stopping() && checkRange(img, r) == nil && img.Cache(r.Offset, r.Length) == nil
}
