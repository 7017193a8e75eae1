package integration

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// hookedProgram is the binary under test with the hooks of
// cmd/nbd-export/hooks_on.go.
func hookedProgram(t testing.TB) string {
	t.Helper()
	p := os.Getenv("NBD_EXPORT_HOOKED")
	if p == "" {
		p = "../bin/nbd-export-hooks"
	}
	p, err := filepath.Abs(p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%v: build it with 'make hooked', or name it in NBD_EXPORT_HOOKED", err)
	}
	return p
}

// hooks is the test's end of the hooks of one exporter of one image. Unless it
// is told to hold a step, every step goes on at once.
type hooks struct {
	t        testing.TB
	listener net.Listener
	held     chan string   // the step that is held
	failed   chan string   // calls that have been made to fail
	stalled  chan string   // calls that wait
	armed    chan string   // calls of which the next will wait
	left     chan struct{} // receives when an exporter is gone

	mu    sync.Mutex
	enc   *json.Encoder
	hold  string
	calls map[string][]string // that were made in each step, sorted
}

// newHooks returns hooks, and what makes a command an exporter that has them.
func newHooks(t testing.TB) (*hooks, func(*exec.Cmd)) {
	t.Helper()
	path := filepath.Join(shortDir(t), "hooks")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	h := &hooks{t: t, listener: l, held: make(chan string, 1), failed: make(chan string, 64), stalled: make(chan string, 64), armed: make(chan string, 1), left: make(chan struct{}, 16), calls: map[string][]string{}}
	go h.serve()
	program := hookedProgram(t)
	return h, func(cmd *exec.Cmd) {
		cmd.Path, cmd.Args[0] = program, program
		cmd.Env = append(cmd.Env, "NBD_EXPORT_HOOKS="+path)
	}
}

// serve takes one exporter after the other, should one be started anew.
func (h *hooks) serve() {
	for {
		c, err := h.listener.Accept()
		if err != nil {
			return
		}
		h.mu.Lock()
		h.enc = json.NewEncoder(c)
		h.mu.Unlock()
		h.follow(json.NewDecoder(c))
		c.Close()
		h.left <- struct{}{}
	}
}

func (h *hooks) follow(d *json.Decoder) {
	step := ""
	for {
		var m struct {
			Step, Call             string
			Failed, Stalled, Armed bool
		}
		if d.Decode(&m) != nil {
			return
		}
		if m.Step != "" {
			step = m.Step
			h.mu.Lock()
			hold := h.hold == step
			if hold {
				h.hold = ""
			}
			h.mu.Unlock()
			if hold {
				h.held <- step
			} else {
				h.goOn()
			}
			continue
		}
		if m.Armed {
			h.armed <- m.Call
			continue
		}
		h.mu.Lock()
		if i, found := slices.BinarySearch(h.calls[step], m.Call); !found {
			h.calls[step] = slices.Insert(h.calls[step], i, m.Call)
		}
		h.mu.Unlock()
		if m.Failed {
			h.failed <- m.Call
		}
		if m.Stalled {
			h.stalled <- m.Call
		}
	}
}

// holdAt has the next such step held.
func (h *hooks) holdAt(step string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hold = step
}

// wait waits until the exporter stands at the step to be held.
func (h *hooks) wait() {
	h.t.Helper()
	select {
	case <-h.held:
	case <-time.After(startTimeout):
		h.t.Fatalf("no step %s", h.hold)
	}
}

// goOn lets the step go on.
func (h *hooks) goOn() { h.send(map[string]any{"go": true}) }

// fail makes calls of this kind fail until the next step, or with errno 0 until
// now.
func (h *hooks) fail(call string, errno syscall.Errno) {
	h.send(map[string]any{"fail": call, "errno": int(errno)})
}

// waitFailed waits until one of the calls has failed.
func (h *hooks) waitFailed(calls ...string) {
	h.t.Helper()
	timeout := time.After(startTimeout)
	for {
		select {
		case call := <-h.failed:
			if slices.Contains(calls, call) {
				return
			}
		case <-timeout:
			h.t.Fatalf("none of %v has been called", calls)
		}
	}
}

// stall has calls of these kinds wait, and returns when one does.
func (h *hooks) stall(calls ...string) {
	h.t.Helper()
	for _, call := range calls {
		h.send(map[string]any{"stall": call})
	}
	h.waitStalled()
}

// stallNext has the next call of this kind wait.
func (h *hooks) stallNext(call string) {
	h.t.Helper()
	h.send(map[string]any{"stall": call, "times": 1})
	select {
	case <-h.armed:
	case <-time.After(startTimeout):
		h.t.Fatal("the exporter does not obey")
	}
}

// waitStalled waits until a call waits.
func (h *hooks) waitStalled() {
	h.t.Helper()
	select {
	case <-h.stalled:
	case <-time.After(startTimeout):
		h.t.Fatal("no call to be stalled")
	}
}

// resume lets calls go on that wait.
func (h *hooks) resume() { h.send(map[string]any{"resume": true}) }

func (h *hooks) send(m any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	_ = h.enc.Encode(m) // an exporter that was killed does not mind
}

// seen returns the calls made in each step since it was last asked.
func (h *hooks) seen() map[string][]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	calls := h.calls
	h.calls = map[string][]string{}
	return calls
}
