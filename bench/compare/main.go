// Command compare puts the same loads on nbd-export, qemu-nbd, nbdkit and a
// server that does nothing, and writes docs/BENCHMARKS.md from what it measured.
// make bench runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/nbd-export/nbd-export/internal/bytesize"
)

// config is one comparison.
type config struct {
	rounds   int
	cellTime time.Duration
	// handoverTime is for each cell of handovers.
	handoverTime time.Duration
	imageSize    bytesize.Size
	cells        []cell
	handovers    []handoverCell
	fair         []fairScenario
	group        bool     // hand over a group of images too
	many         bool     // measure scale too
	qcow2        bool     // and qcow2 images
	servers      []string // names or programs; empty: all
	out          string   // directory of BENCHMARKS.md and benchmarks.svg
	raw          string   // file of the raw figures
	onto         string   // file of those of all parts, or ""
	ours         string   // our program
	shm, disk    string   // directories for images
	quick        bool
	noCheck      bool
}

func init() {
	// Children are killed with the thread that started them (Pdeathsig), so that
	// must be the one that lives as long as the process.
	runtime.LockOSThread()
}

// alsoRuns are the programs that this one is too, by their first argument.
var alsoRuns = map[string]func(args []string) error{
	limitArg:      runLimit,
	limitOwnerArg: runLimitOwner,
	loadArg:       func(args []string) error { return runLoad(args, os.Stdout) },
	ordersArg:     func(args []string) error { return runOrders(args, os.Stdin, os.Stdout) },
	readsArg:      func(args []string) error { return runReads(args, os.Stdin, os.Stdout) },
}

func main() {
	if len(os.Args) > 1 {
		if run := alsoRuns[os.Args[1]]; run != nil {
			exit(run(os.Args[2:]))
		}
	}
	c, render, err := parseFlags(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(2)
	}
	if render != "" {
		rep, err := loadReport(render)
		if err == nil {
			err = rep.write(c.out)
		}
		exit(err)
	}
	exit(compare(c))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func parseFlags(args []string) (c config, render string, err error) {
	f := flag.NewFlagSet("compare", flag.ContinueOnError)
	var cells, servers string
	c.imageSize = 1 << 30
	f.BoolVar(&c.quick, "quick", false, "fewer cells, 3 short rounds, small images; proves nothing, written beside the raw figures")
	f.IntVar(&c.rounds, "rounds", 7, "interleaved rounds")
	f.DurationVar(&c.cellTime, "cell-time", time.Second, "of each load")
	f.DurationVar(&c.handoverTime, "handover-time", enoughHandovers, "of each cell of handovers")
	f.Var(&c.imageSize, "image-size", "of images on tmpfs; those on disk are twice as large")
	f.StringVar(&cells, "cells", "", "only cells whose id matches this regular expression")
	f.StringVar(&servers, "servers", "", "only these servers or programs, with commas between them")
	f.StringVar(&c.out, "out", "docs", "directory for BENCHMARKS.md and benchmarks.svg")
	f.StringVar(&c.raw, "raw", "", "file for the raw figures (default bin/bench/DATE-TIME.json)")
	f.StringVar(&c.onto, "onto", "", "file with what was measured before: the report is of that too, but for the cells measured now, and all is kept there")
	f.StringVar(&c.ours, "program", "bin/nbd-export", "our program")
	f.StringVar(&c.shm, "shm-dir", "/dev/shm", "directory on tmpfs for images")
	f.StringVar(&c.disk, "disk-dir", "bin/bench", "directory on a disk for images")
	f.BoolVar(&c.noCheck, "no-check", false, "leave out the client check")
	f.StringVar(&render, "render", "", "measure nothing, write the report of these raw figures")
	list := f.Bool("list", false, "list cells and goals")
	if err := f.Parse(args); err != nil {
		return c, "", err
	}
	if f.NArg() > 0 {
		return c, "", fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	set := map[string]bool{}
	f.Visit(func(f *flag.Flag) { set[f.Name] = true })
	if c.quick {
		c.quickDefaults(set)
	}
	if c.raw == "" {
		c.raw = filepath.Join("bin", "bench", time.Now().Format("20060102-150405")+".json")
	}
	match, err := regexp.Compile(cells)
	if err != nil {
		return c, "", fmt.Errorf("--cells: %w", err)
	}
	for _, x := range goals {
		if match.MatchString(x.ID()) && (x.Quick || !c.quick || set["cells"]) {
			c.cells = append(c.cells, x)
		}
	}
	for _, x := range handoverCells {
		if match.MatchString(x.ID()) && (!c.quick || set["cells"]) {
			c.handovers = append(c.handovers, x)
		}
	}
	for _, x := range fairScenarios {
		if match.MatchString(x.id) && (x.quick || !c.quick || set["cells"]) {
			c.fair = append(c.fair, x)
		}
	}
	c.qcow2 = match.MatchString(qcowID) && (!c.quick || set["cells"])
	c.many = match.MatchString(scaleID) && (!c.quick || set["cells"])
	c.group = match.MatchString(groupID) && (!c.quick || set["cells"])
	if servers != "" {
		c.servers = strings.Split(servers, ",")
	}
	if *list {
		for _, x := range goals {
			if x.Ops == 0 {
				fmt.Printf("%-40s no goal\n", x.ID())
				continue
			}
			fmt.Printf("%-40s %.3gx %.3gx\n", x.ID(), x.Ops, x.CPU)
		}
		for _, x := range handoverCells {
			fmt.Printf("%-40s %.3gx of QEMU's times at most\n", x.ID(), x.Goal)
		}
		for _, x := range fairScenarios {
			fmt.Printf("%-40s %.3gx\n", x.id, fairGoal)
		}
		fmt.Printf("%-40s goals of its own\n", scaleID)
		fmt.Printf("%-40s goals of its own\n", qcowID)
		fmt.Printf("%-40s %v at most\n", groupID, groupGoal)
		return c, "", flag.ErrHelp
	}
	switch {
	case render != "":
	case len(c.cells)+len(c.handovers)+len(c.fair) == 0 && !c.group && !c.many && !c.qcow2:
		return c, "", fmt.Errorf("no cell matches %q; --list shows them", cells)
	case c.rounds < 1 || c.cellTime <= 0 || c.imageSize < 64<<20:
		return c, "", errors.New("want at least one round, a time, and images of 64M or more")
	}
	return c, render, nil
}

// quickDefaults keeps the whole run under three minutes.
func (c *config) quickDefaults(set map[string]bool) {
	if !set["rounds"] {
		c.rounds = 3
	}
	if !set["cell-time"] {
		c.cellTime = 250 * time.Millisecond
	}
	if !set["image-size"] {
		c.imageSize = 256 << 20
	}
	if !set["out"] {
		c.out = filepath.Join("bin", "bench")
	}
}

// compare measures and writes the report. What was measured until an error or
// an interruption is in the raw figures.
func compare(c config) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	r, err := newRunner(ctx, c)
	if err != nil {
		return err
	}
	err = r.run(ctx)
	err = errors.Join(err, r.close())
	if werr := r.report.save(c.raw); werr != nil {
		return errors.Join(err, werr)
	}
	fmt.Fprintln(os.Stderr, "raw figures:", c.raw)
	if ctx.Err() != nil {
		return errors.New("interrupted; no report written")
	}
	if err != nil {
		return err
	}
	failed := r.report.failed()
	if c.onto != "" {
		if err := r.report.onto(c.onto); err != nil {
			return err
		}
	}
	if err := r.report.write(c.out); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "report:", filepath.Join(c.out, reportName))
	if failed > 0 {
		return fmt.Errorf("%d loads failed; the report lists them", failed)
	}
	return nil
}
