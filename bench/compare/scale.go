package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nbd-export/nbd-export/bench"
	"github.com/nbd-export/nbd-export/client"
)

// Scale: what many connections and many exports cost, ours alone.

const scaleID = "scale-tmpfs"

const (
	idleConns  = 1000
	idleTime   = time.Second // for which their processor time is taken
	busyConns  = 256
	manyImages = 1000
)

// scaleRow is one measure and the most, or with atLeast the least, it is to be.
type scaleRow struct {
	What    string    `json:"what"`
	Unit    string    `json:"unit"`
	Values  []float64 `json:"values"` // by round
	Bound   float64   `json:"bound"`
	AtLeast bool      `json:"at_least,omitempty"`
}

// met holds the median against the bound. A quotient of two loads is noisy: of
// those, what half of the rounds reach within a tenth counts.
func (s scaleRow) met() bool {
	m := median(s.Values)
	if s.AtLeast {
		return m >= s.Bound*(1-near)
	}
	return m <= s.Bound
}

// scale measures all rows.
func (r *runner) scale(ctx context.Context) error {
	at := slices.IndexFunc(r.servers, func(s server) bool { return s.name == programOurs })
	if at < 0 {
		return nil
	}
	r.say("scale: making images, starting servers")
	rows := []scaleRow{
		{What: fmt.Sprintf("memory with %d idle connections", idleConns), Unit: "MiB", Bound: 40},
		{What: fmt.Sprintf("processor time of %d idle connections", idleConns), Unit: "% of a core", Bound: 0.1},
		{What: fmt.Sprintf("4k random reads, depth 8, of %d connections to those of 4", busyConns), Unit: "x", Bound: 1, AtLeast: true},
		{What: "garbage collection of all processor time, 4k random reads, depth 32", Unit: "%", Bound: 1},
		{What: fmt.Sprintf("start of a process with %d exports", manyImages), Unit: "s", Bound: 1},
	}
	for round := range r.cfg.rounds {
		values, err := r.scaleRound(ctx, r.servers[at], round)
		if err != nil {
			return err
		}
		for i, v := range values {
			rows[i].Values = append(rows[i].Values, v)
		}
	}
	r.report.Scale = rows
	return nil
}

func (r *runner) scaleRound(ctx context.Context, s server, round int) (values []float64, err error) {
	// It says what it collects: see collection.
	if err := os.Setenv("GODEBUG", "gctrace=1"); err != nil {
		return nil, err
	}
	running, stop, err := r.startAll(ctx, place{onTmpfs, "unix"}, []server{s})
	err = errors.Join(err, os.Unsetenv("GODEBUG"))
	defer stop()
	if err != nil {
		return nil, err
	}
	p := running[0]
	memory, cpu, err := idle(ctx, p)
	if err != nil {
		return nil, err
	}
	var ops [2]float64
	for i, conns := range []int{4, busyConns} {
		c := cell{RW: "randread", BlockSize: 4 * k, Depth: 8, Conns: conns}
		res, err := bench.Run(ctx, r.load(c, p, round))
		if err != nil {
			return nil, err
		}
		ops[i] = res.Total.OpsPerSec
	}
	if _, err := bench.Run(ctx, r.load(cell{RW: "randread", BlockSize: 4 * k, Depth: 32, Conns: 1}, p, round)); err != nil {
		return nil, err
	}
	collected := collection(p.said.String())
	start, err := r.startMany(ctx)
	return []float64{memory, cpu, ops[1] / ops[0], collected, start}, err
}

// idle connects many clients that ask nothing, and returns the server's memory
// in MiB and its processor time as a part of a core, in per cent.
func idle(ctx context.Context, p *process) (memory, cpu float64, err error) {
	var conns []*client.Batch
	defer func() {
		for _, b := range conns {
			_ = b.Close()
		}
	}()
	for range idleConns {
		b, err := client.DialBatch(ctx, p.uri(), client.Options{}, 1)
		if err != nil {
			return 0, 0, err
		}
		conns = append(conns, b)
	}
	before, err := processorTime(p.cmd.Process.Pid)
	if err != nil {
		return 0, 0, err
	}
	select {
	case <-ctx.Done():
		return 0, 0, ctx.Err()
	case <-time.After(idleTime):
	}
	after, err := processorTime(p.cmd.Process.Pid)
	return float64(p.anonymous()) / (1 << 20), 100 * (after - before).Seconds() / idleTime.Seconds(), err
}

// processorTime is that of the threads a process has, by the scheduler.
func processorTime(pid int) (time.Duration, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			continue // the thread has ended
		}
		first, _, _ := strings.Cut(string(b), " ")
		n, _ := strconv.ParseInt(first, 10, 64)
		sum += n
	}
	return time.Duration(sum), nil
}

var gcLine = regexp.MustCompile(`(?m)^gc \d+ @[\d.]+s (\d+)%`)

// collection is the part of garbage collection in a process's time, per cent,
// from what it said last of it; the runtime rounds down.
func collection(said string) float64 {
	all := gcLine.FindAllStringSubmatch(said, -1)
	if len(all) == 0 {
		return 0
	}
	n, _ := strconv.ParseFloat(all[len(all)-1][1], 64)
	return n
}

// startMany starts a process with many exports, and returns how many seconds it
// takes until it serves them.
func (r *runner) startMany(ctx context.Context) (seconds float64, err error) {
	dir, err := os.MkdirTemp(r.cfg.shm, "nbd-export-compare-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ready := filepath.Join(dir, "pid")
	args := []string{"daemon", "--control", filepath.Join(dir, "ctl"), "--pid-file", ready,
		"--nbd-server", "addr.type=unix,addr.path=" + filepath.Join(dir, "s")}
	for i := range manyImages {
		image := filepath.Join(dir, fmt.Sprintf("%d.img", i))
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			return 0, err
		}
		if err := os.Truncate(image, 1<<20); err != nil {
			return 0, err
		}
		args = append(args, "--blockdev", fmt.Sprintf("driver=raw,node-name=n%d,file.driver=file,file.filename=%s", i, image),
			"--export", fmt.Sprintf("type=nbd,id=e%d,node-name=n%d,name=n%d,writable=on", i, i, i))
	}
	cmd := exec.CommandContext(ctx, r.files[programOurs], args...)
	var said tail
	cmd.Stdout, cmd.Stderr = &said, &said
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	defer func() {
		_ = cmd.Process.Kill()
		<-ended
	}()
	for {
		if _, err := os.Stat(ready); err == nil {
			break
		}
		select {
		case <-ended:
			return 0, fmt.Errorf("it has ended: %s", said.String())
		case <-time.After(time.Millisecond):
		}
		if time.Since(begin) > startTime {
			return 0, fmt.Errorf("it is not ready after %v", startTime)
		}
	}
	seconds = time.Since(begin).Seconds()
	exports, err := client.List(ctx, "nbd+unix:///?socket="+filepath.Join(dir, "s"))
	if err == nil && len(exports) != manyImages {
		err = fmt.Errorf("%d exports instead of %d", len(exports), manyImages)
	}
	return seconds, err
}

func (rep *report) writeScale(s *strings.Builder) {
	if len(rep.Scale) == 0 {
		return
	}
	s.WriteString("## Scale\n\n" + rep.note(scaleID) + "nbd-export alone, on tmpfs, Unix socket. Memory is what is not a mapped file's.\n\n" +
		"| | measured | goal | |\n|---|--:|--:|---|\n")
	for _, row := range rep.Scale {
		most, verdict := "at most", "met"
		if row.AtLeast {
			most = "at least"
		}
		if !row.met() {
			verdict = "**missed**"
		}
		format := func(x float64) string { return fmt.Sprintf("%.3g", x) }
		fmt.Fprintf(s, "| %s | %s %s | %s %.3g | %s |\n", row.What, spread(newStat(row.Values), format), row.Unit, most, row.Bound, verdict)
	}
	s.WriteString("\n")
}
