package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/nbd-export/nbd-export/internal/bytesize"
)

// Result is what a load measured.
type Result struct {
	URI        string        `json:"uri"`
	Label      string        `json:"label,omitempty"`
	Load       string        `json:"load"` // Config.RW, mixed with its percentage of reads
	BlockSize  int64         `json:"block_size"`
	Depth      int           `json:"depth"`
	Conns      int           `json:"conns"`
	FUA        bool          `json:"fua,omitempty"`
	Discard    bool          `json:"discard,omitempty"` // payloads of large reads were not copied
	Rate       float64       `json:"rate,omitempty"`
	Cores      int           `json:"cores"` // GOMAXPROCS of the client
	Structured bool          `json:"structured_replies"`
	MultiConn  bool          `json:"can_multi_conn"`
	Elapsed    time.Duration `json:"elapsed_ns"` // from the first request to the last answer

	Total   Stats `json:"total"` // reads and writes
	Reads   Stats `json:"reads"`
	Writes  Stats `json:"writes"`
	Flushes Stats `json:"flushes"`

	Refused int64 `json:"refused,omitempty"` // answered with EPERM and ignored
	Late    int64 `json:"late,omitempty"`    // due at the given rate, but not sent in time

	ClientCPU CPU   `json:"client_cpu"`
	ServerCPU *CPU  `json:"server_cpu,omitempty"`
	ServerRSS int64 `json:"server_rss_bytes,omitempty"` // resident at the end of the load

	Verified     int64      `json:"verified,omitempty"` // blocks checked
	Blank        int64      `json:"blank,omitempty"`    // blocks of zeroes met by a load that only reads
	Mismatches   int64      `json:"mismatches"`
	MismatchList []Mismatch `json:"mismatch_list,omitempty"` // the first of them
}

// Stats are the figures of one kind of operation. Latencies are in microseconds.
type Stats struct {
	Ops        int64   `json:"ops"`
	OpsPerSec  float64 `json:"ops_per_sec"`
	MiBPerSec  float64 `json:"mib_per_sec"`
	MeanMicros float64 `json:"mean_us"`
	P50Micros  float64 `json:"p50_us"`
	P99Micros  float64 `json:"p99_us"`
	P999Micros float64 `json:"p999_us"`
	MaxMicros  float64 `json:"max_us"`
}

func newStats(h *hdrhistogram.Histogram, blockSize int64, elapsed time.Duration) Stats {
	s := Stats{Ops: h.TotalCount()}
	if s.Ops == 0 {
		return s
	}
	if elapsed > 0 {
		s.OpsPerSec = float64(s.Ops) / elapsed.Seconds()
		s.MiBPerSec = s.OpsPerSec * float64(blockSize) / (1 << 20)
	}
	s.MeanMicros = h.Mean() / 1e3
	s.P50Micros = float64(h.ValueAtQuantile(50)) / 1e3
	s.P99Micros = float64(h.ValueAtQuantile(99)) / 1e3
	s.P999Micros = float64(h.ValueAtQuantile(99.9)) / 1e3
	s.MaxMicros = float64(h.Max()) / 1e3
	return s
}

// CPU is the processor time of a process during a load.
type CPU struct {
	MicrosPerOp float64 `json:"us_per_op"`
	Cores       float64 `json:"cores"` // kept busy: 1 is one core all the time
}

func newCPU(used time.Duration, ops int64, elapsed time.Duration) CPU {
	var c CPU
	if ops > 0 {
		c.MicrosPerOp = float64(used.Nanoseconds()) / 1e3 / float64(ops)
	}
	if elapsed > 0 {
		c.Cores = used.Seconds() / elapsed.Seconds()
	}
	return c
}

// WriteTable writes r for people.
func (r *Result) WriteTable(out io.Writer) error {
	var s strings.Builder
	fmt.Fprintf(&s, "%s\n%s of %s, depth %d, %s, for %v\n", r.URI, r.Load, bytesize.Format(r.BlockSize), r.Depth,
		plural(int64(r.Conns), "connection"), r.Elapsed.Round(time.Millisecond))
	if r.Discard {
		s.WriteString("payloads of reads of 64k and more discarded: what a client gets that takes them is less\n")
	}
	s.WriteString("\n")
	t := tabwriter.NewWriter(&s, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\toperations\tops/s\tMiB/s\tp50 us\tp99 us\tp99.9 us\tmax us\t")
	row := func(name string, x Stats) {
		throughput := "-" // a flush has none
		if name != "flush" {
			throughput = fmt.Sprintf("%.1f", x.MiBPerSec)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", name, grouped(float64(x.Ops)), grouped(x.OpsPerSec), throughput,
			micros(x.P50Micros), micros(x.P99Micros), micros(x.P999Micros), micros(x.MaxMicros))
	}
	if r.Reads.Ops > 0 || r.Writes.Ops == 0 && !strings.Contains(r.Load, "write") {
		row("read", r.Reads)
	}
	if r.Writes.Ops > 0 || strings.Contains(r.Load, "write") {
		row("write", r.Writes)
	}
	if r.Reads.Ops > 0 && r.Writes.Ops > 0 {
		row("together", r.Total)
	}
	if r.Flushes.Ops > 0 {
		row("flush", r.Flushes)
	}
	_ = t.Flush()
	s.WriteString("\n")
	cpu := func(who string, c CPU) {
		fmt.Fprintf(&s, "%s processor time  %6.2f us/op, %.2f cores busy\n", who, c.MicrosPerOp, c.Cores)
	}
	if r.ServerCPU != nil {
		cpu("server", *r.ServerCPU)
	}
	cpu("client", r.ClientCPU)
	if r.Refused > 0 {
		fmt.Fprintf(&s, "refused with EPERM      %s\n", grouped(float64(r.Refused)))
	}
	if r.Late > 0 {
		fmt.Fprintf(&s, "rate not reached: %s more were due in this time\n", plural(r.Late, "operation"))
	}
	if r.Verified > 0 || r.Mismatches > 0 || r.Blank > 0 {
		fmt.Fprintf(&s, "verified %s, %s", plural(r.Verified, "block"), plural(r.Mismatches, "mismatch"))
		if r.Blank > 0 {
			fmt.Fprintf(&s, "; %s of zeroes not counted", plural(r.Blank, "block"))
		}
		s.WriteString("\n")
		for _, m := range r.MismatchList {
			fmt.Fprintf(&s, "  %v\n", m)
		}
	}
	_, err := io.WriteString(out, s.String())
	return err
}

// GoBench is r as a line that Go's benchmark tools read.
func (r *Result) GoBench() string {
	var s strings.Builder
	s.WriteString("BenchmarkNBD/")
	if r.Label != "" {
		s.WriteString(strings.Join(strings.Fields(r.Label), "_") + "/")
	}
	s.WriteString(r.Load)
	if r.Discard {
		s.WriteString("/discard") // not to be compared with what is copied
	}
	fmt.Fprintf(&s, "/bs=%s/depth=%d/conns=%d-%d\t%d", bytesize.Format(r.BlockSize), r.Depth, r.Conns, r.Cores, r.Total.Ops)
	if r.Total.OpsPerSec > 0 {
		fmt.Fprintf(&s, "\t%.1f ns/op", 1e9/r.Total.OpsPerSec)
	}
	fmt.Fprintf(&s, "\t%.2f MB/s\t%.0f ops/s", r.Total.MiBPerSec*(1<<20)/1e6, r.Total.OpsPerSec)
	fmt.Fprintf(&s, "\t%.2f p50-us\t%.2f p99-us\t%.2f p99.9-us\t%.2f max-us", r.Total.P50Micros, r.Total.P99Micros, r.Total.P999Micros, r.Total.MaxMicros)
	fmt.Fprintf(&s, "\t%.3f client-us/op", r.ClientCPU.MicrosPerOp)
	if r.ServerCPU != nil {
		fmt.Fprintf(&s, "\t%.3f server-us/op\t%d server-rss-bytes", r.ServerCPU.MicrosPerOp, r.ServerRSS)
	}
	return s.String()
}

// JSON is r for scripts, indented, with a newline at its end.
func (r *Result) JSON() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	return append(b, '\n'), err
}

// String is one line for a terminal.
func (p Progress) String() string {
	if p.ReadBack {
		return fmt.Sprintf("reading back what was written, %v", p.Elapsed.Round(time.Second))
	}
	s := fmt.Sprintf("%3.0f%%  %s ops/s  %s MiB/s", 100*p.Fraction, grouped(p.OpsPerSec), grouped(p.BytesPerS/(1<<20)))
	if p.Remaining > 0 {
		s += fmt.Sprintf("  %v left", p.Remaining.Round(time.Second))
	}
	return s
}

// grouped is x as a whole number with its thousands set apart.
func grouped(x float64) string {
	s := fmt.Sprintf("%.0f", x)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// micros is a latency: whole from 100 us on.
func micros(x float64) string {
	if x >= 99.95 {
		return grouped(x)
	}
	return fmt.Sprintf("%.1f", x)
}

// plural is "1 block", "2 blocks", "2 mismatches".
func plural(n int64, what string) string {
	s := grouped(float64(n)) + " " + what
	if n != 1 {
		if strings.HasSuffix(what, "h") {
			s += "e"
		}
		s += "s"
	}
	return s
}
