package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
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
	Apart  bool          `json:"apart,omitempty"` // the large reads came from a program of their own
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

// around is how much longer the large reads take than the small ones: to start and
// to say that they are under way.
const around = time.Second

func (r *runner) fairRound(ctx context.Context, p *process, s *fairSample) error {
	small, large := r.load(fairSmall, p, s.Round), r.load(fairLarge, p, s.Round)
	large.Time = small.Time + around
	self, err := os.Executable()
	if err != nil {
		return err
	}
	run := func(into **bench.Result) error {
		res, err := bench.Run(ctx, small)
		if err == nil {
			res.URI = ""
			*into = &res
		}
		return err
	}
	if err := run(&s.Alone); err != nil {
		return err
	}
	began := time.Now()
	other, err := startLoad(ctx, self, large)
	if err != nil {
		return err
	}
	s.Apart = true
	err = run(&s.Beside)
	took := time.Since(began)
	var lerr error
	s.Large, lerr = other.result()
	if err = errors.Join(err, lerr); err == nil && s.Large.Elapsed < took {
		err = fmt.Errorf("the large reads took %v, and the small ones beside them %v", s.Large.Elapsed, took)
	}
	return err
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
	fmt.Fprintf(s, "## Fairness\n\n4k random reads at depth 1, beside another client's 1M reads at depth 16; tmpfs, Unix socket. Microseconds.\n")
	if slices.ContainsFunc(rep.Fair, func(f fairSample) bool { return f.Apart }) {
		s.WriteString("The two clients are two programs, and the large reads are copied by theirs.\n")
	}
	s.WriteString("\n")
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
