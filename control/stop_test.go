package control

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/state"
)

// front is a Front whose clients take their replies when told to.
type front struct {
	refuses, called, taken chan struct{}
}

func newFront() *front {
	return &front{make(chan struct{}), make(chan struct{}), make(chan struct{})}
}

func (f *front) Refuse() { close(f.refuses) }

func (f *front) Shutdown(ctx context.Context) error {
	close(f.called)
	select {
	case <-f.taken:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A stop in the middle of an inactivation: the transition is finished, then
// requests are refused, what was admitted finishes, and the image is let go.
func TestStopOrder(t *testing.T) {
	b := newBed(t, 2)
	if err := b.Activate(context.Background(), state.ActivateOptions{}, "image0", "image1"); err != nil {
		t.Fatal(err)
	}
	settling, settle, settled := make(chan struct{}), make(chan struct{}), 0
	b.images[0].settle = func() error { close(settling); <-settle; return nil }
	b.images[1].settle = func() error { settled++; return nil }
	inactivated := make(chan error)
	go func() {
		inactivated <- b.Inactivate(context.Background(), InactivateOptions{}, "image0")
	}()
	<-settling
	parked := make(chan struct{}, 10)
	lane0 := b.Targets()[0].Machine.Lane(func() { parked <- struct{}{} }, nil)
	defer lane0.Close()
	if v := lane0.Enter(state.Mutate); v != state.Wait {
		t.Fatalf("verdict %v during a transition", v)
	}
	lane1 := b.Targets()[1].Machine.Lane(nil, nil)
	defer lane1.Close()
	if v := lane1.Enter(state.Mutate); v != state.Admitted {
		t.Fatalf("verdict %v while active", v)
	}

	f, done := newFront(), make(chan error)
	go func() { done <- stop(b.Registry, f, zap.NewNop(), time.Hour) }()
	for !b.isStopping() {
	}
	if err := b.Activate(context.Background(), state.ActivateOptions{}); !errors.Is(err, errStopping) {
		t.Errorf("order during a stop: %v", err)
	}
	if err := b.Add(&Target{Node: "late"}); !errors.Is(err, errStopping) {
		t.Errorf("image added during a stop: %v", err)
	}
	select {
	case <-f.refuses:
		t.Error("connections are refused before the transition is finished")
	default:
	}
	close(settle)
	if err := <-inactivated; err != nil {
		t.Error(err)
	}
	<-f.refuses
	<-parked
	if v := lane0.Enter(state.Mutate); v != state.Refused || !errors.Is(lane0.Refusal(), state.ErrStopping) {
		t.Errorf("parked request: %v, %v", v, lane0.Refusal())
	}
	if settled != 0 {
		t.Error("settled before what was admitted has finished")
	}
	select {
	case <-f.called:
		t.Error("connections end before requests can be told of the stop")
	default:
	}
	lane1.Leave()
	close(f.taken)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if settled != 1 {
		t.Errorf("active image settled %d times", settled)
	}
	b.want(t, state.Closed, state.Closed)
}

func TestStopFails(t *testing.T) {
	b := newBed(t, 3)
	if err := b.Activate(context.Background(), state.ActivateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.images[0].settle = func() error { return lost{} }
	b.images[2].settle = func() error { return errors.New("no space left on device") }
	log, lines := journal()
	// The clients never take their replies.
	err := stop(b.Registry, newFront(), log, time.Millisecond)
	for _, want := range []string{"/srv/a.img", "may be lost", "input/output error", "/srv/c.img", "no space left on device"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
	expect(t, lines, "stopping")
	expect(t, lines, "clients were cut off")
}

func TestPIDFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	p, err := NewPIDFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("it is there before it is published")
	}
	if err := p.Publish(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil || string(text) != strconv.Itoa(os.Getpid())+"\n" {
		t.Errorf("read %q, %v", text, err)
	}

	// One of a server that runs is not replaced, whether it was there before or
	// has come meanwhile; one that is left from a dead server is.
	refused := func(err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "of a server that runs, pid "+strconv.Itoa(os.Getpid())) {
			t.Errorf("got %v", err)
		}
	}
	_, err = NewPIDFile(path)
	refused(err)
	hidden := path + ".hidden"
	if err := os.Rename(path, hidden); err != nil {
		t.Fatal(err)
	}
	next, err := NewPIDFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(hidden, path); err != nil {
		t.Fatal(err)
	}
	refused(next.Publish())
	if err := os.WriteFile(hidden, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(hidden, path); err != nil { // as if p had died: nobody has locked it
		t.Fatal(err)
	}
	if err := next.Publish(); err != nil {
		t.Fatal(err)
	}
	p.Remove() // not its own any more
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	next.Remove()
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}

	unused, err := NewPIDFile(path)
	if err != nil {
		t.Fatal(err)
	}
	unused.Remove()
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	// A mistyped path costs nobody a file.
	precious := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(precious, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{filepath.Dir(path), filepath.Join(path, "no", "such"), precious} {
		if _, err := NewPIDFile(bad); err == nil || !strings.Contains(err.Error(), "cannot write pid file "+bad) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
