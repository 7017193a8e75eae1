package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

const (
	demoBlock = 4096
	demoChunk = 128 << 10 // read at once when verifying
)

// demoLoad writes numbered, checksummed blocks through whichever exporter takes
// them. Each writer has blocks of its own and one write in flight, so the newest
// generation acknowledged is what each block must hold whenever writers pause.
type demoLoad struct {
	conns  [2]*client.Conn
	names  [2]string // of the exporters
	run    uint64
	depth  int
	blocks int

	acked, sent []uint32 // generations, by block; a block's belong to its writer

	acknowledged, refused atomic.Int64
	through               [2]atomic.Int64 // acknowledged by each exporter
	gate                  sync.RWMutex    // held by writers while they write; taken to pause them

	mu   sync.Mutex
	lost map[int]uint32 // by block: the generation that is not there
	bad  []string       // the first of them, in words
	odd  int64          // blocks that hold a refused write

	ctx     context.Context // ends with a failure, or with stop
	cancel  context.CancelCauseFunc
	writers sync.WaitGroup
}

// errStopped ends writers without blame.
var errStopped = errors.New("stopped")

func startDemoLoad(ctx context.Context, d *demo) (*demoLoad, error) {
	n := int(d.cfg.ImageSize / demoBlock)
	l := &demoLoad{
		run: rand.Uint64() | 1, depth: d.cfg.Depth, blocks: n,
		acked: make([]uint32, n), sent: make([]uint32, n), lost: map[int]uint32{},
	}
	for i, e := range d.exporters {
		var err error
		l.names[i] = e.Name
		if l.conns[i], err = e.open(ctx); err != nil {
			if i > 0 {
				l.conns[0].Abort()
			}
			return nil, fmt.Errorf("exporter %s: %w", e.Name, err)
		}
	}
	l.ctx, l.cancel = context.WithCancelCause(ctx)
	for i := range l.depth {
		l.writers.Go(func() {
			if err := l.write(i); err != nil {
				l.cancel(fmt.Errorf("writer %d: %w", i, err))
			}
		})
	}
	return l, nil
}

// stop ends the writers and returns their failure, if any. It may be called
// again, and leaves the connections open.
func (l *demoLoad) stop() error {
	l.cancel(errStopped)
	l.writers.Wait()
	return l.failure()
}

// close stops the load and closes its connections.
func (l *demoLoad) close() error {
	err := l.stop()
	for _, c := range l.conns {
		c.Abort()
	}
	return err
}

// failure is why writers ended by themselves, nil if they did not.
func (l *demoLoad) failure() error {
	if err := context.Cause(l.ctx); err != nil && !errors.Is(err, errStopped) {
		return err
	}
	return nil
}

// write is writer i: it writes random blocks of its own until the load stops.
func (l *demoLoad) write(i int) error {
	rng := rand.New(rand.NewPCG(l.run, uint64(i)))
	own := (l.blocks - i + l.depth - 1) / l.depth
	buf := make([]byte, demoBlock)
	at := 0           // the exporter that is likely to be active
	refusedInRow := 0 // by one after the other
	for l.ctx.Err() == nil {
		block := i + l.depth*rng.IntN(own)
		err := l.writeBlock(at, block, buf)
		switch {
		case err == nil:
			refusedInRow = 0
		case errors.Is(err, syscall.EPERM):
			// Not the owner, or not any more: the other one may be, or none is just now.
			at = 1 - at
			if refusedInRow++; refusedInRow%2 == 0 {
				_ = sleep(l.ctx, time.Millisecond)
			}
		default:
			return fmt.Errorf("block %d through %s: %w", block, l.names[at], err)
		}
	}
	return nil
}

// writeBlock writes the next generation of a block through one exporter. A
// refused generation is never written again: it must not turn up anywhere.
func (l *demoLoad) writeBlock(at, block int, buf []byte) error {
	l.gate.RLock()
	defer l.gate.RUnlock()
	l.sent[block]++
	g, off := l.sent[block], int64(block)*demoBlock
	fillPattern(buf, uint64(off), uint64(g), l.run)
	if _, err := l.conns[at].WriteAt(buf, off, false); err != nil {
		if errors.Is(err, syscall.EPERM) {
			l.refused.Add(1)
		}
		return err
	}
	l.acked[block] = g
	l.acknowledged.Add(1)
	l.through[at].Add(1)
	return nil
}

// await returns when exporter at has acknowledged a few writes more.
func (l *demoLoad) await(ctx context.Context, at int) error {
	want := l.through[at].Load() + int64(l.depth)
	for deadline := time.Now().Add(10 * time.Second); l.through[at].Load() < want; {
		if time.Now().After(deadline) {
			return errors.New("no write was acknowledged within 10s")
		}
		if err := cmp.Or(l.failure(), sleep(ctx, time.Millisecond)); err != nil {
			return err
		}
	}
	return nil
}

// verify pauses the writers and compares every block of r with what was
// acknowledged.
func (l *demoLoad) verify(r io.ReaderAt) error {
	l.gate.Lock()
	defer l.gate.Unlock()
	chunks := make(chan int64)
	var errs [4]error
	var readers sync.WaitGroup
	for i := range errs {
		readers.Go(func() {
			buf := make([]byte, demoChunk)
			for off := range chunks {
				if _, err := r.ReadAt(buf, off); err != nil && errs[i] == nil {
					errs[i] = err
				}
				if errs[i] == nil {
					l.compare(buf, off)
				}
			}
		})
	}
	for off := int64(0); off < int64(l.blocks)*demoBlock; off += demoChunk {
		chunks <- off
	}
	close(chunks)
	readers.Wait()
	return errors.Join(errs[:]...)
}

// compare checks the blocks of b, found at off.
func (l *demoLoad) compare(b []byte, off int64) {
	for ; len(b) > 0; b, off = b[demoBlock:], off+demoBlock {
		block := int(off / demoBlock)
		g, _, problem := readPattern(b[:demoBlock], uint64(off), l.run)
		want := l.acked[block]
		if (problem == "" && g == uint64(want)) || (want == 0 && problem == "zeroes") {
			continue
		}
		l.mu.Lock()
		if problem == "" {
			problem = fmt.Sprintf("generation %d", g)
		}
		if g > uint64(want) {
			l.odd++
		} else if l.lost[block] != want {
			l.lost[block] = want
		}
		if len(l.bad) < maxListed {
			l.bad = append(l.bad, fmt.Sprintf("block %d: %s, want generation %d", block, problem, want))
		}
		l.mu.Unlock()
	}
}

func (l *demoLoad) lostCount() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return int64(len(l.lost))
}
