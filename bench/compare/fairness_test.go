package main

import (
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/bench"
)

func TestFairness(t *testing.T) {
	rep := testReport()
	result := func(p99 float64) *bench.Result {
		return &bench.Result{Total: bench.Stats{P50Micros: p99 / 2, P99Micros: p99, OpsPerSec: 1000}}
	}
	for round := range 3 {
		for name, p99 := range map[string]float64{programOurs: 200, programNbdkit: 500, "qemu-nbd/threads": 400, programLimit: 10} {
			rep.Fair = append(rep.Fair, fairSample{Server: name, Round: round, Alone: result(p99 / 4), Beside: result(p99), Large: result(9)})
		}
	}
	rep.Fair = append(rep.Fair, fairSample{Server: programNbdkit, Round: 3, Err: "gone"})
	if _, v := rep.fairVerdict(); v.peer != "qemu-nbd/threads" || v.Median < 1.99 || v.Median > 2.01 || !v.met() {
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
	for _, s := range []string{"are two programs", "## Fairness", "qemu-nbd/threads, is 2.00x", "| nbd-export | 50.0", "round 4: gone"} {
		if !strings.Contains(page, s) {
			t.Errorf("the page does not say %q", s)
		}
	}
	if rep.failed() != 2 {
		t.Errorf("%d failed", rep.failed())
	}
}
