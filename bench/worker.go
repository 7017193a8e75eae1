package bench

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/nbd-export/nbd-export/client"
)

// longest is the longest latency told apart; above it counts as this.
const longest = int64(100 * time.Second)

func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, longest, 3) }

// worker is the load of one connection, a client.Source.
type worker struct {
	cfg   *Config
	info  client.Info
	batch *client.Batch
	run   uint64 // of verified blocks

	rng         *rand.PCG
	first, span int64 // blocks it works on
	next        int64 // sequential: the next of them, from 0

	begin, end int64   // ns on client.Now's clock; end 0: none
	ops        int64   // its bound; 0: none
	every      float64 // ns between its operations; 0: no pace
	ahead      float64 // ns from begin to its first one

	issued     int64
	sinceFlush int64
	flushDue   bool

	reads, writes, flushes *hdrhistogram.Histogram // of latencies in ns; nil for what it does not do
	refused                int64
	last                   int64 // when the last answer came
	failed                 error

	payload []byte   // what unverified writes carry
	bufs    [][]byte // verify: one per slot
	ledger  *ledger  // verify and writes
	checked int64
	blank   int64
	bad     []Mismatch
	badAll  int64

	done      int64
	published atomic.Int64 // done, as others may see it
	shown     int64        // when it was published
}

// maxListed is how many mismatches are kept of each worker.
const maxListed = 20

func newWorker(cfg *Config, batch *client.Batch, id int, first, blocks int64, run uint64) *worker {
	w := &worker{
		cfg: cfg, info: batch.Info(), batch: batch, run: run, first: first, span: blocks,
		rng: rand.NewPCG(cfg.Seed, uint64(id)),
	}
	if cfg.reads() {
		w.reads = newHistogram()
	}
	if cfg.writes() {
		w.writes = newHistogram()
	}
	if cfg.FlushEvery > 0 {
		w.flushes = newHistogram()
	}
	conns := int64(cfg.Conns)
	if cfg.split() {
		lo, hi := blocks*int64(id)/conns, blocks*(int64(id)+1)/conns
		w.first, w.span = first+lo, hi-lo
	}
	if cfg.Ops > 0 {
		w.ops = cfg.Ops / conns
		if int64(id) < cfg.Ops%conns {
			w.ops++
		}
	}
	if cfg.Rate > 0 {
		w.every = float64(cfg.Conns) * 1e9 / cfg.Rate
		w.ahead = float64(id) * 1e9 / cfg.Rate
	}
	switch {
	case cfg.Verify:
		w.bufs = make([][]byte, cfg.Depth)
		for i := range w.bufs {
			w.bufs[i] = make([]byte, cfg.BlockSize)
		}
		if cfg.writes() {
			w.ledger = newLedger(w.span)
		}
	case cfg.writes():
		w.payload = make([]byte, cfg.BlockSize)
		for i := range w.payload {
			w.payload[i] = byte(w.rng.Uint64() >> 56)
		}
	}
	return w
}

// Next implements client.Source.
func (w *worker) Next(op *client.Op, now int64) (time.Duration, bool) {
	if now != w.shown {
		w.shown = now
		w.published.Store(w.done)
	}
	if w.failed != nil || (w.end != 0 && now >= w.end) || (w.cfg.Ops > 0 && w.issued >= w.ops) {
		return 0, false
	}
	if w.flushDue {
		w.flushDue, w.sinceFlush = false, 0
		op.Cmd = client.CmdFlush
		return 0, true
	}
	if w.every > 0 {
		due := w.begin + int64(w.ahead+float64(w.issued)*w.every)
		if due > now {
			return time.Duration(due - now), true
		}
		op.Start = due
	}
	block := w.block()
	if block < 0 {
		return client.Never, true
	}
	w.issued++
	op.Offset = uint64((w.first + block) * w.cfg.BlockSize)
	op.Length = uint32(w.cfg.BlockSize)
	op.Tag = uint64(block)
	if w.choosesRead() {
		w.read(op, block)
	} else {
		w.write(op, block)
	}
	return 0, true
}

// block is the next block to work on, from 0; -1 if those it might be have an
// operation in flight that verifying must see the end of.
func (w *worker) block() int64 {
	for range 8 {
		var b int64
		if w.cfg.sequential() {
			b = w.next
		} else {
			b = w.random(w.span)
		}
		if w.ledger != nil && w.ledger.busy[b] {
			continue
		}
		if w.next++; w.next >= w.span {
			w.next = 0
		}
		return b
	}
	return -1
}

// random is in [0, n).
func (w *worker) random(n int64) int64 {
	return int64((w.rng.Uint64() >> 1) % uint64(n))
}

func (w *worker) choosesRead() bool {
	switch w.cfg.RW {
	case "read", "randread":
		return true
	case "mixed":
		return w.random(100) < int64(w.cfg.ReadPercent)
	}
	return false
}

func (w *worker) read(op *client.Op, block int64) {
	op.Cmd = client.CmdRead
	if w.bufs != nil {
		op.Data = w.bufs[op.Slot]
	}
	if w.ledger != nil {
		w.ledger.busy[block] = true
	}
}

func (w *worker) write(op *client.Op, block int64) {
	op.Cmd, op.Data = client.CmdWrite, w.payload
	if w.cfg.FUA {
		op.Flags = client.FlagFUA
	}
	if w.ledger != nil {
		w.ledger.busy[block] = true
		w.ledger.last[block]++
		op.Data = w.bufs[op.Slot]
		fillPattern(op.Data, op.Offset, uint64(w.ledger.last[block]), w.run)
	}
	if w.sinceFlush++; w.cfg.FlushEvery > 0 && w.sinceFlush >= w.cfg.FlushEvery {
		w.flushDue = true
	}
}

// Done implements client.Source.
func (w *worker) Done(op *client.Op, now int64) {
	w.last = now
	if w.ledger != nil && op.Cmd != client.CmdFlush {
		w.ledger.busy[op.Tag] = false
	}
	if op.Errno != 0 {
		w.refuse(op)
		return
	}
	h := w.reads
	switch op.Cmd {
	case client.CmdFlush:
		_ = w.flushes.RecordValue(clampLatency(now - op.Start))
		return
	case client.CmdWrite:
		h = w.writes
		if w.ledger != nil {
			w.ledger.acked[op.Tag] = w.ledger.last[op.Tag]
		}
	default:
		if w.bufs != nil {
			w.check(op)
		}
	}
	w.done++
	_ = h.RecordValue(clampLatency(now - op.Start))
}

func clampLatency(ns int64) int64 { return min(max(ns, 0), longest) }

// refuse deals with an error of the server: it ends the load, unless it is to be
// counted.
func (w *worker) refuse(op *client.Op) {
	if op.Errno == syscall.EPERM && w.cfg.IgnoreEPERM {
		w.refused++
		return
	}
	if w.failed == nil {
		w.failed = fmt.Errorf("%s: %d bytes at %d: %w", w.cfg.URI, op.Length, op.Offset, op.Err())
	}
}

// check looks at the bytes of a read.
func (w *worker) check(op *client.Op) {
	run := w.run
	if w.ledger == nil {
		run = 0
	}
	g, blank, problem := readPattern(op.Data, op.Offset, run)
	if w.ledger != nil {
		problem = w.ledger.check(int64(op.Tag), g, problem)
	} else if blank {
		w.blank++
		return
	}
	w.checked++
	if problem == "" {
		return
	}
	w.badAll++
	if len(w.bad) < maxListed {
		w.bad = append(w.bad, Mismatch{int64(op.Offset), problem})
	}
}

// readBack is a client.Source that reads every block its worker has written.
type readBack struct {
	*worker
	at int64
}

// Next implements client.Source.
func (r *readBack) Next(op *client.Op, _ int64) (time.Duration, bool) {
	for ; r.failed == nil && r.at < r.span; r.at++ {
		if r.ledger.last[r.at] == 0 {
			continue
		}
		op.Cmd, op.Data = client.CmdRead, r.bufs[op.Slot]
		op.Offset, op.Length, op.Tag = uint64((r.first+r.at)*r.cfg.BlockSize), uint32(r.cfg.BlockSize), uint64(r.at)
		r.at++
		return 0, true
	}
	return 0, false
}

// Done implements client.Source.
func (r *readBack) Done(op *client.Op, _ int64) {
	if op.Errno != 0 {
		if r.failed == nil {
			r.failed = fmt.Errorf("%s: reading back %d bytes at %d: %w", r.cfg.URI, op.Length, op.Offset, op.Err())
		}
		return
	}
	r.check(op)
}
