package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/control"
)

// statusTimeout is how long a server may take to answer; it needs some
// microseconds.
const statusTimeout = 10 * time.Second

func newStatusCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status --control PATH",
		Short: "Show what a server serves and what it owns",
		Long: `Show what the server behind a control socket serves and what it owns. It answers
during transitions too. Exit status is 0 if the server answered, whatever the
answer, so this is also a health check.`,
		Example: `  nbd-export status --control /run/a.ctl
  nbd-export status --control /run/a.ctl --json | jq -r '.images[].state'`,
		Args: noArgs,
	}
	orderCommand(cmd, func(ctx context.Context, c *control.Client) error {
		ctx, cancel := context.WithTimeout(ctx, statusTimeout)
		defer cancel()
		s, err := c.Status(ctx)
		if err != nil {
			return err
		}
		if asJSON {
			enc := json.NewEncoder(cmd.OutOrStdout())
			enc.SetEscapeHTML(false)
			enc.SetIndent("", "  ")
			return enc.Encode(s)
		}
		return writeStatus(cmd.OutOrStdout(), s, time.Now())
	})
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	return cmd
}

// writeStatus prints s for people: a block for each image.
func writeStatus(w io.Writer, s control.Status, now time.Time) error {
	var b strings.Builder
	row := func(name, format string, a ...any) {
		fmt.Fprintf(&b, "%-12s %s\n", name, strings.ReplaceAll(fmt.Sprintf(format, a...), "\n", "; "))
	}
	stopping := ""
	if s.Stopping {
		stopping = ", stopping"
	}
	row("server", "nbd-export %s, pid %d, up %s%s", s.Version, s.PID, age(now, s.Since), stopping)
	if len(s.Images) == 0 {
		row("images", "none")
	}
	for _, i := range s.Images {
		b.WriteByte('\n')
		row("image", "%s", i.Image)
		row("node", "%s", i.Node)
		if i.Export.Name != "" {
			row("export", "%s", i.Export.Name)
		}
		row("format", "%s", i.Format)
		row("size", "%s", exactSize(i.Size))
		mode := ""
		if i.ReadOnly {
			mode = " (read-only)"
		}
		row("state", "%s%s", i.State, mode)
		if i.Step != "" {
			row("step", "%s for %s", i.Step, seconds(i.StepSeconds))
		}
		row("epoch", "%d", i.Epoch)
		row("since", "%s (%s)", i.Since.In(now.Location()).Format("2006-01-02 15:04:05"), age(now, i.Since))
		row("locks", "%s (%s)", i.Locks.Held, i.Locks.Scope)
		row("owner record", "%s", recordText(i.Record))
		row("connections", "%d", i.Connections)
		row("in flight", "%d", i.InFlight)
		row("read", "%s in %d requests", about(i.BytesRead), i.Reads)
		row("written", "%s in %d requests", about(i.BytesWritten), i.Writes)
		if i.Refused+i.Errors > 0 {
			row("answered", "%d requests refused, %d with an error", i.Refused, i.Errors)
		}
		if i.Cause != "" {
			row("failed", "%s", i.Cause)
		}
		if i.LastError != "" && i.LastError != i.Cause {
			row("last error", "%s", i.LastError)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
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
