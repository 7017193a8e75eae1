package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/nbd-export/nbd-export/bench"
	"github.com/nbd-export/nbd-export/control"
)

// programQSD has what QEMU has for this: blockdev-set-active on each side.
const programQSD = "qemu-storage-daemon"

// handoverCell is a medium and a load under which ownership of an image goes
// back and forth between two exporters.
type handoverCell struct {
	Medium string  `json:"medium"` // onTmpfs or onDisk
	Load   string  `json:"load"`
	Conns  int     `json:"conns"`
	Depth  int     `json:"depth"`
	Rate   float64 `json:"rate"` // writes/s, 0 without a pace
	// Goal is what our times may be of QEMU's at most; 0: no goal.
	Goal float64 `json:"goal"`
}

const onDisk = "disk"

// handoverCells are all of them. Their ids begin with handover.
var handoverCells = []handoverCell{
	{onTmpfs, "idle", 0, 0, 0, 0.5},
	{onTmpfs, "paced", 4, 32, 10000, 0.5},
	{onTmpfs, "unpaced", 4, 32, 0, 0},
	{onDisk, "idle", 0, 0, 0, 0.5},
	{onDisk, "paced", 4, 32, 10000, 0.2},
	{onDisk, "unpaced", 4, 32, 0, 0},
}

// ID is the cell's name on command lines and in raw figures.
func (c handoverCell) ID() string { return "handover-" + c.Medium + "-" + c.Load }

// Title is the cell's name in tables.
func (c handoverCell) Title(fs string) string {
	where := cmp.Or(map[string]string{onDisk: fs}[c.Medium], c.Medium)
	switch {
	case c.Conns == 0:
		return where + ", idle"
	case c.Rate > 0:
		return fmt.Sprintf("%s, 4k random writes, %d connections at depth %d, %.0f/s", where, c.Conns, c.Depth, c.Rate)
	}
	return fmt.Sprintf("%s, the same, unpaced", where)
}

// moves are what was measured of one cell with the exporters of one program;
// times in nanoseconds, one for each handover that worked.
type moves struct {
	Cell     string          `json:"cell"`
	Program  string          `json:"program"`
	Orders   []time.Duration `json:"orders_ns"`
	Writes   []time.Duration `json:"write_gaps_ns"`
	Reads    []time.Duration `json:"read_gaps_ns"`
	Commands []time.Duration `json:"commands_ns,omitempty"` // wall time of our commands
	Failures []string        `json:"failures,omitempty"`
	Crashes  []string        `json:"crashes,omitempty"`
}

const (
	handoverTurn  = 10 // handovers of one program before it is the other's turn
	handoverPause = 20 * time.Millisecond
	handoverImage = 256 << 20
	orderTimeout  = time.Minute
)

// exporters are two daemons on the same image, and the load on them.
type exporters struct {
	program string
	procs   [2]*process
	clients [2]*control.Client
	node    string
	active  int
	load    *bench.Follower
}

func controlPath(e endpoint) string { return e.address + ".ctl" }

// handoverServer is how a side of a program is started: owning nothing.
func handoverServer(program, name string) server {
	argv := func(e endpoint) []string {
		return []string{e.binary, "serve", "-f", "raw", "-k", e.address, "--control", controlPath(e), "--inactive", "--log-level", "warn", e.image}
	}
	if program == programQSD {
		argv = func(e endpoint) []string {
			return []string{
				e.binary, "--blockdev", "driver=file,node-name=file,filename=" + e.image + ",active=off",
				"--blockdev", "driver=raw,node-name=disk,file=file,active=off",
				"--nbd-server", "addr.type=unix,addr.path=" + e.address + ",max-connections=0",
				"--export", "type=nbd,id=export,node-name=disk,name=,writable=on,allow-inactive=on",
				"--chardev", "socket,id=control,path=" + controlPath(e) + ",server=on,wait=off", "--monitor", "chardev=control",
			}
		}
	}
	return server{name: name, program: program, argv: argv}
}

// handovers runs all handover cells.
func (r *runner) handovers(ctx context.Context) error {
	files, err := findPrograms([]server{handoverServer(programOurs, ""), handoverServer(programQSD, "")}, r.cfg.ours)
	if err != nil {
		return err
	}
	r.report.Handover = &handoverReport{
		When: time.Now(), Machine: lookAtMachine(files, r.cfg.disk), Time: r.cfg.handoverTime, Cells: r.cfg.handovers,
	}
	for _, c := range r.cfg.handovers {
		if err := r.handover(ctx, files, c); err != nil {
			return fmt.Errorf("%s: %w", c.ID(), err)
		}
	}
	return ctx.Err()
}

// handover measures one cell: both programs have their exporters up on the same
// image, and take turns.
func (r *runner) handover(ctx context.Context, files map[string]string, c handoverCell) (err error) {
	parent := r.cfg.shm
	if c.Medium == onDisk {
		parent = r.cfg.disk
	}
	images, err := newStore(parent, handoverImage, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, images.remove()) }()
	image, err := images.image(ctx, "handover")
	if err != nil {
		return err
	}
	var all []*exporters
	defer func() {
		for _, x := range all {
			x.stop()
		}
	}()
	figures := map[string]*moves{}
	for _, program := range []string{programOurs, programQSD} {
		x := &exporters{program: program, node: "disk"}
		if program == programOurs {
			x.node = "image0"
		}
		for side := range x.procs {
			s := handoverServer(program, fmt.Sprintf("%s-%c", program, 'a'+side))
			e, err := newEndpoint(r.sockets, s.name, place{c.Medium, "unix"})
			if err != nil {
				return err
			}
			e.binary, e.image, e.size = files[program], image, handoverImage
			x.procs[side] = &process{server: s, endpoint: e, argv: s.argv(e)}
			r.recordHandover(x.procs[side])
		}
		if err := x.start(ctx); err != nil {
			return err
		}
		all = append(all, x)
		figures[program] = &moves{Cell: c.ID(), Program: program}
		r.report.Handover.Moves = append(r.report.Handover.Moves, figures[program])
	}
	for began, turn := time.Now(), 0; time.Since(began) < r.cfg.handoverTime; turn++ {
		x := all[turn%len(all)]
		if err := r.turn(ctx, c, x, figures[x.program], image, turn); err != nil {
			return err
		}
	}
	for _, program := range []string{programOurs, programQSD} {
		f := figures[program]
		r.say("%s, %s: %d handovers, orders %v, write gap %v, %d failures, %d crashes", c.ID(), program, len(f.Orders),
			middleTime(f.Orders), middleTime(f.Writes), len(f.Failures), len(f.Crashes))
	}
	return ctx.Err()
}

func middleTime(v []time.Duration) time.Duration {
	if len(v) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(v))[len(v)/2].Round(10 * time.Microsecond)
}

// recordHandover keeps the command of an exporter for the report.
func (r *runner) recordHandover(p *process) {
	line := strings.ReplaceAll(p.shown(p.argv), p.image, "$IMAGE")
	line = strings.ReplaceAll(line, p.address, "$SOCKET")
	if h := r.report.Handover; !slices.Contains(h.Commands, line) {
		h.Commands = append(h.Commands, line)
	}
}

// start starts both sides.
func (x *exporters) start(ctx context.Context) (err error) {
	for side, p := range x.procs {
		if err := p.start(ctx); err != nil {
			return err
		}
		if x.clients[side], err = control.Dial(ctx, controlPath(p.endpoint)); err != nil {
			return err
		}
	}
	return nil
}

func (x *exporters) stop() {
	for side, p := range x.procs {
		if c := x.clients[side]; c != nil {
			_ = c.Close()
			x.clients[side] = nil
		}
		if p != nil && p.ended != nil {
			p.stop()
		}
	}
}

// crashed says which side has died, and its last words; "" if none has.
func (x *exporters) crashed() string {
	for _, p := range x.procs {
		if !p.alive() {
			said := p.said.String()
			return fmt.Sprintf("%s ended by itself: %s", p.name, said[max(0, len(said)-300):])
		}
	}
	return ""
}

// turn is a few handovers between the exporters of x, beginning and ending with
// nobody owning the image. A failure of x is noted, and x started anew.
func (r *runner) turn(ctx context.Context, c handoverCell, x *exporters, f *moves, image string, turn int) error {
	err := x.turn(ctx, c, f, image, turn, files{r.cfg.ours})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		return nil
	}
	time.Sleep(50 * time.Millisecond) // one that crashes takes a moment to end
	if died := x.crashed(); died != "" {
		f.Crashes = append(f.Crashes, died)
	} else {
		f.Failures = append(f.Failures, err.Error())
	}
	r.say("%s, %s: %v", c.ID(), x.program, err)
	x.stop()
	return x.start(ctx)
}

type files struct{ ours string }

func (x *exporters) turn(ctx context.Context, c handoverCell, f *moves, image string, turn int, bin files) (err error) {
	if err := warm(image); err != nil {
		return err
	}
	if err := x.order(ctx, 0, true); err != nil {
		return err
	}
	x.active = 0
	load, err := bench.Follow(ctx, bench.FollowConfig{
		URIs:  [2]string{x.procs[0].uri(), x.procs[1].uri()},
		Conns: c.Conns, Depth: c.Depth, BlockSize: 4 * k, Size: handoverImage, Rate: c.Rate, Seed: uint64(turn),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, load.Close()) }()
	pause := func() error {
		select {
		case <-time.After(handoverPause):
		case <-ctx.Done():
		}
		return errors.Join(ctx.Err(), load.Err())
	}
	for n := range handoverTurn {
		if err := pause(); err != nil {
			return err
		}
		load.ReadGap()
		from, to := x.active, 1-x.active
		if x.program == programOurs && c.Conns == 0 && n == 0 {
			took, err := x.command(ctx, bin.ours, from, to)
			if err != nil {
				return err
			}
			f.Commands = append(f.Commands, took)
			x.active = to
			continue
		}
		start := time.Now()
		if err := errors.Join(x.order(ctx, from, false), x.order(ctx, to, true)); err != nil {
			return err
		}
		took := time.Since(start)
		x.active = to
		if c.Conns > 0 {
			limited, cancel := context.WithTimeout(ctx, orderTimeout)
			gap, err := load.WriteGap(limited, to)
			cancel()
			if err != nil {
				return err
			}
			f.Writes = append(f.Writes, gap)
		}
		f.Orders = append(f.Orders, took)
		if err := pause(); err != nil {
			return err
		}
		f.Reads = append(f.Reads, load.ReadGap())
	}
	if err := load.Close(); err != nil {
		return err
	}
	return x.order(ctx, x.active, false)
}

// order gives a side an order on its open control socket.
func (x *exporters) order(ctx context.Context, side int, active bool) error {
	ctx, cancel := context.WithTimeout(ctx, orderTimeout)
	defer cancel()
	return x.clients[side].SetActive(ctx, active, x.node)
}

// command hands over as a person does.
func (x *exporters) command(ctx context.Context, ours string, from, to int) (time.Duration, error) {
	run := func(args ...string) error {
		cmd := exec.CommandContext(ctx, ours, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	a, b := controlPath(x.procs[from].endpoint), controlPath(x.procs[to].endpoint)
	start := time.Now()
	if hasHandover(ours) {
		err := run("handover", "--from", a, "--to", b)
		return time.Since(start), err
	}
	err := run("inactivate", "--control", a)
	if err == nil {
		err = run("activate", "--control", b)
	}
	return time.Since(start), err
}

var handoverVerb = map[string]bool{}

// hasHandover says whether our program has the verb handover.
func hasHandover(ours string) bool {
	has, known := handoverVerb[ours]
	if !known {
		out, err := exec.Command(ours, "handover", "--help").CombinedOutput()
		has = err == nil && strings.Contains(string(out), "--from")
		handoverVerb[ours] = has
	}
	return has
}

// warm reads an image into the page cache: QEMU drops it whenever it activates.
func warm(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for b := make([]byte, 1<<20); ; {
		n, err := f.Read(b)
		if n == 0 {
			if err != nil && err.Error() == "EOF" {
				return nil
			}
			return err
		}
	}
}

var _ = filepath.Join
