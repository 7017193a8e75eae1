package bench

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

// Exporter is one server process of the demo.
type Exporter struct {
	Name   string
	PID    int
	Socket string // a Unix socket where it serves its default export

	// SetActive orders it to own the image, or not, and returns when that is done.
	SetActive func(ctx context.Context, active bool) error
	// Stop ends it in order and Kill at once; both return when it has ended.
	Stop func(ctx context.Context) error
	Kill func() error
}

// DemoConfig is what the demo needs. Zero values mean the defaults.
type DemoConfig struct {
	// Start runs an exporter of the raw image as a process of its own and returns
	// when it serves. If it fails nothing is left running.
	Start func(ctx context.Context, name, image string, inactive bool) (*Exporter, error)

	Dir       string        // a new directory for the image is made here; default os.TempDir
	Handovers int           // in each direction; default 20
	Depth     int           // writers, each with one write in flight; default 16
	ImageSize int64         // bytes, a multiple of 128k; default 32M
	Between   time.Duration // how long writes flow between handovers; default 100ms

	Progress func(DemoProgress) // if not nil, hears of every handover

	handles func(pid int, path string) ([]string, error) // writableHandles, or a test's
}

// DemoProgress is how far the demo is.
type DemoProgress struct {
	Handover, Of                int
	From, To                    string
	Took                        time.Duration // the handover
	Acknowledged, Refused, Lost int64         // writes so far
}

// String is one line for a terminal.
func (p DemoProgress) String() string {
	return fmt.Sprintf("handover %d of %d  %s -> %s in %.1f ms  %s writes acknowledged, %d lost",
		p.Handover, p.Of, p.From, p.To, float64(p.Took.Microseconds())/1e3, grouped(float64(p.Acknowledged)), p.Lost)
}

// demo is one run.
type demo struct {
	cfg       DemoConfig
	image     string
	exporters [2]*Exporter
	load      *demoLoad
	begin     time.Time
	result    DemoResult
	handovers []time.Duration
}

// RunDemo lets two exporters share an image and hand it to each other while
// writers write through whichever owns it. err is for what kept the demo from
// being completed; what it found is in the result's verdict.
func RunDemo(ctx context.Context, cfg DemoConfig) (DemoResult, error) {
	d := &demo{cfg: cfg, begin: time.Now()}
	if d.cfg.Handovers == 0 {
		d.cfg.Handovers = 20
	}
	if d.cfg.Depth == 0 {
		d.cfg.Depth = 16
	}
	if d.cfg.ImageSize == 0 {
		d.cfg.ImageSize = 32 << 20
	}
	if d.cfg.Between == 0 {
		d.cfg.Between = 100 * time.Millisecond
	}
	if d.cfg.handles == nil {
		d.cfg.handles = writableHandles
	}
	if d.cfg.ImageSize%demoChunk != 0 || d.cfg.ImageSize < int64(d.cfg.Depth)*demoBlock {
		return DemoResult{}, fmt.Errorf("image of %d bytes: want a multiple of %d, with a block for each writer", d.cfg.ImageSize, demoChunk)
	}
	err := d.run(ctx)
	d.result.sum(d)
	return d.result, err
}

func (d *demo) run(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp(d.cfg.Dir, "nbd-export-demo-")
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, os.RemoveAll(dir)) }()
	d.image = filepath.Join(dir, "disk.raw")
	if err := makeImage(d.image, d.cfg.ImageSize); err != nil {
		return err
	}
	defer func() {
		for _, e := range d.exporters {
			if e != nil && e.Kill != nil {
				_ = e.Kill()
			}
		}
	}()
	for i, name := range []string{"a", "b"} {
		if d.exporters[i], err = d.cfg.Start(ctx, name, d.image, i != 0); err != nil {
			return fmt.Errorf("exporter %s: %w", name, err)
		}
	}
	if d.load, err = startDemoLoad(ctx, d); err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, d.load.close()) }()
	for i := range 2 * d.cfg.Handovers {
		if err := d.turn(ctx, i); err != nil {
			if cause := d.load.failure(); cause != nil {
				err = cause
			}
			return err
		}
	}
	return d.finish(ctx)
}

func makeImage(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return cmp.Or(f.Truncate(size), f.Close())
}

// turn lets writes flow, hands the image over, and verifies.
func (d *demo) turn(ctx context.Context, i int) error {
	from, to := d.exporters[i%2], d.exporters[(i+1)%2]
	if err := sleep(ctx, d.cfg.Between); err != nil {
		return err
	}
	took, err := d.handover(ctx, from, to, i%10 < 2)
	if err != nil {
		return err
	}
	d.handovers = append(d.handovers, took)
	if err := d.load.await(ctx, (i+1)%2); err != nil {
		return fmt.Errorf("exporter %s, active since the handover: %w", to.Name, err)
	}
	if err := d.load.verify(d.load.conns[(i+1)%2]); err != nil {
		return fmt.Errorf("reading through %s: %w", to.Name, err)
	}
	if d.cfg.Progress != nil {
		d.cfg.Progress(DemoProgress{
			Handover: i + 1, Of: 2 * d.cfg.Handovers, From: from.Name, To: to.Name, Took: took,
			Acknowledged: d.load.acknowledged.Load(), Lost: d.load.lostCount(), Refused: d.load.refused.Load(),
		})
	}
	return nil
}

// handover takes the image from one exporter and gives it to the other. Between
// the two orders nobody owns it, and it is checked that nothing changes it while
// writers keep trying; that time is not part of the handover's.
func (d *demo) handover(ctx context.Context, from, to *Exporter, thorough bool) (took time.Duration, err error) {
	begin := time.Now()
	if err := from.SetActive(ctx, false); err != nil {
		return 0, fmt.Errorf("inactivating %s: %w", from.Name, err)
	}
	took = time.Since(begin)
	if err := d.checkIdle(ctx, thorough); err != nil {
		return 0, err
	}
	begin = time.Now()
	if err := to.SetActive(ctx, true); err != nil {
		return 0, fmt.Errorf("activating %s: %w", to.Name, err)
	}
	took += time.Since(begin)
	return took, d.checkHandles(from)
}

// finish verifies once more, from the file itself too, and that the end of
// exporters that own nothing changes nothing.
func (d *demo) finish(ctx context.Context) error {
	if err := d.load.stop(); err != nil {
		return err
	}
	// After an even number of handovers the first exporter owns the image again.
	owner, other := d.exporters[0], d.exporters[1]
	if err := d.load.verify(d.load.conns[0]); err != nil {
		return fmt.Errorf("reading through %s: %w", owner.Name, err)
	}
	if err := owner.SetActive(ctx, false); err != nil {
		return fmt.Errorf("inactivating %s: %w", owner.Name, err)
	}
	if err := d.checkIdle(ctx, true); err != nil {
		return err
	}
	f, err := os.Open(d.image)
	if err != nil {
		return err
	}
	err = d.load.verify(f)
	_ = f.Close()
	if err != nil {
		return err
	}
	before, err := look(d.image, true)
	if err != nil {
		return err
	}
	if err := owner.Stop(ctx); err != nil {
		return fmt.Errorf("stopping %s: %w", owner.Name, err)
	}
	if err := other.Kill(); err != nil {
		return fmt.Errorf("killing %s: %w", other.Name, err)
	}
	after, err := look(d.image, true)
	if err != nil {
		return err
	}
	if after != before {
		d.result.find("the image changed when inactive exporters ended")
	}
	d.result.Ended = true
	return nil
}

// checkIdle checks, while nobody owns the image, that nobody can change it and
// nobody does.
func (d *demo) checkIdle(ctx context.Context, thorough bool) error {
	for _, e := range d.exporters {
		if err := d.checkHandles(e); err != nil {
			return err
		}
	}
	hold := time.Millisecond
	if thorough {
		hold = 20 * time.Millisecond
	}
	before, err := look(d.image, thorough)
	if err != nil {
		return err
	}
	if err := sleep(ctx, hold); err != nil {
		return err
	}
	after, err := look(d.image, thorough)
	if err != nil {
		return err
	}
	d.result.Looks++
	if thorough {
		d.result.Checksums++
	}
	if before != after {
		d.result.find("the image changed while nobody owned it")
	}
	return nil
}

// checkHandles checks that an exporter which does not own the image has nothing
// to change it with.
func (d *demo) checkHandles(e *Exporter) error {
	found, err := d.cfg.handles(e.PID, d.image)
	if err != nil {
		return fmt.Errorf("exporter %s: %w", e.Name, err)
	}
	d.result.HandleLooks++
	for _, h := range found {
		d.result.find(fmt.Sprintf("inactive exporter %s can write the image: %s", e.Name, h))
	}
	return nil
}

// appearance is what a change of a file would change.
type appearance struct {
	mtime, ctime time.Time
	size, blocks int64
	sum          [sha256.Size]byte
}

// look is how a file appears; summed includes its bytes.
func look(path string, summed bool) (appearance, error) {
	var a appearance
	f, err := os.Open(path)
	if err != nil {
		return a, err
	}
	defer f.Close()
	if err := a.stat(f); err != nil || !summed {
		return a, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return a, err
	}
	h.Sum(a.sum[:0])
	return a, nil
}

// sleep returns an error if ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// open connects to the exporter.
func (e *Exporter) open(ctx context.Context) (*client.Conn, error) {
	return client.Dial(ctx, client.UnixURI(e.Socket, ""), client.Options{})
}
