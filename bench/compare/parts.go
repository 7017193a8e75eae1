package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"
)

// A comparison may be measured in parts, some cells at a time: -onto keeps what
// was measured so far in a file, and the report is of all of it. A part replaces
// what there was of its cells.

// part is one run of a comparison.
type part struct {
	When   time.Time `json:"when"`
	Ours   string    `json:"ours"` // our program's version
	Rounds int       `json:"rounds"`
	// What was measured: ids of cells and of scenarios of fairness, scaleID, qcowID.
	// In older files there are only those of cells.
	What []string `json:"cells"`
}

// onto adds to rep what the file at path has of cells that rep has not, and
// writes all of it there. A file that is not there has nothing.
func (rep *report) onto(path string) error {
	old, err := loadReport(path)
	if errors.Is(err, fs.ErrNotExist) {
		old, err = nil, nil
	}
	if err != nil {
		return err
	}
	if rep.loads() {
		rep.Parts = []part{rep.part()}
	}
	if old != nil {
		if what := rep.differs(old); what != "" {
			return fmt.Errorf("%s was measured with another %s; remove it, or give another file", path, what)
		}
		rep.add(old)
	}
	return rep.save(path)
}

// loads reports whether anything but handovers was measured.
func (rep *report) loads() bool {
	return len(rep.Cells)+len(rep.Fair)+len(rep.Scale)+len(rep.Qcow2) > 0
}

// what says what was measured, but for handovers, as part.What does.
func (rep *report) what() (ids []string) {
	for _, c := range rep.Cells {
		ids = append(ids, c.ID())
	}
	for _, sc := range fairScenarios {
		if slices.ContainsFunc(rep.Fair, func(f fairSample) bool { return f.Scenario == sc.id }) {
			ids = append(ids, sc.id)
		}
	}
	if len(rep.Scale) > 0 {
		ids = append(ids, scaleID)
	}
	if len(rep.Qcow2) > 0 {
		ids = append(ids, qcowID)
	}
	return ids
}

func (rep *report) part() part {
	return part{When: rep.When, Ours: rep.Machine.Versions[programOurs], Rounds: rep.Rounds, What: rep.what()}
}

// differs names what keeps figures of two runs from being compared, "" if
// nothing does. Our own program may differ: the report says how.
func (rep *report) differs(old *report) string {
	a, b := rep.Machine, old.Machine
	for _, x := range []struct {
		what string
		same bool
	}{
		{"kernel", a.Kernel == b.Kernel},
		{"processor", a.CPU == b.CPU && a.Cores == b.Cores},
		{"net.core.wmem_max", a.WmemMax == b.WmemMax},
		{"how processors idle", a.Idle == b.Idle},
		{"file system", a.DiskFS == b.DiskFS},
		{"qemu-nbd", !differ(a.Versions[programQEMU], b.Versions[programQEMU])},
		{"nbdkit", !differ(a.Versions[programNbdkit], b.Versions[programNbdkit])},
		{"image size", rep.Image == old.Image},
		{"time per load", rep.CellTime == old.CellTime},
	} {
		if !x.same {
			return x.what
		}
	}
	return ""
}

// differ compares versions, of which one may be unknown: that program did not
// take part.
func differ(a, b string) bool { return a != "" && b != "" && a != b }

// add takes over what old has of cells that were not measured now.
func (rep *report) add(old *report) {
	measured := rep.what()
	now := func(id string) bool { return slices.Contains(measured, id) }
	ids := slices.Clone(measured)
	for _, c := range old.Cells {
		ids = append(ids, c.ID())
	}
	rep.Cells = slices.DeleteFunc(slices.Clone(goals), func(c cell) bool { return !slices.Contains(ids, c.ID()) })
	for _, s := range old.Samples {
		if !now(s.Cell) {
			rep.Samples = append(rep.Samples, s)
		}
	}
	if len(rep.Checks) == 0 {
		rep.Checks = old.Checks
	}
	fair := rep.Fair
	for _, s := range old.Fair {
		if !slices.ContainsFunc(fair, func(now fairSample) bool { return now.Scenario == s.Scenario }) {
			rep.Fair = append(rep.Fair, s)
		}
	}
	if len(rep.Scale) == 0 {
		rep.Scale = old.Scale
	}
	if len(rep.Qcow2) == 0 {
		rep.Qcow2 = old.Qcow2
	}
	if rep.Handover == nil {
		rep.Handover = old.Handover
	} else if old.Handover != nil {
		rep.Handover.add(old.Handover)
	}
	rep.Servers = union(rep.Servers, old.Servers)
	slices.SortStableFunc(rep.Servers, func(a, b string) int { return serverPlace(a) - serverPlace(b) })
	rep.Commands = union(old.Commands, rep.Commands)
	for program, version := range old.Machine.Versions {
		if rep.Machine.Versions[program] == "" {
			rep.Machine.Versions[program] = version
		}
	}
	parts := old.Parts
	if len(parts) == 0 && old.loads() { // measured at once
		parts = []part{old.part()}
	}
	for _, p := range parts {
		p.What = slices.DeleteFunc(slices.Clone(p.What), now)
		if len(p.What) > 0 {
			rep.Parts = append(rep.Parts, p)
		}
	}
	slices.SortFunc(rep.Parts, func(a, b part) int { return a.When.Compare(b.When) })
}

// serverPlace is where a server stands in tables.
func serverPlace(name string) int {
	return slices.IndexFunc(allServers(true), func(s server) bool { return s.name == name })
}

// union is a and what only b has, in their order.
func union(a, b []string) []string {
	all := slices.Clone(a)
	for _, s := range b {
		if !slices.Contains(all, s) {
			all = append(all, s)
		}
	}
	return all
}

// writeParts says what was measured when, if that was not at once.
func (rep *report) writeParts(s *strings.Builder) {
	if len(rep.Parts) < 2 {
		return
	}
	s.WriteString("Of what was measured more than once the last counts:\n\n| measured | what | rounds | nbd-export |\n|---|---|---|---|\n")
	rest := rep.what()
	for _, p := range rep.Parts {
		rest = slices.DeleteFunc(rest, func(id string) bool { return slices.Contains(p.What, id) })
		n := fmt.Sprint(p.Rounds)
		if p.Rounds < enoughRounds {
			n += ", **a trial**"
		}
		fmt.Fprintf(s, "| %s | %s | %s | %s |\n", p.When.UTC().Format(whenForm), cmp.Or(rep.inWords(p.What), "not recorded"), n, p.Ours)
	}
	if len(rest) > 0 { // in older files
		fmt.Fprintf(s, "| not recorded | %s | | |\n", rep.inWords(rest))
	}
	s.WriteString("\n")
}

// inWords names what was measured, by the headings of the page.
func (rep *report) inWords(ids []string) string {
	var words []string
	for _, p := range places(rep.Cells) {
		n, all := 0, 0
		for _, c := range rep.Cells {
			if c.place() == p {
				if all++; slices.Contains(ids, c.ID()) {
					n++
				}
			}
		}
		switch title := p.Title(rep.Machine.DiskFS); {
		case n == all:
			words = append(words, title)
		case n > 0:
			words = append(words, fmt.Sprintf("%s (%d of %d cells)", title, n, all))
		}
	}
	for _, sc := range fairScenarios {
		if slices.Contains(ids, sc.id) {
			words = append(words, "fairness: "+sc.small.place().Title(rep.Machine.DiskFS))
		}
	}
	for _, id := range []string{qcowID, scaleID} {
		if slices.Contains(ids, id) {
			words = append(words, map[string]string{qcowID: "qcow2", scaleID: "scale"}[id])
		}
	}
	return strings.Join(words, "; ")
}

const whenForm = "2006-01-02 15:04 UTC"

// measured says when, and ours with which versions of our program.
func (rep *report) measured() (when, ours string) {
	if len(rep.Parts) == 0 {
		return rep.When.UTC().Format(whenForm), rep.Machine.Versions[programOurs]
	}
	first, last := rep.Parts[0], rep.Parts[len(rep.Parts)-1]
	when = first.When.UTC().Format(whenForm)
	if len(rep.Parts) > 1 {
		when += fmt.Sprintf(" to %s, in %d parts", last.When.UTC().Format(whenForm), len(rep.Parts))
	}
	var versions []string
	for _, p := range rep.Parts {
		versions = union(versions, []string{p.Ours})
	}
	return when, strings.Join(versions, "; ")
}
