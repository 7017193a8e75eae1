package integration

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// However fast clients write, no more than --handover-dirty is left when the
// gate closes, reads go on beside them, and the log and status say what was done
// for that.
func TestHandoverDirty(t *testing.T) {
	const limit = 1 << 20
	everyPlace(t, func(t *testing.T, dir string) {
		image := randomImage(t, dir, 1, 64<<20)
		e := serve(t, image, "--handover-dirty", "1M", "--log-format", "json", "--log-level", "debug")
		load := spawn(t, "load", nil, program(t), "bench", "--rw", "randwrite", "--bs", "64k", "--depth", "32", "--conns", "4",
			"--time", "60s", "--size", "64M", "--ignore-eperm", e.uri())
		reads := spawn(t, "reads", nil, program(t), "bench", "--rw", "randread", "--bs", "4k", "--depth", "1",
			"--time", "60s", "--size", "64M", e.uri())
		q := e.qmp()
		for range 3 {
			written := q.stats().Writes
			waitFor(t, time.Minute, "writes", func() bool { return q.stats().Writes > written+500 })
			before := len(e.log.lines())
			e.inactivate()
			line := e.log.wait(t, before, "the end of the inactivation", func(l string) bool { return strings.Contains(l, `"to":"inactive"`) })
			var end struct {
				Syncs int
				Left  int64
				Steps string
			}
			if err := json.Unmarshal([]byte(line), &end); err != nil || end.Syncs == 0 || !strings.Contains(end.Steps, "sync-ahead ") {
				t.Fatalf("%v: %s", err, line)
			}
			if end.Left > limit {
				t.Errorf("%d bytes were left: %s", end.Left, line)
			}
			s := q.stats()
			if s.Ahead == nil || s.Ahead.Syncs != end.Syncs {
				t.Errorf("status %+v, log %s", s.Ahead, line)
			}
			e.activate()
		}
		for _, p := range []*process{load, reads} {
			if !p.alive() {
				t.Errorf("it ended: %s", p.log)
			}
			p.kill()
		}
	})
}

// stats are what status says of an exporter's only image.
func (q *qmpConn) stats() (s struct {
	Writes uint64 `json:"writes"`
	Ahead  *struct {
		Syncs int `json:"syncs"`
	} `json:"sync-ahead"`
}) {
	q.t.Helper()
	var status struct{ Images []json.RawMessage }
	if err := json.Unmarshal(q.must("x-query-status", nil), &status); err != nil || len(status.Images) != 1 {
		q.t.Fatalf("%v: %+v", err, status)
	}
	if err := json.Unmarshal(status.Images[0], &s); err != nil {
		q.t.Fatal(err)
	}
	return s
}
