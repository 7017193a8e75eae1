package bench

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
)

// fakeExporter serves an image file that it has open for writing only while it
// owns it, unless it misbehaves.
type fakeExporter struct {
	mu      sync.RWMutex
	path    string
	file    *os.File
	active  bool
	misdeed string
	kept    *os.File
}

func (e *fakeExporter) ReadAt(p []byte, off int64) (int, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.file.ReadAt(p, off)
}

func (e *fakeExporter) WriteAt(p []byte, off int64) (int, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.misdeed == "loses" && off/4096%4 == 1 {
		return len(p), nil
	}
	return e.file.WriteAt(p, off)
}

func (e *fakeExporter) setActive(_ context.Context, active bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	mode := os.O_RDONLY
	if active {
		mode = os.O_RDWR
	}
	f, err := os.OpenFile(e.path, mode, 0)
	if err != nil {
		return err
	}
	if e.misdeed == "keeps" && !active {
		e.kept = e.file
	} else if e.file != nil {
		_ = e.file.Close()
	}
	e.file, e.active = f, active
	return nil
}

func (e *fakeExporter) refuse(cmd uint16) (uint32, string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if cmd != wire.CmdWrite || e.active {
		return 0, ""
	}
	if e.misdeed == "writes" {
		if f, err := os.OpenFile(e.path, os.O_WRONLY, 0); err == nil {
			_, _ = f.WriteAt([]byte("x"), 50_000)
			_ = f.Close()
		}
	}
	return wire.EPERM, "export is inactive"
}

// runFakeDemo is a short demo with exporters within this process.
func runFakeDemo(t *testing.T, misdeed string) (DemoResult, error) {
	t.Helper()
	var shown []string
	exporters := map[int]*fakeExporter{}
	cfg := DemoConfig{
		Dir: t.TempDir(), Handovers: 3, Depth: 4, ImageSize: 1 << 20, Between: 5 * time.Millisecond,
		Progress: func(p DemoProgress) { shown = append(shown, p.String()) },
		handles: func(pid int, _ string) ([]string, error) {
			if e := exporters[pid]; e.active || e.kept != nil {
				return []string{"descriptor 7"}, nil
			}
			return nil, nil
		},
		Start: func(_ context.Context, name, image string, inactive bool) (*Exporter, error) {
			e := &fakeExporter{path: image}
			if name == "a" {
				e.misdeed = misdeed
			}
			if err := e.setActive(t.Context(), !inactive); err != nil {
				return nil, err
			}
			exporters[int(name[0])] = e
			f := &fake{image: e, size: 1 << 20, flags: fakeFlags, refuse: e.refuse}
			end := func() error {
				e.mu.Lock()
				defer e.mu.Unlock()
				if misdeed == "ends" && name == "a" {
					_ = os.Truncate(image, 0)
				}
				_ = e.kept.Close()
				return nil
			}
			return &Exporter{
				Name: name, PID: int(name[0]), Socket: f.start(t), SetActive: e.setActive,
				Stop: func(context.Context) error { return end() }, Kill: end,
			}, nil
		},
	}
	r, err := RunDemo(t.Context(), cfg)
	if err == nil && len(shown) != 6 {
		t.Errorf("%q", shown)
	}
	if left, _ := os.ReadDir(cfg.Dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	return r, err
}

func TestDemo(t *testing.T) {
	r, err := runFakeDemo(t, "")
	if err != nil || !r.OK() || r.Acknowledged == 0 || r.Refused == 0 || r.Handovers != 6 || r.Checksums == 0 || r.HandoverP50 <= 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	var table bytes.Buffer
	if err := r.WriteTable(&table); err != nil || !strings.Contains(table.String(), "\nPASS: ") {
		t.Errorf("%s %v", &table, err)
	}
}

func TestDemoFinds(t *testing.T) {
	for misdeed, want := range map[string]string{
		"loses":  "acknowledged write",
		"keeps":  "inactive exporter a can write the image: descriptor",
		"writes": "the image changed while nobody owned it",
		"ends":   "the image changed when inactive exporters ended",
	} {
		t.Run(misdeed, func(t *testing.T) {
			r, err := runFakeDemo(t, misdeed)
			if err != nil {
				t.Fatal(err)
			}
			var table bytes.Buffer
			_ = r.WriteTable(&table)
			if r.OK() || !strings.Contains(table.String(), want) || !strings.Contains(table.String(), "\nFAIL: ") || strings.Contains(table.String(), "unchanged") {
				t.Errorf("%+v\n%s", r, &table)
			}
		})
	}
}

func TestDemoFails(t *testing.T) {
	broken := errors.New("broken")
	_, err := RunDemo(t.Context(), DemoConfig{Dir: t.TempDir(), Start: func(context.Context, string, string, bool) (*Exporter, error) {
		return nil, broken
	}})
	if !errors.Is(err, broken) {
		t.Error(err)
	}
	if _, err := RunDemo(t.Context(), DemoConfig{ImageSize: 1000}); err == nil {
		t.Error("odd size accepted")
	}
}

func TestWritableHandles(t *testing.T) {
	path := t.TempDir() + "/f"
	if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	count := func() int {
		t.Helper()
		found, err := writableHandles(os.Getpid(), path)
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	r, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if n := count(); n != 0 {
		t.Error(n)
	}
	w, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if n := count(); n != 1 {
		t.Error(n)
	}
	m, err := syscall.Mmap(int(w.Fd()), 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	if n := count(); n != 1 {
		t.Error(n)
	}
	_ = syscall.Munmap(m)
	if n := count(); n != 0 {
		t.Error(n)
	}
}
