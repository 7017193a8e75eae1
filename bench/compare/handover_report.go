package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nbd-export/nbd-export/bench"
)

// handoverReport is what was measured of handovers.
type handoverReport struct {
	When     time.Time      `json:"when"`
	Machine  machine        `json:"machine"`
	Time     time.Duration  `json:"time_ns"` // of each cell
	Cells    []handoverCell `json:"cells"`
	Commands []string       `json:"commands"`
	Verb     bool           `json:"verb"` // our program has the verb handover
	NoGroup  string         `json:"no_group,omitempty"`
	Moves    []*moves       `json:"moves"`
}

// record keeps how exporters are started, each once.
func (h *handoverReport) record(x *exporters) {
	if line := x.shown(); !slices.Contains(h.Commands, line) {
		h.Commands = append(h.Commands, line)
	}
}

// add takes over what old has of cells that were not measured now.
func (h *handoverReport) add(old *handoverReport) {
	var ids []string // measured now
	for _, m := range h.Moves {
		ids = append(ids, m.Cell)
	}
	cells, kept := slices.Clone(h.Cells), false
	for _, c := range old.Cells {
		if !slices.Contains(ids, c.ID()) {
			cells = append(cells, c)
			h.Time = min(h.Time, old.Time)
		}
	}
	slices.SortStableFunc(cells, func(a, b handoverCell) int { return handoverPlace(a) - handoverPlace(b) })
	h.Cells = cells
	for _, m := range old.Moves {
		if !slices.Contains(ids, m.Cell) {
			h.Moves, kept = append(h.Moves, m), true
		}
	}
	if !slices.Contains(ids, groupID) && h.NoGroup == "" {
		h.NoGroup = old.NoGroup
	}
	h.Commands = union(old.Commands, h.Commands)
	if !kept {
		return
	}
	for program, before := range old.Machine.Versions {
		all := union(strings.Split(before, "; "), strings.Split(h.Machine.Versions[program], "; "))
		h.Machine.Versions[program] = strings.Join(all, "; ")
	}
}

// handoverPlace is where a cell stands in the table.
func handoverPlace(c handoverCell) int {
	return slices.IndexFunc(handoverCells, func(x handoverCell) bool { return x.ID() == c.ID() })
}

// of returns what was measured of a cell with a program; nothing if it was not.
func (h *handoverReport) of(cell, program string) *moves {
	for _, m := range h.Moves {
		if m.Cell == cell && m.Program == program {
			return m
		}
	}
	return &moves{}
}

// quantiles of times: median, 90th and 99th percentile, and the most.
type quantiles [4]time.Duration

func newQuantiles(v []time.Duration) (q quantiles) {
	if len(v) == 0 {
		return q
	}
	s := slices.Sorted(slices.Values(v))
	for i, p := range []int{50, 90, 99, 100} {
		q[i] = s[max(0, (len(s)*p+99)/100-1)] // nearest rank
	}
	return q
}

// String is the quantiles in milliseconds.
func (q quantiles) String() string {
	if q == (quantiles{}) {
		return "-"
	}
	var s []string
	for _, d := range q {
		s = append(s, millis(d))
	}
	return strings.Join(s, " / ")
}

func millis(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case ms >= 99.95:
		return fmt.Sprintf("%.0f", ms)
	case ms >= 9.995:
		return fmt.Sprintf("%.1f", ms)
	}
	return fmt.Sprintf("%.2f", ms)
}

const (
	handoverBegin = "<!-- handovers: written by bin/compare -cells handover -->\n"
	handoverEnd   = "<!-- end of handovers -->\n"
	readGoal      = 5 * time.Millisecond
	// enoughHandovers is from when on goals count as met or missed.
	enoughHandovers = 40 * time.Second
	loadedGoal      = 1000 // handovers under load without a failure
)

// markdown is the section of the report, with its marks.
func (h *handoverReport) markdown() string {
	var s strings.Builder
	s.WriteString(handoverBegin + "## Handover\n\n")
	if h.Time < enoughHandovers {
		fmt.Fprintf(&s, "> **A trial**: %v for each load. Goals are judged from %v on.\n\n", h.Time, enoughHandovers)
	}
	s.WriteString("Ownership of one image, a raw one where nothing else is said, goes back and forth between two exporters on\n" +
		"one machine, beside QEMU's two `blockdev-set-active`, in turns on the same image. Milliseconds: median / p90 /\n" +
		"p99 / most. *Writes* is the time from the last write that the old owner acknowledged to the first that the new\n" +
		"one did, *reads* the longest time without an answer from either side, and *orders* the pair of orders on open\n" +
		"control sockets, given by a program that does nothing else. Ours sync ahead while writes are served, which is\n" +
		"part of the orders and not of the gap. *Orders for nothing* is the same pair given once more, when there is\n" +
		"nothing left to do: the way to two processes and back. *Limit* is a program that forgets what is written, and\n" +
		"changes owners by the system calls that this takes alone, on a thread that does nothing else: what the machine\n" +
		"and the client take.\n\n")
	s.WriteString("| | n | nbd-export | n | QEMU | ours / QEMU, median, p99 | goal | |\n|---|--:|--:|--:|--:|--:|--:|---|\n")
	for _, c := range h.Cells {
		h.writeCell(&s, c)
	}
	h.writeGroup(&s)
	s.WriteString("\n")
	h.writeFailures(&s)
	if h.Time >= enoughHandovers && strings.Contains(s.String(), "**missed**") {
		s.WriteString(handoverCauses + "\n")
	}
	h.writeMethod(&s)
	s.WriteString(handoverEnd)
	return s.String()
}

func (h *handoverReport) writeCell(s *strings.Builder, c handoverCell) {
	ours, theirs, limit := h.of(c.ID(), programOurs), h.of(c.ID(), programQSD), h.of(c.ID(), programLimit)
	fmt.Fprintf(s, "| **%s** | | | | | | | |\n", c.Title(h.Machine.DiskFS))
	if c.Conns > 0 {
		writeTimes(s, "writes", ours.Writes, theirs.Writes, c.Goal)
		writeLimit(s, "writes", limit.Writes, theirs.Writes)
	}
	goal := c.Goal
	if c.Medium == onDisk && c.Conns > 0 {
		goal = 0 // most of it is syncing ahead, while clients write
	}
	writeTimes(s, "orders", ours.Orders, theirs.Orders, goal)
	writeLimit(s, "orders", limit.Orders, theirs.Orders)
	if len(ours.Nothing) > 0 {
		writeTimes(s, "orders for nothing", ours.Nothing, theirs.Nothing, 0)
	}
	writeReads(s, "reads", ours.Reads, theirs.Reads, readGoal)
	writeReads(s, "reads between handovers", ours.Calm, theirs.Calm, 0)
	if len(ours.Commands) > 0 {
		what := "`inactivate && activate`"
		if h.Verb {
			what = "`handover`"
		}
		fmt.Fprintf(s, "| wall time of %s | %d | %v | | | | | |\n", what, len(ours.Commands), newQuantiles(ours.Commands))
	}
}

// writeReads writes two lines where the machine has stood still meanwhile. goal is the
// longest time that ours may be, 0 if there is none.
func writeReads(s *strings.Builder, what string, ours, theirs []bench.ReadGap, goal time.Duration) {
	line := func(what string, ours, theirs []time.Duration, goal, verdict string) {
		a, b := newQuantiles(ours), newQuantiles(theirs)
		fmt.Fprintf(s, "| %s | %d | %v | %d | %v | %s | %s | %s |\n", what, len(ours), a, len(theirs), b, shares(a, b), goal, verdict)
	}
	want, verdict := "", ""
	if goal > 0 {
		want = millis(goal) + " ms at most"
		verdict = met(len(ours), newQuantiles(moving(ours))[3] <= goal)
	}
	if slices.Equal(moving(ours), longest(ours)) && slices.Equal(moving(theirs), longest(theirs)) {
		line(what, longest(ours), longest(theirs), want, verdict)
		return
	}
	line(what, longest(ours), longest(theirs), "", "")
	line(what+", the machine running", moving(ours), moving(theirs), want, verdict)
}

func writeTimes(s *strings.Builder, what string, ours, theirs []time.Duration, goal float64) {
	a, b := newQuantiles(ours), newQuantiles(theirs)
	want, verdict := "", ""
	if goal > 0 {
		want = fmt.Sprintf("%.2g", goal)
		ok := float64(a[0]) <= goal*float64(b[0]) && float64(a[2]) <= goal*float64(b[2])
		verdict = met(min(len(ours), len(theirs)), ok)
	}
	fmt.Fprintf(s, "| %s | %d | %v | %d | %v | %s | %s | %s |\n", what, len(ours), a, len(theirs), b, shares(a, b), want, verdict)
}

// writeLimit has the limit server in the place of ours.
func writeLimit(s *strings.Builder, what string, limit, theirs []time.Duration) {
	if len(limit) == 0 {
		return
	}
	a, b := newQuantiles(limit), newQuantiles(theirs)
	fmt.Fprintf(s, "| %s, *limit* | %d | %v | | | %s | | |\n", what, len(limit), a, shares(a, b))
}

// shares are ours by theirs, of the median and of the 99th percentile.
func shares(a, b quantiles) string {
	if a[0] == 0 || b[0] == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f, %.2f", float64(a[0])/float64(b[0]), float64(a[2])/float64(b[2]))
}

func met(n int, ok bool) string {
	switch {
	case n == 0:
		return "not measured"
	case ok:
		return "met"
	}
	return "**missed**"
}

func (h *handoverReport) writeGroup(s *strings.Builder) {
	ours, theirs := h.of(groupID, programOurs), h.of(groupID, programQSD)
	if h.NoGroup == "" && len(ours.Orders)+len(ours.Failures) == 0 {
		return
	}
	fmt.Fprintf(s, "| **tmpfs, %d images as one group, idle** | | | | | | | |\n", groupSize)
	if h.NoGroup != "" {
		fmt.Fprintf(s, "| orders | | not measured: %s | | | | | |\n", h.NoGroup)
		return
	}
	a, b := newQuantiles(ours.Orders), newQuantiles(theirs.Orders)
	fmt.Fprintf(s, "| orders | %d | %v | %d | %v | %s | %v at most | %s |\n", len(ours.Orders), a, len(theirs.Orders), b,
		shares(a, b), groupGoal, met(len(ours.Orders), a[3] <= groupGoal))
}

// writeFailures counts what went wrong on either side, and quotes it.
func (h *handoverReport) writeFailures(s *strings.Builder) {
	for _, program := range []string{programOurs, programQSD} {
		done, loaded, spared := 0, 0, 0
		var failures, crashes []string
		for _, m := range h.Moves {
			if m.Program != program {
				continue
			}
			done += m.Done
			spared += m.Spared
			for _, c := range h.Cells {
				if c.ID() == m.Cell && c.Conns > 0 {
					loaded += m.Done
				}
			}
			failures, crashes = append(failures, m.Failures...), append(crashes, m.Crashes...)
		}
		goal := ""
		if program == programOurs {
			goal = fmt.Sprintf(" (goal: none in %d under load: %s)", loadedGoal,
				met(loaded, loaded >= loadedGoal && len(failures)+len(crashes) == 0))
		}
		fmt.Fprintf(s, "- %s: %d handovers, %d of them under load; %d failures, %d crashes%s.\n", program, done, loaded, len(failures), len(crashes), goal)
		if spared > 0 {
			fmt.Fprintf(s, "  - After %d crashes in a cell its writers stopped before each handover and went on after it: so in %d of these.\n", handoverSpare, spared)
		}
		all := slices.Concat(failures, crashes)
		slices.Sort(all)
		for _, text := range slices.Compact(all) {
			n := 0
			for _, other := range slices.Concat(failures, crashes) {
				if other == text {
					n++
				}
			}
			fmt.Fprintf(s, "  - %d times `%s`\n", n, strings.ReplaceAll(strings.ReplaceAll(text, "\n", " "), "`", "'"))
		}
	}
	s.WriteString("\n")
}

func (h *handoverReport) writeMethod(s *strings.Builder) {
	mc := h.Machine
	fmt.Fprintf(s, "Measured %s, Linux %s, %d cores for everything, %s, %s, on tmpfs and %s; %v for each load:\n\n",
		h.When.UTC().Format("2006-01-02 15:04 UTC"), mc.Kernel, mc.Cores, mc.Versions[programOurs], mc.Versions[programQSD], mc.DiskFS, h.Time)
	s.WriteString("```sh\nbin/compare -cells handover\n" + strings.Join(h.Commands, "\n") + "\n```\n\n")
	s.WriteString(`- Loads are 4k random writes to 256M from 4 connections at depth 32; the client goes on at the other exporter
  when it gets EPERM, asking every 0.1 ms. Reads come from a program of their own with a connection to each side, one
  every 0.5 ms, and *reads between handovers* are the same measure while nobody hands over: what load and machine make
  of it.
- *The machine running* leaves out of a read's time what of it a real-time thread overslept by 3 ms or more, of which
  each processor has one that only sleeps, 1 ms at a time: the host of a virtual machine wakes it late now and then.
- The load goes on for 200 ms between two handovers on disk, 20 ms otherwise; ten by one program, then ten by
  the other. QEMU empties the page cache of an image when it activates it, so that is filled before each ten.
- Inactivation by nbd-export always ends with an fdatasync, and QEMU's of a raw image with none: what was
  written is synced when it is activated.
- A qcow2 image has all its clusters, and is looked at by qemu-img check after each ten.
`)
}

// splice puts the section of handovers into a page: in the place of the one it
// has, or before the description of the machine.
func splice(page, section string) string {
	if before, rest, ok := strings.Cut(page, handoverBegin); ok {
		_, after, _ := strings.Cut(rest, handoverEnd)
		return before + section + after
	}
	if before, after, ok := strings.Cut(page, "## The machine\n"); ok {
		return before + section + "\n## The machine\n" + after
	}
	return page + section
}

// handoverSection is what a written page has of it, "" if nothing.
func handoverSection(page string) string {
	_, rest, ok := strings.Cut(page, handoverBegin)
	if !ok {
		return ""
	}
	text, _, _ := strings.Cut(rest, handoverEnd)
	return handoverBegin + text + handoverEnd
}

// page is the whole report. Handovers and loads that were not measured this time
// stay as they are on the page in dir.
func (rep *report) page(dir string, results []result) (string, error) {
	old, err := os.ReadFile(filepath.Join(dir, reportName))
	if err != nil && !os.IsNotExist(err) {
		return "", err
	}
	section := handoverSection(string(old))
	if rep.Handover != nil {
		section = rep.Handover.markdown()
	}
	page := string(old)
	if rep.loads() || page == "" {
		page = rep.markdown(results)
	}
	if section == "" {
		return page, nil
	}
	return splice(page, section), nil
}
