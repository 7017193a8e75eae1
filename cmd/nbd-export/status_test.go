package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/ioloop"
)

func TestWriteStatus(t *testing.T) {
	now := time.Date(2026, 11, 23, 10, 2, 3, 0, time.UTC)
	s := control.Status{
		Version: "1.2", PID: 812, Since: now.Add(-50*time.Hour - 3*time.Minute), Stopping: true,
		Images: []control.ImageStatus{
			{
				Node: "image0", Image: "/srv/a.img", Format: "raw", Size: 10 << 30, State: "inactivating", Epoch: 7,
				Exports: []control.Export{{Name: "disk", Writable: true}, {}, {Name: "copy"}}, Since: now.Add(-1234 * time.Millisecond), Step: "sync-ahead", StepSeconds: 1.2,
				Locks:  control.Locks{Held: "100,101,103,201,203", Scope: "cluster"},
				Record: control.Record{Path: "/srv/a.img.owner"},
				Slow:   &control.SlowRequest{Request: "write of 4096 bytes at 0 from unix pid 7", Seconds: 12.3},
				Stats: ioloop.Stats{
					Connections: 4, InFlight: 32, Reads: 31234, BytesRead: 1288490188, Writes: 512, BytesWritten: 512 * 4096,
					Refused: 3, Errors: 1, Ahead: &ioloop.PaceStats{Syncs: 2, Dirty: 5 << 20, Slowed: 0.31, Delayed: 12},
				},
			},
			{
				Node: "image1", Image: "/dev/sdx", Format: "raw", Size: 1000, ReadOnly: true, State: "failed(io)", Since: now, Exports: []control.Export{{}},
				PathLost: "/proc/812/fd/9",
				Cause:    "input/output error", LastError: "line one\nline two", Locks: control.Locks{Held: "none", Scope: "host-local"},
				Record: control.Record{PerProcess: "--owner-record off"},
			},
		},
	}
	const want = `server       nbd-export 1.2, pid 812, up 2d2h, stopping

image        /srv/a.img
node         image0
export       disk, "" (read-only), copy (read-only)
format       raw
size         10 GiB (10737418240 bytes)
state        inactivating
step         sync-ahead for 1.2s, 5 MiB not yet synced, writers slowed for 310ms
epoch        7
since        2026-11-23 10:02:01 (1.2s)
locks        100,101,103,201,203 (cluster)
owner record /srv/a.img.owner
connections  4
in flight    32
slow         write of 4096 bytes at 0 from unix pid 7, for 12s
read         1.2 GiB in 31234 requests
written      2 MiB in 512 requests
answered     3 requests refused, 1 with an error

image        /dev/sdx
node         image1
format       raw
size         1000 bytes
state        failed(io) (read-only)
epoch        0
since        2026-11-23 10:02:03 (0s)
locks        none (host-local)
owner record per process (--owner-record off)
path lost    it names another file or none; copy the bytes from /proc/812/fd/9 before the server stops
connections  0
in flight    0
read         0 bytes in 0 requests
written      0 bytes in 0 requests
failed       input/output error
last error   line one; line two
`
	var b strings.Builder
	if err := writeStatus(&b, s, now); err != nil || b.String() != want {
		t.Errorf("%v, got\n%s\nwant\n%s", err, b.String(), want)
	}
	b.Reset()
	if err := writeStatus(&b, control.Status{Version: "1.2", PID: 1, Since: now}, now); err != nil ||
		b.String() != "server       nbd-export 1.2, pid 1, up 0s\nimages       none\n" {
		t.Errorf("%v, got\n%s", err, b.String())
	}
}

// TestStatusesAligned: an image stands in one row for all servers that have
// it, by path, else node, else export.
func TestStatusesAligned(t *testing.T) {
	block := func(image, node, export string) []statusRow {
		rows := []statusRow{{"image", image}, {"node", node}}
		if export != "" {
			rows = append(rows, statusRow{"export", export})
		}
		return rows
	}
	head := []statusRow{{"control", "x"}}
	for _, c := range []struct{ columns, want string }{
		{"/a n1|/b n2", "/a /b"}, // one each
		{"/a n1,/b n2|/b n2,/a n1", "/a /a,/b /b"},
		{"/a n1,/b n2|/c n3,/b n4", "/a -,/b /b,- /c"},
		{"/a n1,/b n2|/y n2,/x n1", "/a /x,/b /y"},
		{"/a n1 e1,/b n2 e2|/y n4 e2,/x n3 e1", "/a /x,/b /y"},
		{"/a n1,/b n2|/b n1", "/a -,/b /b"}, // the path counts more
		{"/a n1,/a n2|/a n2,/a n1", "/a /a,/a /a"},
		{"|/a n1,/b n2", "- /a,- /b"}, // does not answer
		{"/a n1|/b n2,/c n3|/c n3,/a n1", "/a - /a,- /b -,- /c /c"},
	} {
		var columns [][][]statusRow
		for text := range strings.SplitSeq(c.columns, "|") {
			column := [][]statusRow{head}
			for image := range strings.SplitSeq(text, ",") {
				if f := append(strings.Fields(image), "", ""); f[0] != "" {
					column = append(column, block(f[0], f[1], f[2]))
				}
			}
			columns = append(columns, column)
		}
		alignImages(columns)
		var rows []string
		for n := 1; n < len(columns[0]); n++ {
			var row []string
			for _, column := range columns {
				row = append(row, valueOf(column[n], "image"))
			}
			rows = append(rows, strings.Join(row, " "))
		}
		if got := strings.Join(rows, ","); got != c.want {
			t.Errorf("%s: %s; want %s", c.columns, got, c.want)
		}
	}
}

// A script that reads JSON is told of a failure in JSON.
func TestJSONOfFailures(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	for _, args := range [][]string{{"status", "--json", "--control", none}, {"who", "--json", none}, {"activate", "--json", "--control", none}, {"inactivate", "--json", "--control", none}, {"handover", "--json", "--from", none, "--to", none + "2"}} {
		root := newRootCommand(nil)
		var out, errOut bytes.Buffer
		root.SetOut(&out)
		root.SetErr(&errOut)
		var got struct{ Error string }
		if status := run(root, args); status != 1 {
			t.Errorf("%s: exit status %d", args, status)
		}
		if err := json.Unmarshal(out.Bytes(), &got); err != nil || !strings.Contains(got.Error, none) || !strings.Contains(errOut.String(), got.Error) {
			t.Errorf("%s: %v, stdout %s, stderr %s", args, err, out.String(), errOut.String())
		}
	}
}
