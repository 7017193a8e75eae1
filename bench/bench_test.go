package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/client"
	"github.com/nbd-export/nbd-export/export/wire"
)

// valid is a short load on uri.
func valid(uri, rw string) Config {
	return Config{URI: uri, RW: rw, ReadPercent: 50, BlockSize: 4096, Depth: 8, Conns: 1, Ops: 500, Seed: 1}
}

func TestConfig(t *testing.T) {
	for name, spoil := range map[string]func(c *Config){
		"uri": func(c *Config) { c.URI = "http://x" }, "load": func(c *Config) { c.RW = "erase" },
		"percent": func(c *Config) { c.ReadPercent = 101 }, "no block": func(c *Config) { c.BlockSize = 0 },
		"large block": func(c *Config) { c.BlockSize = 64 << 20 }, "depth": func(c *Config) { c.Depth = 0 },
		"connections": func(c *Config) { c.Conns = 0 }, "rate": func(c *Config) { c.Rate = math.NaN() },
		"endless": func(c *Config) { c.Ops = 0 }, "size": func(c *Config) { c.Size = -1 },
		"discarded and verified": func(c *Config) { c.Verify, c.Discard = true, true },
		"odd block to verify":    func(c *Config) { c.Verify, c.BlockSize = true, 1000 },
	} {
		c := valid("nbd://host", "randread")
		if err := c.Check(); err != nil {
			t.Fatal(err)
		}
		spoil(&c)
		if err := c.Check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestRegion meets servers that cannot take the load.
func TestRegion(t *testing.T) {
	for _, c := range []struct {
		want  string
		info  client.Info
		spoil func(c *Config)
	}{
		{"", client.Info{Size: 1 << 20}, func(c *Config) {}},
		{"read-only", client.Info{Size: 1 << 20, Flags: wire.TransReadOnly}, func(c *Config) {}},
		{"", client.Info{Size: 1 << 20, Flags: wire.TransReadOnly}, func(c *Config) { c.RW = "read" }},
		{"does not offer FUA", client.Info{Size: 1 << 20}, func(c *Config) { c.FUA = true }},
		{"does not offer FLUSH", client.Info{Size: 1 << 20}, func(c *Config) { c.FlushEvery = 1 }},
		{"above the server's maximum of 2k", client.Info{Size: 1 << 20, MaxBlock: 2048}, func(c *Config) {}},
		{"minimum of 8k", client.Info{Size: 1 << 20, MinBlock: 8192}, func(c *Config) {}},
		{"not a multiple of the block size", client.Info{Size: 1 << 20}, func(c *Config) { c.Offset = 100 }},
		{"past the export's end", client.Info{Size: 1 << 20}, func(c *Config) { c.Size = 2 << 20 }},
		{"past the export's end", client.Info{Size: 1 << 20}, func(c *Config) { c.Size, c.Offset = math.MaxInt64, 4096 }},
		{"holds no block", client.Info{Size: 4095}, func(c *Config) {}},
		{"holds no block", client.Info{}, func(c *Config) {}},
		{"cannot be divided", client.Info{Size: 8192}, func(c *Config) { c.Conns, c.Verify = 3, true }},
		{"too large to verify", client.Info{Size: 1 << 50}, func(c *Config) { c.Verify = true }},
		{"too large", client.Info{Size: 1 << 63}, func(c *Config) {}},
	} {
		cfg := valid("nbd://host", "mixed")
		c.spoil(&cfg)
		_, _, err := cfg.region(c.info)
		if (err == nil) != (c.want == "") || (err != nil && !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}

func TestPattern(t *testing.T) {
	b := make([]byte, 4096)
	if _, blank, _ := readPattern(b, 0, 7); !blank {
		t.Fatal("zeroes not seen")
	}
	fillPattern(b, 8192, 5, 7)
	if g, _, problem := readPattern(b, 8192, 7); g != 5 || problem != "" {
		t.Fatal(g, problem)
	}
	if g, _, problem := readPattern(b, 8192, 0); g != 5 || problem != "" {
		t.Fatal(g, problem)
	}
	other := make([]byte, 4096)
	for name, c := range map[string]struct {
		spoil func(b []byte)
		want  string
	}{
		"one bit":        {func(b []byte) { b[700] ^= 1 }, "wrong checksum at 8704"},
		"zeroes within":  {func(b []byte) { clear(b[1024:2048]) }, "no pattern at 9216"},
		"older half":     {func(b []byte) { fillPattern(other, 8192, 4, 7); copy(b[2048:], other[2048:]) }, "torn at 10240: generation 4 after 5"},
		"another block":  {func(b []byte) { fillPattern(b, 0, 5, 7) }, "bytes at 8192 belong at 0"},
		"another's":      {func(b []byte) { fillPattern(b, 8192, 5, 8) }, "of run 8, not 7"},
		"something else": {func(b []byte) { copy(b, "ext4 superblock") }, "no pattern at 8192"},
	} {
		fillPattern(b, 8192, 5, 7)
		c.spoil(b)
		if _, _, problem := readPattern(b, 8192, 7); !strings.Contains(problem, c.want) {
			t.Errorf("%s: %q, want %q", name, problem, c.want)
		}
	}
}

func TestRunModes(t *testing.T) {
	for _, rw := range Modes {
		for _, verify := range []bool{false, true} {
			for _, simple := range []bool{false, true} {
				f := newFake(1 << 20)
				c := valid(f.uri(t), rw)
				c.Verify, c.SimpleReplies, c.Conns, c.FlushEvery, c.FUA = verify, simple, 3, 10, true
				r, err := Run(t.Context(), c)
				if err != nil {
					t.Fatalf("%+v: %v", c, err)
				}
				if r.Total.Ops != 500 || r.Reads.Ops+r.Writes.Ops != 500 || r.Structured == simple || r.Elapsed <= 0 ||
					(r.Reads.Ops > 0) != c.reads() || (r.Writes.Ops > 0) != c.writes() || (r.Flushes.Ops > 0) != c.writes() {
					t.Fatalf("%+v: %+v", c, r)
				}
				if verify && c.writes() && r.Verified == 0 || r.Mismatches != 0 || r.Total.P50Micros <= 0 || r.Total.MaxMicros < r.Total.P999Micros {
					t.Fatalf("%+v: %+v", c, r)
				}
			}
		}
	}
}

// TestRunDiscard throws large payloads away, amid small answers.
func TestRunDiscard(t *testing.T) {
	pipes := func() (n int) {
		fds, err := filepath.Glob("/proc/self/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, "pipe:") {
				n++
			}
		}
		return n
	}
	for _, discard := range []bool{false, true} {
		f := newFake(4 << 20)
		c := valid(f.uri(t), "mixed")
		c.BlockSize, c.Discard = 128<<10, discard
		l := &load{cfg: &c}
		before := pipes()
		if err := l.connect(t.Context()); err != nil {
			t.Fatal(err)
		}
		if opened := pipes() > before; opened != discard {
			t.Errorf("discard %v: a pipe %v", discard, opened)
		}
		r, err := l.run(t.Context())
		l.close()
		if err != nil || r.Total.Ops != c.Ops || r.Discard != discard {
			t.Errorf("discard %v: %+v, %v", discard, r, err)
		}
	}
}

// liar is an image that does not keep its promises.
type liar struct {
	memory
	lie func(m *memory, p []byte, off int64, n int64) (done bool) // on the n-th write
	n   atomic.Int64
}

func (l *liar) WriteAt(p []byte, off int64) (int, error) {
	if l.lie(&l.memory, p, off, l.n.Add(1)) {
		return len(p), nil
	}
	return l.memory.WriteAt(p, off)
}

func TestRunVerifyFinds(t *testing.T) {
	for _, c := range []struct {
		name, want string
		lie        func(m *memory, p []byte, off, n int64) bool
	}{
		{"lost write", "lost write: generation", func(m *memory, p []byte, off, n int64) bool { return n > 100 && n%50 == 0 }},
		{"flipped bit", "wrong checksum", func(m *memory, p []byte, off, n int64) bool { p[99] ^= 4; return false }},
		{"wrong place", "belong at", func(m *memory, p []byte, off, n int64) bool {
			if n > 100 && n%20 == 0 {
				_, _ = m.WriteAt(p, 0)
				return true
			}
			return false
		}},
		{"half a write", "torn", func(m *memory, p []byte, off, n int64) bool {
			if n > 100 && n%50 == 0 {
				_, _ = m.WriteAt(p[:2048], off)
				return true
			}
			return false
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(64 << 10)
			f.image = &liar{memory: memory{b: make([]byte, f.size)}, lie: c.lie}
			cfg := valid(f.uri(t), "mixed")
			cfg.Verify = true
			r, err := Run(t.Context(), cfg)
			var found *VerifyError
			if !errors.As(err, &found) || r.Mismatches == 0 || found.Count != r.Mismatches {
				t.Fatal(err)
			}
			var text []string
			for _, m := range r.MismatchList {
				text = append(text, m.String())
			}
			if !strings.Contains(strings.Join(text, "\n"), c.want) {
				t.Errorf("%q, want %q", text, c.want)
			}
		})
	}
}

// TestRunVerifyRead checks what an earlier load has left.
func TestRunVerifyRead(t *testing.T) {
	f := newFake(1 << 20)
	uri := f.uri(t)
	c := valid(uri, "write")
	c.Verify, c.Ops = true, 100
	if _, err := Run(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	c.RW, c.BlockSize, c.Ops = "read", 8192, 128
	r, err := Run(t.Context(), c)
	if err != nil || r.Verified != 50 || r.Blank != 78 {
		t.Fatalf("%v %+v", err, r)
	}
	f.image.(*memory).b[5000] ^= 1
	if r, err = Run(t.Context(), c); err == nil || r.Mismatches != 1 || r.MismatchList[0].Offset != 0 {
		t.Fatalf("%v %+v", err, r)
	}
}

func TestRunInactive(t *testing.T) {
	f := newFake(1 << 20)
	var n atomic.Int64
	f.refuse = func(cmd uint16) (uint32, string) {
		if cmd == wire.CmdWrite && n.Add(1) > 100 {
			return wire.EPERM, "export is inactive"
		}
		return 0, ""
	}
	c := valid(f.uri(t), "randwrite")
	c.Verify = true
	_, err := Run(t.Context(), c)
	if !errors.Is(err, syscall.EPERM) || !strings.Contains(err.Error(), "export is inactive (EPERM)") || strings.Contains(err.Error(), "\n") {
		t.Fatal(err)
	}
	n.Store(0)
	c.IgnoreEPERM = true
	r, err := Run(t.Context(), c)
	if err != nil || r.Refused != 400 || r.Writes.Ops != 100 || r.Verified == 0 {
		t.Fatalf("%v %+v", err, r)
	}
}

// TestRunRefusedYetWritten meets a server that writes what it refuses.
func TestRunRefusedYetWritten(t *testing.T) {
	f := newFake(64 << 10)
	var image liar
	image.b = make([]byte, f.size)
	image.lie = func(*memory, []byte, int64, int64) bool { return false }
	f.image = &image
	var n atomic.Int64
	f.refuse = func(cmd uint16) (uint32, string) {
		if cmd == wire.CmdWrite && n.Add(1) == 50 {
			fillPattern(image.b[:4096], 0, 999, 1)
			return wire.EPERM, ""
		}
		return 0, ""
	}
	c := valid(f.uri(t), "randwrite")
	c.Verify, c.IgnoreEPERM, c.Ops = true, true, 60
	if _, err := Run(t.Context(), c); err == nil {
		t.Fatal("not found")
	}
}

func TestRunRate(t *testing.T) {
	c := valid(newFake(1<<20).uri(t), "randread")
	c.Ops, c.Time, c.Rate, c.Conns = 0, 300*time.Millisecond, 1000, 2
	r, err := Run(t.Context(), c)
	if err != nil || r.Total.Ops < 100 || r.Total.Ops > 310 {
		t.Fatalf("%v %+v", err, r)
	}
}

// TestRunRateLate counts latency from when an operation was due, not from when a
// slow server let it be sent.
func TestRunRateLate(t *testing.T) {
	f := newFake(1 << 20)
	f.refuse = func(uint16) (uint32, string) {
		time.Sleep(5 * time.Millisecond)
		return 0, ""
	}
	c := valid(f.uri(t), "randread")
	c.Ops, c.Time, c.Rate, c.Depth = 0, 200*time.Millisecond, 1000, 1
	r, err := Run(t.Context(), c)
	if err != nil || r.Late < 100 || r.Total.P99Micros < 100_000 {
		t.Fatalf("%v %+v", err, r)
	}
}

func TestRunProgress(t *testing.T) {
	c := valid(newFake(1<<20).uri(t), "randread")
	c.Ops, c.Time = 0, 600*time.Millisecond
	var seen []Progress
	c.Progress = func(p Progress) { seen = append(seen, p) }
	if _, err := Run(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	// Two, or one on a machine that was busy elsewhere.
	if len(seen) == 0 || len(seen) > 2 || seen[0].Ops == 0 {
		t.Fatalf("%+v", seen)
	}
	if last := seen[len(seen)-1]; len(seen) == 2 && last.Fraction <= seen[0].Fraction || last.Remaining > 400*time.Millisecond {
		t.Errorf("%+v", seen)
	}
	if s := seen[0].String(); !strings.Contains(s, "ops/s") || strings.ContainsAny(s, "\r\n") {
		t.Errorf("%q", s)
	}
}

func TestRunFailures(t *testing.T) {
	f := newFake(1 << 20)
	f.flags |= wire.TransReadOnly
	for want, c := range map[string]Config{
		"export is read-only": valid(f.uri(t), "randwrite"),
		"no such file":        valid(client.UnixURI(t.TempDir()+"/none", ""), "randread"),
		"unknown load":        valid("nbd://x", "erase"),
	} {
		if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	c := valid(newFake(1<<20).uri(t), "randread")
	c.PID = 1 << 30
	if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "process 1073741824") {
		t.Error(err)
	}
}

func TestMeter(t *testing.T) {
	m := newMeter(os.Getpid())
	if err := m.begin(); err != nil {
		t.Fatal(err)
	}
	own := processorTime()
	for end := time.Now().Add(100 * time.Millisecond); time.Now().Before(end); {
	}
	own = processorTime() - own
	u, err := m.end()
	if err != nil || !u.known || u.rss <= 0 || u.time < own/2 || u.time > 2*own+50*time.Millisecond {
		t.Fatalf("%+v, own %v, %v", u, own, err)
	}
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := newMeter(0).end(); err != nil {
		t.Error(err)
	}
	if err := newMeter(cmd.Process.Pid).begin(); err == nil {
		t.Error("measured a process that has ended")
	}
}

func TestResultForms(t *testing.T) {
	r := Result{
		URI: "nbd://h/x", Load: "mixed70", BlockSize: 4096, Depth: 32, Conns: 1, Cores: 2, Elapsed: 2 * time.Second, Label: "our server",
		Total:     Stats{Ops: 2_000_000, OpsPerSec: 1e6, MiBPerSec: 3906.25, P50Micros: 30.5, P99Micros: 99.5, P999Micros: 450, MaxMicros: 12345},
		Reads:     Stats{Ops: 1_400_000, OpsPerSec: 7e5, MiBPerSec: 2734.4, P50Micros: 30.5, P99Micros: 99.5, P999Micros: 450, MaxMicros: 12345},
		Writes:    Stats{Ops: 600_000, OpsPerSec: 3e5, MiBPerSec: 1171.9, P50Micros: 31, P99Micros: 99.5, P999Micros: 450, MaxMicros: 12345},
		ClientCPU: CPU{0.75, 0.75}, ServerCPU: &CPU{1.9, 1}, ServerRSS: 1 << 20,
	}
	line := regexp.MustCompile(`^BenchmarkNBD/our_server/mixed70/bs=4k/depth=32/conns=1-2\t2000000(\t[0-9.]+ [a-zA-Z0-9./-]+)+$`)
	if g := r.GoBench(); !line.MatchString(g) || !strings.Contains(g, "\t1000.0 ns/op\t4096.00 MB/s\t") || !strings.Contains(g, "\t1.900 server-us/op") {
		t.Error(g)
	}
	b, err := r.JSON()
	var back Result
	if err != nil || json.Unmarshal(b, &back) != nil || back.Total != r.Total || *back.ServerCPU != *r.ServerCPU {
		t.Errorf("%s %v", b, err)
	}
	if bytes.Contains(b, []byte("discard")) {
		t.Errorf("nothing was discarded: %s", b)
	}
	var table bytes.Buffer
	if err := r.WriteTable(&table); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"mixed70 of 4k, depth 32, 1 connection, for 2s", "together   2,000,000  1,000,000  3906.2    30.5    99.5       450  12,345", "server processor time    1.90 us/op"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("no %q in\n%s", want, &table)
		}
	}
	if strings.Contains(table.String(), "discard") {
		t.Errorf("nothing was discarded: %s", &table)
	}
	r.Discard = true
	if g := r.GoBench(); !strings.Contains(g, "/mixed70/discard/bs=4k/") {
		t.Error(g)
	}
	if b, err := r.JSON(); err != nil || !bytes.Contains(b, []byte(`"discard": true`)) {
		t.Errorf("%s %v", b, err)
	}
	table.Reset()
	if err := r.WriteTable(&table); err != nil || !strings.Contains(table.String(), "64k and more discarded") {
		t.Errorf("%s %v", &table, err)
	}
	for x, want := range map[float64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1234: "-1,234"} {
		if got := grouped(x); got != want {
			t.Errorf("%v: %s", x, got)
		}
	}
}
