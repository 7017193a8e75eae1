package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nbd-export/nbd-export/bench"
)

// handoverCell is a medium and a load under which ownership of an image goes
// back and forth between two exporters.
type handoverCell struct {
	Format string  `json:"format"` // of the image
	Medium string  `json:"medium"` // onTmpfs or onDisk
	Load   string  `json:"load"`
	Conns  int     `json:"conns"` // of 4k random writes; 0: none
	Depth  int     `json:"depth"`
	Rate   float64 `json:"rate"` // writes/s, 0 without a pace
	// Goal is the share of QEMU's times that ours may be; 0: no goal.
	Goal float64 `json:"goal"`
}

const (
	onDisk     = "disk"
	formatRaw  = "raw"
	formatQcow = "qcow2"
)

// handoverCells are all of them.
var handoverCells = []handoverCell{
	{formatRaw, onTmpfs, "idle", 0, 0, 0, 0.5},
	{formatRaw, onTmpfs, "paced", 4, 32, 10000, 0.5},
	{formatRaw, onTmpfs, "unpaced", 4, 32, 0, 0},
	{formatRaw, onDisk, "idle", 0, 0, 0, 0.5},
	{formatRaw, onDisk, "paced", 4, 32, 10000, 0.2},
	{formatRaw, onDisk, "unpaced", 4, 32, 0, 0},
	{formatQcow, onTmpfs, "paced", 4, 32, 10000, 0.5},
	{formatQcow, onTmpfs, "unpaced", 4, 32, 0, 0},
	{formatQcow, onDisk, "paced", 4, 32, 10000, 0.2},
	{formatQcow, onDisk, "unpaced", 4, 32, 0, 0},
}

// ID is the cell's name on command lines and in raw figures.
func (c handoverCell) ID() string {
	id := "handover-" + c.Medium + "-" + c.Load
	if c.Format == formatQcow {
		id = "handover-" + formatQcow + strings.TrimPrefix(id, "handover")
	}
	return id
}

// Title is the cell's name in tables; fs is the disk's file system.
func (c handoverCell) Title(fs string) string {
	where := cmp.Or(map[string]string{onDisk: fs}[c.Medium], c.Medium)
	if c.Format == formatQcow {
		where = formatQcow + " on " + where
	}
	switch {
	case c.Conns == 0:
		return where + ", idle"
	case c.Rate > 0:
		return fmt.Sprintf("%s, %s writes/s", where, count(c.Rate))
	}
	return where + ", as many writes as it takes"
}

// limited reports whether the limit server is measured too, which has no file: where
// no disk has to be waited for.
func (c handoverCell) limited() bool {
	return c.Format == formatRaw && c.Goal > 0 && (c.Medium == onTmpfs || c.Conns == 0)
}

// pause is how long the load goes on between two handovers: long enough for
// something to gather that is not on disk yet.
func (c handoverCell) pause() time.Duration {
	if c.Medium == onDisk && c.Conns > 0 {
		return 200 * time.Millisecond
	}
	return 20 * time.Millisecond
}

const (
	handoverTurn  = 10 // handovers of one program before it is the other's turn
	handoverImage = 256 << 20
	handoverSpare = 3 // crashes of a program in a cell, after which it is spared
	groupID       = "handover-group"
	groupSize     = 1000
	groupImage    = 1 << 20
	groupGoal     = time.Second
	groupRounds   = 10
)

// moves are what was measured of one cell with the exporters of one program:
// times in nanoseconds, in their order.
type moves struct {
	Cell     string          `json:"cell"`
	Program  string          `json:"program"`
	Done     int             `json:"done"`             // handovers that worked
	Spared   int             `json:"spared,omitempty"` // those of them before which writers stopped
	Orders   []time.Duration `json:"orders_ns"`        // both, on open control sockets
	Nothing  []time.Duration `json:"orders_for_nothing_ns,omitempty"`
	Writes   []time.Duration `json:"write_gaps_ns,omitempty"`
	Reads    []bench.ReadGap `json:"read_gaps,omitempty"`
	Calm     []bench.ReadGap `json:"calm_read_gaps,omitempty"` // between handovers
	Commands []time.Duration `json:"commands_ns,omitempty"`    // wall time of our command
	Failures []string        `json:"failures,omitempty"`
	Crashes  []string        `json:"crashes,omitempty"`
}

// handovers runs all cells of handovers.
func (r *runner) handovers(ctx context.Context) error {
	if len(r.cfg.handovers) == 0 && !r.cfg.group {
		return nil
	}
	files, err := findPrograms([]server{{program: programOurs}, {program: programQSD}, {program: programLimit}}, r.cfg.ours)
	if err != nil {
		return err
	}
	h := &handoverReport{
		When: time.Now(), Machine: lookAtMachine(files, r.cfg.disk), Time: r.cfg.handoverTime, Cells: r.cfg.handovers,
		Verb: hasVerb(r.cfg.ours, "handover"),
	}
	r.report.Handover = h
	for _, c := range r.cfg.handovers {
		if err := r.handover(ctx, files, c, h); err != nil {
			return fmt.Errorf("%s: %w", c.ID(), err)
		}
	}
	if r.cfg.group {
		if err := r.handoverGroup(ctx, files, h); err != nil {
			return fmt.Errorf("%s: %w", groupID, err)
		}
	}
	return ctx.Err()
}

// handover measures one cell: both programs have their exporters up on the same
// image, and take turns.
func (r *runner) handover(ctx context.Context, files map[string]string, c handoverCell, h *handoverReport) (err error) {
	parent := r.cfg.shm
	if c.Medium == onDisk {
		parent = r.cfg.disk
	}
	images, err := newStore(parent, handoverImage, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, images.remove()) }()
	image, err := handoverImageOf(ctx, images, c.Format)
	if err != nil {
		return err
	}
	var pairs []*exporters
	defer func() {
		for _, x := range pairs {
			x.stop()
		}
	}()
	programs := []string{programOurs, programQSD}
	if c.limited() {
		programs = append(programs, programLimit)
	}
	for _, program := range programs {
		x := newExporters(program, files[program], r.sockets, image, c.Format)
		pairs = append(pairs, x)
		h.Moves = append(h.Moves, &x.moves)
		x.moves.Cell, x.moves.Program = c.ID(), program
		if program != programLimit {
			h.record(x)
		}
		if err := x.start(ctx); err != nil {
			return err
		}
	}
	for began, turn := time.Now(), 0; time.Since(began) < r.cfg.handoverTime || turn%len(pairs) != 0; turn++ {
		if err := warm(image); err != nil {
			return err
		}
		if err := r.turn(ctx, c, pairs[turn%len(pairs)], uint64(turn)); err != nil {
			return err
		}
	}
	for _, x := range pairs {
		f := &x.moves
		r.say("%s, %s: %d handovers, orders %v, writes %v, reads %v, %d failures, %d crashes", c.ID(), x.program, f.Done,
			middleTime(f.Orders), middleTime(f.Writes), middleTime(longest(f.Reads)), len(f.Failures), len(f.Crashes))
	}
	return ctx.Err()
}

// handoverImageOf makes the image, full, and returns its path.
func handoverImageOf(ctx context.Context, images *store, format string) (string, error) {
	raw, err := images.image(ctx, "handover")
	if err != nil || format == formatRaw {
		return raw, err
	}
	path := filepath.Join(images.dir, "handover."+format)
	if err := qemuImg(ctx, "convert", "-f", formatRaw, "-O", format, raw, path); err != nil {
		return "", err
	}
	return path, errors.Join(os.Remove(raw), syncFile(path))
}

func middleTime(v []time.Duration) time.Duration {
	if len(v) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(v))[len(v)/2].Round(10 * time.Microsecond)
}

// longest are the gaps as they were, and moving but for when the machine stood still.
func longest(gaps []bench.ReadGap) (v []time.Duration) {
	for _, g := range gaps {
		v = append(v, g.Longest)
	}
	return v
}

func moving(gaps []bench.ReadGap) (v []time.Duration) {
	for _, g := range gaps {
		v = append(v, g.Moving)
	}
	return v
}

// turn is a few handovers between the exporters of x, beginning and ending with
// nobody owning the image. A failure of x is noted, and x started anew.
func (r *runner) turn(ctx context.Context, c handoverCell, x *exporters, seed uint64) error {
	err := x.turn(ctx, c, r.cfg.ours, seed)
	if err == nil && c.Format == formatQcow {
		err = qemuImg(ctx, "check", "-q", "-f", c.Format, x.procs[0].image)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		return nil
	}
	if died := x.crashed(); died != "" {
		x.moves.Crashes = append(x.moves.Crashes, died)
		err = errors.New(died)
	} else {
		x.moves.Failures = append(x.moves.Failures, err.Error())
	}
	r.say("%s, %s: %s", c.ID(), x.program, strings.ReplaceAll(err.Error(), "\n", " "))
	x.stop()
	return x.start(ctx)
}

// turn is the program's part of runner.turn. Its error is the program's failure.
func (x *exporters) turn(ctx context.Context, c handoverCell, ours string, seed uint64) (err error) {
	if err := x.order(ctx, 0, true); err != nil {
		return err
	}
	load, err := bench.Follow(ctx, bench.FollowConfig{
		URIs:  [2]string{x.procs[0].uri(), x.procs[1].uri()},
		Conns: c.Conns, Depth: c.Depth, BlockSize: 4 * k, Size: handoverImage, Rate: c.Rate, Seed: seed,
	})
	if err != nil {
		return err
	}
	defer func() {
		if e := load.Close(); err == nil {
			err = e
		}
	}()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	reads, err := startReads(ctx, self, bench.FollowConfig{
		URIs: [2]string{x.procs[0].uri(), x.procs[1].uri()}, BlockSize: 4 * k, Size: handoverImage, Seed: seed, Reads: true, Still: true,
	})
	if err != nil {
		return err
	}
	defer reads.stop()
	pause := func(d time.Duration) error {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
		return errors.Join(ctx.Err(), load.Err())
	}
	f, from := &x.moves, 0
	if c.Conns == 0 && x.program == programOurs {
		took, err := x.command(ctx, ours, from, 1-from)
		if err != nil {
			return err
		}
		f.Commands = append(f.Commands, took)
		from = 1 - from
	}
	if err := pause(c.pause()); err != nil {
		return err
	}
	if _, err := reads.gap(); err != nil {
		return err
	}
	for range handoverTurn {
		if err := pause(c.pause()); err != nil {
			return err
		}
		calm, err := reads.gap()
		if err != nil {
			return err
		}
		f.Calm = append(f.Calm, calm)
		orders, err := x.move(load, from)
		if err != nil {
			return err
		}
		from = 1 - from
		if c.Conns > 0 {
			limited, cancel := context.WithTimeout(ctx, orderTimeout)
			gap, err := load.WriteGap(limited, from)
			cancel()
			if err != nil {
				return err
			}
			f.Writes = append(f.Writes, gap)
		}
		f.Orders = append(f.Orders, orders)
		f.Done++
		if err := pause(5 * time.Millisecond); err != nil {
			return err
		}
		gap, err := reads.gap()
		if err != nil {
			return err
		}
		f.Reads = append(f.Reads, gap)
		if c.Conns == 0 {
			nothing, err := x.orders(1-from, from)
			if err != nil {
				return err
			}
			f.Nothing = append(f.Nothing, nothing)
		}
	}
	if err := load.Close(); err != nil {
		return err
	}
	return x.order(ctx, from, false)
}

// move hands over, and returns how long the orders took. With a program that has
// crashed again and again in this cell, writers stop before and go on after.
func (x *exporters) move(load *bench.Follower, from int) (time.Duration, error) {
	if len(x.moves.Crashes) >= handoverSpare {
		defer load.Hold()()
		x.moves.Spared++
	}
	return x.orders(from, 1-from)
}

// orders gives the pair of orders, and returns how long they took.
func (x *exporters) orders(from, to int) (time.Duration, error) {
	return x.orderer.give(oneOrder{from, false}, oneOrder{to, true})
}

// warm reads an image into the page cache: QEMU empties it when it activates.
func warm(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, 1<<20))
	return err
}
