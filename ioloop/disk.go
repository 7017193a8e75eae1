package ioloop

import (
	"sync/atomic"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// Disk is an image with its ownership, as connections are served from it.
type Disk struct {
	Image   backend.Image
	Machine *state.Machine
	unseen  backend.Receiver // the image, if it is one
	cached  bool             // Info.Cached
	pace    *Pace            // nil for none
	counts  counts
	flushes flushes
	faults  faultLog
}

// NewDisk joins an image and the machine that guards it.
func NewDisk(img backend.Image, m *state.Machine) *Disk {
	unseen, _ := img.(backend.Receiver)
	return &Disk{Image: img, Machine: m, unseen: unseen, cached: img.Info().Cached}
}

// counts are a disk's totals over all its connections. Connections add to
// them once for each batch, not for each request.
type counts struct {
	connections, inFlight         atomic.Int64
	held, heldBytes               atomic.Int64
	reads, writes, flushes, other atomic.Uint64
	bytesRead, bytesWritten       atomic.Uint64
	dirtied                       atomic.Uint64 // bytes, see Pace.dirties; nothing without a Pace
	refused, errors               atomic.Uint64
}

// unread takes a read back that was counted before it failed.
func (c *counts) unread(r *Request) {
	c.reads.Add(^uint64(0))
	c.bytesRead.Add(-uint64(r.Length))
}

// Stats of a Disk since it was made.
type Stats struct {
	Connections  int64  `json:"connections"`
	InFlight     int64  `json:"in-flight"`  // requests that wait: for storage, for the gate, for their turn
	Held         int64  `json:"held"`       // of these, writes held until the image is active
	HeldBytes    int64  `json:"held-bytes"` // their payloads
	Reads        uint64 `json:"reads"`
	Writes       uint64 `json:"writes"`
	Flushes      uint64 `json:"flushes"`
	Others       uint64 `json:"others"`
	BytesRead    uint64 `json:"bytes-read"`
	BytesWritten uint64 `json:"bytes-written"`
	Refused      uint64 `json:"refused"` // since the image was inactive, or the server stopped
	Errors       uint64 `json:"errors"`  // answered with any other error
	// Ahead is how the present inactivation syncs ahead, or the last one did;
	// nil without a Pace.
	Ahead *PaceStats `json:"sync-ahead,omitempty"`
}

// Stats never waits.
func (d *Disk) Stats() Stats {
	c := &d.counts
	s := Stats{
		Connections: c.connections.Load(), InFlight: c.inFlight.Load(),
		Held: c.held.Load(), HeldBytes: c.heldBytes.Load(),
		Reads: c.reads.Load(), Writes: c.writes.Load(), Flushes: c.flushes.Load(), Others: c.other.Load(),
		BytesRead: c.bytesRead.Load(), BytesWritten: c.bytesWritten.Load(),
		Refused: c.refused.Load(), Errors: c.errors.Load(),
	}
	if d.pace != nil {
		a := d.pace.Stats()
		s.Ahead = &a
	}
	return s
}
