//go:build testhooks

package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// hook lets a test stop an image at each step of its transitions, and make the
// system calls of a step fail. It exists only in programs built with the tag
// testhooks, and there only where NBD_EXPORT_HOOKS names the Unix socket of
// the test. Each image connects once; both sides send JSON values:
//
//	{"image":"/disk.img","step":"settle"}   we are at this step, and wait
//	{"call":"sync"}                         the first such call of the step
//	{"call":"sync","failed":true}           and the first that was made to fail
//
//	{"fail":"sync","errno":5}               such calls fail until the next step
//	{"go":true}                             go on with the step
//
// When the test has gone everything goes on and nothing fails.
type hook struct {
	image  string
	conn   net.Conn
	resume chan struct{}
	gone   chan struct{} // closed when the test is

	mu           sync.Mutex // a leaf; also keeps what is sent in its order
	armed        map[string]syscall.Errno
	seen, failed map[string]bool
}

// hookMessage is what is sent in either direction.
type hookMessage struct {
	Image  string        `json:"image,omitempty"`
	Step   state.Step    `json:"step,omitempty"`
	Call   string        `json:"call,omitempty"`
	Failed bool          `json:"failed,omitempty"`
	Fail   string        `json:"fail,omitempty"`
	Errno  syscall.Errno `json:"errno,omitempty"`
	Go     bool          `json:"go,omitempty"`
}

// openImage opens an image with the hooks of the test that asks for them.
func openImage(o backend.Options) (*backend.Raw, func(image string, step state.Step), error) {
	path := os.Getenv("NBD_EXPORT_HOOKS")
	if path == "" {
		img, err := backend.Open(o)
		return img, nil, err
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, nil, fmt.Errorf("NBD_EXPORT_HOOKS: %w", err)
	}
	h := &hook{image: o.Path, conn: conn, resume: make(chan struct{}), gone: make(chan struct{})}
	h.reset()
	go h.obey()
	img, err := backend.OpenHooked(o, h.fault)
	return img, h.step, err
}

// reset forgets what the last step did and what was to fail.
func (h *hook) reset() {
	h.armed = map[string]syscall.Errno{}
	h.seen, h.failed = map[string]bool{}, map[string]bool{}
}

func (h *hook) send(m hookMessage) { _ = json.NewEncoder(h.conn).Encode(m) }

func (h *hook) step(image string, s state.Step) {
	h.mu.Lock()
	h.reset()
	h.send(hookMessage{Image: image, Step: s})
	h.mu.Unlock()
	select {
	case <-h.resume:
	case <-h.gone:
	}
}

// obey does what the test says.
func (h *hook) obey() {
	for d := json.NewDecoder(h.conn); ; {
		var m hookMessage
		if d.Decode(&m) != nil {
			break
		}
		if m.Fail != "" {
			h.mu.Lock()
			h.armed[m.Fail] = m.Errno
			h.mu.Unlock()
		}
		if m.Go {
			h.resume <- struct{}{}
		}
	}
	h.mu.Lock()
	h.reset()
	h.mu.Unlock()
	close(h.gone)
}

func (h *hook) fault(call string, _ int64, n int) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	errno, fails := h.armed[call]
	if !h.seen[call] || fails && !h.failed[call] {
		h.seen[call], h.failed[call] = true, fails
		h.send(hookMessage{Image: h.image, Call: call, Failed: fails})
	}
	if fails {
		return 0, errno
	}
	return n, nil
}
