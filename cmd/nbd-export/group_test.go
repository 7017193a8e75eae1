package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/internal/testfs"
	"github.com/nbd-export/nbd-export/state"
)

// group is how many images one process hands over as one.
const group = 1000

// groupPair are two processes' worth of daemon on the same images, each with a
// client of its control socket; the first owns them all.
type groupPair [2]*control.Client

func newGroupPair(t testing.TB, n int, log *zap.Logger) groupPair {
	t.Helper()
	dir := testfs.Memory(t)
	var pair groupPair
	for side := range pair {
		d, err := newDaemon(daemonOptions{control: filepath.Join(dir, fmt.Sprintf("%d.ctl", side)), dirty: 32 << 20, engine: "portable"}, log)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.listen(); err != nil {
			t.Fatal(err)
		}
		for i := range n {
			path := filepath.Join(dir, fmt.Sprintf("%d.img", i))
			if side == 0 {
				if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			opt := imageOptions{Options: backend.Options{Path: path, Format: "raw"}, name: fmt.Sprint(i), inactive: true}
			if err := d.add(opt); err != nil {
				t.Fatal(err)
			}
		}
		serve := func(l net.Listener) {
			if err := d.control.Serve(l); err != nil {
				t.Error(err)
			}
		}
		go serve(d.controlListener)
		t.Cleanup(func() {
			if err := d.close(); err != nil {
				t.Error(err)
			}
		})
		if pair[side], err = control.Dial(t.Context(), d.opt.control); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = pair[side].Close() })
	}
	if err := pair[0].SetActive(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	return pair
}

// handOver gives all images of one side to the other.
func (p groupPair) handOver(ctx context.Context, from int) error {
	if err := p[from].SetActive(ctx, false); err != nil {
		return fmt.Errorf("inactivate: %w", err)
	}
	if err := p[1-from].SetActive(ctx, true); err != nil {
		return fmt.Errorf("activate: %w", err)
	}
	return nil
}

func (p groupPair) expect(t testing.TB, side int, want state.State) {
	t.Helper()
	s, err := p[side].Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range s.Images {
		if i.State != control.State(want.String()) {
			t.Errorf("side %d: image %s is %s, want %s", side, i.Image, i.State, want)
		}
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// TestGroup hands over a thousand images of one process as one group, and back,
// and sees that nothing is left over.
func TestGroup(t *testing.T) {
	p := newGroupPair(t, group, zap.NewNop())
	files, goroutines := openFiles(t), runtime.NumGoroutine()
	for _, from := range []int{0, 1} {
		start := time.Now()
		if err := p.handOver(t.Context(), from); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d images in %v", group, time.Since(start))
		p.expect(t, from, state.Inactive)
		p.expect(t, 1-from, state.Active)
	}
	if n := openFiles(t); n > files+10 {
		t.Errorf("%d files were open before, %d are now", files, n)
	}
	// Once a second each image is looked at, by a goroutine that ends.
	n := runtime.NumGoroutine()
	for deadline := time.Now().Add(30 * time.Second); n > goroutines+10 && time.Now().Before(deadline); n = runtime.NumGoroutine() {
		time.Sleep(time.Millisecond)
	}
	if n > goroutines+10 {
		t.Errorf("%d goroutines before, %d now", goroutines, n)
	}
	t.Logf("two processes' worth of images: %d files, %d goroutines", files, n)
}

// BenchmarkGroup is the time to hand over a thousand images on tmpfs.
func BenchmarkGroup(b *testing.B) {
	log := zap.NewNop()
	if testing.Verbose() {
		log = zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(zap.NewDevelopmentEncoderConfig()), os.Stderr, zap.DebugLevel))
	}
	p := newGroupPair(b, group, log)
	from := 0
	for b.Loop() {
		if err := p.handOver(b.Context(), from); err != nil {
			b.Fatal(err)
		}
		from = 1 - from
	}
}
