package main

import (
	"fmt"
	"strings"

	"github.com/nbd-export/nbd-export/internal/bytesize"
)

// Media of images. The disk may have another file system; reports name it.
const (
	onTmpfs  = "tmpfs"
	onDirect = "direct"      // O_DIRECT on the disk
	onCached = "ext4-cached" // all of the image in the page cache
	onCold   = "ext4-cold"   // none of it
)

// cell is a load and what we want to reach in it, as ratios to the better peer:
// more operations per second, less processor time per operation.
type cell struct {
	Medium    string `json:"medium"`
	Transport string `json:"transport"` // unix or tcp
	RW        string `json:"rw"`        // as in bench.Config; mixed is 70 % reads
	BlockSize int64  `json:"block_size"`
	Depth     int    `json:"depth"`
	Conns     int    `json:"conns"`
	Discard   bool   `json:"discard,omitempty"` // the client throws payloads away uncopied

	// Goals; 0: none.
	Ops float64 `json:"ops_goal"`
	CPU float64 `json:"cpu_goal"`
	// Instead where net.core.wmem_max is below deepBuffer; 0: the same.
	StockOps float64 `json:"stock_ops_goal,omitempty"`
	StockCPU float64 `json:"stock_cpu_goal,omitempty"`

	Quick bool `json:"-"` // part of a quick run
}

// deepBuffer is the net.core.wmem_max from which a send can hold a large reply.
const deepBuffer = 4 << 20

const (
	k = 1 << 10
	m = 1 << 20
)

// largeRead is from where on reads are discarded: the client's copy is most of what
// they take.
const largeRead = 64 * k

// What the client does with payloads.
const copied, discarded = false, true

// goals are all cells, those of one medium and transport next to each other. Large
// reads are discarded by the client; what such a load reaches where it is copied
// stands beside it, without a goal.
var goals = []cell{
	{onTmpfs, "unix", "randread", 4 * k, 32, 1, copied, 4, 5, 0, 0, true},
	{onTmpfs, "unix", "randread", 4 * k, 32, 4, copied, 4, 5, 0, 0, false},
	{onTmpfs, "unix", "randread", 4 * k, 1, 1, copied, 1.9, 1.3, 0, 0, true},
	{onTmpfs, "unix", "randread", 4 * k, 1, 4, copied, 1.8, 2.2, 0, 0, false},
	{onTmpfs, "unix", "randwrite", 4 * k, 32, 1, copied, 2.5, 2.7, 0, 0, true},
	{onTmpfs, "unix", "mixed", 4 * k, 32, 1, copied, 3, 3, 0, 0, false},
	{onTmpfs, "unix", "randread", 16 * k, 16, 1, copied, 2.8, 3.2, 0, 0, false},
	{onTmpfs, "unix", "randread", 64 * k, 8, 1, discarded, 2.9, 3.2, 0, 0, true},
	{onTmpfs, "unix", "randread", 64 * k, 8, 1, copied, 0, 0, 0, 0, false},
	{onTmpfs, "unix", "randread", 1 * m, 4, 1, discarded, 4.5, 4.7, 2, 2, true},
	{onTmpfs, "unix", "randread", 1 * m, 4, 1, copied, 0, 0, 0, 0, false},
	{onTmpfs, "unix", "randread", 1 * m, 1, 1, discarded, 1.7, 1.7, 0, 0, false},
	{onTmpfs, "unix", "randread", 1 * m, 1, 1, copied, 0, 0, 0, 0, false},
	{onTmpfs, "unix", "randwrite", 64 * k, 8, 1, copied, 1.3, 1.4, 0, 0, true},
	{onTmpfs, "unix", "randwrite", 1 * m, 4, 1, copied, 2, 2, 0, 0, true},
	{onTmpfs, "tcp", "randread", 4 * k, 32, 1, copied, 5, 6, 0, 0, true},
	{onTmpfs, "tcp", "randread", 64 * k, 8, 1, discarded, 2, 2, 0, 0, false},
	{onTmpfs, "tcp", "randread", 64 * k, 8, 1, copied, 0, 0, 0, 0, false},
	{onTmpfs, "tcp", "randread", 1 * m, 4, 1, discarded, 1, 1.2, 0, 0, false},
	{onTmpfs, "tcp", "randread", 1 * m, 4, 1, copied, 0, 0, 0, 0, false},
	{onTmpfs, "tcp", "randwrite", 1 * m, 4, 1, copied, 1.5, 1.8, 0, 0, false},
	{onDirect, "unix", "randread", 4 * k, 1, 1, copied, 1.4, 1.1, 0, 0, false},
	{onDirect, "unix", "randread", 4 * k, 32, 1, copied, 2, 4.5, 0, 0, true},
	{onDirect, "unix", "randread", 4 * k, 32, 4, copied, 2.2, 4, 0, 0, false},
	{onDirect, "unix", "randwrite", 4 * k, 32, 1, copied, 2.7, 3.2, 0, 0, true},
	{onCold, "unix", "randread", 4 * k, 32, 1, copied, 1.3, 2, 0, 0, true},
	{onCold, "unix", "read", 1 * m, 4, 1, discarded, 1.1, 1.2, 0, 0, true},
	{onCached, "unix", "randread", 4 * k, 32, 1, copied, 4.5, 6, 0, 0, true},
	{onCached, "unix", "randread", 1 * m, 4, 1, discarded, 3.8, 6, 0, 0, false},
	{onCached, "unix", "randread", 1 * m, 4, 1, copied, 0, 0, 0, 0, false},
	{onCached, "unix", "randwrite", 4 * k, 32, 1, copied, 3, 3.5, 0, 0, true},
}

// ID is the cell's name on command lines and in raw figures.
func (c cell) ID() string {
	id := fmt.Sprintf("%s-%s-%s-%s-d%d-c%d", c.Medium, c.Transport, c.RW, bytesize.Format(c.BlockSize), c.Depth, c.Conns)
	if c.Discard {
		id += "-discard"
	}
	return id
}

// loads are how people call the loads.
var loads = map[string]string{
	"randread": "random read", "randwrite": "random write", "read": "sequential read", "mixed": "random 70:30 mix",
}

// Title is the cell's name within its medium and transport.
func (c cell) Title() string {
	s := fmt.Sprintf("%s %s, depth %d", bytesize.Format(c.BlockSize), loads[c.RW], c.Depth)
	if c.Conns > 1 {
		s += fmt.Sprintf(", %d connections", c.Conns)
	}
	if c.largeRead() && !c.Discard {
		s += ", copied by the client"
	}
	return s
}

// place is a medium reached by a transport: what one set of servers is for.
type place struct{ medium, transport string }

func (c cell) place() place { return place{c.Medium, c.Transport} }

// Title is how the place is called in headings; fs is the disk's file system.
func (p place) Title(fs string) string {
	s := map[string]string{
		onTmpfs: "tmpfs", onDirect: "O_DIRECT on " + fs, onCached: fs + ", cached", onCold: fs + ", cold cache",
	}[p.medium]
	if p.transport == "tcp" {
		return s + ", TCP"
	}
	return s + ", Unix socket"
}

// goal is what to reach where net.core.wmem_max is wmem.
func (c cell) goal(wmem int64) (ops, cpu float64) {
	if c.StockOps > 0 && wmem < deepBuffer {
		return c.StockOps, c.StockCPU
	}
	return c.Ops, c.CPU
}

func (c cell) writes() bool { return strings.HasSuffix(c.RW, "write") || c.RW == "mixed" }

func (c cell) largeRead() bool {
	return (c.RW == "read" || c.RW == "randread") && c.BlockSize >= largeRead
}

// places are those of cells, in their order.
func places(cells []cell) []place {
	var all []place
	for _, c := range cells {
		if len(all) == 0 || all[len(all)-1] != c.place() {
			all = append(all, c.place())
		}
	}
	return all
}
