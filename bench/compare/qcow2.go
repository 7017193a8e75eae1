package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nbd-export/nbd-export/bench"
)

// qcow2 images: loads on clusters that are there, held against our own raw
// images, and loads that allocate, held against qemu-nbd.

const qcowID = "qcow2"

// Servers of these cells, in the order of the tables.
const (
	oursQcow2    = "nbd-export"
	oursRaw      = "nbd-export, raw"
	qemuThreads  = "qemu-nbd/threads"
	qemuIOUring  = "qemu-nbd/io_uring"
	emptySize    = 8 << 30 // of images that are written for the first time, bytes
	mostOps      = 20000   // of a load that allocates
	cluster      = 64 << 10
	flushedAfter = 16
)

var qcowServers = []string{oursQcow2, oursRaw, qemuThreads, qemuIOUring}

// What an image has when a load begins.
const (
	isFull    = "full"
	isEmpty   = "empty"
	isOverlay = "overlay" // nothing itself, and a raw file behind it
)

// qcowCell is a load on a qcow2 image.
type qcowCell struct {
	load  cell
	kind  string
	flush int64   // a FLUSH after so many writes of a connection; 0: none
	goal  float64 // operations per second: of raw for a full image, of qemu-nbd otherwise
	limit string  // in qcowLimits: what limits it if it misses its goal
}

var qcowCells = []qcowCell{
	{cell{Medium: onTmpfs, RW: "randread", BlockSize: 4 * k, Depth: 32, Conns: 1}, isFull, 0, 0.9, "mapped"},
	{cell{Medium: onTmpfs, RW: "randwrite", BlockSize: 4 * k, Depth: 32, Conns: 1}, isFull, 0, 0.9, ""},
	{cell{Medium: onTmpfs, RW: "randread", BlockSize: 1 * m, Depth: 4, Conns: 1}, isFull, 0, 0.9, "pages"},
	{cell{Medium: onTmpfs, RW: "randwrite", BlockSize: 1 * m, Depth: 4, Conns: 1}, isFull, 0, 0.9, ""},
	{cell{Medium: onTmpfs, RW: "randwrite", BlockSize: 4 * k, Depth: 32, Conns: 1}, isEmpty, 0, 10, "new"},
	{cell{Medium: onTmpfs, RW: "randwrite", BlockSize: 4 * k, Depth: 8, Conns: 4}, isEmpty, 0, 10, "new"},
	{cell{Medium: onTmpfs, RW: "randwrite", BlockSize: 4 * k, Depth: 32, Conns: 1}, isOverlay, 0, 3, "copy"},
	{cell{Medium: onTmpfs, RW: "randwrite", BlockSize: 4 * k, Depth: 32, Conns: 1}, isEmpty, flushedAfter, 2, ""},
	{cell{Medium: onCached, RW: "randread", BlockSize: 4 * k, Depth: 32, Conns: 1}, isFull, 0, 0.9, "mapped"},
	{cell{Medium: onCached, RW: "randwrite", BlockSize: 4 * k, Depth: 32, Conns: 1}, isFull, 0, 0.9, ""},
	{cell{Medium: onCached, RW: "randread", BlockSize: 1 * m, Depth: 4, Conns: 1}, isFull, 0, 0.9, "pages"},
	{cell{Medium: onCached, RW: "randwrite", BlockSize: 4 * k, Depth: 32, Conns: 1}, isEmpty, 0, 10, "new"},
	{cell{Medium: onCached, RW: "randwrite", BlockSize: 4 * k, Depth: 32, Conns: 1}, isEmpty, flushedAfter, 1, ""},
}

// Title is the cell's name; fs is the disk's file system.
func (c qcowCell) Title(fs string) string {
	where := map[string]string{onTmpfs: "tmpfs", onCached: fs}[c.load.Medium]
	s := where + ", " + c.load.Title()
	switch {
	case c.kind == isEmpty:
		s += ", empty"
	case c.kind == isOverlay:
		s += ", overlay"
	}
	if c.flush > 0 {
		s += fmt.Sprintf(", FLUSH after %d", c.flush)
	}
	return s
}

// qcowSample is one load on one server.
type qcowSample struct {
	Cell   int           `json:"cell"` // in qcowCells
	Server string        `json:"server"`
	Round  int           `json:"round"`
	Err    string        `json:"error,omitempty"`
	Result *bench.Result `json:"result,omitempty"`
}

// qcow2 runs all rounds of all cells. Each load has a server of its own: a new
// image needs one anyway.
func (r *runner) qcow2(ctx context.Context) error {
	r.say("qcow2: making images")
	for _, medium := range []string{onTmpfs, onCached} {
		images, err := r.store(medium)
		if err != nil {
			return err
		}
		if err := r.makeFull(ctx, images); err != nil {
			return err
		}
		for round := range r.cfg.rounds {
			for i, c := range qcowCells {
				if c.load.Medium != medium {
					continue
				}
				for turn := range qcowServers {
					name := qcowServers[(turn+round+i)%len(qcowServers)]
					if name == oursRaw && c.kind != isFull {
						continue
					}
					s := qcowSample{Cell: i, Server: name, Round: round}
					if err := r.qcowLoad(ctx, images, c, &s); err != nil {
						if ctx.Err() != nil {
							return ctx.Err()
						}
						s.Err = err.Error()
						r.say("%s on %s: %v", c.Title(r.report.Machine.DiskFS), name, err)
					}
					r.report.Qcow2 = append(r.report.Qcow2, s)
				}
			}
			r.say("qcow2 on %s: round %d of %d done", medium, round+1, r.cfg.rounds)
		}
	}
	return nil
}

const (
	fullRaw   = "qcow2-full-raw"
	fullQcow2 = "qcow2-full.qcow2"
	freshName = "qcow2-fresh.qcow2"
)

// makeFull makes a raw image and a qcow2 image with the same bytes.
func (r *runner) makeFull(ctx context.Context, images *store) error {
	raw, err := images.image(ctx, fullRaw)
	if err != nil {
		return err
	}
	return qemuImg(ctx, "convert", "-f", "raw", "-O", "qcow2", raw, filepath.Join(images.dir, fullQcow2))
}

func qemuImg(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "qemu-img", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// qcowLoad runs one load on a server that is started for it.
func (r *runner) qcowLoad(ctx context.Context, images *store, c qcowCell, s *qcowSample) (err error) {
	raw := filepath.Join(images.dir, fullRaw+".img")
	e := endpoint{medium: c.load.Medium, transport: "unix", address: filepath.Join(r.sockets, "qcow2.sock")}
	switch fresh := filepath.Join(images.dir, freshName); {
	case s.Server == oursRaw:
		e.image, e.size = raw, images.size
	case c.kind == isFull:
		e.image, e.size = filepath.Join(images.dir, fullQcow2), images.size
	default:
		e.image, e.size = fresh, emptySize
		args := []string{"create", "-q", "-f", "qcow2", fresh, fmt.Sprint(int64(emptySize))}
		if c.kind == isOverlay {
			e.size = images.size
			args = []string{"create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", fresh}
		}
		if err := qemuImg(ctx, args...); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.Remove(fresh)) }()
	}
	program, aio, _ := strings.Cut(s.Server, "/")
	server := server{name: s.Server, program: programOurs, argv: oursOf("qcow2")}
	switch {
	case s.Server == oursRaw:
		server.argv = oursOf("raw")
	case program == programQEMU:
		server.program, server.argv = programQEMU, qemuOf(aio)
	}
	e.binary = r.files[server.program]
	p, err := start(ctx, server, e)
	if err != nil {
		return err
	}
	defer p.stop()
	r.record([]*process{p})
	load := r.load(c.load, p, s.Round)
	load.FlushEvery = c.flush
	if c.kind != isFull {
		// So few that most of them find a cluster that is not there.
		load.Time, load.Ops = 30*time.Second, min(mostOps, e.size/cluster/4)
	}
	if c.kind == isFull && c.load.Medium == onCached && resident(e.image, e.size) < isWarm {
		warm := r.load(cell{RW: "read", BlockSize: 1 * m, Depth: 4, Conns: 1}, p, 0)
		warm.Time = 0
		if _, err := bench.Run(ctx, warm); err != nil {
			return fmt.Errorf("filling the page cache: %w", err)
		}
	}
	res, err := bench.Run(ctx, load)
	if err != nil {
		return err
	}
	res.URI = ""
	s.Result = &res
	if c.load.writes() {
		return syncFile(e.image)
	}
	return nil
}

func oursOf(format string) func(endpoint) []string {
	return func(e endpoint) []string {
		return []string{e.binary, "serve", "-f", format, "--owner-record", "off", "-k", e.address, e.image}
	}
}

func qemuOf(aio string) func(endpoint) []string {
	return func(e endpoint) []string {
		return []string{e.binary, "-t", "-e", "0", "-f", "qcow2", "--cache=writeback", "--discard=unmap", "--aio=" + aio, "-k", e.address, e.image}
	}
}

// qcowVerdict is our operations per second as a ratio to what the cell is held
// against.
func (rep *report) qcowVerdict(cell int) (servers map[string]*figures, v verdict) {
	by := map[string][]sample{}
	for _, s := range rep.Qcow2 {
		if s.Cell == cell && s.Err == "" && s.Result != nil {
			by[s.Server] = append(by[s.Server], sample{Server: s.Server, Round: s.Round, Result: s.Result})
		}
	}
	servers = map[string]*figures{}
	for name, samples := range by {
		servers[name] = newFigures(samples)
	}
	v = verdict{goal: qcowCells[cell].goal}
	for _, name := range qcowServers {
		if (name == oursRaw) != (qcowCells[cell].kind == isFull) || name == oursQcow2 || servers[name] == nil {
			continue
		}
		if v.peer == "" || servers[name].ops.Median > servers[v.peer].ops.Median {
			v.peer = name
		}
	}
	if ours := servers[oursQcow2]; ours != nil && v.peer != "" {
		v.ratio = newRatio(paired(ours.opsBy, servers[v.peer].opsBy))
	}
	return servers, v
}

func (rep *report) writeQcow2(s *strings.Builder) {
	if len(rep.Qcow2) == 0 {
		return
	}
	s.WriteString("## qcow2\n\n" + rep.note(qcowID) + "Unix socket, clusters of 64 KiB. What is there already is read and overwritten beside our own raw image of\n" +
		"the same bytes; *empty* is an image of 8 GiB that is written for the first time, and an *overlay* has a raw file behind\n" +
		"it from which the rest of each cluster is copied: random writes to a quarter of the clusters at most, held\n" +
		"against the better of qemu-nbd's modes. Operations per second, and in brackets the server's CPU in microseconds for each.\n\n" +
		"| | nbd-export | raw | qemu-nbd, threads | qemu-nbd, io_uring | ratio | goal | |\n|---|--:|--:|--:|--:|--:|--:|---|\n")
	var missed []string
	for i, c := range qcowCells {
		servers, v := rep.qcowVerdict(i)
		if len(servers) == 0 {
			continue
		}
		row := []string{c.Title(rep.Machine.DiskFS)}
		for _, name := range qcowServers {
			f := servers[name]
			if f == nil {
				row = append(row, "")
				continue
			}
			row = append(row, fmt.Sprintf("%s (%s)", count(f.ops.Median), micros(f.cpu.Median)))
		}
		fmt.Fprintf(s, "| %s | %s | %s |\n", strings.Join(row, " | "), v, mark(v))
		if limit := qcowLimits[c.limit]; v.known() && !v.met() && !slices.Contains(missed, limit) {
			missed = append(missed, limit)
		}
	}
	s.WriteString("\n")
	if len(missed) > 0 {
		s.WriteString("What limits the misses:\n\n")
		for _, limit := range missed {
			fmt.Fprintf(s, "- %s\n", limit)
		}
		s.WriteString("\n")
	}
	for _, f := range rep.Qcow2 {
		if f.Err != "" {
			fmt.Fprintf(s, "- no figure of %s, %s, in round %d: %s\n", f.Server, qcowCells[f.Cell].Title(rep.Machine.DiskFS), f.Round+1, strings.ReplaceAll(f.Err, "\n", " "))
		}
	}
	if slices.ContainsFunc(rep.Qcow2, func(f qcowSample) bool { return f.Err != "" }) {
		s.WriteString("\n")
	}
}
