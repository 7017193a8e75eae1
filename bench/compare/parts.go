package main

import (
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
	Cells  []string  `json:"cells"` // ids
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

func (rep *report) part() part {
	p := part{When: rep.When, Ours: rep.Machine.Versions[programOurs], Rounds: rep.Rounds}
	for _, c := range rep.Cells {
		p.Cells = append(p.Cells, c.ID())
	}
	return p
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
	measured := rep.part().Cells
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
	for _, p := range old.Parts {
		p.Cells = slices.DeleteFunc(slices.Clone(p.Cells), now)
		if len(p.Cells) > 0 {
			rep.Parts = append(rep.Parts, p)
			rep.Rounds = min(rep.Rounds, p.Rounds)
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

// measured says when, and ours with which versions of our program.
func (rep *report) measured() (when, ours string) {
	const form = "2006-01-02 15:04 UTC"
	if len(rep.Parts) == 0 {
		return rep.When.UTC().Format(form), rep.Machine.Versions[programOurs]
	}
	first, last := rep.Parts[0], rep.Parts[len(rep.Parts)-1]
	when = first.When.UTC().Format(form)
	if len(rep.Parts) > 1 {
		when += fmt.Sprintf(" to %s, in %d parts", last.When.UTC().Format(form), len(rep.Parts))
	}
	var versions []string
	for _, p := range rep.Parts {
		versions = union(versions, []string{p.Ours})
	}
	return when, strings.Join(versions, "; ")
}
