package ioloop

import (
	"context"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// Config of an Engine; zero values mean the defaults given.
type Config struct {
	Memory  int64       // bytes for all payloads of the process; 256 MiB
	Workers int         // most blocking operations at once; 32
	Log     *zap.Logger // nothing is logged
	// StallLimit is how long a client may take to move 32 KiB, or all that it
	// owes, while others wait for the memory it holds, before it is
	// disconnected; 10 s.
	StallLimit time.Duration
	// Ring makes it the io_uring engine, which closes it when it has been shut
	// down; nil is the portable one.
	Ring *Uring
}

// Engine is what all connections of a process share. Its methods may be called
// concurrently.
type Engine struct {
	limit   int64 // of budget
	budget  *budget
	buffers pool
	sched   *scheduler
	ring    *Uring // nil in the portable engine
	yielder yielder
	pipes   pipes
	log     *zap.Logger
	stall   time.Duration

	// How many connections are busy: see alone.
	nextCount atomic.Int64 // when they are to be counted, by clock
	busy      atomic.Int32
	reading   atomic.Int32 // receiving goroutines in readHere

	mu      sync.Mutex // leaf
	conns   map[*conn]struct{}
	shut    bool          // Serve refuses
	waiting int           // connections in acquire
	calm    chan struct{} // closed when waiting becomes 0
}

// NewEngine makes an engine; it holds no goroutine while it has no work.
func NewEngine(cfg Config) *Engine {
	if cfg.Memory == 0 {
		cfg.Memory = 256 << 20
	}
	if cfg.Workers == 0 {
		cfg.Workers = 32
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.StallLimit == 0 {
		cfg.StallLimit = 10 * time.Second
	}
	return &Engine{
		limit:   cfg.Memory,
		budget:  newBudget(cfg.Memory),
		buffers: pool{keep: cfg.Memory / 8},
		log:     cfg.Log,
		stall:   cfg.StallLimit,
		sched:   newScheduler(cfg.Workers),
		ring:    cfg.Ring,
		conns:   make(map[*conn]struct{}),
	}
}

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

// Memory is how much of the budget is in use, and the budget, in bytes.
func (e *Engine) Memory() (used, limit int64) {
	return e.budget.inUse(), e.limit
}

// Serve moves the requests of one negotiated connection until the client
// leaves, the stream breaks, or the engine shuts down; it closes nc. The error
// is nil if the connection ended in order.
func (e *Engine) Serve(nc net.Conn, codec Codec, d *Disk) error {
	return e.serve(newConn(e, nc, codec, d))
}

func (e *Engine) serve(c *conn) error {
	d := c.disk
	e.mu.Lock()
	if e.shut {
		e.mu.Unlock()
		c.lane.Close()
		return c.nc.Close()
	}
	e.conns[c] = struct{}{}
	e.mu.Unlock()
	d.counts.connections.Add(1)
	defer func() {
		d.counts.connections.Add(-1)
		e.mu.Lock()
		delete(e.conns, c)
		last := e.shut && len(e.conns) == 0
		e.mu.Unlock()
		if last {
			e.close()
		}
	}()
	return c.serve()
}

// Shutdown ends all connections: each as soon as the requests received are
// answered and the replies sent, and at the latest when ctx ends. Serve takes
// no new ones.
func (e *Engine) Shutdown(ctx context.Context) {
	e.mu.Lock()
	e.shut = true
	e.mu.Unlock()
	var wg sync.WaitGroup
	for _, c := range e.all() {
		wg.Go(func() { c.finish(ctx) })
	}
	wg.Wait()
	e.mu.Lock()
	last := len(e.conns) == 0
	e.mu.Unlock()
	if last {
		e.close()
	}
}

// close is called when no connection is left and none will come.
func (e *Engine) close() {
	e.yielder.Close()
	e.pipes.close()
	if e.ring == nil {
		return
	}
	if err := e.ring.close(); err != nil {
		e.log.Warn("io_uring cannot be closed", zap.Error(err))
	}
}

func (e *Engine) all() []*conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Keys(e.conns))
}

// acquire takes what c wants of the budget, waiting for it; false if c broke
// meanwhile. As long as anyone waits stalled clients are evicted.
func (e *Engine) acquire(w want, c *conn) (lease, bool) {
	e.mu.Lock()
	if e.waiting++; e.waiting == 1 {
		e.calm = make(chan struct{})
		go e.evictStalled(e.calm)
	}
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		if e.waiting--; e.waiting == 0 {
			close(e.calm)
		}
		e.mu.Unlock()
	}()
	c.waited.Store(true)
	return e.budget.acquire(w, c.out.broken)
}

var errStalled = errors.New("the client has moved next to nothing for too long while others waited for the memory it held")

// evictStalled disconnects clients that have moved next to nothing for longer than
// the stall limit while others wait for memory, as many as it takes, those that
// stalled first first.
func (e *Engine) evictStalled(calm <-chan struct{}) {
	tick := time.NewTicker(max(e.stall/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-calm:
			return
		case <-tick.C:
		}
		for need := e.budget.wantedBytes(); need > 0; {
			c := e.longestStalled(time.Now())
			if c == nil {
				break
			}
			held := c.held.Load()
			need -= held
			e.log.Warn("client disconnected: it has moved next to nothing for too long while others wait for the memory it holds",
				zap.String("client", c.name), zap.Int64("bytes", held), zap.Duration("limit", e.patience(c)))
			c.out.fail(errStalled)
		}
	}
}

// patience is how long c's client may move too little while others wait. One
// that had to wait for memory itself gets less: a crowd of them would else
// keep the others waiting in turns.
func (e *Engine) patience(c *conn) time.Duration {
	if c.waited.Load() {
		return e.stall / 4
	}
	return e.stall
}

// longestStalled is the connection whose client has moved too little for longest,
// if that is too long and another connection waits for memory.
func (e *Engine) longestStalled(now time.Time) (worst *conn) {
	oldest := now.UnixNano()
	for _, c := range e.all() {
		since := c.stalledSince()
		if since == 0 || since >= oldest || c.out.cause(nil) != nil {
			continue
		}
		if now.Sub(time.Unix(0, since)) > e.patience(c) && e.budget.wanted(&c.held) {
			worst, oldest = c, since
		}
	}
	return worst
}
