package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
)

// What the record says, what is locked, and what that means.
func TestJudge(t *testing.T) {
	img := newImage(t)
	now := time.Now()
	self := backend.OwnerRecord{Since: now, Epoch: 7, PID: os.Getpid(), Control: "/run/a.ctl"}
	self.Host, _ = os.Hostname()
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	self.BootID = strings.TrimSpace(string(boot))
	dead, far, clean := self, self, self
	dead.PID, far.Host, clean.Clean = 1<<30, "hostB", true
	writer, reader := []int64{100, 101, 103, 201, 203}, []int64{100, 201}
	text := self.Owner(now)
	for _, c := range []struct {
		record         *backend.OwnerRecord
		locks          []int64
		stale          bool
		state, verdict string
	}{
		{nil, nil, false, "free", "nobody owns it"},
		{nil, reader, false, "readers", "nobody owns it; readers hold locks"},
		{nil, writer, false, "foreign", "locked by another program, one that writes no record (QEMU, or an exporter that could not or was not to)"},
		{&clean, nil, false, "free", "the last owner let go in order: " + text},
		{&clean, reader, false, "readers", "in order: " + text + "; readers hold locks"},
		{&clean, writer, false, "foreign", ": that says let go in order by " + text},
		{&self, writer, false, "owned", "owned by " + text + "; it is locked"},
		{&far, writer, false, "owned", "owned by nbd-export on hostB, pid "},
		{&self, writer, true, "foreign", "; that is stale: it says owned by " + text},
		{&dead, writer, false, "foreign", "but that process has ended"},
		{&self, nil, false, "left", "record says owned by " + text + ", but no lock of an owner is held: that process lives"},
		{&dead, nil, false, "left", "is held: that process ended without letting go"},
		{&dead, reader, false, "left", "without letting go; readers hold locks"},
		{&far, nil, false, "left", "or its locks do not reach this host"},
	} {
		w := judge(img, &backend.Ownership{Owner: c.record, Locks: c.locks, Stale: c.stale}, now)
		if w.State != c.state || !strings.Contains(w.Verdict, c.verdict) || w.Error != "" {
			t.Errorf("%+v, locks %v: %s, %s; want %s, %s", c.record, c.locks, w.State, w.Verdict, c.state, c.verdict)
		}
	}
	// Who can be seen to have the locks is named.
	qemu := []backend.Holder{{PID: 5, Program: "qemu-io", Locks: reader}, {PID: 7, Program: "qemu nbd", Locks: writer}}
	seen := judge(img, &backend.Ownership{Owner: &dead, Locks: writer, Holders: qemu}, now)
	if want := "locked by qemu nbd (pid 7), which has not written the record: that says owned by " + text[:len("nbd-export on ")]; !strings.HasPrefix(seen.Verdict, want) {
		t.Errorf("%s; want %s", seen.Verdict, want)
	}
	var out bytes.Buffer
	if err := seen.write(&out); err != nil || !strings.Contains(out.String(), "\nlocked by    qemu-io, pid 5: 100,201\nlocked by    qemu nbd, pid 7: 100,101,103,201,203\n") {
		t.Errorf("%v, %s", err, out.String())
	}
	w := judge(img, &backend.Ownership{LocksErr: errors.Join(unix.ENOLCK, unix.EIO)}, now)
	if w.State != "unknown" || w.Locks.Held != "unknown" || !strings.Contains(w.Error, "no locks available; input/output") {
		t.Errorf("%+v", w)
	}
}

func TestWho(t *testing.T) {
	img := newImage(t)
	dir := filepath.Dir(img)
	if out := command(t, 0, "who", img); out != fmt.Sprintf(`image        %[1]s
owner        nobody owns it
locks        none (cluster)
owner record %[1]s.owner
`, img) {
		t.Error(out)
	}
	ask := func() (w who) {
		t.Helper()
		if err := json.Unmarshal([]byte(command(t, 0, "who", "--json", img)), &w); err != nil {
			t.Fatal(err)
		}
		return w
	}
	a := serveChild(t, img, "a")
	w := ask()
	if r := w.Record; w.State != "owned" || r.PID != a.Process.Pid || r.Control != filepath.Join(dir, "a.ctl") || r.Epoch != 1 ||
		w.Process != backend.ProcessLives || w.Locks.Held != "100,101,103,201,203" || len(w.Holders) != 1 || w.Holders[0].PID != a.Process.Pid ||
		w.Holders[0].Locks != w.Locks.Held || w.Place.Path != img+".owner" {
		t.Errorf("%+v", w)
	}
	if s := stateOf(t, filepath.Join(dir, "a.ctl")); s.Record != w.Place || s.Epoch != 1 {
		t.Errorf("status %+v", s)
	}
	command(t, 0, "inactivate", "--control", filepath.Join(dir, "a.ctl"))
	if w := ask(); w.State != "free" || !w.Record.Clean {
		t.Errorf("%+v", w)
	}

	// Epochs go on from one process to the next, and a refusal names the owner.
	b := serveChild(t, img, "b")
	if s := stateOf(t, filepath.Join(dir, "b.ctl")); s.Epoch != 2 {
		t.Errorf("epoch %d", s.Epoch)
	}
	want := fmt.Sprintf("pid %d, since ", b.Process.Pid)
	if out := command(t, 1, "activate", "--control", filepath.Join(dir, "a.ctl")); !strings.Contains(out, want) || !strings.Contains(out, "epoch 2 (control "+filepath.Join(dir, "b.ctl")) ||
		!strings.Contains(out, `Failed to get "write" lock`) {
		t.Error(out)
	}
	b.signal(t, syscall.SIGKILL)
	b.end(t)
	if w := ask(); w.State != "left" || w.Process != backend.ProcessEnded || w.Record.Epoch != 2 {
		t.Errorf("%+v", w)
	}
	command(t, 0, "activate", "--control", filepath.Join(dir, "a.ctl"))

	// Somebody else took it, which the locks did not hinder.
	r := *ask().Record
	r.Epoch, r.Host = 9, "hostB"
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(img+".owner", text, 0o600); err != nil {
		t.Fatal(err)
	}
	if l := a.expect(t, "another process may own the image"); l.To != "failed(fenced)" || !strings.Contains(l.Error, "nbd-export on hostB") {
		t.Errorf("%+v", l)
	}
	a.signal(t, syscall.SIGTERM)
	if status, words := a.end(t); status != 1 || !strings.Contains(words, "hostB") {
		t.Errorf("exit %d: %s", status, words)
	}
	if got, _ := os.ReadFile(img + ".owner"); !bytes.Equal(got, text) {
		t.Errorf("the other's record became %s", got)
	}

	// What is no record refuses activation, and who says so.
	if err := os.WriteFile(img+".owner", []byte("notes"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, out := range []string{command(t, 1, "who", img), command(t, 1, "who", "--json", img)} {
		if !strings.Contains(out, "this is no owner record") || !strings.Contains(out, "unknown") && !strings.Contains(out, "cannot be told") {
			t.Error(out)
		}
	}
	c := start(t, "serve", "-f", "raw", "--log-format", "json", "-k", filepath.Join(dir, "c.sock"), img)
	if status, words := c.end(t); status != 1 || !strings.Contains(words, "remove it") || strings.Contains(words, "\n") {
		t.Errorf("exit %d: %s", status, words)
	}
	d := serveChild(t, img, "d", "--owner-record", "off")
	if s := stateOf(t, filepath.Join(dir, "d.ctl")); s.Record.PerProcess != "--owner-record off" || s.Epoch != 1 {
		t.Errorf("%+v", s)
	}
	d.signal(t, syscall.SIGTERM)
	d.end(t)
	e := serveChild(t, img, "e", "--owner-record", filepath.Join(dir, "rec"))
	if out := command(t, 0, "who", "--owner-record", filepath.Join(dir, "rec"), img); !strings.Contains(out, "it is locked as that says") {
		t.Error(out)
	}
	e.signal(t, syscall.SIGTERM)
	e.end(t)
}

// A name cannot make lines of its own, for people or for scripts that read them.
func TestWhoOneLineEach(t *testing.T) {
	var out bytes.Buffer
	w := who{Image: "disk\nowner        nobody owns it\x1b[2J", Verdict: "locked"}
	if err := w.write(&out); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(out.String(), "\n"); len(lines) != 5 || lines[0] != "image        disk?owner        nobody owns it?[2J" {
		t.Errorf("%q", lines)
	}
}
