package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/state"
)

// statusTimeout is how long a server may take to answer; it needs some
// microseconds.
const statusTimeout = 10 * time.Second

func newStatusCommand() *cobra.Command {
	var asJSON bool
	var controls []string
	cmd := &cobra.Command{
		Use:   "status --control CTL [--control CTL]...",
		Short: "Show what a server serves and what it owns",
		Long: `Show what the server behind a control socket serves and what it owns. It answers
during transitions too. Exit status is 0 if the server answered, whatever the
answer, so this is also a health check.

With more than one --control the servers are shown side by side, and with --json
as a list of objects with control and status, or error. Exit status is 1 then if
one of them did not answer. A single server that does not answer is such an object,
too.`,
		Example: `  nbd-export status --control /run/a.ctl
  nbd-export status --control /run/a.ctl --json | jq -r '.images[].state'
  nbd-export status --control /run/a.ctl --control 'exec:ssh hostB nbd-export control-stdio /run/b.ctl'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(controls) == 0 || slices.Contains(controls, "") {
				return usageError{errors.New("status needs --control CTL")}
			}
			all := askStatus(cmd.Context(), controls)
			var err error
			switch {
			case len(all) > 1 && asJSON:
				err = writeJSON(cmd.OutOrStdout(), all)
			case len(all) > 1:
				err = writeStatuses(cmd.OutOrStdout(), all, time.Now())
			case all[0].err != nil && asJSON:
				err = writeJSON(cmd.OutOrStdout(), all[0])
			case all[0].err != nil:
			case asJSON:
				err = writeJSON(cmd.OutOrStdout(), all[0].Status)
			default:
				err = writeStatus(cmd.OutOrStdout(), *all[0].Status, time.Now())
			}
			for _, s := range all {
				err = errors.Join(err, s.err)
			}
			return err
		},
	}
	cmd.Flags().StringArrayVar(&controls, "control", nil, controlUsage+"; may be repeated")
	_ = cmd.MarkFlagFilename("control")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	return cmd
}

// controlStatus is what the server at a control socket says.
type controlStatus struct {
	Control string          `json:"control"`
	Status  *control.Status `json:"status,omitempty"` // nil if it did not answer
	Error   string          `json:"error,omitempty"`
	err     error
}

// askStatus asks all servers at once.
func askStatus(ctx context.Context, controls []string) []controlStatus {
	all := make([]controlStatus, len(controls))
	var wg sync.WaitGroup
	for i, ctl := range controls {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, statusTimeout)
			defer cancel()
			p := control.NewPeer(ctl)
			defer p.Close()
			s, err := p.Status(ctx)
			if err != nil {
				all[i] = controlStatus{Control: ctl, Error: err.Error(), err: err}
				return
			}
			all[i] = controlStatus{Control: ctl, Status: &s}
		})
	}
	wg.Wait()
	return all
}

// writeStatus prints s for people: a block for each image.
func writeStatus(w io.Writer, s control.Status, now time.Time) error {
	var b strings.Builder
	for i, block := range statusBlocks(s, now) {
		if i > 0 {
			b.WriteByte('\n')
		}
		for _, r := range block {
			fmt.Fprintf(&b, "%-12s %s\n", r.name, r.value)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// statusRow is a line of a status.
type statusRow struct{ name, value string }

// statusBlocks are the lines of a status: those of the server, and those of
// each image.
func statusBlocks(s control.Status, now time.Time) [][]statusRow {
	var blocks [][]statusRow
	var rows []statusRow
	row := func(name, format string, a ...any) {
		rows = append(rows, statusRow{name, strings.ReplaceAll(fmt.Sprintf(format, a...), "\n", "; ")})
	}
	stopping := ""
	if s.Stopping {
		stopping = ", stopping"
	}
	if s.PID == 0 {
		row("server", "%s", s.Version) // it says no more
	} else {
		row("server", "nbd-export %s, pid %d, up %s%s", s.Version, s.PID, age(now, s.Since), stopping)
	}
	if len(s.Images) == 0 {
		row("images", "none")
	}
	for _, i := range s.Images {
		blocks, rows = append(blocks, rows), nil
		row("image", "%s", i.Image)
		row("node", "%s", i.Node)
		if text := exportsText(i); text != "" {
			row("export", "%s", text)
		}
		row("format", "%s", i.Format)
		row("size", "%s", exactSize(i.Size))
		mode := ""
		if i.ReadOnly {
			mode = " (read-only)"
		}
		row("state", "%s%s", i.State, mode)
		if i.Step != "" {
			repair := ""
			if r := i.Repair; r != nil {
				repair = fmt.Sprintf(", repairing the image, %d%%", r.Done*100/r.Total)
			}
			row("step", "%s for %s%s%s", i.Step, seconds(i.StepSeconds), aheadText(i), repair)
		}
		if i.Since.IsZero() {
			continue // QEMU's daemon says no more
		}
		row("epoch", "%d", i.Epoch)
		row("since", "%s (%s)", i.Since.In(now.Location()).Format("2006-01-02 15:04:05"), age(now, i.Since))
		row("locks", "%s (%s)", i.Locks.Held, i.Locks.Scope)
		row("owner record", "%s", recordText(i.Record))
		if i.PathLost != "" {
			row("path lost", "it names another file or none; copy the bytes from %s before the server stops", i.PathLost)
		}
		row("connections", "%d", i.Connections)
		row("in flight", "%d", i.InFlight)
		if i.Slow != nil {
			row("slow", "%s, for %s", i.Slow.Request, seconds(i.Slow.Seconds))
		}
		if i.Held > 0 {
			row("held", "%s in %s, until the image is active", about(uint64(i.HeldBytes)), count(uint64(i.Held), "write"))
		}
		row("read", "%s in %s", about(i.BytesRead), count(i.Reads, "request"))
		row("written", "%s in %s", about(i.BytesWritten), count(i.Writes, "request"))
		if i.Refused+i.Errors > 0 {
			row("answered", "%s refused, %d with an error", count(i.Refused, "request"), i.Errors)
		}
		if i.Cause != "" {
			row("failed", "%s", i.Cause)
		}
		if i.LastError != "" && i.LastError != i.Cause {
			row("last error", "%s", i.LastError)
		}
	}
	return append(blocks, rows)
}

// exportsText names the exports of an image, and says which are read-only if
// others are not. One without a name alone needs none: clients get it by default.
func exportsText(i control.ImageStatus) string {
	var list []string
	for _, e := range i.Exports {
		name := e.Name
		switch {
		case i.Since.IsZero(): // QEMU's daemon says no more
			name = e.ID
		case name == "":
			name = `""`
		}
		if !e.Writable && !i.ReadOnly {
			name += " (read-only)"
		}
		list = append(list, name)
	}
	if len(list) == 1 && list[0] == `""` {
		return ""
	}
	return strings.Join(list, ", ")
}

// aheadText is what is left to write, and how long writers have been slowed
// for that, while an image is synced ahead.
func aheadText(i control.ImageStatus) string {
	if a := i.Ahead; a != nil && i.Step == string(state.StepSyncAhead) {
		return fmt.Sprintf(", %s not yet synced, writers slowed for %s", about(a.Dirty), seconds(a.Slowed))
	}
	return ""
}

func recordText(r control.Record) string {
	switch {
	case r.Path != "":
		return r.Path
	case r.PerProcess != "":
		return fmt.Sprintf("per process (%s)", r.PerProcess)
	}
	return "unknown" // an older server
}

// count is n and what is counted: "1 request", "2 requests".
func count(n uint64, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// about is n bytes in the unit that fits: "1.2 GiB".
func about(n uint64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f, u := float64(n), 0
	for f >= 1024 && u < len(units)-1 {
		f, u = f/1024, u+1
	}
	if u == 0 {
		return fmt.Sprintf("%d %s", n, units[0])
	}
	return strings.TrimSuffix(strconv.FormatFloat(f, 'f', 1, 64), ".0") + " " + units[u]
}

// exactSize is about and the number of bytes.
func exactSize(n int64) string {
	if n < 1024 {
		return about(uint64(n))
	}
	return fmt.Sprintf("%s (%d bytes)", about(uint64(n)), n)
}

func seconds(s float64) string { return brief(time.Duration(s * float64(time.Second))) }

// age is the time since then, as exact as its length asks for.
func age(now, then time.Time) string { return brief(now.Sub(then)) }

func brief(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < 48*time.Hour:
		return d.Round(time.Second).String()
	}
	hours := int(d.Hours())
	return fmt.Sprintf("%dd%dh", hours/24, hours%24)
}
