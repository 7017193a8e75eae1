package control

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbd-export/nbd-export/state"
)

// helperMain makes the test binary a relay to a control socket, or a server
// without images, if it is asked to.
func helperMain() {
	if path := os.Getenv("CONTROL_TEST_RELAY"); path != "" {
		nc, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			os.Exit(1)
		}
		go func() {
			_, _ = io.Copy(nc, os.Stdin)
			_ = nc.CloseWrite()
		}()
		_, _ = io.Copy(os.Stdout, nc)
		os.Exit(0)
	}
	if path := os.Getenv("CONTROL_TEST_SERVE"); path != "" {
		l, err := Listen(path)
		if err != nil {
			os.Exit(1)
		}
		_ = NewServer(Config{Registry: &Registry{}, Version: "test"}).Serve(l)
		os.Exit(0)
	}
}

func execRelay(t testing.TB, path string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return "exec:CONTROL_TEST_RELAY='" + path + "' exec '" + self + "'"
}

func TestExec(t *testing.T) {
	b := newBed(t, 2)
	path := b.listen(t, Config{})
	c := dial(t, execRelay(t, path))
	ctx := context.Background()
	if err := c.SetActive(ctx, true); err != nil {
		t.Fatal(err)
	}
	b.want(t, state.Active, state.Active)
	if s, err := c.Status(ctx); err != nil || len(s.Images) != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	x := c.nc.(*execConn)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := syscall.Kill(-x.pid, 0); err != syscall.ESRCH {
		t.Errorf("the command is still there: %v", err)
	}
}

func TestExecFails(t *testing.T) {
	ctx := context.Background()
	for command, want := range map[string]string{
		"":                                  "no command follows",
		"echo no route to host >&2; exit 7": "ended before it answered (exit status 7): no route to host",
		"echo hello":                        "is no control socket",
		"printf 'a\\033b\\nc' >&2":          "ended before it answered: a?b; c",
		"kill -9 $$":                        "signal: killed",
		"exec >&-; sleep 60":                "its output ended before it answered",
		`echo '{"QMP": {}}'; exit 3`:        "exit status 3",
	} {
		_, err := Dial(ctx, "exec:"+command)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %s", command, err, want)
		}
	}
}

// A command that does not end by itself is killed with all that it started,
// and nobody waits for it for long.
func TestExecEnds(t *testing.T) {
	dir := t.TempDir()
	pid := filepath.Join(dir, "pid")
	ctx, cancel := context.WithCancel(context.Background())
	var child string
	started := make(chan struct{})
	go func() {
		defer close(started)
		for end := time.Now().Add(time.Minute); child == "" && time.Now().Before(end); time.Sleep(time.Millisecond) {
			b, _ := os.ReadFile(pid)
			if s, whole := strings.CutSuffix(string(b), "\n"); whole {
				child = s
			}
		}
		cancel()
	}()
	_, err := Dial(ctx, "exec:trap '' TERM INT HUP; sleep 1000 & echo $! > "+pid+"; wait")
	<-started
	if !errors.Is(err, context.Canceled) && (err == nil || !strings.Contains(err.Error(), "does not greet")) {
		t.Error(err)
	}
	if child == "" {
		t.Fatal("the command has not started anything")
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + child + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("what the command has started is still there")
		}
	}
}

func TestOrders(t *testing.T) {
	var o orders
	begin := func(name string) *namedOrder {
		n, err := o.begin(name)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	a := begin("a")
	if !o.takeBack("a", false) || a.ctx.Err() != nil {
		t.Error("one that is under way is not running, or is given up")
	}
	// A client may give two the same name.
	b, again := begin("b"), begin("b")
	o.end(b)
	if again.ctx.Err() != nil || !o.takeBack("b", true) || again.ctx.Err() == nil || a.ctx.Err() != nil {
		t.Error("another is given up, or none")
	}
	o.end(again)
	o.end(a)
	if o.takeBack("a", true) || o.takeBack("b", true) {
		t.Error("they have ended")
	}
	if o.takeBack("c", true) {
		t.Error("it has not begun")
	}
	if _, err := o.begin("c"); err == nil {
		t.Error("one that was taken back begins")
	}
	for range 3 {
		o.end(begin(""))
	}
	for i := range 2 * mostVoid {
		o.takeBack(string(rune('A'+i)), true)
	}
	if len(o.void) != mostVoid {
		t.Errorf("%d are remembered", len(o.void))
	}
}

// Names that are to be remembered have a bound.
func TestOrderNames(t *testing.T) {
	c := dial(t, newBed(t, 1).listen(t, Config{}))
	long := strings.Repeat("x", 1000)
	_, _, err := c.takeBack(t.Context(), long, nil)
	if err == nil || err.Error() != "Parameter 'order' is longer than 64 bytes" {
		t.Errorf("taken back: %v", err)
	}
	if err := c.setActive(t.Context(), setActive{Active: true, Order: long}, nil); err == nil || err.Error() != "Parameter 'x-order' is longer than 64 bytes" {
		t.Errorf("ordered: %v", err)
	}
}

// An order that is taken back on another connection does not begin, and one
// under way is told of.
func TestTakeBack(t *testing.T) {
	b := newBed(t, 1)
	path := b.listen(t, Config{})
	p := NewPeer(path)
	defer p.Close()
	ctx := context.Background()
	if running, err := p.TakeBack(ctx, Order{Name: "x", Nodes: []string{"image0"}}); running || err != nil {
		t.Fatal(running, err)
	}
	if err := p.SetActive(ctx, Order{Name: "x", Active: true, Nodes: []string{"image0"}}); err == nil || !answered(err) {
		t.Error(err)
	}
	b.want(t, state.Inactive)

	begun, goOn := make(chan struct{}), make(chan struct{})
	b.images[0].acquire = func() error { close(begun); <-goOn; return nil }
	result := make(chan error)
	go func() { result <- p.SetActive(ctx, Order{Name: "y", Active: true, Nodes: []string{"image0"}}) }()
	<-begun
	if running, err := p.TakeBack(ctx, Order{Name: "y", Nodes: []string{"image0"}}); !running || err != nil {
		t.Error(running, err)
	}
	close(goOn)
	if err := <-result; err != nil {
		t.Error(err)
	}
	b.want(t, state.Active)
	// One about what is not here any more is void too.
	if running, err := p.TakeBack(ctx, Order{Name: "z", Nodes: []string{"image0", "removed"}}); running || err != nil {
		t.Error(running, err)
	}
	if running, err := p.TakeBack(ctx, Order{Name: "z", Nodes: []string{"removed"}}); running || err != nil {
		t.Error(running, err)
	}
	// What is done for somebody else goes on.
	begun, goOn = make(chan struct{}), make(chan struct{})
	b.images[0].syncAhead = func(ctx context.Context) error {
		close(begun)
		select {
		case <-goOn:
		case <-ctx.Done():
		}
		return ctx.Err()
	}
	go func() { result <- p.SetActive(ctx, Order{Name: "theirs", Nodes: []string{"image0"}}) }()
	<-begun
	for _, active := range []bool{true, false} {
		if running, err := p.TakeBack(ctx, Order{Name: "ours", Active: active, Nodes: []string{"image0"}}); running || err != nil {
			t.Error(running, err)
		}
	}
	close(goOn)
	if err := <-result; err != nil {
		t.Error(err)
	}
	b.want(t, state.Inactive)
	// Whoever goes on knows that nobody is gone: it is this process.
	if p.Gone() {
		t.Error("this process is gone")
	}
}

// A process that has ended is seen to be gone, one behind a command never.
func TestGone(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "ctl")
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "CONTROL_TEST_SERVE="+path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	defer func() { _ = cmd.Process.Kill(); <-ended }()
	ctx := context.Background()
	near, far := NewPeer(path), NewPeer(execRelay(t, path))
	defer near.Close()
	defer far.Close()
	if near.Gone() {
		t.Error("gone before it was asked")
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		_, err := near.Status(ctx)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	for _, p := range []*Peer{near, far} {
		if _, err := p.Status(ctx); err != nil || p.Gone() {
			t.Fatal(err, p.Gone())
		}
	}
	_ = cmd.Process.Signal(syscall.SIGKILL)
	<-ended
	if !near.Gone() || far.Gone() {
		t.Errorf("after its death: %v, through a command %v", near.Gone(), far.Gone())
	}
}

// An order that is taken back ends an inactivation only if no other order wants it,
// whichever of them began it.
func TestTakeBackShared(t *testing.T) {
	const (
		why       = "Failed to inactivate node: "
		by        = "it was taken back by who gave it (x-cancel)"
		gaveUp    = why + "cannot inactivate: gave up waiting for the transition under way: " + by
		cancelled = why + "inactivation cancelled, everything stays active: " + by
	)
	for _, c := range []struct {
		back  []string
		at    state.State // then
		first string      // errors
		next  string
	}{
		{[]string{"next"}, state.Inactivating, "", gaveUp},
		{[]string{"first"}, state.Inactivating, "", ""},
		{[]string{"first", "next"}, state.Active, cancelled, gaveUp},
		{[]string{"next", "first"}, state.Active, cancelled, gaveUp},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newBed(t, 1)
			b.activate(t)
			goOn := make(chan struct{})
			b.images[0].syncAhead = func(ctx context.Context) error {
				select {
				case <-goOn:
				case <-ctx.Done():
				}
				return ctx.Err()
			}
			s := &session{server: NewServer(Config{Registry: b.Registry})}
			nodes := []string{"image0"}
			give := func(name string) (result chan error) {
				result = make(chan error, 1)
				go func() {
					_, err := s.setActive(args{"active": false, "x-node-names": nodes, "x-order": name})
					result <- err
				}()
				synctest.Wait()
				return result
			}
			first, next := give("first"), give("next")
			for _, name := range c.back {
				b.want(t, state.Inactivating)
				if _, err := s.cancel(args{"order": name, "x-node-names": nodes}); err != nil {
					t.Error(err)
				}
				synctest.Wait()
			}
			b.want(t, c.at)
			if c.next != "" { // it is told at once
				if err := <-next; errorText(err) != c.next {
					t.Errorf("%v: next: %v", c.back, err)
				}
				next <- errors.New(c.next)
			}
			close(goOn)
			for result, want := range map[chan error]string{first: c.first, next: c.next} {
				if err := <-result; errorText(err) != want {
					t.Errorf("%v: %v, want %s", c.back, err, want)
				}
			}
			if c.at == state.Inactivating {
				b.want(t, state.Inactive)
			}
		})
	}
}
