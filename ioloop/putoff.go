package ioloop

import (
	"sync"

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
//     for the batch (inplace.go).
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
	payload []byte        // in the input
	at      int           // where in the input
	place   []byte        // to receive it into, or nil
	claim   backend.Claim // to that, while it is received into; nothing if one before covers it
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
