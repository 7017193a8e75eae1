package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/bench"
)

// TestLimit puts all kinds of loads on the limit server; replies that do not
// fit the requests would end them.
func TestLimit(t *testing.T) {
	const size = 64 << 20
	for _, network := range []string{"unix", "tcp"} {
		address := "127.0.0.1:0"
		if network == "unix" {
			address = filepath.Join(t.TempDir(), "s")
		}
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() { _ = serveLimit(l, size) }()
		e := endpoint{transport: network, address: address}
		if network == "tcp" {
			_, e.address, _ = net.SplitHostPort(l.Addr().String())
		}
		for _, bs := range []int64{512, 4096, 100_000, 1 << 20, 3 << 20} {
			ops := min(500, 16<<20/bs)
			for _, rw := range []string{"randread", "randwrite", "mixed"} {
				for _, conns := range []int{1, 3} {
					c := bench.Config{
						URI: e.uri(), RW: rw, ReadPercent: 50, BlockSize: bs, Depth: 40, Conns: conns, Ops: ops, FlushEvery: 7, FUA: true,
					}
					if rw == "randread" {
						c.FlushEvery, c.Depth = 0, 200
					}
					r, err := bench.Run(t.Context(), c)
					if err != nil || r.Total.Ops != ops {
						t.Fatalf("%s %s %d: %d operations, %v", network, rw, bs, r.Total.Ops, err)
					}
				}
			}
		}
	}
}

func TestCells(t *testing.T) {
	if len(goals) != 31 {
		t.Errorf("%d cells", len(goals))
	}
	ids, seen := map[string]bool{}, map[place]bool{}
	quick := map[place]bool{}
	for _, c := range goals {
		if ids[c.ID()] {
			t.Errorf("%s twice", c.ID())
		}
		ids[c.ID()] = true
		quick[c.place()] = quick[c.place()] || c.Quick
		cfg := bench.Config{URI: "nbd://h", RW: c.RW, BlockSize: c.BlockSize, Depth: c.Depth, Conns: c.Conns, Ops: 1}
		if err := cfg.Check(); err != nil {
			t.Errorf("%s: %v", c.ID(), err)
		}
		if aside := c.largeRead() && !c.Discard; loads[c.RW] == "" || (c.Ops > 0) == aside || (c.CPU > 0) == aside || c.Discard && !c.largeRead() {
			t.Errorf("%s: %+v", c.ID(), c)
		}
		if c.Discard && c.Medium != onCold { // there the disk is the limit
			if aside := cellsOf(strings.TrimSuffix(c.ID(), "-discard"))[0]; aside.Discard || aside.Quick {
				t.Errorf("beside %s: %+v", c.ID(), aside)
			}
		}
	}
	for _, p := range places(goals) {
		if seen[p] {
			t.Errorf("cells of %v are not together", p)
		}
		if seen[p] = true; !quick[p] {
			t.Errorf("no quick cell for %v", p)
		}
	}
	for id := range causes {
		if !ids[id] {
			t.Errorf("a cause for %s, which is no cell", id)
		}
	}
	for _, c := range checkCells {
		if !slices.ContainsFunc(append(allServers(false), delayed), func(s server) bool { return s.name == c.server }) {
			t.Errorf("no server %s", c.server)
		}
	}
}

func TestChoose(t *testing.T) {
	names := func(wanted ...string) string {
		chosen, err := choose(allServers(true), wanted)
		if err != nil {
			return err.Error()
		}
		var s []string
		for _, c := range chosen {
			s = append(s, c.name)
		}
		return strings.Join(s, " ")
	}
	for want, got := range map[string]string{
		"limit nbd-export nbd-export/portable nbd-export/uring qemu-nbd/threads qemu-nbd/io_uring qemu-nbd/native nbdkit": names(),
		"nbd-export nbd-export/portable nbd-export/uring nbdkit":                                                          names("nbdkit", "nbd-export"),
		"qemu-nbd/native":                                    names("qemu-nbd/native"),
		`--servers: no server "tgtd"`:                        names("nbdkit", "tgtd"),
		`--servers: no server ""`:                            names(""),
		"qemu-nbd/threads qemu-nbd/io_uring qemu-nbd/native": names("qemu-nbd", "qemu-nbd/threads"),
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestCommands(t *testing.T) {
	e := endpoint{binary: "/usr/bin/x", image: "/tmp/i", medium: onDirect, transport: "tcp", address: "1234"}
	var lines []string
	for _, s := range allServers(true) {
		if s.program != programLimit {
			lines = append(lines, e.shown(s.argv(e)))
		}
	}
	got := strings.Join(lines, "\n")
	if strings.Contains(got, "/") || strings.Contains(got, "1234") {
		t.Errorf("places of this run:\n%s", got)
	}
	for _, want := range []string{
		"x serve -f raw --cache none -b 127.0.0.1 -p $PORT $IMAGE", "--engine uring", "--cache=none --aio=native", "file $IMAGE cache=none",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q:\n%s", want, got)
		}
	}
}

func TestParseFio(t *testing.T) {
	s, err := parseFio([]byte("fio: a warning\n" + `{"jobs":[{"read":{"iops":2000},"usr_cpu":3.0,"sys_cpu":5.0}]}`))
	if err != nil || s != (side{Ops: 2000, CPU: 40, Cores: 0.08}) {
		t.Error(s, err)
	}
	for _, bad := range []string{"", "no", "{", "{}", `{"jobs":[{"read":{"iops":0}}]}`} {
		if _, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("%q: accepted", bad)
		}
	}
}

func TestFlags(t *testing.T) {
	c, _, err := parseFlags(nil)
	if err != nil || c.rounds != 7 || c.out != "docs" || len(c.cells) != len(goals) || !strings.HasPrefix(c.raw, "bin/") {
		t.Error(c, err)
	}
	c, _, err = parseFlags([]string{"-quick", "-rounds", "5", "-cells", "tcp"})
	if err != nil || c.rounds != 5 || c.out == "docs" || len(c.cells) != 6 {
		t.Error(c, err)
	}
	for _, bad := range [][]string{{"-cells", "nothing"}, {"-cells", "("}, {"-rounds", "0"}, {"-image-size", "1k"}, {"x"}} {
		if _, _, err := parseFlags(bad); err == nil {
			t.Errorf("%q: accepted", bad)
		}
	}
}

func TestStore(t *testing.T) {
	const size = 20 << 20
	if _, err := newStore(t.TempDir(), 1<<60, 1); err == nil {
		t.Error("an exabyte fits")
	}
	s, err := newStore(t.TempDir(), size, 1)
	if err != nil {
		t.Fatal(err)
	}
	path, err := s.image(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.image(t.Context(), "a"); err != nil || again != path {
		t.Fatal(again, err)
	}
	b, err := os.ReadFile(path)
	if err != nil || len(b) != size {
		t.Fatal(len(b), err)
	}
	for i, blocks := 0, map[string]bool{}; i < size; i += 4096 {
		if block := string(b[i : i+4096]); blocks[block] || bytes.Count(b[i:i+4096], []byte{0}) > 100 {
			t.Fatal("a block twice, or empty, at", i)
		} else {
			blocks[block] = true
		}
	}
	if share := resident(path, size); share >= 0 && share < isWarm {
		t.Error("just read, but resident", share)
	}
	if err := s.remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(s.dir); err == nil {
		t.Error("still there")
	}
}
