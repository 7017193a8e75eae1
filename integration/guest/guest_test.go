package guest

import (
	"strings"
	"testing"
	"time"
)

// The guest itself: a script's output, input, files and exit status arrive, and
// the monitor answers meanwhile.
func TestGuest(t *testing.T) {
	g := Start(t, Config{
		Script: "echo hello; cat /some/where; read line; echo \"got $line\"; dmesg | tail -n 3; exit 7\n",
		Files:  map[string][]byte{"/some/where": []byte("a file\n")},
	})
	q := g.QMP()
	_, next := g.WaitFor("^hello$", 0)
	status, err := q.Execute("query-status", nil)
	if err != nil || !strings.Contains(string(status), "running") {
		t.Errorf("query-status: %s, %v", status, err)
	}
	if _, err := q.Execute("no-such-command", nil); err == nil {
		t.Error("an unknown command was accepted")
	}
	g.WaitFor("^a file$", next)
	g.Send("a line")
	r := g.Wait()
	if r.ExitCode != 7 || !strings.Contains(r.Output, "got a line\n") {
		t.Errorf("exit status %d, want 7; output:\n%s", r.ExitCode, r.Output)
	}
	t.Logf("%v\n%s\n%s", r.Elapsed, r.Output, r.Console)
}

// A guest moves to another QEMU while it runs, with the pause at which a disk's
// owner would change: the base for the migration tests with real exporters.
func TestMigrate(t *testing.T) {
	cfg := Config{Script: "i=0; while [ $i -lt 40 ]; do i=$((i + 1)); echo count $i; sleep 0.1; done; exit 3\n"}
	source := Start(t, cfg)
	source.WaitFor("^count 5$", 0)
	cfg.Args = []string{"-incoming", "defer"}
	destination := Start(t, cfg)

	uri := "unix:" + t.TempDir() + "/m"
	src, dst := source.QMP(), destination.QMP()
	execute := func(q *QMP, command string, args any) {
		t.Helper()
		if _, err := q.Execute(command, args); err != nil {
			t.Fatalf("%s: %v", command, err)
		}
	}
	capabilities := map[string]any{"capabilities": []map[string]any{
		{"capability": "events", "state": true}, {"capability": "pause-before-switchover", "state": true},
	}}
	execute(src, "migrate-set-capabilities", capabilities)
	execute(dst, "migrate-set-capabilities", capabilities)
	execute(dst, "migrate-incoming", map[string]any{"uri": uri})
	execute(src, "migrate", map[string]any{"uri": uri})
	reached := func(q *QMP, status string) {
		t.Helper()
		is := func(e Event) bool { return e.Data["status"] == status }
		if _, err := q.WaitEvent("MIGRATION", is, time.Minute); err != nil {
			t.Fatalf("%s: %v", status, err)
		}
	}
	reached(src, "pre-switchover")
	execute(src, "migrate-continue", map[string]any{"state": "pre-switchover"})
	reached(dst, "completed")
	reached(src, "completed")
	source.Kill()

	r := destination.Wait()
	before := strings.Fields(source.Output())
	after := strings.Fields(r.Output)
	if r.ExitCode != 3 || len(after) < 2 {
		t.Fatalf("exit status %d at the destination, want 3; output:\n%s", r.ExitCode, r.Output)
	}
	t.Logf("source counted to %s, destination to %s", before[len(before)-1], after[len(after)-1])
	if after[len(after)-1] != "40" {
		t.Errorf("destination ended at %s, want 40", after[len(after)-1])
	}
}
