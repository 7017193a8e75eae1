package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

// FollowConfig is a load on an image that two exporters serve, of which one takes
// writes: a client that goes on at the other one when it is refused.
type FollowConfig struct {
	URIs      [2]string
	Conns     int     // connections to each exporter for writes; 0: none are made
	Depth     int     // writes in flight per connection
	BlockSize int64   // bytes of a write or read, at random places
	Size      int64   // of the region, bytes
	Rate      float64 // writes/s; 0: as fast as possible
	Seed      uint64
	// Reads: one read at a time from each exporter, too. They are best a program of
	// their own: amid writes as fast as they go they wait for Go's scheduler.
	Reads bool
	// Still: know when the machine stood still; see ReadGap. It is for a program that
	// does nothing but read.
	Still bool
}

// ReadEvery is how often a Follower reads from each exporter, so that two
// reads are never further apart because of the client.
const ReadEvery = 500 * time.Microsecond

// probeEvery is how often a Follower asks, one write at a time, who takes writes.
const probeEvery = 100 * time.Microsecond

// Follower is the running load. Its methods may be called concurrently.
type Follower struct {
	cfg   FollowConfig
	conns [2][]*client.Conn // one more than for writes, for reads
	every time.Duration     // between writes; 0: no pace

	acked [2]atomic.Int64 // when the last write was, on client.Now's clock
	heard [2]atomic.Int64 // when the last read was
	due   atomic.Int64    // when the next paced write is
	gaps  gaps            // between reads
	still *stillness      // nil: not asked for

	writing sync.RWMutex // read-locked by who has a write under way; see Hold

	mu      sync.Mutex
	side    int           // that took writes last
	settled chan struct{} // while it is sought: closed when it is found
	seeker  *napper       // of who seeks it
	first   int64         // when the first write there was acknowledged
	moved   chan struct{} // closed at the next move

	ctx    context.Context
	cancel context.CancelCauseFunc
	group  sync.WaitGroup
}

// Follow starts the load; ctx ends it, or Close.
func Follow(ctx context.Context, cfg FollowConfig) (*Follower, error) {
	f := &Follower{cfg: cfg, moved: make(chan struct{})}
	f.ctx, f.cancel = context.WithCancelCause(ctx)
	if cfg.Rate > 0 {
		f.every = time.Duration(float64(time.Second) / cfg.Rate)
	}
	for i, uri := range cfg.URIs {
		conns := cfg.Conns
		if cfg.Reads {
			conns++
		}
		for range conns {
			c, err := client.Dial(ctx, uri, client.Options{})
			if err != nil {
				_ = f.Close()
				return nil, err
			}
			f.conns[i] = append(f.conns[i], c)
		}
	}
	var err error
	if f.seeker, err = newNapper(); err != nil {
		_ = f.Close()
		return nil, err
	}
	f.due.Store(client.Now())
	for i := range cfg.Conns * cfg.Depth {
		f.start(func() error { return f.write(i) })
	}
	if cfg.Still {
		f.still = watchStill()
	}
	for side := range f.conns {
		f.heard[side].Store(client.Now())
		if cfg.Reads {
			f.start(func() error { return f.read(side) })
		}
	}
	return f, nil
}

func (f *Follower) start(run func() error) {
	f.group.Go(func() {
		if err := run(); err != nil {
			f.cancel(err)
		}
	})
}

// Close ends the load and returns why it had ended before, nil if it had not.
func (f *Follower) Close() error {
	f.cancel(errStopped)
	for _, conns := range f.conns {
		for _, c := range conns {
			c.Abort()
		}
	}
	f.group.Wait()
	if f.seeker != nil {
		f.seeker.close()
	}
	if f.still != nil {
		f.still.close()
	}
	return f.Err()
}

// Err is why the load has ended by itself, nil if it has not.
func (f *Follower) Err() error {
	if err := context.Cause(f.ctx); err != nil && !errors.Is(err, errStopped) {
		return err
	}
	return nil
}

// WriteGap waits until a write is acknowledged by the exporter to, and returns
// the time since the last one by the other.
func (f *Follower) WriteGap(ctx context.Context, to int) (time.Duration, error) {
	for {
		f.mu.Lock()
		there, moved := f.side == to && f.settled == nil, f.moved
		gap := time.Duration(f.first - f.acked[1-to].Load())
		f.mu.Unlock()
		if there {
			return gap, nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-f.ctx.Done():
			return 0, context.Cause(f.ctx)
		}
	}
}

// Hold returns when no write is under way, and none begins until resume is called,
// as it has to be. Reads go on.
func (f *Follower) Hold() (resume func()) {
	f.writing.Lock()
	return f.writing.Unlock
}

// ReadGap is a time without an answer from one of the exporters.
type ReadGap struct {
	Longest time.Duration `json:"longest_ns"`
	// Moving is the longest but for when the machine stood still (FollowConfig.Still),
	// as far as that is known.
	Moving time.Duration `json:"moving_ns"`
}

// gaps are times without an answer that ended since they were last asked for. Its
// methods may be called concurrently.
type gaps struct {
	mu    sync.Mutex // a leaf
	short int64      // the longest in which the machine cannot have stood still, ns
	long  []span     // the others
}

func (g *gaps) add(t span) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if d := t.to - t.from; d < int64(stillFrom) {
		g.short = max(g.short, d)
	} else {
		g.long = append(g.long, t)
	}
}

func (g *gaps) take() (short int64, long []span) {
	g.mu.Lock()
	defer g.mu.Unlock()
	short, long = g.short, g.long
	g.short, g.long = 0, nil
	return short, long
}

// ReadGap is the longest time for which either exporter answered no read, of those
// that ended since it was last called or have not ended yet.
func (f *Follower) ReadGap() ReadGap {
	for side := range f.heard {
		f.gaps.add(span{f.heard[side].Load(), client.Now()})
	}
	short, long := f.gaps.take()
	gap := ReadGap{time.Duration(short), time.Duration(short)}
	for _, t := range long {
		d := time.Duration(t.to - t.from)
		gap.Longest = max(gap.Longest, d)
		if f.still != nil {
			d = f.still.moving(t)
		}
		gap.Moving = max(gap.Moving, d)
	}
	return gap
}

// read reads from one exporter.
func (f *Follower) read(side int) error {
	rng, buf := rand.New(rand.NewPCG(f.cfg.Seed, uint64(1<<32+side))), make([]byte, f.cfg.BlockSize)
	c := f.conns[side][f.cfg.Conns]
	rest, err := newNapper()
	if err != nil {
		return err
	}
	defer rest.close()
	for f.ctx.Err() == nil {
		if _, err := c.ReadAt(buf, f.somewhere(rng)); err != nil {
			return fmt.Errorf("reading: %w", err)
		}
		now := client.Now()
		f.gaps.add(span{f.heard[side].Swap(now), now})
		if err := rest.nap(ReadEvery); err != nil {
			return err
		}
	}
	return nil
}

func (f *Follower) somewhere(rng *rand.Rand) int64 {
	return rng.Int64N(f.cfg.Size/f.cfg.BlockSize) * f.cfg.BlockSize
}

// write is one of the writes in flight.
func (f *Follower) write(i int) error {
	rng, buf := rand.New(rand.NewPCG(f.cfg.Seed, uint64(i))), make([]byte, f.cfg.BlockSize)
	for j := range buf {
		buf[j] = byte(rng.Uint32())
	}
	conn := i % f.cfg.Conns
	for f.ctx.Err() == nil {
		f.pace()
		off := f.somewhere(rng)
		put := func(side int) error {
			f.writing.RLock()
			defer f.writing.RUnlock()
			_, err := f.conns[side][conn].WriteAt(buf, off, false)
			return err
		}
		for {
			side, settled := f.where()
			if settled != nil {
				select {
				case <-settled:
					continue
				case <-f.ctx.Done():
					return nil
				}
			}
			err := put(side)
			if err == nil {
				f.acked[side].Store(client.Now())
				break
			}
			if errors.Is(err, syscall.EPERM) && f.seek(side) {
				err = f.find(put)
			} else if errors.Is(err, syscall.EPERM) {
				continue
			}
			if err != nil {
				return fmt.Errorf("writing: %w", err)
			}
			break
		}
	}
	return nil
}

// pace waits until the next write is due. What could not be written in time is
// not made up for.
func (f *Follower) pace() {
	if f.every == 0 {
		return
	}
	for {
		due, now := f.due.Load(), client.Now()
		next := max(due, now-int64(10*time.Millisecond)) + int64(f.every)
		if f.due.CompareAndSwap(due, next) {
			time.Sleep(time.Duration(next - now))
			return
		}
	}
}

func (f *Follower) where() (side int, settled chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.side, f.settled
}

// seek is told that side refused a write. It reports whether the caller is the
// one to find out who takes it.
func (f *Follower) seek(side int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.side != side || f.settled != nil {
		return false
	}
	f.settled = make(chan struct{})
	return true
}

// find writes by put, to one exporter after the other, until one takes it.
func (f *Follower) find(put func(side int) error) error {
	side := 1 - f.side
	for tries := 1; ; tries++ {
		err := put(side)
		if err == nil {
			break
		}
		if !errors.Is(err, syscall.EPERM) || f.ctx.Err() != nil {
			return err
		}
		side = 1 - side
		if tries%2 == 0 {
			if err := f.seeker.nap(probeEvery); err != nil {
				return err
			}
		}
	}
	now := client.Now()
	f.acked[side].Store(now)
	f.mu.Lock()
	f.side, f.first = side, now
	close(f.settled)
	f.settled = nil
	close(f.moved)
	f.moved = make(chan struct{})
	f.mu.Unlock()
	return nil
}
