package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/nbd-export/nbd-export/bench"
)

// runner measures. It is used on the main thread, which starts the servers.
type runner struct {
	cfg     config
	servers []server
	files   map[string]string // of programs
	report  *report
	sockets string // directory of sockets
	shm     *store
	disk    *store
	began   time.Time
	planned time.Duration
}

// newRunner finds everything that is needed before anything takes time.
func newRunner(ctx context.Context, c config) (r *runner, err error) {
	servers, err := choose(allServers(hasEngines(c.ours)), c.servers)
	if err != nil {
		return nil, err
	}
	files, err := findPrograms(servers, c.ours)
	if err != nil {
		return nil, err
	}
	if fio, err := exec.LookPath("fio"); err == nil {
		files["fio"] = fio
	} else if !c.noCheck {
		return nil, fmt.Errorf("%w; make peers installs it, --no-check goes without", err)
	}
	if err := os.MkdirAll(c.disk, 0o755); err != nil {
		return nil, err
	}
	if c.disk, err = filepath.Abs(c.disk); err != nil {
		return nil, err
	}
	r = &runner{cfg: c, servers: servers, files: files}
	r.report = &report{
		When: time.Now(), Machine: lookAtMachine(files, c.disk), Rounds: c.rounds, CellTime: c.cellTime,
		Image: int64(c.imageSize), Quick: c.quick, Cells: c.cells,
	}
	for _, s := range servers {
		r.report.Servers = append(r.report.Servers, s.name)
	}
	if r.report.Machine.Cores < 2 {
		return nil, fmt.Errorf("%d core: client and server need one each", runtime.NumCPU())
	}
	r.sockets, err = os.MkdirTemp("", "nbd-export-compare-")
	return r, err
}

// close removes what the run has made.
func (r *runner) close() error {
	return errors.Join(r.shm.remove(), r.disk.remove(), os.RemoveAll(r.sockets))
}

// overhead is what a load takes beside its time: connecting, and ending.
const overhead = 100 * time.Millisecond

func (r *runner) run(ctx context.Context) error {
	for _, c := range r.cfg.cells {
		for _, s := range r.servers {
			if s.serves(c.Medium) {
				r.planned += time.Duration(r.cfg.rounds) * (r.cfg.cellTime + overhead)
			}
		}
	}
	r.planned += time.Duration(len(r.cfg.handovers)) * r.cfg.handoverTime
	r.say("%d cells, %d rounds, %d cells of handovers: about %v, and the time to make images",
		len(r.cfg.cells), r.cfg.rounds, len(r.cfg.handovers), r.planned.Round(time.Second))
	if !r.cfg.noCheck && len(r.cfg.cells) > 0 {
		if err := r.check(ctx); err != nil {
			return fmt.Errorf("client check: %w", err)
		}
	}
	for _, p := range places(r.cfg.cells) {
		if err := r.place(ctx, p); err != nil {
			return fmt.Errorf("%s: %w", p.Title(r.report.Machine.DiskFS), err)
		}
	}
	for _, sc := range r.cfg.fair {
		if err := r.fairness(ctx, sc); err != nil {
			return fmt.Errorf("%s: %w", sc.id, err)
		}
	}
	if r.cfg.qcow2 {
		if err := r.qcow2(ctx); err != nil {
			return fmt.Errorf("qcow2: %w", err)
		}
	}
	if r.cfg.many {
		if err := r.scale(ctx); err != nil {
			return fmt.Errorf("scale: %w", err)
		}
	}
	if err := r.removeShm(); err != nil {
		return err
	}
	return r.handovers(ctx)
}

func (r *runner) removeShm() error {
	if err := r.shm.remove(); err != nil {
		return err
	}
	r.shm = nil
	return nil
}

// place runs all cells of a place, with all its servers up at once.
func (r *runner) place(ctx context.Context, p place) error {
	title := p.Title(r.report.Machine.DiskFS)
	r.say("%s: making images, starting servers", title)
	servers := slices.DeleteFunc(slices.Clone(r.servers), func(s server) bool { return !s.serves(p.medium) })
	running, stop, err := r.startAll(ctx, p, servers)
	defer stop()
	if err != nil {
		return err
	}
	r.record(running)
	for round := range r.cfg.rounds {
		for i, c := range r.cfg.cells {
			if c.place() != p {
				continue
			}
			for turn := range running {
				s := r.sample(ctx, c, running[(turn+round+i)%len(running)], round)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				s.Turn = turn
				r.report.Samples = append(r.report.Samples, s)
				if s.Err != "" {
					r.say("%s on %s: %s", s.Cell, s.Server, s.Err)
				}
			}
		}
		r.say("%s: round %d of %d done", title, round+1, r.cfg.rounds)
	}
	return nil
}

// record keeps the commands of servers for the report, each once.
func (r *runner) record(running []*process) {
	for _, p := range running {
		if line := p.shown(p.argv); p.program != programLimit && !slices.Contains(r.report.Commands, line) {
			r.report.Commands = append(r.report.Commands, line)
		}
	}
}

// startAll starts servers, each on an image of its own, and returns how to stop
// them again, also after an error.
func (r *runner) startAll(ctx context.Context, p place, servers []server) (running []*process, stop func(), err error) {
	stop = func() {
		for _, s := range running {
			s.stop()
		}
	}
	images, err := r.store(p.medium)
	if err != nil {
		return nil, stop, err
	}
	if p.medium == onTmpfs { // on a disk they would be in pieces
		var names []string
		for i, s := range servers {
			if !s.bare {
				names = append(names, fmt.Sprint(i))
			}
		}
		if _, err := images.images(ctx, names...); err != nil {
			return nil, stop, err
		}
	}
	for i, s := range servers {
		e, err := newEndpoint(r.sockets, s.name, p)
		if err != nil {
			return running, stop, err
		}
		e.binary, e.size = r.files[s.program], int64(r.cfg.imageSize)
		if p.medium == onCold {
			e.size = images.size
		}
		if !s.bare {
			if e.image, err = images.image(ctx, fmt.Sprint(i)); err != nil {
				return running, stop, err
			}
		}
		process, err := start(ctx, s, e)
		if err != nil {
			return running, stop, err
		}
		running = append(running, process)
	}
	return running, stop, nil
}

// store is where the images of a medium are. On disk they are twice as large:
// a cold image is not to be used up within a load. Those in memory are gone then:
// the page cache needs it.
func (r *runner) store(medium string) (s *store, err error) {
	if medium == onTmpfs {
		if r.shm == nil {
			r.shm, err = newStore(r.cfg.shm, int64(r.cfg.imageSize), len(r.servers))
		}
		return r.shm, err
	}
	if err := r.removeShm(); err != nil {
		return nil, err
	}
	if r.disk == nil {
		r.disk, err = newStore(r.cfg.disk, 2*int64(r.cfg.imageSize), len(r.servers))
	}
	return r.disk, err
}

// load is cell c on server p, the same for all servers of a round.
func (r *runner) load(c cell, p *process, round int) bench.Config {
	b := bench.Config{
		URI: p.uri(), RW: c.RW, ReadPercent: 70, BlockSize: c.BlockSize, Depth: c.Depth, Conns: c.Conns,
		Time: r.cfg.cellTime, Size: p.size, Seed: uint64(round + 1), PID: p.cmd.Process.Pid,
		Discard: c.Discard,
	}
	if c.RW == "read" {
		b.Ops = p.size / c.BlockSize // the second time around it would not be cold
	}
	return b
}

// sample runs one load.
func (r *runner) sample(ctx context.Context, c cell, p *process, round int) sample {
	s := sample{Cell: c.ID(), Server: p.name, Round: round}
	fail := func(err error) sample {
		s.Err = err.Error()
		return s
	}
	if !p.alive() {
		said := p.said.String()
		if err := p.restart(ctx); err != nil {
			return fail(fmt.Errorf("it had ended (%s) and does not start again: %w", said, err))
		}
	}
	share, err := r.prepare(ctx, c, p)
	if err != nil {
		return fail(err)
	}
	if share >= 0 {
		s.Resident = &share
	}
	result, err := bench.Run(ctx, r.load(c, p, round))
	if err != nil {
		if !p.alive() {
			err = fmt.Errorf("%w; it has ended: %s", err, p.said.String())
		}
		return fail(err)
	}
	result.URI = "" // says nothing elsewhere
	s.Result, s.Own = &result, p.anonymous()
	if c.writes() && p.image != "" {
		err = syncFile(p.image)
	}
	if err != nil {
		return fail(err)
	}
	return s
}

// prepare brings the page cache into the state that the cell is about, and
// returns the share of the image in it, -1 if it does not matter.
func (r *runner) prepare(ctx context.Context, c cell, p *process) (float64, error) {
	switch c.Medium {
	case onDirect:
		return -1, dropCache(p.image)
	case onCold:
		return chill(ctx, p)
	case onCached:
		share := resident(p.image, p.size)
		if share < isWarm {
			// Through the server, so that the cache is as it makes it.
			warm := cell{RW: "read", BlockSize: 1 * m, Depth: 4, Conns: 1}
			b := r.load(warm, p, 0)
			b.Time = 0
			if _, err := bench.Run(ctx, b); err != nil {
				return -1, fmt.Errorf("filling the page cache: %w", err)
			}
			share = resident(p.image, p.size)
		}
		return share, nil
	}
	return -1, nil
}

// say prints a line of progress, with the time left if it is known.
func (r *runner) say(format string, args ...any) {
	if r.began.IsZero() {
		r.began = time.Now()
	}
	fmt.Fprintf(os.Stderr, "%6s  %s\n", time.Since(r.began).Round(time.Second), fmt.Sprintf(format, args...))
}
