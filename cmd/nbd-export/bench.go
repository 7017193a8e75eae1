package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/bench"
	"github.com/nbd-export/nbd-export/internal/bytesize"
)

// newBenchCommand is nbd-export bench: a load on any NBD server.
func newBenchCommand() *cobra.Command {
	c := bench.Config{ReadPercent: 70}
	blockSize, offset, region := bytesize.Size(4096), bytesize.Size(0), bytesize.Size(0)
	rw := choose("randread", "read", "write", "randwrite", "mixed")
	var asJSON, asGoBench bool
	cmd := &cobra.Command{
		Use:   "bench URI",
		Short: "Put a load on an NBD server and report how it fares",
		Long: `Put a load on an NBD server, this one or another, and report operations and
bytes per second, latencies and processor time.

URI is nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH. Loads that write
destroy what the export holds. Sizes take k, M, G and T.

Where reads are large the client's copy out of the socket takes longer than what
the server does. With --discard it copies no payload of 64k or more, as iperf3
with --skip-rx-copy: that measures the server, and no user's client is as fast.

Exit status is 1 if the load could not be run to its end or if --verify found
anything wrong.`,
		Example: `  # what a guest's small random reads would get
  nbd-export bench --rw randread --bs 4k --depth 32 nbd://localhost/disk

  # 1,000 mixed operations per second, latency counted from when each was due
  nbd-export bench --rw mixed --rate 1000 --time 30s 'nbd+unix:///?socket=/run/nbd.sock'

  # write, check what is read back, and fail if anything is wrong
  nbd-export bench --rw randwrite --verify --size 1G nbd://localhost/scratch`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{fmt.Errorf("bench: want one URI, got %d arguments", len(args))}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c.URI, c.RW, c.BlockSize, c.Offset, c.Size = args[0], rw.value, int64(blockSize), int64(offset), int64(region)
			flags := cmd.Flags()
			if flags.Changed("ops") && !flags.Changed("time") {
				c.Time = 0
			}
			if asJSON && asGoBench {
				return usageError{errors.New("bench: --json and --gobench exclude each other")}
			}
			if err := c.Check(); err != nil {
				return usageError{fmt.Errorf("bench: %w", err)}
			}
			return runBench(cmd.Context(), c, cmd.OutOrStdout(), func(out io.Writer, r *bench.Result) error {
				switch {
				case asJSON:
					b, err := r.JSON()
					if err == nil {
						_, err = out.Write(b)
					}
					return err
				case asGoBench:
					_, err := fmt.Fprintln(out, r.GoBench())
					return err
				}
				return r.WriteTable(out)
			})
		},
	}
	f := cmd.Flags()
	rw.addTo(cmd, "rw", "", "kind of load")
	f.IntVar(&c.ReadPercent, "read-percent", c.ReadPercent, "`N` reads among the operations of mixed, per cent")
	f.Var(&blockSize, "bs", "SIZE of each operation")
	f.IntVar(&c.Depth, "depth", 32, "`N` operations in flight per connection")
	f.IntVar(&c.Conns, "conns", 1, "`N` connections")
	f.DurationVar(&c.Time, "time", 10*time.Second, "for `TIME`; 0 without a bound")
	f.Int64Var(&c.Ops, "ops", 0, "end after `N` operations, then --time is unbounded unless given")
	f.Float64Var(&c.Rate, "rate", 0, "`N` operations per second of all connections together; 0 as fast as possible")
	f.Var(&offset, "offset", "SIZE of what comes before the region to work on")
	f.Var(&region, "size", "SIZE of the region; 0 to the end of the export")
	f.BoolVar(&c.FUA, "fua", false, "every write goes to stable storage before it is answered")
	f.Int64Var(&c.FlushEvery, "flush-every", 0, "a flush after every `N` writes of a connection")
	f.BoolVar(&c.Verify, "verify", false, "write a pattern and check it, during the load and after it")
	f.Uint64Var(&c.Seed, "seed", 1, "`N` from which the random offsets come")
	f.IntVar(&c.PID, "pid", 0, "process id `PID` of the server, to report its processor time per operation")
	f.BoolVar(&c.IgnoreEPERM, "ignore-eperm", false, "count refused operations, as of an inactive export, instead of stopping")
	f.BoolVar(&c.SimpleReplies, "simple-replies", false, "do not negotiate structured replies")
	f.BoolVar(&c.Discard, "discard", false, "throw payloads of reads of 64k and more away uncopied, to measure what the server can send, not what a client gets")
	f.StringVar(&c.Label, "label", "", "`TEXT` added to the name of the Go benchmark line")
	f.BoolVar(&asGoBench, "gobench", false, "print a Go benchmark line")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// runBench runs the load until it ends or is interrupted, and prints what was
// measured.
func runBench(ctx context.Context, c bench.Config, out io.Writer, print func(io.Writer, *bench.Result) error) error {
	ctx, stop := interruptible(ctx)
	defer stop()
	line := newStatusLine(os.Stderr)
	if line != nil {
		c.Progress = func(p bench.Progress) { line.show(p.String()) }
	}
	r, err := bench.Run(ctx, c)
	line.clear()
	var found *bench.VerifyError
	if err == nil || errors.As(err, &found) || (ctx.Err() != nil && r.Total.Ops > 0) {
		if perr := print(out, &r); perr != nil && err == nil {
			err = perr
		}
	}
	switch {
	case ctx.Err() != nil && err != nil:
		return errors.New("bench: interrupted")
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return fmt.Errorf("bench: %w; is a server listening there?", err)
	case err != nil:
		return fmt.Errorf("bench: %w", err)
	}
	return nil
}

// interruptible is ctx, which may be nil, until the user ends the program.
func interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	if ctx == nil {
		ctx = context.Background()
	}
	return signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
}

// statusLine is one line of a terminal that is written over and over.
type statusLine struct{ file *os.File }

// newStatusLine is nil, which shows nothing, if file is not a terminal.
func newStatusLine(file *os.File) *statusLine {
	if _, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS); err != nil {
		return nil
	}
	return &statusLine{file}
}

func (s *statusLine) show(text string) {
	if s != nil {
		_, _ = fmt.Fprintf(s.file, "\r\x1b[K%s", text)
	}
}

func (s *statusLine) clear() { s.show("") }
