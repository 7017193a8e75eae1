package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/bench"
)

// TestMain is also what the tests start as another client or as the limit server.
func TestMain(m *testing.M) {
	run := alsoRuns[append(os.Args, "")[1]]
	if run == nil {
		os.Exit(m.Run())
	}
	if err := run(os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func self(t *testing.T) string {
	t.Helper()
	file, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// TestFairRound has two clients on the limit server, of which one is another process.
func TestFairRound(t *testing.T) {
	for _, sc := range fairScenarios {
		t.Run(sc.id, func(t *testing.T) { testFairRound(t, sc) })
	}
}

func testFairRound(t *testing.T, sc fairScenario) {
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, make([]byte, 64<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	e := endpoint{binary: self(t), image: image, size: 64 << 20, transport: "unix", address: filepath.Join(dir, "s")}
	p, err := start(t.Context(), allServers(false)[0], e)
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	r := &runner{cfg: config{cellTime: 50 * time.Millisecond}}
	var s fairSample
	// Where this machine is too busy for them to overlap it has to say so.
	err = r.fairRound(t.Context(), sc, p, &s)
	late := err != nil && strings.Contains(err.Error(), "and the small one beside it")
	if err != nil && !late {
		t.Fatal(err)
	}
	if !s.Apart || s.Alone == nil || s.Beside == nil || s.Large == nil {
		t.Fatalf("%+v", s)
	}
	if l := s.Large; l.Total.Ops == 0 || l.Load != sc.large.RW || l.BlockSize != sc.large.BlockSize || l.Conns != sc.large.Conns ||
		l.Discard || l.URI != "" || l.ServerCPU == nil || !late && l.Elapsed < s.Beside.Elapsed {
		t.Errorf("%+v beside %v", l, s.Beside.Elapsed)
	}
	if s.Alone.Rate != sc.rate || s.Beside.Rate != sc.rate {
		t.Errorf("rates %v and %v", s.Alone.Rate, s.Beside.Rate)
	}

	// Without its server, and with ctx, it ends and says why.
	p.stop()
	if err := r.fairRound(t.Context(), sc, p, &s); err == nil {
		t.Error("no server, but a result")
	}
	gone := r.load(sc.large, p, 0)
	gone.PID = 0
	if _, err := startLoad(t.Context(), self(t), gone); err == nil || !strings.Contains(err.Error(), "another client's load: exit status 1: dial unix") {
		t.Error(err)
	}
}

// TestFairWarm has an image that the server does not bring into the page cache.
func TestFairWarm(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 64<<20)); err != nil {
		t.Fatal(err)
	}
	if resident(image, 64<<20) < 0 {
		t.Skip("before Linux 6.5 nobody can tell")
	}
	p, err := start(t.Context(), allServers(false)[0], endpoint{
		binary: self(t), image: image, size: 64 << 20, transport: "unix", address: filepath.Join(dir, "s"),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	r := &runner{cfg: config{cellTime: time.Millisecond}}
	var s fairSample
	// Whether the two loads overlap is not this test's business.
	if err := r.fairRound(t.Context(), fairScenarios[1], p, &s); s.Resident == nil || *s.Resident != 0 {
		t.Errorf("%v, %+v", err, s)
	}
}

func TestOtherClientEnds(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { _ = serveLimit(l, 64<<20) }()
	c := bench.Config{URI: endpoint{address: l.Addr().String()}.uri(), RW: "randread", BlockSize: 4 * k, Depth: 1, Conns: 1, Time: time.Hour}
	ctx, cancel := context.WithCancel(t.Context())
	o, err := startLoad(ctx, self(t), c)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := o.result(); err == nil || o.cmd.ProcessState == nil {
		t.Error("not ended by its context:", err)
	}
	for says, want := range map[string]string{
		`{"result":{}}`: "before it was under way", "no JSON": "another client's load: ", "{": "another client's load: ",
	} {
		script := filepath.Join(t.TempDir(), "script")
		if err := os.WriteFile(script, []byte("#!/bin/sh\necho '"+says+"'\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		if _, err := startLoad(t.Context(), script, c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", says, err, want)
		}
	}
	for _, bad := range [][]string{nil, {"{"}, {"{}"}} {
		if err := runLoad(bad, &bytes.Buffer{}); err == nil {
			t.Errorf("%q: accepted", bad)
		}
	}
}
