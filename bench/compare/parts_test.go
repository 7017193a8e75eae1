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
	of := func(when int, ours string, ops float64, cells ...cell) *report {
		rep := testReport()
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
	first := of(0, "nbd-export 1", 2000, goals[2], goals[0])
	first.Checks = testReport().Checks
	if err := first.onto(path); err != nil {
		t.Fatal(err)
	}
	second := of(1, "nbd-export 2", 3000, goals[1], goals[2])
	second.Rounds = 3
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
	for _, s := range []string{"in 2 parts", "nbd-export 1; nbd-export 2", "**A trial**: 3 rounds"} {
		if !strings.Contains(page, s) {
			t.Errorf("the page does not say %q", s)
		}
	}
	// All of the first part is measured anew: it counts no more.
	if err := of(2, "nbd-export 3", 4000, goals[0]).onto(path); err != nil {
		t.Fatal(err)
	}
	if rep, err = loadReport(path); err != nil || len(rep.Parts) != 2 || rep.Parts[1].Ours != "nbd-export 3" {
		t.Fatalf("%+v, %v", rep.Parts, err)
	}
	other := of(3, "nbd-export 3", 4000, goals[0])
	other.Machine.Kernel = "7.0"
	if err := other.onto(path); err == nil || !strings.Contains(err.Error(), "kernel") {
		t.Errorf("%v, want that the kernel is another", err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := of(4, "nbd-export 3", 1, goals[0]).onto(path); err == nil {
		t.Error("a broken file was replaced")
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
