package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// What is measured in parts is reported as if it had been measured at once, with
// the latest figures of each cell.
func TestParts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "parts.json")
	of := func(when int, ours string, rounds int, ops float64, cells ...cell) *report {
		rep := testReport()
		rep.Rounds = rounds
		rep.When = rep.When.Add(time.Duration(when) * time.Hour)
		rep.Machine.Versions[programOurs] = ours
		rep.Cells, rep.Samples, rep.Checks = cells, nil, nil
		for _, c := range cells {
			for round := range rep.Rounds {
				rep.Samples = append(rep.Samples,
					rounded(c, programOurs, round, ops, 2), rounded(c, programNbdkit, round, 1000, 4))
			}
		}
		return rep
	}
	first := of(0, "nbd-export 1", 7, 2000, goals[2], goals[0])
	first.Checks = testReport().Checks
	if err := first.onto(path); err != nil {
		t.Fatal(err)
	}
	second := of(1, "nbd-export 2", 3, 3000, goals[1], goals[2])
	if err := second.onto(path); err != nil {
		t.Fatal(err)
	}
	rep, err := loadReport(path)
	if err != nil {
		t.Fatal(err)
	}
	results := rep.results()
	want := []float64{2, 3, 3}
	for i, r := range results {
		if r.ID() != goals[i].ID() || r.ops.Median != want[i] {
			t.Errorf("%s: %v", r.ID(), r.ops)
		}
	}
	if len(results) != 3 || len(rep.Checks) != 4 {
		t.Errorf("%d cells, %d checks", len(results), len(rep.Checks))
	}
	page := rep.markdown(results)
	for _, s := range []string{
		"in 2 parts", "nbd-export 1; nbd-export 2", "3 to 7 rounds, 1s per load",
		"| 4k random read, depth 32 | 2,000 |",
		"| 4k random read, depth 32, 4 connections (**a trial**: 3 rounds) | 3,000 |",
		"| 2026-11-23 01:02 UTC | tmpfs, Unix socket (1 of 3 cells) | 7 | nbd-export 1 |",
		"| 2026-11-23 02:02 UTC | tmpfs, Unix socket (2 of 3 cells) | 3, **a trial** | nbd-export 2 |",
	} {
		if !strings.Contains(page, s) {
			t.Errorf("the page does not say %q:\n%s", s, page)
		}
	}
	if strings.Contains(page, "**A trial**") {
		t.Error("all is said to be a trial")
	}
	// All of the first part is measured anew: it counts no more.
	if err := of(2, "nbd-export 3", 7, 4000, goals[0]).onto(path); err != nil {
		t.Fatal(err)
	}
	if rep, err = loadReport(path); err != nil || len(rep.Parts) != 2 || rep.Parts[1].Ours != "nbd-export 3" {
		t.Fatalf("%+v, %v", rep.Parts, err)
	}
	other := of(3, "nbd-export 3", 7, 4000, goals[0])
	other.Machine.Kernel = "7.0"
	if err := other.onto(path); err == nil || !strings.Contains(err.Error(), "kernel") {
		t.Errorf("%v, want that the kernel is another", err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := of(4, "nbd-export 3", 7, 1, goals[0]).onto(path); err == nil {
		t.Error("a broken file was replaced")
	}
}

// What is no cell is a part too, and the trial of one is no trial of the others.
func TestPartsWithoutCells(t *testing.T) {
	path := filepath.Join(t.TempDir(), "parts.json")
	var when time.Duration
	add := func(rounds int, measured func(rep *report)) *report {
		t.Helper()
		now := testReport()
		now.When, now.Rounds = now.When.Add(when), rounds
		when += time.Hour
		now.Cells, now.Samples = nil, nil
		measured(now)
		if err := now.onto(path); err != nil {
			t.Fatal(err)
		}
		rep, err := loadReport(path)
		if err != nil {
			t.Fatal(err)
		}
		return rep
	}
	fair := func(id string) func(rep *report) {
		return func(rep *report) { rep.Fair = fairRounds(id, map[string]float64{programOurs: 1, programNbdkit: 2}) }
	}
	if page := add(3, fair(fairDisk)).markdown(nil); strings.Count(page, "> **A trial**: 3 rounds") != 1 || strings.Contains(page, "a trial") {
		t.Errorf("a trial alone: %s", page)
	}
	add(7, func(rep *report) {
		rep.Scale = []scaleRow{{What: "a", Values: []float64{1, 2, 3, 4, 5, 6, 7}}}
	})
	add(7, func(rep *report) { rep.Cells, rep.Samples = testReport().Cells, testReport().Samples })
	add(1, func(rep *report) { rep.Qcow2 = []qcowSample{{Server: qemuThreads}} })
	rep := add(3, fair(fairTmpfs))
	page := rep.markdown(rep.results())
	for _, s := range []string{
		"2026-11-23 05:02 UTC, in 5 parts",
		"| 2026-11-23 01:02 UTC | fairness: ext4, cached, Unix socket | 3, **a trial** | nbd-export 1 |",
		"| 2026-11-23 02:02 UTC | scale | 7 | nbd-export 1 |",
		"| 2026-11-23 03:02 UTC | tmpfs, Unix socket; tmpfs, TCP; ext4, cold cache, Unix socket | 7 | nbd-export 1 |",
		"| 2026-11-23 04:02 UTC | qcow2 | 1, **a trial** | nbd-export 1 |",
		"| 2026-11-23 05:02 UTC | fairness: tmpfs, Unix socket | 3, **a trial** | nbd-export 1 |",
		"### tmpfs, Unix socket\n\n> **A trial**: 3 rounds. Goals are judged from 7 rounds on.\n\n4k random reads",
		"### ext4, cached, Unix socket\n\n> **A trial**: 3 rounds",
		"## qcow2\n\n> **A trial**: 1 round.", "## Scale\n\nnbd-export alone",
	} {
		if !strings.Contains(page, s) {
			t.Errorf("the page does not say %q:\n%s", s, page)
		}
	}
	if head, _, _ := strings.Cut(page, "## Goals"); strings.Contains(head, "trial") {
		t.Error("all is said to be a trial")
	}
	// What is measured anew stands there once, and a part of which nothing is left not
	// at all. An older file knows only cells.
	rep = add(7, func(rep *report) {
		rep.Scale = []scaleRow{{What: "a", Values: []float64{1, 2, 3, 4, 5, 6, 7}}}
	})
	if page := rep.markdown(rep.results()); strings.Count(page, "| scale |") != 1 || len(rep.Parts) != 5 {
		t.Errorf("%d parts: %s", len(rep.Parts), page)
	}
	rep.Parts = slices.DeleteFunc(rep.Parts, func(p part) bool { return slices.Contains(p.What, fairTmpfs) || slices.Contains(p.What, qcowID) })
	rep.Parts[0].What = nil
	page = rep.markdown(rep.results())
	for _, s := range []string{"| 2026-11-23 01:02 UTC | not recorded | 3,", "| not recorded | fairness: tmpfs, Unix socket; fairness: ext4, cached, Unix socket; qcow2 | | |"} {
		if !strings.Contains(page, s) {
			t.Errorf("the page does not say %q:\n%s", s, page)
		}
	}
}

func TestServerPlaces(t *testing.T) {
	if got := union([]string{"a", "b"}, []string{"b", "c"}); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Error(got)
	}
	if serverPlace(programLimit) != 0 || serverPlace(programNbdkit) < serverPlace(programOurs) {
		t.Error("limit, ours, peers")
	}
}
