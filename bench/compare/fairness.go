package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nbd-export/nbd-export/bench"
)

// Fairness: what a client with small reads gets of a server while another one
// has it read as much as it can.

const fairID = "fairness-tmpfs"

var (
	fairSmall = cell{Medium: onTmpfs, Transport: "unix", RW: "randread", BlockSize: 4 * k, Depth: 1, Conns: 1}
	fairLarge = cell{Medium: onTmpfs, Transport: "unix", RW: "randread", BlockSize: 1 * m, Depth: 16, Conns: 1}
)

// fairGoal is how many times the best peer's p99 ours may be.
const fairGoal = 1.0

// fairSample is one round on one server: the small reads alone, and beside the
// large ones.
type fairSample struct {
	Server string        `json:"server"`
	Round  int           `json:"round"`
	Alone  *bench.Result `json:"alone,omitempty"`
	Beside *bench.Result `json:"beside,omitempty"`
	Large  *bench.Result `json:"large,omitempty"`
	Err    string        `json:"error,omitempty"`
}

// fairness runs all rounds on all servers.
func (r *runner) fairness(ctx context.Context) error {
	r.say("fairness: making images, starting servers")
	running, stop, err := r.startAll(ctx, fairSmall.place(), slices.DeleteFunc(slices.Clone(r.servers),
		func(s server) bool { return !s.serves(onTmpfs) }))
	defer stop()
	if err != nil {
		return err
	}
	r.record(running)
	for round := range r.cfg.rounds {
		for turn := range running {
			p := running[(turn+round)%len(running)]
			s := fairSample{Server: p.name, Round: round}
			if err := r.fairRound(ctx, p, &s); err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				s.Err = err.Error()
				r.say("fairness on %s: %v", p.name, err)
			}
			r.report.Fair = append(r.report.Fair, s)
		}
	}
	return nil
}

// settling is how long the large reads go on before the small ones begin.
const settling = 100 * time.Millisecond

func (r *runner) fairRound(ctx context.Context, p *process, s *fairSample) error {
	small, large := r.load(fairSmall, p, s.Round), r.load(fairLarge, p, s.Round)
	large.Time = small.Time + 2*settling
	run := func(c bench.Config, into **bench.Result) error {
		res, err := bench.Run(ctx, c)
		if err == nil {
			res.URI = ""
			*into = &res
		}
		return err
	}
	if err := run(small, &s.Alone); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- run(large, &s.Large) }()
	time.Sleep(settling)
	err := run(small, &s.Beside)
	return errors.Join(err, <-ended)
}

// fairFigures are one server's.
type fairFigures struct {
	alone, beside, median, large stat // p99, p99, p50 beside in microseconds; MiB/s
	by                           map[int]float64
}

// fairVerdict is ours, and the quotient of the best peer's p99 and ours.
func (rep *report) fairVerdict() (figures map[string]*fairFigures, v verdict) {
	samples := map[string][]fairSample{}
	for _, s := range rep.Fair {
		if s.Err == "" && s.Alone != nil && s.Beside != nil && s.Large != nil {
			samples[s.Server] = append(samples[s.Server], s)
		}
	}
	figures = map[string]*fairFigures{}
	for name, all := range samples {
		f := &fairFigures{by: map[int]float64{}}
		pick := func(of func(s fairSample) float64) stat {
			var x []float64
			for _, s := range all {
				x = append(x, of(s))
			}
			return newStat(x)
		}
		f.alone = pick(func(s fairSample) float64 { return s.Alone.Total.P99Micros })
		f.beside = pick(func(s fairSample) float64 { return s.Beside.Total.P99Micros })
		f.median = pick(func(s fairSample) float64 { return s.Beside.Total.P50Micros })
		f.large = pick(func(s fairSample) float64 { return s.Large.Total.OpsPerSec })
		for _, s := range all {
			if p99 := s.Beside.Total.P99Micros; p99 > 0 {
				f.by[s.Round] = 1 / p99
			}
		}
		figures[name] = f
	}
	v = verdict{goal: fairGoal}
	for _, name := range slices.Sorted(maps.Keys(figures)) {
		if isPeer(name) && (v.peer == "" || figures[name].beside.Median < figures[v.peer].beside.Median) {
			v.peer = name
		}
	}
	if ours := figures[programOurs]; ours != nil && v.peer != "" {
		v.ratio = newRatio(paired(ours.by, figures[v.peer].by))
	}
	return figures, v
}

func (rep *report) writeFairness(s *strings.Builder) {
	if len(rep.Fair) == 0 {
		return
	}
	figures, v := rep.fairVerdict()
	fmt.Fprintf(s, "## Fairness\n\n4k random reads at depth 1, beside another client's 1M reads at depth 16; tmpfs, Unix socket. Microseconds.\n\n")
	if v.known() {
		fmt.Fprintf(s, "The p99 of the best peer, %s, is %s [%s, %s] of ours; the goal is %.3gx: %s.\n\n", v.peer,
			times(v.Median), times(v.Low), times(v.High), v.goal, mark(v))
	}
	s.WriteString("| | p99 alone | p99 beside | p50 beside | the others' MiB/s |\n|---|--:|--:|--:|--:|\n")
	for _, name := range rep.Servers {
		if f := figures[name]; f != nil {
			fmt.Fprintf(s, "| %s | %s | %s | %s | %s |\n", name, spread(f.alone, micros), spread(f.beside, micros),
				micros(f.median.Median), count(f.large.Median))
		}
	}
	s.WriteString("\n")
	for _, f := range rep.Fair {
		if f.Err != "" {
			fmt.Fprintf(s, "- no figure of %s in round %d: %s\n", f.Server, f.Round+1, strings.ReplaceAll(f.Err, "\n", " "))
		}
	}
}
