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
// has it do as much as it can.

// fairScenario is what the two clients do.
type fairScenario struct {
	id           string
	about        string
	small, large cell
	rate         float64 // of the small load, operations/s; 0: as fast as it goes
	long         int     // for how many times of a cell the small load runs beside the large one
	unit         string  // of the large load's operations per second
	quick        bool    // part of a quick run
}

const (
	fairTmpfs = "fairness-tmpfs"
	fairDisk  = "fairness-disk"
)

// fairScenarios are all, in the order of the page.
var fairScenarios = []fairScenario{
	{
		id:    fairTmpfs,
		about: "4k random reads at depth 1, beside another client's 1M reads at depth 16, which it copies.",
		small: cell{Medium: onTmpfs, Transport: "unix", RW: "randread", BlockSize: 4 * k, Depth: 1, Conns: 1},
		large: cell{Medium: onTmpfs, Transport: "unix", RW: "randread", BlockSize: 1 * m, Depth: 16, Conns: 1},
		long:  1,
		unit:  "MiB/s",
		quick: true,
	},
	{
		id: fairDisk,
		about: "4k random reads at depth 1, 2,000 a second, beside another client's 4k random writes with 4 connections at\n" +
			"depth 32, as fast as they go. Latencies are from when a read was due; a server that lets the reads starve\n" +
			"answers fewer than 2,000 a second.",
		small: cell{Medium: onCached, Transport: "unix", RW: "randread", BlockSize: 4 * k, Depth: 1, Conns: 1},
		large: cell{Medium: onCached, Transport: "unix", RW: "randwrite", BlockSize: 4 * k, Depth: 32, Conns: 4},
		rate:  2000,
		// It takes up to 4 s until most of the image is dirty, and the file system
		// commits its journal every 5 s: a load of one second has neither.
		long: 5,
		unit: "writes/s",
	},
}

// fairGoal is how many times the best peer's p99 ours may be.
const fairGoal = 1.0

// fairSample is one round on one server: the small reads alone, and beside the
// large load.
type fairSample struct {
	Scenario string        `json:"scenario,omitempty"` // its id; in older files there is none, see loadReport
	Server   string        `json:"server"`
	Round    int           `json:"round"`
	Alone    *bench.Result `json:"alone,omitempty"`
	Beside   *bench.Result `json:"beside,omitempty"`
	Large    *bench.Result `json:"large,omitempty"`
	Apart    bool          `json:"apart,omitempty"`    // the large load came from a program of its own
	Resident *float64      `json:"resident,omitempty"` // share of the image in the page cache before
	Err      string        `json:"error,omitempty"`
}

// fairness runs all rounds of a scenario on all servers.
func (r *runner) fairness(ctx context.Context, sc fairScenario) error {
	r.say("%s: making images, starting servers", sc.id)
	running, stop, err := r.startAll(ctx, sc.small.place(), slices.DeleteFunc(slices.Clone(r.servers),
		func(s server) bool { return !s.serves(sc.small.Medium) }))
	defer stop()
	if err != nil {
		return err
	}
	r.record(running)
	for round := range r.cfg.rounds {
		for turn := range running {
			p := running[(turn+round)%len(running)]
			s := fairSample{Scenario: sc.id, Server: p.name, Round: round}
			if err := r.fairRound(ctx, sc, p, &s); err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				s.Err = err.Error()
				r.say("%s on %s: %v", sc.id, p.name, err)
			}
			r.report.Fair = append(r.report.Fair, s)
		}
		r.say("%s: round %d of %d done", sc.id, round+1, r.cfg.rounds)
	}
	return nil
}

// around is how much longer the large load takes than the small one: to start and
// to say that it is under way.
const around = time.Second

func (r *runner) fairRound(ctx context.Context, sc fairScenario, p *process, s *fairSample) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	share, err := r.prepare(ctx, sc.small, p)
	if err != nil {
		return err
	}
	if share >= 0 {
		s.Resident = &share
	}
	small, large := r.load(sc.small, p, s.Round), r.load(sc.large, p, s.Round)
	small.Rate = sc.rate
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
	small.Time *= time.Duration(sc.long)
	large.Time = small.Time + around
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
		err = fmt.Errorf("the large load took %v, and the small one beside it %v", s.Large.Elapsed, took)
	}
	if sc.large.writes() {
		err = errors.Join(err, syncFile(p.image))
	}
	return err
}

// fairFigures are one server's in a scenario: of the small load latencies in
// microseconds, alone and beside, and operations per second beside; of the large
// one operations per second.
type fairFigures struct {
	alone, p50, p99, most, ops, large stat // alone is a p99
	by                                map[int]float64
}

// fairVerdict is ours in a scenario, and the quotient of the best peer's p99 and ours.
func (rep *report) fairVerdict(id string) (figures map[string]*fairFigures, v verdict) {
	samples := map[string][]fairSample{}
	for _, s := range rep.Fair {
		if s.Scenario == id && s.Err == "" && s.Alone != nil && s.Beside != nil && s.Large != nil {
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
		f.p50 = pick(func(s fairSample) float64 { return s.Beside.Total.P50Micros })
		f.p99 = pick(func(s fairSample) float64 { return s.Beside.Total.P99Micros })
		f.most = pick(func(s fairSample) float64 { return s.Beside.Total.MaxMicros })
		f.ops = pick(func(s fairSample) float64 { return s.Beside.Total.OpsPerSec })
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
		if isPeer(name) && (v.peer == "" || figures[name].p99.Median < figures[v.peer].p99.Median) {
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
	s.WriteString("## Fairness\n\nWhat a client with small reads gets beside another one. Latencies in microseconds.\n\n")
	for _, sc := range fairScenarios {
		of := slices.DeleteFunc(slices.Clone(rep.Fair), func(f fairSample) bool { return f.Scenario != sc.id })
		if len(of) > 0 {
			rep.writeScenario(s, sc, of)
		}
	}
}

func (rep *report) writeScenario(s *strings.Builder, sc fairScenario, of []fairSample) {
	fmt.Fprintf(s, "### %s\n\n%s%s\n", sc.small.place().Title(rep.Machine.DiskFS), rep.note(sc.id), sc.about)
	if slices.ContainsFunc(of, func(f fairSample) bool { return f.Apart }) {
		s.WriteString("The two clients are two programs.\n")
	}
	s.WriteString("\n")
	figures, v := rep.fairVerdict(sc.id)
	if v.known() {
		fmt.Fprintf(s, "The p99 of the best peer, %s, is %s [%s, %s] of ours; the goal is %.3gx: %s.\n\n", v.peer,
			times(v.Median), times(v.Low), times(v.High), v.goal, mark(v))
	}
	fmt.Fprintf(s, "| | p99 alone | p50 beside | p99 beside | most beside | reads/s beside | the others' %s |\n"+
		"|---|--:|--:|--:|--:|--:|--:|\n", sc.unit)
	for _, name := range rep.Servers {
		if f := figures[name]; f != nil {
			fmt.Fprintf(s, "| %s | %s | %s | %s | %s | %s | %s |\n", name, spread(f.alone, micros), micros(f.p50.Median),
				spread(f.p99, micros), spread(f.most, micros), spread(f.ops, count), count(f.large.Median))
		}
	}
	s.WriteString("\n")
	notes := false
	for _, f := range of {
		if f.Resident != nil && *f.Resident < isWarm {
			notes = true
			fmt.Fprintf(s, "- %s in round %d: only %.1f %% of the image was in the page cache before.\n", f.Server, f.Round+1, 100**f.Resident)
		}
		if f.Err != "" {
			notes = true
			fmt.Fprintf(s, "- no figure of %s in round %d: %s\n", f.Server, f.Round+1, strings.ReplaceAll(f.Err, "\n", " "))
		}
	}
	if notes {
		s.WriteString("\n")
	}
}
