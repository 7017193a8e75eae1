package main

import (
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/bench"
)

// What is there already is held against raw, the rest against the better of
// qemu-nbd's modes.
func TestQcow2Report(t *testing.T) {
	result := func(ops float64) *bench.Result {
		return &bench.Result{Total: bench.Stats{OpsPerSec: ops}, ServerCPU: &bench.CPU{MicrosPerOp: 2}}
	}
	rep := &report{Machine: machine{DiskFS: "ext4"}}
	for round := range 7 {
		for cell, ops := range map[int][]float64{0: {95, 100, 20, 30}, 4: {200, 0, 20, 10}} {
			for i, name := range qcowServers {
				if ops[i] > 0 {
					rep.Qcow2 = append(rep.Qcow2, qcowSample{Cell: cell, Server: name, Round: round, Result: result(1000 * ops[i])})
				}
			}
		}
	}
	rep.Qcow2 = append(rep.Qcow2, qcowSample{Cell: 12, Server: qemuThreads, Round: 2, Err: "gone"})
	var s strings.Builder
	rep.writeQcow2(&s)
	for _, want := range []string{
		"| tmpfs, 4k random read, depth 32 | 95.0k (2.00) | 100k (2.00) | 20.0k (2.00) | 30.0k (2.00) | 0.95x [0.95x, 0.95x] | 0.9x | met |",
		"| tmpfs, 4k random write, depth 32, empty | 200k (2.00) |  | 20.0k (2.00) | 10.0k (2.00) | 10.00x [10.00x, 10.00x] | 10x | met |",
		"qemu-nbd/threads, ext4, 4k random write, depth 32, empty, FLUSH after 16, in round 3: gone",
	} {
		if !strings.Contains(s.String(), want) {
			t.Errorf("no %q in\n%s", want, s.String())
		}
	}
	if n := rep.failed(); n != 1 {
		t.Errorf("%d failed", n)
	}
}
