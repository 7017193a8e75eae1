package main

import (
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/bench"
)

var update = flag.Bool("update", false, "write what tests compare with anew")

// rounded gives a server's figures of one round in a cell.
func rounded(c cell, server string, round int, ops, cpu float64) sample {
	r := &bench.Result{
		Total:     bench.Stats{Ops: int64(ops), OpsPerSec: ops, P50Micros: 1e6 / ops, P99Micros: 3e6 / ops},
		ClientCPU: bench.CPU{MicrosPerOp: 1.25, Cores: 1.25 * ops / 1e6},
		ServerCPU: &bench.CPU{MicrosPerOp: cpu, Cores: cpu * ops / 1e6},
		ServerRSS: 12 << 20,
	}
	return sample{Cell: c.ID(), Server: server, Round: round, Own: 5 << 20, Result: r}
}

// cellsOf are goals' cells by their ids, in this order.
func cellsOf(ids ...string) (cells []cell) {
	for _, id := range ids {
		i := slices.IndexFunc(goals, func(c cell) bool { return c.ID() == id })
		cells = append(cells, goals[i])
	}
	return cells
}

// testReport has a cell that is met, one whose best peers differ and that is
// missed by half, large reads that are discarded and the same copied, which have no
// goal, one near its goal, a cold one that was not, and one that failed.
func testReport() *report {
	rep := &report{
		When: time.Date(2026, 11, 23, 1, 2, 3, 0, time.UTC), Rounds: 7, CellTime: time.Second, Image: 1 << 30,
		Cells: cellsOf("tmpfs-unix-randread-4k-d32-c1", "tmpfs-unix-randread-4k-d1-c1", "tmpfs-unix-randread-1M-d4-c1-discard",
			"tmpfs-unix-randread-1M-d4-c1", "tmpfs-tcp-randread-4k-d32-c1", "ext4-cold-unix-randread-4k-d32-c1", "ext4-cold-unix-read-1M-d4-c1-discard"),
		Servers:  []string{programLimit, programOurs, "qemu-nbd/threads", "qemu-nbd/io_uring", programNbdkit},
		Commands: []string{"nbd-export serve -f raw -k $SOCKET $IMAGE", "nbdkit -f -U $SOCKET file $IMAGE"},
		Machine: machine{
			Kernel: "6.18.0 x86_64", CPU: "A Processor", Cores: 2, Memory: 24 << 30, WmemMax: deepBuffer, DiskFS: "ext4", Go: "go1.26.8",
			Versions: map[string]string{programOurs: "nbd-export 1", programQEMU: "qemu-nbd 10", programNbdkit: "nbdkit 1", "fio": "fio-3"},
		},
	}
	add := func(c cell, server string, ops, cpu float64) {
		for round := range rep.Rounds {
			drift := 1 + 0.02*float64((round*3+len(server))%7)
			rep.Samples = append(rep.Samples, rounded(c, server, round, ops*drift, cpu/drift))
		}
	}
	for i, c := range rep.Cells[:6] {
		add(c, programOurs, []float64{560e3, 34e3, 13e3, 6e3, 335e3, 40e3}[i], []float64{1.6, 15, 66, 75, 2.9, 18}[i])
		add(c, "qemu-nbd/threads", []float64{15e3, 15e3, 2.5e3, 1.9e3, 15e3, 15e3}[i], []float64{80, 80, 400, 420, 80, 80}[i])
		add(c, "qemu-nbd/io_uring", []float64{49e3, 20e3, 2.4e3, 1.8e3, 31e3, 18e3}[i], []float64{28, 35, 420, 500, 42, 60}[i])
		add(c, programNbdkit, []float64{122e3, 18e3, 2e3, 1.8e3, 54e3, 33e3}[i], []float64{8.8, 24, 450, 480, 19, 40}[i])
	}
	add(rep.Cells[0], programLimit, 593e3, 1.6)
	add(rep.Cells[1], programLimit, 36e3, 27)
	cold, warm := 0.0, 0.25
	for i := range rep.Samples {
		if rep.Samples[i].Cell == rep.Cells[5].ID() {
			rep.Samples[i].Resident = &cold
		}
	}
	rep.Samples[len(rep.Samples)-15].Resident = &warm
	rep.Samples = append(rep.Samples, sample{Cell: rep.Cells[6].ID(), Server: programOurs, Round: rep.Rounds - 1, Err: "connection\nreset"})
	rep.Checks = []check{
		{checkCells[0].cell, programLimit, []side{{600e3, 1, 0.6}, {610e3, 1, 0.6}}, []side{{100e3, 9, 0.9}, {101e3, 9, 0.9}}},
		{checkCells[1].cell, delayed.name, []side{{4000, 9, 0.04}, {4100, 9, 0.04}}, []side{{3900, 19, 0.07}, {4100, 19, 0.07}}},
		{checkCells[3].cell, delayed.name, []side{{3900, 15, 0.06}}, []side{{3800, 40, 0.15}}},
		{checkCells[4].cell, "qemu-nbd/io_uring", []side{{4000, 9, 0.04}}, []side{{3000, 19, 0.07}}},
	}
	return rep
}

func TestResults(t *testing.T) {
	r := testReport().results()
	if v := r[0].ops; v.peer != programNbdkit || v.Median < 4 || !v.met() {
		t.Errorf("%+v", v)
	}
	// The limit server against the same peers, with nothing to reach.
	if l := r[1].limitOps; l.peer != "qemu-nbd/io_uring" || l.Median < 1.7 || l.Median > 1.9 || l.goal != 0 || r[2].limitOps.known() {
		t.Errorf("%+v %+v", l, r[2].limitOps)
	}
	// The best peer of each figure, not of the program.
	if r[1].ops.peer != "qemu-nbd/io_uring" || r[1].cpu.peer != programNbdkit {
		t.Errorf("%+v %+v", r[1].ops, r[1].cpu)
	}
	if len(r[6].failed) != 1 || r[6].ops.known() || r[6].ops.met() {
		t.Errorf("%+v", r[6])
	}
	// What is copied has figures of its own, and a ratio, but nothing to reach.
	if d, c := r[2].ops, r[3].ops; d.goal != 4.5 || d.Median <= c.Median || c.goal != 0 || !c.known() {
		t.Errorf("%+v %+v", d, c)
	}
	if n := testReport().failed(); n != 1 {
		t.Error(n)
	}
	lonely := testReport()
	lonely.Samples = lonely.Samples[:7]
	if v := lonely.results()[0].ops; v.known() || v.peer != "" {
		t.Errorf("a ratio to nobody: %+v", v)
	}
}

// TestOldRun renders figures of a run from before large reads were discarded: they
// are what they were, and have the goals of that time.
func TestOldRun(t *testing.T) {
	rep := testReport()
	old := rep.Cells[3]
	old.Ops, old.CPU = 4.5, 4.7
	rep.Cells = []cell{rep.Cells[0], old}
	path := filepath.Join(t.TempDir(), "old.json")
	if err := rep.save(path); err != nil {
		t.Fatal(err)
	}
	rep, err := loadReport(path)
	if err != nil {
		t.Fatal(err)
	}
	page := rep.markdown(rep.results())
	for _, s := range []string{"3 of 4 met", "| 1M random read, depth 4, copied by the client | 6,360 | 3.22x", "| 4.5x | **missed** |"} {
		if !strings.Contains(page, s) {
			t.Errorf("the page does not say %q:\n%s", s, page)
		}
	}
	for _, s := range []string{"`--discard`", "Rows without a goal"} {
		if strings.Contains(page, s) {
			t.Errorf("nothing was discarded, but the page says %q", s)
		}
	}
	// In a part that is measured now they stand beside what is discarded.
	now := testReport()
	now.Cells = now.Cells[2:3]
	now.Samples = slices.DeleteFunc(now.Samples, func(s sample) bool { return s.Cell != now.Cells[0].ID() })
	if err := now.onto(path); err != nil {
		t.Fatal(err)
	}
	results := now.results()
	if len(results) != 3 || results[1].ops.goal != 4.5 || !results[1].Discard || results[2].ops.goal != 0 || results[2].Discard || !results[2].ops.known() {
		t.Errorf("%+v", results)
	}
}

func TestStockGoal(t *testing.T) {
	for _, c := range goals {
		if c.StockOps == 0 {
			continue
		}
		if ops, cpu := c.goal(212992); ops != c.StockOps || cpu != c.StockCPU {
			t.Error(c.ID(), ops, cpu)
		}
		if ops, cpu := c.goal(deepBuffer); ops != c.Ops || cpu != c.CPU {
			t.Error(c.ID(), ops, cpu)
		}
		return
	}
	t.Error("no cell has a goal for small buffers")
}

// TestGolden compares the report and the plot with what they were;
// go test ./bench/compare -update writes them anew.
func TestGolden(t *testing.T) {
	// What limits the real cells today is not this test's business.
	today := causes
	t.Cleanup(func() { causes = today })
	causes = nil
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw", "figures.json")
	rep := testReport()
	if err := rep.save(raw); err != nil {
		t.Fatal(err)
	}
	rep, err := loadReport(raw)
	if err != nil {
		t.Fatal(err)
	}
	if err := rep.write(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{reportName, plotName} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		golden := filepath.Join("testdata", name)
		if *update {
			if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(golden, got, 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Errorf("%s is not as in testdata; see -update:\n%s", name, got)
		}
	}
}

func TestPlotIsXML(t *testing.T) {
	rep := testReport()
	rep.Machine.DiskFS = `<&">`
	d := xml.NewDecoder(strings.NewReader(rep.plot(rep.results())))
	for {
		_, err := d.Token()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestNumbers(t *testing.T) {
	for x, want := range map[float64]string{
		0: "0", 12.4: "12", 999.4: "999", 999.5: "1,000", 4812: "4,812", 9999.4: "9,999", 9999.6: "10.0k", 99949: "99.9k",
		99950: "100k", 501e3: "501k", 1.5e6: "1500k",
	} {
		if got := count(x); got != want {
			t.Errorf("%v: %s, want %s", x, got, want)
		}
	}
	for x, want := range map[float64]string{0: "0.00", 1.904: "1.90", 9.996: "10.0", 35.71: "35.7", 99.96: "100", 553: "553", 1247: "1,247"} {
		if got := micros(x); got != want {
			t.Errorf("%v: %s, want %s", x, got, want)
		}
	}
}
