package ioloop

import (
	"context"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// Config of an Engine; zero values mean the defaults given.
type Config struct {
	Memory int64       // bytes for all payloads of the process; 256 MiB
	Log    *zap.Logger // nothing is logged
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
	stall   time.Duration // stallLimit, but for tests

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
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	return &Engine{
		limit:   cfg.Memory,
		budget:  newBudget(cfg.Memory),
		buffers: pool{keep: cfg.Memory / 8},
		log:     cfg.Log,
		stall:   stallLimit,
		sched:   newScheduler(mostWorkers),
		ring:    cfg.Ring,
		conns:   make(map[*conn]struct{}),
	}
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
