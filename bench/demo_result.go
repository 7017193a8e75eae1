package bench

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// DemoResult is what the demo found.
type DemoResult struct {
	Elapsed      time.Duration
	Writers      int
	Handovers    int   // both directions together
	Acknowledged int64 // writes
	Lost         int64 // acknowledged, but not found
	Refused      int64 // while inactive
	Odd          int64 // refused, but found

	HandoverP50, HandoverP99, HandoverMax time.Duration

	HandleLooks int  // how often an inactive exporter's descriptors and maps were looked through
	Looks       int  // how often the image was watched while nobody owned it
	Checksums   int  // how many of these included its bytes
	Ended       bool // both exporters ended while inactive, and the image was compared

	Findings []string // what should not be, at most 20
}

func (r *DemoResult) find(what string) {
	if len(r.Findings) < maxListed {
		r.Findings = append(r.Findings, what)
	}
}

// sum fills in the figures.
func (r *DemoResult) sum(d *demo) {
	r.Elapsed, r.Handovers = time.Since(d.begin), len(d.handovers)
	if n := len(d.handovers); n > 0 {
		slices.Sort(d.handovers)
		r.HandoverP50 = d.handovers[(n-1)/2]
		r.HandoverP99 = d.handovers[(n*99+99)/100-1]
		r.HandoverMax = d.handovers[n-1]
	}
	if l := d.load; l != nil {
		r.Writers = l.depth
		r.Acknowledged, r.Refused, r.Lost, r.Odd = l.acknowledged.Load(), l.refused.Load(), l.lostCount(), l.odd
		for _, b := range l.bad {
			r.find(b)
		}
	}
}

// OK reports whether nothing was lost and nothing changed that must not.
func (r *DemoResult) OK() bool {
	return r.Ended && r.Lost == 0 && r.Odd == 0 && len(r.Findings) == 0
}

// WriteTable writes r for people, with the verdict at its end.
func (r *DemoResult) WriteTable(out io.Writer) error {
	var s strings.Builder
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d.Microseconds())/1e3) }
	fmt.Fprintf(&s, "Two exporters, one image, %d writers; ownership changed hands %d times in %.1f s.\n\n",
		r.Writers, r.Handovers, r.Elapsed.Seconds())
	t := tabwriter.NewWriter(&s, 0, 0, 3, ' ', 0)
	row := func(what, value string) { fmt.Fprintf(t, "  %s\t%s\n", what, value) }
	count := func(n int64) string { return grouped(float64(n)) }
	row("acknowledged writes", count(r.Acknowledged))
	row("lost", count(r.Lost))
	row("refused while inactive", count(r.Refused))
	row("refused, but found in the image", count(r.Odd))
	row("handover, p50 / p99 / max", fmt.Sprintf("%s / %s / %s ms", ms(r.HandoverP50), ms(r.HandoverP99), ms(r.HandoverMax)))
	_ = t.Flush()
	s.WriteString("\nThe exporter that does not own the image:\n\n")
	row("open for writing, descriptors and maps", fmt.Sprintf("none in %s", plural(int64(r.HandleLooks), "look")))
	row("image while writers tried, nobody owning it", fmt.Sprintf("unchanged in %s, %s", plural(int64(r.Looks), "look"), plural(int64(r.Checksums), "checksum")))
	if r.Ended {
		row("image when inactive exporters ended", "unchanged, one ended by SIGTERM, one by SIGKILL")
	}
	_ = t.Flush()
	s.WriteString("\n")
	if len(r.Findings) > 0 {
		// Rows above that say "none" and "unchanged" are not to be believed.
		s.Reset()
		fmt.Fprintf(&s, "%s acknowledged writes, %s lost, %s refused, %s of these found in the image.\n\n",
			count(r.Acknowledged), count(r.Lost), count(r.Refused), count(r.Odd))
		for _, f := range r.Findings {
			fmt.Fprintf(&s, "  %s\n", f)
		}
		s.WriteString("\n")
	}
	s.WriteString(r.Verdict() + "\n")
	_, err := io.WriteString(out, s.String())
	return err
}

// Verdict is the demo's outcome in a sentence.
func (r *DemoResult) Verdict() string {
	switch {
	case r.OK():
		return "PASS: every acknowledged write is there, and an inactive exporter changed nothing."
	case r.Lost > 0:
		return fmt.Sprintf("FAIL: %s lost.", plural(r.Lost, "acknowledged write"))
	case r.Odd > 0 || len(r.Findings) > 0:
		return "FAIL: an inactive exporter changed the image, or could have."
	}
	return "FAIL: the demo did not come to its end."
}
