package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/bench"
)

// testHandovers has a cell that is met, one that is missed by its p99, one
// without a goal, failures on both sides and a group.
func testHandovers() *handoverReport {
	h := &handoverReport{
		When: time.Date(2026, 11, 23, 1, 2, 3, 0, time.UTC), Time: 40 * time.Second, Cells: handoverCells[:3],
		Machine:  machine{Kernel: "6.18.0", Cores: 2, DiskFS: "ext4", Versions: map[string]string{programOurs: "nbd-export 1", programQSD: "qemu 10"}},
		Commands: []string{"nbd-export serve $IMAGE"},
	}
	times := func(n int, d, last time.Duration) (v []time.Duration) {
		for i := range n {
			v = append(v, d+time.Duration(i)*time.Microsecond)
		}
		v[n-1] = last
		return v
	}
	gaps := func(v []time.Duration) (g []bench.ReadGap) {
		for _, d := range v {
			g = append(g, bench.ReadGap{Longest: d, Moving: d})
		}
		return g
	}
	for i, c := range h.Cells {
		for _, program := range []string{programOurs, programQSD} {
			d := time.Millisecond
			if program == programQSD {
				d *= 4
			}
			m := &moves{Cell: c.ID(), Program: program, Done: 500, Orders: times(100, d, 2*d), Reads: gaps(times(500, d, 4*time.Millisecond))}
			if c.Conns > 0 {
				m.Writes = times(50, d, time.Duration(i)*5*time.Millisecond)
			}
			if program == programQSD && i == 2 {
				m.Crashes = []string{"signal: aborted: x `y'", "signal: aborted: x `y'"}
			}
			if program == programOurs && i == 0 {
				m.Commands = times(5, d, d)
			}
			if i == 1 { // the machine stood still once
				m.Reads[3].Longest = 9 * time.Millisecond
			}
			if i == 0 {
				m.Nothing = times(9, d/2, d)
			}
			h.Moves = append(h.Moves, m)
		}
	}
	h.Moves = append(h.Moves, &moves{Cell: h.Cells[0].ID(), Program: programLimit, Done: 9, Orders: times(9, time.Second, time.Second)})
	h.Moves = append(h.Moves, &moves{Cell: groupID, Program: programOurs, Done: 3, Orders: times(3, time.Second/2, time.Second)})
	return h
}

func TestHandoverReport(t *testing.T) {
	got := testHandovers().markdown()
	for _, want := range []string{
		"| **tmpfs, idle** |",
		"| orders | 100 | 1.05 / 1.09 / 1.10 / 2.00 | 100 | 4.05 / 4.09 / 4.10 / 8.00 | 0.26, 0.27 | 0.5 | met |",
		"| writes | 50 | 1.02 / 1.04 / 5.00 / 5.00 | 50 | 4.02 / 4.04 / 5.00 / 5.00 | 0.25, 1.00 | 0.5 | **missed** |",
		"| writes | 50 | 1.02 / 1.04 / 10.0 / 10.0 | 50 | 4.02 / 4.04 / 10.0 / 10.0 | 0.25, 1.00 |  |  |",
		"| orders, *limit* | 9 | 1000 / 1000 / 1000 / 1000 | | | 246.98, 244.02 | | |",
		"| reads | 500 | 1.25 / 1.45 / 1.49 / 4.00 | 500 |",
		"| reads | 500 | 1.25 / 1.45 / 1.49 / 4.00 | 500 | 4.25 / 4.45 / 4.49 / 4.50 | 0.29, 0.33 | 5.00 ms at most | met |",
		"| reads | 500 | 1.25 / 1.45 / 1.50 / 9.00 | 500 | 4.25 / 4.45 / 4.49 / 9.00 | 0.29, 0.33 |  |  |\n" +
			"| reads, the machine running | 500 | 1.25 / 1.45 / 1.49 / 4.00 | 500 | 4.25 / 4.45 / 4.49 / 4.50 | 0.29, 0.33 | 5.00 ms at most | met |",
		"| orders for nothing | 9 | 0.50 / 1.00 / 1.00 / 1.00 | 9 | 2.00 / 4.00 / 4.00 / 4.00 | 0.25, 0.25 |  |  |",
		"| wall time of `inactivate && activate` | 5 | 1.00 / 1.00 / 1.00 / 1.00 |",
		"| **tmpfs, 1000 images as one group, idle** |",
		"| orders | 3 | 500 / 1000 / 1000 / 1000 | 0 | - | - | 1s at most | met |",
		"- nbd-export: 1503 handovers, 1000 of them under load; 0 failures, 0 crashes (goal: none in 1000 under load: met).",
		"- qemu-storage-daemon: 1500 handovers, 1000 of them under load; 0 failures, 2 crashes.\n  - 2 times `signal: aborted: x 'y'`",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q", want)
		}
	}
	if t.Failed() {
		t.Log(got)
	}
}

// Handovers and loads are measured together or one without the other; the page
// keeps what was not.
func TestHandoverSection(t *testing.T) {
	dir := t.TempDir()
	page := func() string {
		b, err := os.ReadFile(filepath.Join(dir, reportName))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	write := func(rep *report) {
		if err := rep.write(dir); err != nil {
			t.Fatal(err)
		}
	}
	loads := testReport()
	write(loads)
	before := page()
	alone := &report{Handover: testHandovers()}
	write(alone)
	with := page()
	if !strings.Contains(with, "## Handover\n") || strings.Index(with, "## Handover\n") > strings.Index(with, "## The machine\n") {
		t.Error("the section is not where it belongs")
	}
	if strings.Replace(with, alone.Handover.markdown()+"\n", "", 1) != before {
		t.Error("the rest of the page has changed")
	}
	write(loads)
	if page() != with {
		t.Error("a run without handovers loses them")
	}
	alone.Handover.Cells = alone.Handover.Cells[:1]
	write(alone)
	if n := strings.Count(page(), "## Handover\n"); n != 1 || page() == with {
		t.Errorf("%d sections", n)
	}
	loads.Handover = alone.Handover // as measured
	last := page()
	write(loads)
	if page() != last {
		t.Error("a run with all gives another page")
	}
}

func TestQuantiles(t *testing.T) {
	var v []time.Duration
	for i := range 200 {
		v = append(v, time.Duration(200-i)*time.Millisecond)
	}
	if s := fmt.Sprint(newQuantiles(v)); s != "100 / 180 / 198 / 200" {
		t.Error(s)
	}
	if s := fmt.Sprint(newQuantiles(nil)); s != "-" {
		t.Error(s)
	}
}

// Cells of handovers that are measured later take their place among the others.
func TestHandoverParts(t *testing.T) {
	first, second := testHandovers(), testHandovers()
	first.Cells = slices.Concat(first.Cells[:1], []handoverCell{handoverCells[len(handoverCells)-1]})
	second.Cells, second.Time = second.Cells[1:2], 50*time.Second
	second.Moves = slices.DeleteFunc(second.Moves, func(m *moves) bool { return m.Cell != second.Cells[0].ID() })
	second.Machine.Versions[programOurs] = "nbd-export 2"
	second.Moves[1].Spared, second.Commands = 7, []string{"nbd-export serve -f qcow2 $IMAGE"}
	path := filepath.Join(t.TempDir(), "parts.json")
	for _, h := range []*handoverReport{first, second} {
		rep := testReport()
		rep.Cells, rep.Samples, rep.Handover = nil, nil, h
		if err := rep.onto(path); err != nil {
			t.Fatal(err)
		}
	}
	rep, err := loadReport(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Parts) != 0 {
		t.Errorf("parts of nothing: %v", rep.Parts)
	}
	h := rep.Handover
	if len(h.Cells) != 3 || h.Cells[1] != handoverCells[1] || h.Time != first.Time || h.of(groupID, programOurs).Done != 3 {
		t.Errorf("%v, %v", h.Cells, h.Time)
	}
	text := h.markdown()
	for _, want := range []string{"nbd-export 1; nbd-export 2", "serve $IMAGE\n", "-f qcow2", "so in 7 of these", "**qcow2 on ext4, "} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

// Of what has all been measured anew nothing old is told.
func TestHandoverAnew(t *testing.T) {
	h := testHandovers()
	h.Machine.Versions[programOurs] = "nbd-export 2"
	old := testHandovers()
	old.Time = time.Second
	h.add(old)
	if got := h.Machine.Versions[programOurs]; got != "nbd-export 2" || h.Time != 40*time.Second {
		t.Errorf("measured %s, for %v", got, h.Time)
	}
	old.Moves = append(old.Moves, &moves{Cell: "handover-disk-idle", Program: programOurs})
	old.Machine.Versions[programOurs] = "nbd-export 1; nbd-export 2"
	h.add(old)
	if got := h.Machine.Versions[programOurs]; got != "nbd-export 1; nbd-export 2" {
		t.Errorf("measured %s", got)
	}
}
