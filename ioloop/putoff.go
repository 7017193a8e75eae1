package ioloop

import (
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
)

// Writes whose payloads lie in the input are put off to the end of the batch, if
// something can be done with several of them at once:
//
//   - What follows the write before it in the image goes with it, in one vector
//     write (storeRun).
//   - Where the file has places in memory (backend.File.Place) the payloads are
//     not even copied into the input: fill only looks at it, and what was put off
//     is then received, from the socket into those places, by one system call
//     for the batch (takePeeked). What it looked at is there, so nobody waits for
//     the client. Of a large payload, nothing but the request is looked at
//     (receiveInPlace).
//
// An admission is held from putOff to settle, and everything that may wait for
// the client or for memory settles first. Each request is prepared, committed
// and answered by itself.

// maxPutOff is how many writes are put off at once.
const maxPutOff = backend.MaxVector

// puts is a batch of writes that were put off.
type puts struct {
	n      int
	writes [maxPutOff]putOff
	iov    [2*maxPutOff + 1]unix.Iovec
	pieces [maxPutOff][]byte
}

// putOff is an admitted and prepared write of one extent.
type putOff struct {
	req     Request
	plan    backend.Plan
	payload []byte // in the input
	at      int    // where in the input
	place   []byte // to receive it into, or nil
	stored  bool
	err     error
}

var putsPool = sync.Pool{New: func() any { return new(puts) }}

// dropPuts is called when nothing is put off.
func (c *conn) dropPuts() {
	if c.puts != nil {
		putsPool.Put(c.puts)
		c.puts = nil
	}
}

// putOff takes an admitted write whose payload lies in the input, which ends at
// c.r, if it can be carried out by settle.
func (c *conn) putOff(r *Request, payload []byte) bool {
	if c.puts == nil {
		c.puts = putsPool.Get().(*puts)
	}
	g := c.puts
	if g.n == maxPutOff || g.n > 0 && !c.peeked && !g.writes[g.n-1].endsAt(r.Offset) {
		c.settle()
	}
	w := &g.writes[g.n]
	place, ok := c.prepareOff(w, r, payload)
	if !ok && g.n > 0 {
		c.settle() // what stands in the way may be one of these
		w = &g.writes[0]
		place, ok = c.prepareOff(w, r, payload)
	}
	if !ok {
		return false
	}
	if place != nil && c.peeker != nil {
		c.next = lookAll
	}
	w.req, w.payload, w.at = *r, payload, c.r-len(payload)
	if !c.peeked || w.at < c.taken {
		place = nil // it has been received
	}
	w.place = place
	w.stored, w.err = false, nil
	g.n++
	return true
}

func (w *putOff) endsAt(off int64) bool { return w.req.Offset+w.req.Length == off }

// prepareOff prepares w for r. The place is nil where the file has none that is
// worth it.
func (c *conn) prepareOff(w *putOff, r *Request, payload []byte) (place []byte, ok bool) {
	img := c.disk.Image
	if checkRange(img, r) != nil || img.Prepare(&w.plan, r.Offset, payload, 0) != nil {
		return nil, false
	}
	if len(w.plan.Extents) == 1 {
		if e := &w.plan.Extents[0]; c.writesHere(e, c.durable(r)) {
			if !e.Fresh {
				place = e.File.Place(e.Offset, e.Length)
			}
			return place, true
		}
	}
	img.Abort(&w.plan)
	return nil, false
}

// settle carries out what was put off, and answers it.
func (c *conn) settle() {
	g := c.puts
	if g == nil || g.n == 0 {
		return
	}
	writes := g.writes[:g.n]
	g.n = 0
	if c.peeked {
		c.takePeeked(writes)
	}
	for i := 0; i < len(writes); {
		n := 1
		for i+n < len(writes) && writes[i+n-1].precedes(&writes[i+n]) {
			n++
		}
		if !writes[i].stored {
			g.storeRun(writes[i : i+n])
		}
		i += n
	}
	img := c.disk.Image
	for i := range writes {
		w := &writes[i]
		if w.err == nil {
			img.Commit(&w.plan) // what is durable here is so without a Flush
		} else {
			img.Abort(&w.plan)
		}
		c.lane.Leave()
	}
	for i := range writes {
		c.answerWrite(&writes[i].req, writes[i].err)
		writes[i].err = nil
	}
}

// precedes reports whether o, the next one, belongs into one vector write with w.
func (w *putOff) precedes(o *putOff) bool {
	if w.stored || o.stored {
		return false
	}
	a, b := &w.plan.Extents[0], &o.plan.Extents[0]
	return a.File == b.File && a.Offset+a.Length == b.Offset
}

// storeRun writes what lies side by side in one file.
func (g *puts) storeRun(run []putOff) {
	first := &run[0].plan.Extents[0]
	var done int
	var err error
	if len(run) == 1 {
		done, err = first.File.TryWriteAt(run[0].payload, first.Offset)
	} else {
		for i := range run {
			g.pieces[i] = run[i].payload
		}
		done, err = first.File.TryWriteVector(g.pieces[:len(run)], first.Offset)
		clear(g.pieces[:len(run)])
	}
	for i := range run {
		w := &run[i]
		n := min(done, len(w.payload))
		done -= n
		if err != nil && n < len(w.payload) {
			// Rare. It ends under its admission: see tryWrite.
			e := &w.plan.Extents[0]
			w.err = e.File.WriteAt(w.payload[n:], e.Offset+int64(n), false)
		}
	}
}

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
		if w.place == nil {
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
	var err error // of the write
	if rest := c.takeInto(place); rest > 0 {
		err, lost = c.storeRest(e.File, e.Offset+e.Length-int64(rest), rest)
	}
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
// could not be received into their place at off. lost is why they cannot be
// received at all.
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
