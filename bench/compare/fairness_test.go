package main

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/bench"
)

// fairRounds are three rounds of a scenario, with a p99 beside for each server.
func fairRounds(id string, p99s map[string]float64) (all []fairSample) {
	for round := range 3 {
		for name, p99 := range p99s {
			result := func(p99, ops float64) *bench.Result {
				return &bench.Result{Total: bench.Stats{P50Micros: p99 / 2, P99Micros: p99, MaxMicros: 3 * p99, OpsPerSec: ops}}
			}
			all = append(all, fairSample{
				Scenario: id, Server: name, Round: round,
				Alone: result(p99/4, 2000), Beside: result(p99, 1500), Large: result(9, 1000),
			})
		}
	}
	return all
}

func TestFairness(t *testing.T) {
	rep := testReport()
	rep.Fair = append(fairRounds(fairTmpfs, map[string]float64{programOurs: 200, programNbdkit: 500, "qemu-nbd/threads": 400, programLimit: 10}),
		fairRounds(fairDisk, map[string]float64{programOurs: 8000, programNbdkit: 6000, "qemu-nbd/threads": 40000})...)
	rep.Fair = append(rep.Fair, fairSample{Scenario: fairDisk, Server: programNbdkit, Round: 3, Err: "gone"})
	cool, warm := 0.998, 1.0
	for i, share := range []*float64{&cool, &warm} {
		rep.Fair = append(rep.Fair, fairSample{Scenario: fairDisk, Server: programNbdkit, Round: 4 + i, Resident: share})
	}
	if _, v := rep.fairVerdict(fairTmpfs); v.peer != "qemu-nbd/threads" || v.Median < 1.99 || v.Median > 2.01 || !v.met() {
		t.Errorf("%+v", v)
	}
	if _, v := rep.fairVerdict(fairDisk); v.peer != programNbdkit || v.Median < 0.74 || v.Median > 0.76 || v.met() {
		t.Errorf("%+v", v)
	}
	page := rep.markdown(rep.results())
	if strings.Contains(page, "two programs") {
		t.Error("both loads were in one program")
	}
	for i := range rep.Fair {
		rep.Fair[i].Apart = true
	}
	page = rep.markdown(rep.results())
	_, page, _ = strings.Cut(page, "## Fairness\n")
	page, _, _ = strings.Cut(page, "\n## ")
	tmpfs, disk, _ := strings.Cut(page, "### ext4, cached, Unix socket\n")
	for _, x := range []struct {
		part string
		says []string
	}{
		{tmpfs, []string{
			"### tmpfs, Unix socket", "are two programs", "qemu-nbd/threads, is 2.00x", "1x: met", "the others' MiB/s",
			"| nbd-export | 50.0 (50.0..50.0) | 100 | 200 (200..200) | 600 (600..600) | 1,500 (1,500..1,500) | 1,000 |",
		}},
		{disk, []string{
			"2,000 a second", "from when a read was due", "are two programs", "nbdkit, is 0.75x", "1x: **missed**", "the others' writes/s",
			"| nbd-export | 2,000 (2,000..2,000) | 4,000 | 8,000 (8,000..8,000) | 24.0k (24.0k..24.0k) | 1,500 (1,500..1,500) | 1,000 |",
			"round 4: gone", "nbdkit in round 5: only 99.8 %",
		}},
	} {
		for _, s := range x.says {
			if !strings.Contains(x.part, s) {
				t.Errorf("the page does not say %q:\n%s", s, x.part)
			}
		}
	}
	if strings.Contains(tmpfs, "gone") || strings.Contains(tmpfs, "8,000") || strings.Contains(disk, "in round 6") {
		t.Errorf("not to be said there:\n%s", page)
	}
	if rep.failed() != 2 {
		t.Errorf("%d failed", rep.failed())
	}
}

// A run of one scenario keeps what there was of the other, also from a file of the
// time when there was one and samples did not say which.
func TestFairParts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "parts.json")
	of := func(id string, ours float64) *report {
		rep := testReport()
		rep.Cells, rep.Samples = nil, nil
		rep.Fair = fairRounds(id, map[string]float64{programOurs: ours, programNbdkit: 600})
		return rep
	}
	if err := of("", 100).save(path); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		now         *report
		tmpfs, disk float64 // the verdicts then
	}{
		{of(fairDisk, 200), 6, 3},
		{of(fairTmpfs, 300), 2, 3},
		{of(fairDisk, 600), 2, 1},
	} {
		if err := x.now.onto(path); err != nil {
			t.Fatal(err)
		}
		rep, err := loadReport(path)
		if err != nil {
			t.Fatal(err)
		}
		_, tmpfs := rep.fairVerdict(fairTmpfs)
		_, disk := rep.fairVerdict(fairDisk)
		if near := func(a, b float64) bool { return a > 0.99*b && a < 1.01*b }; !near(tmpfs.Median, x.tmpfs) || !near(disk.Median, x.disk) || len(rep.Fair) != 12 {
			t.Errorf("%v and %v of %d samples, want %v and %v of 12", tmpfs.Median, disk.Median, len(rep.Fair), x.tmpfs, x.disk)
		}
	}
}

func TestFairCells(t *testing.T) {
	for args, want := range map[string][]string{
		"":                             {fairTmpfs, fairDisk},
		"-cells fairness":              {fairTmpfs, fairDisk},
		"-cells fairness-disk":         {fairDisk},
		"-cells fairness-tmpfs":        {fairTmpfs},
		"-cells scale":                 nil,
		"-quick":                       {fairTmpfs},
		"-quick -cells fairness":       {fairTmpfs, fairDisk},
		"-quick -cells fairness-disk$": {fairDisk},
	} {
		c, _, err := parseFlags(strings.Fields(args))
		var got []string
		for _, x := range c.fair {
			got = append(got, x.id)
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v; want %q", args, got, err, want)
		}
	}
}
