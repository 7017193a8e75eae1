package ioloop

const (
	leastAhead = 128 << 10
	mostAhead  = 2 << 20
	// longRead is a read from which on reading ahead gains nothing, in bytes: it
	// keeps the device busy by itself.
	longRead = 256 << 10
)

// sequence follows a connection's reads. Where one that is not in the page cache
// continues those before it, what lies behind it is read ahead: files that are
// written are open in a way that leaves that to us (backend, smallFolios).
type sequence struct {
	end     int64 // of the last read, bytes
	follows bool  // it began where the one before it ended
	window  int64 // bytes last read ahead
	to      int64 // the end of them
}

// note is told of each read as it comes.
func (s *sequence) note(r *Request) {
	if s.follows = r.Offset == s.end && r.Offset != 0; !s.follows {
		s.window, s.to = 0, 0
	}
	s.end = r.Offset + r.Length
}

// missed is told of the read noted last that it is not in the cache. It returns
// how many bytes from its start are to be read ahead.
func (s *sequence) missed(r *Request) int64 {
	if !s.follows || r.Length >= longRead || s.end <= s.to {
		return 0
	}
	s.window = min(max(2*s.window, leastAhead, 2*r.Length), mostAhead)
	s.to = r.Offset + s.window
	return s.window
}

// aheadOf is missed, where that is of use.
func (c *conn) aheadOf(r *Request) int64 {
	if !c.disk.cached {
		return 0
	}
	return c.sequence.missed(r)
}
