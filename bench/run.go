package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/nbd-export/nbd-export/client"
)

// drainTime is how long after the end of a load answers may take.
const drainTime = 30 * time.Second

// Progress is how far a load is.
type Progress struct {
	Elapsed   time.Duration
	Remaining time.Duration // estimated; 0 if not known
	Fraction  float64       // done, 0 to 1
	Ops       int64         // so far
	OpsPerSec float64       // since the last Progress
	BytesPerS float64       // since the last Progress
	ReadBack  bool          // the load has ended, what it wrote is being read back
}

// VerifyError says that verification found blocks that are not as they must be.
type VerifyError struct {
	Count int64    // of them
	First Mismatch // one of them
}

func (e *VerifyError) Error() string {
	return fmt.Sprintf("verification failed: %d blocks, the first at %v", e.Count, e.First)
}

// Run puts load c on a server and returns what was measured. The Result is
// also of use with a *VerifyError, and with an error that ended the load midway.
// Several loads may run at once.
func Run(ctx context.Context, c Config) (Result, error) {
	if err := c.Check(); err != nil {
		return Result{}, err
	}
	l := &load{cfg: &c}
	defer l.close()
	if err := l.connect(ctx); err != nil {
		return Result{}, err
	}
	return l.run(ctx)
}

// load is one run.
type load struct {
	cfg     *Config
	info    client.Info
	batches []*client.Batch
	workers []*worker
}

func (l *load) connect(ctx context.Context) error {
	opt := client.Options{SimpleReplies: l.cfg.SimpleReplies, Discard: l.cfg.Discard}
	var first, blocks int64
	run := rand.Uint64() | 1
	for id := range l.cfg.Conns {
		b, err := client.DialBatch(ctx, l.cfg.URI, opt, l.cfg.Depth)
		if err != nil {
			return err
		}
		l.batches = append(l.batches, b)
		if id == 0 {
			l.info = b.Info()
			if first, blocks, err = l.cfg.region(l.info); err != nil {
				return err
			}
		}
		l.workers = append(l.workers, newWorker(l.cfg, b, id, first, blocks, run))
	}
	return nil
}

func (l *load) close() {
	var all sync.WaitGroup
	for _, b := range l.batches {
		all.Go(func() { _ = b.Close() })
	}
	all.Wait()
}

func (l *load) run(ctx context.Context) (Result, error) {
	server := newMeter(l.cfg.PID)
	if err := server.begin(); err != nil {
		return Result{}, err
	}
	own := processorTime()
	begin := client.Now()
	var deadline time.Time
	if l.cfg.Time > 0 {
		deadline = time.Now().Add(l.cfg.Time + drainTime)
	}
	stop := l.progress(begin, false)
	err := l.each(ctx, func(ctx context.Context, w *worker) error {
		w.begin, w.last = begin, begin
		if l.cfg.Time > 0 {
			w.end = begin + int64(l.cfg.Time)
		}
		if err := w.batch.Run(ctx, w, deadline, l.cfg.Rate > 0); err != nil {
			return fmt.Errorf("%s: %w", l.cfg.URI, err)
		}
		return w.failed
	})
	own = processorTime() - own
	stop()
	used, merr := server.end()

	r := l.result(begin, own, used)
	if err == nil {
		err = merr
	}
	if err == nil && l.cfg.Verify {
		err = l.verify(ctx, &r)
	}
	return r, err
}

// verify reads back what was written, and sums up.
func (l *load) verify(ctx context.Context, r *Result) error {
	var err error
	if l.cfg.writes() {
		stop := l.progress(client.Now(), true)
		err = l.each(ctx, func(ctx context.Context, w *worker) error {
			src := &readBack{worker: w}
			if err := w.batch.Run(ctx, src, time.Time{}, false); err != nil {
				return fmt.Errorf("%s: reading back: %w", l.cfg.URI, err)
			}
			return w.failed
		})
		stop()
	}
	for _, w := range l.workers {
		r.Verified += w.checked
		r.Blank += w.blank
		r.Mismatches += w.badAll
		r.MismatchList = append(r.MismatchList, w.bad...)
	}
	r.MismatchList = r.MismatchList[:min(len(r.MismatchList), maxListed)]
	if err == nil && r.Mismatches > 0 {
		err = &VerifyError{Count: r.Mismatches, First: r.MismatchList[0]}
	}
	return err
}

// each runs f for all workers at once. The first failure ends the others.
func (l *load) each(ctx context.Context, f func(context.Context, *worker) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	errs := make([]error, len(l.workers))
	var all sync.WaitGroup
	for i, w := range l.workers {
		all.Go(func() {
			if errs[i] = f(ctx, w); errs[i] != nil {
				cancel(errAside)
			}
		})
	}
	all.Wait()
	for _, err := range errs {
		if err != nil && !errors.Is(err, errAside) {
			return err
		}
	}
	return nil
}

// errAside ends workers because of another's error.
var errAside = errors.New("another connection failed")

// progress reports until stop is called.
func (l *load) progress(begin int64, readBack bool) (stop func()) {
	if l.cfg.Progress == nil {
		return func() {}
	}
	quit := make(chan struct{})
	var ended sync.WaitGroup
	ended.Go(func() {
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		var ops int64
		at := begin
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
			}
			now := client.Now()
			p := Progress{Elapsed: time.Duration(now - begin), ReadBack: readBack}
			for _, w := range l.workers {
				p.Ops += w.published.Load()
			}
			p.OpsPerSec = float64(p.Ops-ops) * 1e9 / float64(now-at)
			p.BytesPerS = p.OpsPerSec * float64(l.cfg.BlockSize)
			ops, at = p.Ops, now
			l.estimate(&p)
			l.cfg.Progress(p)
		}
	})
	return func() {
		close(quit)
		ended.Wait()
	}
}

// estimate fills in how far it is and how long it takes.
func (l *load) estimate(p *Progress) {
	if p.ReadBack {
		return
	}
	if l.cfg.Time > 0 {
		p.Fraction = float64(p.Elapsed) / float64(l.cfg.Time)
	}
	if l.cfg.Ops > 0 {
		p.Fraction = max(p.Fraction, float64(p.Ops)/float64(l.cfg.Ops))
	}
	p.Fraction = min(p.Fraction, 1)
	if p.Fraction > 0 {
		p.Remaining = time.Duration(float64(p.Elapsed) * (1 - p.Fraction) / p.Fraction)
	}
}

// result sums up a load that began at begin.
func (l *load) result(begin int64, own time.Duration, used usage) Result {
	c := l.cfg
	r := Result{
		URI: c.URI, Label: c.Label, Load: c.kind(), BlockSize: c.BlockSize, Depth: c.Depth, Conns: c.Conns,
		FUA: c.FUA, Discard: c.Discard, Rate: c.Rate, Cores: runtime.GOMAXPROCS(0), Structured: l.info.Structured,
		MultiConn: l.info.CanMultiConn(),
	}
	reads, writes, flushes := newHistogram(), newHistogram(), newHistogram()
	end := begin
	for _, w := range l.workers {
		merge(reads, w.reads)
		merge(writes, w.writes)
		merge(flushes, w.flushes)
		r.Refused += w.refused
		r.Late += w.late()
		end = max(end, w.last)
	}
	r.Elapsed = time.Duration(end - begin)
	r.Reads = newStats(reads, c.BlockSize, r.Elapsed)
	r.Writes = newStats(writes, c.BlockSize, r.Elapsed)
	r.Flushes = newStats(flushes, 0, r.Elapsed)
	merge(reads, writes)
	r.Total = newStats(reads, c.BlockSize, r.Elapsed)
	ops := r.Total.Ops + r.Flushes.Ops + r.Refused
	r.ClientCPU = newCPU(own, ops, r.Elapsed)
	if used.known {
		cpu := newCPU(used.time, ops, r.Elapsed)
		r.ServerCPU, r.ServerRSS = &cpu, used.rss
	}
	return r
}

// merge adds from, which may be nil, to sum.
func merge(sum, from *hdrhistogram.Histogram) {
	if from != nil {
		sum.Merge(from)
	}
}

// late is how many operations of a paced load were not sent in its time.
func (w *worker) late() int64 {
	if w.every == 0 || w.end == 0 {
		return 0
	}
	due := int64((float64(w.end-w.begin)-w.ahead)/w.every) + 1
	if w.cfg.Ops > 0 {
		due = min(due, w.ops)
	}
	return max(0, due-w.issued-1)
}
