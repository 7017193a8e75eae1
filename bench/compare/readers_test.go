package main

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/bench"
)

// TestReads reads from two servers by a program of its own.
func TestReads(t *testing.T) {
	dir := t.TempDir()
	c := bench.FollowConfig{BlockSize: 4096, Size: 64 << 20, Reads: true, Still: true}
	var servers [2]*process
	for i := range servers {
		e := endpoint{binary: self(t), size: 64 << 20, transport: "unix", address: filepath.Join(dir, string(rune('a'+i)))}
		p, err := start(t.Context(), server{name: programLimit, program: programLimit, argv: limitArgv}, e)
		if err != nil {
			t.Fatal(err)
		}
		defer p.stop()
		servers[i], c.URIs[i] = p, p.uri()
	}
	r, err := startReads(t.Context(), self(t), c)
	if err != nil {
		t.Fatal(err)
	}
	defer r.stop()
	for range 3 {
		time.Sleep(2 * bench.ReadEvery)
		if g, err := r.gap(); err != nil || g.Longest <= 0 || g.Moving <= 0 {
			t.Errorf("%+v, %v", g, err)
		}
	}
	servers[1].stop()
	for {
		if _, err := r.gap(); err != nil {
			if !strings.Contains(err.Error(), "reading: ") {
				t.Error(err)
			}
			break
		}
	}
}
