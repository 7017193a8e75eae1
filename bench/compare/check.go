package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"github.com/nbd-export/nbd-export/bench"
	"github.com/nbd-export/nbd-export/internal/bytesize"
)

// check is one load put on a server by bench and by fio in turn.
type check struct {
	Cell   cell   `json:"cell"`
	Server string `json:"server"`
	Bench  []side `json:"bench"` // by round
	Fio    []side `json:"fio"`
}

// side is what one client reached, and what it cost itself.
type side struct {
	Ops   float64 `json:"ops_per_sec"`
	CPU   float64 `json:"client_us_per_op"`
	Cores float64 `json:"client_cores"`
}

// delayed answers every read after 2 ms: what a client adds itself is little
// beside that, and the same each time, unlike a disk's.
var delayed = server{"nbdkit/delay-2ms", programNbdkit, nil, func(e endpoint) []string {
	return []string{e.binary, "-f", "-U", e.address, "--filter=delay", "memory", fmt.Sprint(e.size), "delay-read=2ms"}
}, true}

// checkCells are a load on a server that costs nothing, to show what the clients
// can do, and loads with which neither is the bottleneck, to show that they agree.
var checkCells = []checkCell{
	{programLimit, cell{Medium: onTmpfs, Transport: "unix", RW: "randread", BlockSize: 4 * k, Depth: 32, Conns: 1}},
	{delayed.name, cell{Medium: onTmpfs, Transport: "unix", RW: "randread", BlockSize: 4 * k, Depth: 1, Conns: 1}},
	{delayed.name, cell{Medium: onTmpfs, Transport: "unix", RW: "randread", BlockSize: 4 * k, Depth: 8, Conns: 1}},
	{delayed.name, cell{Medium: onTmpfs, Transport: "unix", RW: "randread", BlockSize: 64 * k, Depth: 8, Conns: 1, Discard: true}},
	{"qemu-nbd/io_uring", cell{Medium: onDirect, Transport: "unix", RW: "randread", BlockSize: 64 * k, Depth: 1, Conns: 1}},
}

type checkCell struct {
	server string
	cell   cell
}

// check compares bench with fio on the same servers, in turn.
func (r *runner) check(ctx context.Context) error {
	r.say("client check: making images, starting servers")
	var servers []server
	for _, s := range append(slices.Clone(r.servers), delayed) {
		wanted := slices.ContainsFunc(checkCells, func(c checkCell) bool { return c.server == s.name })
		if wanted && r.files[s.program] != "" {
			servers = append(servers, s)
		}
	}
	running, stop, err := r.startAll(ctx, place{onDirect, "unix"}, servers)
	defer stop()
	if err != nil {
		return err
	}
	for _, c := range checkCells {
		i := slices.IndexFunc(running, func(p *process) bool { return p.name == c.server })
		if i < 0 {
			continue
		}
		k := check{Cell: c.cell, Server: c.server}
		for round := range min(r.cfg.rounds, 7) {
			if err := r.checkRound(ctx, &k, running[i], round); err != nil {
				return fmt.Errorf("%s on %s: %w", c.cell.ID(), c.server, err)
			}
		}
		r.report.Checks = append(r.report.Checks, k)
	}
	return nil
}

// checkRound lets both run, the other one first each time.
func (r *runner) checkRound(ctx context.Context, k *check, p *process, round int) error {
	sides := []func() error{
		func() error {
			b := r.load(k.Cell, p, round)
			b.Time = max(b.Time, checkTime)
			res, err := bench.Run(ctx, b)
			k.Bench = append(k.Bench, side{res.Total.OpsPerSec, res.ClientCPU.MicrosPerOp, res.ClientCPU.Cores})
			return err
		},
		func() error {
			s, err := r.fio(ctx, k.Cell, p)
			k.Fio = append(k.Fio, s)
			return err
		},
	}
	for i := range sides {
		if _, err := r.prepare(ctx, k.Cell, p); err != nil {
			return err
		}
		if err := sides[(i+round)%2](); err != nil {
			return err
		}
	}
	return nil
}

// fioArgs is a load as fio takes it.
func fioArgs(c cell, uri string, size int64, length time.Duration) []string {
	return []string{
		"--name=check", "--thread", "--ioengine=nbd", "--uri=" + uri, "--rw=" + c.RW, "--bs=" + bytesize.Format(c.BlockSize),
		fmt.Sprintf("--iodepth=%d", c.Depth), fmt.Sprintf("--size=%d", size), "--norandommap", "--randrepeat=0",
		"--time_based", fmt.Sprintf("--runtime=%dms", length.Milliseconds()), "--output-format=json",
	}
}

func (r *runner) fio(ctx context.Context, c cell, p *process) (side, error) {
	// fio makes files for the state of its verification where it is started.
	cmd := exec.CommandContext(ctx, r.files["fio"], fioArgs(c, p.uri(), p.size, max(r.cfg.cellTime, checkTime))...)
	cmd.Dir = r.sockets
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return side{}, fmt.Errorf("fio: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return parseFio(out)
}

// parseFio takes what a reading fio says, which may begin with warnings.
func parseFio(out []byte) (side, error) {
	var all struct {
		Jobs []struct {
			Read struct {
				IOPS float64 `json:"iops"`
			} `json:"read"`
			User   float64 `json:"usr_cpu"` // per cent
			System float64 `json:"sys_cpu"`
		} `json:"jobs"`
	}
	at := bytes.IndexByte(out, '{')
	if at < 0 {
		return side{}, errors.New("fio: no JSON in what it says")
	}
	if err := json.Unmarshal(out[at:], &all); err != nil {
		return side{}, fmt.Errorf("fio: %w", err)
	}
	if len(all.Jobs) != 1 || all.Jobs[0].Read.IOPS <= 0 {
		return side{}, errors.New("fio: it has read nothing")
	}
	j := all.Jobs[0]
	s := side{Ops: j.Read.IOPS, Cores: (j.User + j.System) / 100}
	s.CPU = s.Cores * 1e6 / s.Ops
	return s, nil
}

// busy is the share of a core from which a client may be the bottleneck.
const busy = 0.5

// checkTime is the least time of these loads: fio takes a while to get going.
const checkTime = 500 * time.Millisecond

// near is how far the clients may be apart, beside noise.
const near = 0.1

// judge says how bench compares with fio.
func (k check) judge() (quotient ratio, words string) {
	var quotients, cores []float64
	for i := range min(len(k.Bench), len(k.Fio)) {
		quotients = append(quotients, k.Bench[i].Ops/k.Fio[i].Ops)
		cores = append(cores, k.Fio[i].Cores)
	}
	quotient = newRatio(quotients)
	switch {
	case k.Server == programLimit:
		return quotient, "the clients' own limits"
	case median(cores) > busy:
		return quotient, "fio is the bottleneck"
	case quotient.Low <= 1+near && quotient.High >= 1-near:
		return quotient, "agree"
	}
	b, f := sideStat(k.Bench, sideOps).Median, sideStat(k.Fio, sideOps).Median
	return quotient, fmt.Sprintf("**apart by %.0f us per operation**", math.Abs(1e6/b-1e6/f)*float64(k.Cell.Depth))
}

func sideOps(s side) float64 { return s.Ops }

func sideStat(sides []side, of func(side) float64) stat {
	var v []float64
	for _, s := range sides {
		v = append(v, of(s))
	}
	return newStat(v)
}
