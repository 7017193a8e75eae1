package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/control"
)

func newHandoverCommand() *cobra.Command {
	var from, to string
	var asJSON bool
	var opt control.HandoverOptions
	cmd := &cobra.Command{
		Use:   "handover --from CTL --to CTL",
		Short: "Hand images over from one server to another",
		Long: `Have the server at --from hand back all its images, or those of --node, and the
one at --to become their owner: all of them, or none. First it sees that both
sides answer, that the destination could open the images, and that both have the
same ones: the source writes a word into its owner records, and the destination
has to find it beside its own images.

At no time do both own an image. If the destination refuses, the source takes
back what it gave, if nobody has changed it. If a side does not answer, what it
has is not guessed: the error says what is known, and what to run next. Running
the same command again finishes a handover that was interrupted, or says that it
is done.

CTL is the path of a control socket, or exec:COMMAND, whose standard input and
output are one; see control-stdio. QEMU's storage daemon can be a side, with
--assume-same-image. Ctrl-C stops where it is safe: before the source has let go
everything stays as it was, afterwards the handover is finished. A second Ctrl-C
stops at once; at most one side owns the images then too.`,
		Example: `  nbd-export handover --from /run/a.ctl --to /run/b.ctl

  # to another host
  nbd-export handover --from /run/a.ctl \
    --to 'exec:ssh -o BatchMode=yes hostB nbd-export control-stdio /run/b.ctl'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case from == "" || to == "":
				return usageError{errors.New("handover needs --from CTL and --to CTL")}
			case from == to:
				return usageError{fmt.Errorf("handover: --from and --to are both %s", from)}
			case opt.Timeout <= 0:
				return usageError{fmt.Errorf("handover: --timeout %v is not a time to wait", opt.Timeout)}
			}
			if err := noEmptyNode(cmd, opt.Nodes); err != nil {
				return err
			}
			if !asJSON && isTerminal(os.Stderr) {
				opt.Progress = progress(cmd.ErrOrStderr())
			}
			r := handOver(from, to, opt)
			if asJSON {
				if err := writeJSON(cmd.OutOrStdout(), r); err != nil {
					return err
				}
			} else if r.Outcome.Good() {
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), handedOver(&r)); err != nil {
					return err
				}
			}
			return r.Err()
		},
	}
	f := cmd.Flags()
	f.StringVar(&from, "from", "", "control socket `CTL` of the source, which owns the images now (required)")
	f.StringVar(&to, "to", "", "control socket `CTL` of the destination (required)")
	nodeFlag(cmd, &opt.Nodes, " at the source")
	f.DurationVar(&opt.Timeout, "timeout", 10*time.Second, "`TIME` that each side may take over an order, and again to find out what became of one that it did not answer")
	f.BoolVar(&opt.AssumeSameImage, "assume-same-image", false, "go on where it cannot be proven that both have the same image")
	f.BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	f.SortFlags = false
	for _, name := range []string{"from", "to"} {
		_ = cmd.MarkFlagFilename(name)
	}
	return cmd
}

// handOver is control.Handover between two control sockets, where Ctrl-C means
// to stop where that is safe, and a second one at once.
func handOver(from, to string, opt control.HandoverOptions) control.HandoverReport {
	ctx, interrupt, stop := interrupts()
	defer stop()
	opt.Interrupt = interrupt
	a, b := control.NewPeer(from), control.NewPeer(to)
	defer a.Close()
	defer b.Close()
	return control.Handover(ctx, a, b, opt)
}

// handedOver is the last line of a handover that worked.
func handedOver(r *control.HandoverReport) string {
	what := "1 image"
	switch {
	case len(r.Images) == 1:
		what = r.Images[0].Image
	case len(r.Images) > 1:
		what = fmt.Sprintf("%d images", len(r.Images))
	}
	if r.Outcome == control.HandoverAlready {
		return fmt.Sprintf("nothing to do: %s owns %s", r.To.Control, what)
	}
	text := fmt.Sprintf("handed %s over from %s to %s in %s; no writes for at most %s",
		what, r.From.Control, r.To.Control, millis(r.Milliseconds), millis(r.Gap))
	if r.Interrupted {
		text += "; the interrupt came too late to stop it"
	}
	return text
}

// progress prints a line for each step.
func progress(w io.Writer) func(control.HandoverStep, bool) {
	return func(s control.HandoverStep, ended bool) {
		name := fmt.Sprintf("%-10s %s", s.Name, s.What)
		switch {
		case !ended:
			_, _ = fmt.Fprintf(w, "%-32s ...", name)
		case s.Error != "":
			_, _ = fmt.Fprintf(w, "\r%-32s %s failed: %s\n", name, millis(s.Milliseconds), strings.ReplaceAll(s.Error, "\n", "; "))
		default:
			_, _ = fmt.Fprintf(w, "\r%-32s %s\n", name, millis(s.Milliseconds))
		}
	}
}

func millis(ms float64) string {
	if ms >= 10_000 {
		return fmt.Sprintf("%.1f s", ms/1000)
	}
	return fmt.Sprintf("%.1f ms", ms)
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// writeJSON prints v for scripts, indented for people who look at it.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
