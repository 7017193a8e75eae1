package ioloop

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
)

// Input that fill has only looked at is still in the socket, from conn.taken on. So
// what of it is a payload can be received into its place in the file, and all else
// where it was seen. It is there, so nobody waits for the client. Of a large payload
// nothing but the request is looked at, and the rest received in place if all of it
// has come.

// takePeeked receives the input that was looked at, up to c.r: payloads into
// their places, and all else where it was seen already.
func (c *conn) takePeeked(writes []putOff) {
	g := c.puts
	n, at := 0, c.taken
	piece := func(b []byte) {
		g.iov[n].Base = unsafe.SliceData(b)
		g.iov[n].SetLen(len(b))
		n++
	}
	for i := range writes {
		w := &writes[i]
		if w.place == nil || !claimPlace(writes[:i], w) {
			continue
		}
		if w.at > at {
			piece(c.in.raw[at:w.at])
		}
		piece(w.place)
		at = w.at + len(w.place)
	}
	if c.r > at {
		piece(c.in.raw[at:c.r])
	}
	rest := c.takeAll(g.iov[:n])
	clear(g.iov[:n])
	c.taken = c.r - rest
	reached := c.taken
	c.takeTo(c.r)
	for i := range writes {
		w := &writes[i]
		switch {
		case w.place == nil:
		case w.at+len(w.place) <= reached:
			w.stored = true
		default:
			e := &w.plan.Extents[0]
			w.err = e.File.WriteAfterFault(w.payload, e.Offset)
			w.stored = true
		}
		w.place = nil
	}
	for i := range writes {
		writes[i].claim.Release()
		writes[i].claim = backend.Claim{}
	}
}

// claimPlace claims the place of w, unless one before it has. What somebody else may
// be writing is not received in place.
func claimPlace(before []putOff, w *putOff) (ok bool) {
	e := &w.plan.Extents[0]
	want := e.File.Claim(e.Offset, e.Length)
	if want.Try() {
		w.claim = want
		return true
	}
	for i := len(before) - 1; i >= 0; i-- {
		if before[i].plan.Extents[0].File == e.File && before[i].claim.Covers(want) {
			return true
		}
	}
	w.place = nil
	return false
}

// takeAll receives into iov, and returns how many bytes of it are left because
// they could not be put there.
func (c *conn) takeAll(iov []unix.Iovec) (rest int) {
	for len(iov) > 0 {
		n, err := c.peeker.take(iov)
		if err != nil {
			break
		}
		c.owes.move(n)
		for len(iov) > 0 && n >= int(iov[0].Len) {
			n -= int(iov[0].Len)
			iov = iov[1:]
		}
		if n > 0 {
			iov[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(iov[0].Base), n))
			iov[0].SetLen(int(iov[0].Len) - n)
		}
	}
	for i := range iov {
		rest += int(iov[i].Len)
	}
	return rest
}

// takeInto is takeAll for one piece.
func (c *conn) takeInto(b []byte) (rest int) {
	iov := c.one[:]
	iov[0].Base = unsafe.SliceData(b)
	iov[0].SetLen(len(b))
	rest = c.takeAll(iov)
	iov[0].Base = nil
	return rest
}

// takeTo receives what was seen, from c.taken to end, where it was seen. If that
// fails the connection is broken, and the next receive says so.
func (c *conn) takeTo(end int) {
	if end > c.taken {
		c.takeInto(c.in.raw[c.taken:end])
		c.taken = end
	}
}

// swallow is called before a wait, when nothing is put off: it receives all that
// was looked at, or the client might be waiting for us to do so.
func (c *conn) swallow() {
	if c.peeked {
		c.takeTo(c.w)
		c.peeked = false
	}
}

// unpeek receives what of the input has been used, and forgets what was only
// looked at. Nothing is put off.
func (c *conn) unpeek() {
	if !c.peeked {
		return
	}
	c.takeTo(c.r)
	c.w, c.peeked = c.taken, false
}

// receiveInPlace receives a large payload where it belongs, and answers its
// request, if all of the payload is in the socket. done is false if it has done
// nothing. lost is why the payload could not be received: the connection ends.
func (c *conn) receiveInPlace(r *Request) (done bool, lost error) {
	if c.aloof || c.peeker == nil || c.disk.unseen == nil || c.r != c.w || !c.isHere(r.Payload) {
		return false, nil
	}
	if c.durable(r) && c.disk.Image.Info().Mapped {
		return false, nil // the mapping needs a Flush, which may wait
	}
	if c.pace.slows() {
		return false, nil // if it came to nothing the write would be charged twice
	}
	if admitted, _, _ := c.admit(r); !admitted {
		return false, nil // asked again when the payload is here
	}
	p, img := &c.plan, c.disk.Image
	if checkRange(img, r) != nil || c.disk.unseen.PrepareUnseen(p, r.Offset, r.Length) != nil {
		c.lane.Leave()
		return false, nil
	}
	e := &p.Extents[0]
	place := e.File.Place(e.Offset, e.Length)
	if len(p.Extents) != 1 || place == nil {
		c.aloof = true
		img.Abort(p)
		c.lane.Leave()
		return false, nil
	}
	claim := e.File.Claim(e.Offset, e.Length)
	if !claim.Try() {
		img.Abort(p)
		c.lane.Leave()
		return false, nil // it is written, which waits for the other
	}
	var err error // of the write
	if rest := c.takeInto(place); rest > 0 {
		err, lost = c.storeRest(e.File, e.Offset+e.Length-int64(rest), rest)
	}
	claim.Release()
	if err == nil && lost == nil {
		img.Commit(p)
	} else {
		img.Abort(p)
	}
	c.lane.Leave()
	if lost != nil {
		return true, lost
	}
	c.answerWrite(r, err)
	return true, nil
}

// isHere reports whether n bytes are there to be received.
func (c *conn) isHere(n int64) bool { return int64(c.peeker.pending()) >= n }

// storeRest writes the last n bytes of a payload, which are in the socket but
// could not be received into their place at off, which is claimed. lost is why they
// cannot be received at all.
func (c *conn) storeRest(f *backend.File, off int64, n int) (err, lost error) {
	for n > 0 {
		b := c.in.raw[:min(n, inputSize)]
		if c.takeInto(b) > 0 {
			return nil, errGone
		}
		if err == nil {
			err = f.WriteAfterFault(b, off)
		}
		off, n = off+int64(len(b)), n-len(b)
	}
	return err, nil
}
