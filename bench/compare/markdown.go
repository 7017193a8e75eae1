package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/nbd-export/nbd-export/internal/bytesize"
)

// markdown is the report.
func (rep *report) markdown(results []result) string {
	var s strings.Builder
	s.WriteString("# Benchmarks\n\n")
	s.WriteString("nbd-export beside qemu-nbd and nbdkit, on one machine, in one run. This page, its plot\n" +
		"and every verdict are written by `make bench`.\n\n")
	if rep.trial() {
		s.WriteString(trialNote(span(rep.rounds())))
	}
	fmt.Fprintf(&s, "![Ratios to the better peer, by cell](%s)\n\n", plotName)
	rep.writeGoals(&s, results)
	rep.writeMisses(&s, results)
	rep.writeFairness(&s)
	rep.writeQcow2(&s)
	rep.writeScale(&s)
	rep.writeChecks(&s)
	rep.writeServers(&s, results)
	rep.writeMachine(&s)
	rep.writeMethod(&s)
	return s.String()
}

// byPlace calls f for the results of each place in turn.
func (rep *report) byPlace(results []result, f func(title string, of []result)) {
	for _, p := range places(rep.Cells) {
		of := slices.DeleteFunc(slices.Clone(results), func(r result) bool { return r.place() != p })
		f(p.Title(rep.Machine.DiskFS), of)
	}
}

func (rep *report) writeGoals(s *strings.Builder, results []result) {
	met, all := 0, 0
	for _, r := range results {
		for _, v := range []verdict{r.ops, r.cpu} {
			if v.goal == 0 {
				continue
			}
			if all++; v.met() {
				met++
			}
		}
	}
	fmt.Fprintf(s, "## Goals\n\n%d of %d met. Each ratio is ours to the better peer: operations per second, and\n"+
		"operations per second of the server's processor time. In brackets the 90 %% interval.\n", met, all)
	if rep.discards() {
		s.WriteString("Rows without a goal are the load above them with a client that copies what it reads; [why](#the-client).\n")
	}
	s.WriteString("\n")
	s.WriteString("| cell | ops/s | ratio | goal | | server CPU us/op | ratio | goal | |\n|---|--:|--:|--:|---|--:|--:|--:|---|\n")
	rep.byPlace(results, func(title string, of []result) {
		fmt.Fprintf(s, "| **%s** | | | | | | | | |\n", title)
		for _, r := range of {
			ours, theirs := "-", "-"
			if f := r.servers[programOurs]; f != nil {
				ours, theirs = count(f.ops.Median), micros(f.cpu.Median)
			}
			fmt.Fprintf(s, "| %s%s | %s | %s | %s | %s | %s | %s |\n", r.Title(), rep.mention(r.ID()), ours, r.ops, mark(r.ops), theirs, r.cpu, mark(r.cpu))
		}
	})
	s.WriteString("\n")
}

// String is the ratio and its goal, two columns.
func (v verdict) String() string {
	reached, goal := "-", ""
	if v.known() {
		reached = fmt.Sprintf("%s [%s, %s]", times(v.Median), times(v.Low), times(v.High))
	}
	if v.goal > 0 {
		goal = fmt.Sprintf("%.3gx", v.goal)
	}
	return reached + " | " + goal
}

func mark(v verdict) string {
	switch {
	case !v.known():
		return "not measured"
	case v.goal == 0:
		return ""
	case v.met():
		return "met"
	}
	return "**missed**"
}

// writeMisses names every miss, with a place for its cause.
func (rep *report) writeMisses(s *strings.Builder, results []result) {
	s.WriteString("## Misses\n\nWhere *limit* is said, that is what a server reaches that answers from a constant buffer and has no file\n" +
		"([the client](#the-client)), against the same peer in the same run. It copies; what is sent as pages of the file may be above it.\n\n")
	none := true
	for _, r := range results {
		where := r.place().Title(rep.Machine.DiskFS) + ", " + r.Title()
		var what []string
		for _, x := range []struct {
			name string
			verdict
			limit verdict
		}{{"operations", r.ops, r.limitOps}, {"CPU", r.cpu, r.limitCPU}} {
			if x.goal > 0 && x.known() && !x.met() {
				limit := ""
				if x.limit.known() {
					limit = fmt.Sprintf(" (limit %s)", times(x.limit.Median))
				}
				what = append(what, fmt.Sprintf("%s %s of %.3gx against %s%s", x.name, times(x.Median), x.goal, x.peer, limit))
			}
		}
		if len(what) > 0 {
			none = false
			fmt.Fprintf(s, "- %s: %s.\n  Cause: %s\n", where,
				strings.Join(what, "; "), cmp.Or(causes[r.ID()], "not yet found."))
		}
		if r.Medium == onCold && r.share.Max > isCold {
			none = false
			fmt.Fprintf(s, "- %s: up to %.1f %% of the image was in the page cache before a load.\n", where, 100*r.share.Max)
		}
		if r.Medium == onCached && r.share.Max > 0 && r.share.Min < isWarm {
			none = false
			fmt.Fprintf(s, "- %s: only %.1f %% of the image was in the page cache before a load.\n", where, 100*r.share.Min)
		}
		for _, f := range r.failed {
			none = false
			fmt.Fprintf(s, "- %s: no figure of %s in round %d: %s\n", where, f.Server, f.Round+1, strings.ReplaceAll(f.Err, "\n", " "))
		}
	}
	if none {
		s.WriteString("None.\n")
	}
	s.WriteString("\n")
}

func (rep *report) writeChecks(s *strings.Builder) {
	s.WriteString("## The client\n\nThe load comes from the engine of `nbd-export bench`. What it costs itself is in the tables below;\n" +
		"the *limit* server there answers from a constant buffer, without any file.\n\n")
	if rep.discards() {
		s.WriteString("Reads of 64k and more are measured with `--discard`, on all servers alike: the client takes their payloads off\n" +
			"the socket without copying them, by splice into a pipe and from there to /dev/null. On a Unix socket its copy takes\n" +
			"as long as all that our server does for such a read, or longer: with it these cells would say how fast the client\n" +
			"copies. But no user's client is that cheap, since it wants the bytes. What one gets that copies them is in the rows\n" +
			"*copied by the client*, which have no goal. In the other sections all reads are copied.\n\n")
	}
	s.WriteString("Beside fio (`--ioengine=nbd`) on the same server, in turn:\n\n")
	if len(rep.Checks) == 0 {
		s.WriteString("Not checked in this run.\n\n")
		return
	}
	s.WriteString("| server | load | bench ops/s | fio ops/s | bench / fio | bench CPU us/op | fio CPU us/op | fio's core busy | |\n" +
		"|---|---|--:|--:|--:|--:|--:|--:|---|\n")
	for _, k := range rep.Checks {
		q, words := k.judge()
		cpu, cores := func(x side) float64 { return x.CPU }, func(x side) float64 { return x.Cores }
		title := k.Cell.Title()
		if k.Cell.Discard {
			title += ", discarded by bench"
		}
		if k.Cell.Medium == onDirect {
			title += ", O_DIRECT"
		}
		fmt.Fprintf(s, "| %s | %s | %s | %s | %s [%s, %s] | %s | %s | %.0f %% | %s |\n", k.Server, title,
			spread(sideStat(k.Bench, sideOps), count), spread(sideStat(k.Fio, sideOps), count), times(q.Median), times(q.Low), times(q.High),
			micros(sideStat(k.Bench, cpu).Median), micros(sideStat(k.Fio, cpu).Median), 100*sideStat(k.Fio, cores).Median, words)
	}
	s.WriteString("\n")
}

// writeServers has every figure of every server.
func (rep *report) writeServers(s *strings.Builder, results []result) {
	s.WriteString("## All servers\n\nMedians of the rounds, and from the least to the most. Latencies and CPU in microseconds, memory in\n" +
		"MiB: all that is resident, and what of it is not a mapped file's.\n\n")
	rep.byPlace(results, func(title string, of []result) {
		fmt.Fprintf(s, "### %s\n\n", title)
		s.WriteString("| | ops/s | p50 | p99 | server CPU/op | cores | client CPU/op | cores | memory |\n" +
			"|---|--:|--:|--:|--:|--:|--:|--:|--:|\n")
		for _, r := range of {
			fmt.Fprintf(s, "| **%s** | | | | | | | | |\n", r.Title())
			for _, name := range rep.Servers {
				f := r.servers[name]
				if f == nil {
					continue
				}
				fmt.Fprintf(s, "| %s | %s | %s | %s | %s | %.2f | %s | %.2f | %.0f, %.0f |\n", name, spread(f.ops, count),
					micros(f.p50.Median), spread(f.p99, micros), spread(f.cpu, micros), f.cores.Median,
					micros(f.client.Median), f.clientCores.Median, f.rss.Median/(1<<20), f.own.Median/(1<<20))
			}
		}
		s.WriteString("\n")
	})
}

func (rep *report) writeMachine(s *strings.Builder) {
	mc := rep.Machine
	s.WriteString("## The machine\n\n| | |\n|---|---|\n")
	row := func(name, value string) { fmt.Fprintf(s, "| %s | %s |\n", name, cmp.Or(value, "not used")) }
	when, ours := rep.measured()
	row("measured", when)
	row("kernel", "Linux "+mc.Kernel)
	row("processor", fmt.Sprintf("%s, %d cores, for servers and client together", mc.CPU, mc.Cores))
	row("memory", fmt.Sprintf("%.0f GiB", float64(mc.Memory)/(1<<30)))
	row("net.core.wmem_max", fmt.Sprint(mc.WmemMax))
	if mc.Idle != "" {
		row("idle processors", mc.Idle)
	}
	row("disk's file system", mc.DiskFS)
	row("Go", mc.Go)
	row(programOurs, ours)
	for _, program := range []string{programQEMU, programNbdkit, "fio"} {
		row(program, mc.Versions[program])
	}
	s.WriteString("\n")
	rep.writeParts(s)
}

func (rep *report) writeMethod(s *strings.Builder) {
	s.WriteString("## How it was measured\n\n```sh\nmake bench\n```\n\n")
	fmt.Fprintf(s, "All servers of a medium are up at once, each on an image of its own: %s of random bytes, on disk\n"+
		"twice that, of which cold loads use all. %s, %v per load; within a round each cell is run on\n"+
		"one server after the other, and who begins changes from round to round. Servers, as started:\n\n",
		bytesize.Format(rep.Image), span(rep.rounds()), rep.CellTime)
	block := func(lines ...string) { s.WriteString("```sh\n" + strings.Join(lines, "\n") + "\n```\n\n") }
	block(rep.Commands...)
	s.WriteString("A load is what the first of these does; the client was checked with the others:\n\n")
	const uri = "'nbd+unix:///?socket=$SOCKET'"
	block(fmt.Sprintf("nbd-export bench --rw randread --bs 4k --depth 32 --conns 1 --time %v --size %s --pid $PID %s",
		rep.CellTime, bytesize.Format(rep.Image), uri),
		strings.Join(append([]string{"fio"}, fioArgs(checkCells[0].cell, uri, rep.Image, max(rep.CellTime, checkTime))...), " "),
		strings.Join(delayed.argv(endpoint{binary: programNbdkit, address: "$SOCKET", size: rep.Image}), " "))
	s.WriteString(`- The better peer is the one with the best median of the cell, among all modes of qemu-nbd and nbdkit,
  chosen for operations and for CPU separately. The ratio is paired: ours to its, round by round, and
  the median of that. The interval is the percentile bootstrap's (10,000 resamples).
- Met is a median at or above the goal; for goals under 1.3x an interval that reaches it.
- Server CPU is the time of all threads of the process, in nanoseconds, kernel time included.
- Cached: read through the server once, so the page cache is as that server fills it. Cold: taken out of
  the page cache before each load, and checked. Writes are synced between loads, not within them.
- nbdkit's file plugin has no O_DIRECT; with ` + "`cache=none`" + ` it drops what it has used from the page cache.
- The 1M read at depth 4 has a lower goal where net.core.wmem_max is below 4 MiB.
`)
	if rep.discards() {
		s.WriteString("- Reads of 64k and more are loads with `--discard`, unless they are called copied: see [the client](#the-client).\n")
	}
}

// spread is a median and its range.
func spread(x stat, format func(float64) string) string {
	return fmt.Sprintf("%s (%s..%s)", format(x.Median), format(x.Min), format(x.Max))
}

// count is a rate in three digits or more: 501k, 12.3k, 4,812.
func count(x float64) string {
	switch {
	case x >= 99950:
		return fmt.Sprintf("%.0fk", x/1e3)
	case x >= 9999.5:
		return fmt.Sprintf("%.1fk", x/1e3)
	case x >= 999.5:
		n := int(x + 0.5)
		return fmt.Sprintf("%d,%03d", n/1000, n%1000)
	}
	return fmt.Sprintf("%.0f", x)
}

// micros is a time in three digits.
func micros(x float64) string {
	switch {
	case x >= 999.5:
		return count(x)
	case x >= 99.95:
		return fmt.Sprintf("%.0f", x)
	case x >= 9.995:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

// times is a ratio.
func times(x float64) string { return fmt.Sprintf("%.2fx", x) }
