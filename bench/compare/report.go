package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/nbd-export/nbd-export/bench"
)

const (
	reportName = "BENCHMARKS.md"
	plotName   = "benchmarks.svg"
)

// report is everything that was measured; what is written comes from it alone.
type report struct {
	When     time.Time     `json:"when"`
	Machine  machine       `json:"machine"`
	Rounds   int           `json:"rounds"`
	CellTime time.Duration `json:"cell_time_ns"`
	Image    int64         `json:"image_size"`
	Quick    bool          `json:"quick,omitempty"`
	Cells    []cell        `json:"cells"`
	Servers  []string      `json:"servers"`
	Commands []string      `json:"commands"` // that started them
	Checks   []check       `json:"checks"`
	Samples  []sample      `json:"samples"`
	Fair     []fairSample  `json:"fairness,omitempty"`
	Scale    []scaleRow    `json:"scale,omitempty"`
	Qcow2    []qcowSample  `json:"qcow2,omitempty"`
	Parts    []part        `json:"parts,omitempty"` // oldest first; none: measured at once

	Handover *handoverReport `json:"handover,omitempty"` // nil: not measured
}

// sample is one load on one server.
type sample struct {
	Cell     string        `json:"cell"`
	Server   string        `json:"server"`
	Round    int           `json:"round"`
	Turn     int           `json:"turn"`            // in the round, from 0
	Own      int64         `json:"anonymous_bytes"` // of the server, at the end
	Resident *float64      `json:"resident,omitempty"`
	Err      string        `json:"error,omitempty"`
	Result   *bench.Result `json:"result,omitempty"`
}

// result is the judgement of one cell.
type result struct {
	cell
	servers map[string]*figures
	ops     verdict // more operations per second
	cpu     verdict // less processor time per operation
	// The same of the limit server, which has no file. They have no goals.
	limitOps, limitCPU verdict
	failed             []sample
	share              stat // of the image in the page cache before the loads; Max -1: unknown
}

// figures are one server's in one cell, in microseconds and bytes.
type figures struct {
	ops, p50, p99, cpu, cores, client, clientCores, rss, own stat

	// By round: operations per second, and per microsecond of the server's processor.
	opsBy, cpuBy map[int]float64
}

// verdict is one ratio of a server to the better peer.
type verdict struct {
	peer string // the better one, "" if there is none
	ratio
	goal float64 // 0: none
}

func (v verdict) met() bool { return v.known() && v.meets(v.goal) }

// results sums up what was measured, in the order of the cells.
func (rep *report) results() []result {
	var all []result
	for _, c := range rep.Cells {
		r := result{cell: c, servers: map[string]*figures{}}
		var shares []float64
		by := map[string][]sample{}
		for _, s := range rep.Samples {
			if s.Cell != c.ID() {
				continue
			}
			if s.Err != "" || s.Result == nil {
				r.failed = append(r.failed, s)
				continue
			}
			by[s.Server] = append(by[s.Server], s)
			if s.Resident != nil {
				shares = append(shares, *s.Resident)
			}
		}
		for name, samples := range by {
			r.servers[name] = newFigures(samples)
		}
		r.share = newStat(shares)
		opsGoal, cpuGoal := c.goal(rep.Machine.WmemMax)
		ops := func(f *figures) (float64, map[int]float64) { return f.ops.Median, f.opsBy }
		cpu := func(f *figures) (float64, map[int]float64) { return -f.cpu.Median, f.cpuBy }
		r.ops, r.limitOps = r.judge(programOurs, opsGoal, ops), r.judge(programLimit, 0, ops)
		r.cpu, r.limitCPU = r.judge(programOurs, cpuGoal, cpu), r.judge(programLimit, 0, cpu)
		all = append(all, r)
	}
	return all
}

func newFigures(samples []sample) *figures {
	f := &figures{opsBy: map[int]float64{}, cpuBy: map[int]float64{}}
	pick := func(of func(r *bench.Result) float64) stat {
		var v []float64
		for _, s := range samples {
			v = append(v, of(s.Result))
		}
		return newStat(v)
	}
	server := func(r *bench.Result) bench.CPU {
		if r.ServerCPU == nil {
			return bench.CPU{}
		}
		return *r.ServerCPU
	}
	f.ops = pick(func(r *bench.Result) float64 { return r.Total.OpsPerSec })
	f.p50 = pick(func(r *bench.Result) float64 { return r.Total.P50Micros })
	f.p99 = pick(func(r *bench.Result) float64 { return r.Total.P99Micros })
	f.cpu = pick(func(r *bench.Result) float64 { return server(r).MicrosPerOp })
	f.cores = pick(func(r *bench.Result) float64 { return server(r).Cores })
	f.client = pick(func(r *bench.Result) float64 { return r.ClientCPU.MicrosPerOp })
	f.clientCores = pick(func(r *bench.Result) float64 { return r.ClientCPU.Cores })
	f.rss = pick(func(r *bench.Result) float64 { return float64(r.ServerRSS) })
	var own []float64
	for _, s := range samples {
		own = append(own, float64(s.Own))
		f.opsBy[s.Round] = s.Result.Total.OpsPerSec
		if cpu := server(s.Result).MicrosPerOp; cpu > 0 {
			f.cpuBy[s.Round] = 1 / cpu
		}
	}
	f.own = newStat(own)
	return f
}

// judge holds a server against the best peer: figure says how good a server is, and
// what it reached in each round.
func (r *result) judge(name string, goal float64, figure func(*figures) (good float64, by map[int]float64)) verdict {
	v := verdict{goal: goal}
	var best float64
	for _, peer := range slices.Sorted(maps.Keys(r.servers)) {
		if good, _ := figure(r.servers[peer]); isPeer(peer) && (v.peer == "" || good > best) {
			v.peer, best = peer, good
		}
	}
	judged := r.servers[name]
	if judged == nil || v.peer == "" {
		return v
	}
	_, a := figure(judged)
	_, b := figure(r.servers[v.peer])
	v.ratio = newRatio(paired(a, b))
	return v
}

// discards reports whether the client discarded what it read in any cell.
func (rep *report) discards() bool {
	return slices.ContainsFunc(rep.Cells, func(c cell) bool { return c.Discard })
}

// failed is how many loads could not be run to their end.
func (rep *report) failed() (n int) {
	for _, s := range rep.Samples {
		if s.Err != "" {
			n++
		}
	}
	for _, s := range rep.Fair {
		if s.Err != "" {
			n++
		}
	}
	for _, s := range rep.Qcow2 {
		if s.Err != "" {
			n++
		}
	}
	return n
}

func (rep *report) save(path string) error {
	b, err := json.MarshalIndent(rep, "", " ")
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, append(b, '\n'), 0o644))
}

func loadReport(path string) (*report, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	rep := &report{}
	if err := json.Unmarshal(b, rep); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for i := range rep.Fair {
		// Of the time when there was one scenario.
		rep.Fair[i].Scenario = cmp.Or(rep.Fair[i].Scenario, fairTmpfs)
	}
	return rep, nil
}

// write writes the report and its plot into a directory.
func (rep *report) write(dir string) error {
	results := rep.results()
	page, err := rep.page(dir, results)
	if err != nil {
		return err
	}
	err = errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, reportName), []byte(page), 0o644))
	if len(rep.Cells) == 0 {
		return err
	}
	return errors.Join(err,
		os.WriteFile(filepath.Join(dir, plotName), []byte(rep.plot(results)), 0o644))
}
