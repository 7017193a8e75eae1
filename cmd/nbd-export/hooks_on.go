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
//	{"call":"write","stalled":true}         one that waits
//
//	{"fail":"sync","errno":5}               such calls fail until the next step
//	{"fail":"sync","errno":0}               or until now
//	{"stall":"write"}                       such calls wait
//	{"stall":"write","times":1}             the next such call waits, from when on
//	{"call":"write","armed":true}           we have said so
//	{"resume":true}                         until then
//	{"go":true}                             go on with the step
//
// When the test has gone everything goes on and nothing fails.
type hook struct {
	image string
	conn  net.Conn
	next  chan struct{} // receives when the step may go on
	gone  chan struct{} // closed when the test is

	mu           sync.Mutex // a leaf; also keeps what is sent in its order
	armed        map[string]syscall.Errno
	seen, failed map[string]bool
	stalled      map[string]*stall
}

// stall has calls wait.
type stall struct {
	left int           // so many more, negative for all
	over chan struct{} // closed when they may go on
}

// hookMessage is what is sent in either direction.
type hookMessage struct {
	Image   string        `json:"image,omitempty"`
	Step    state.Step    `json:"step,omitempty"`
	Call    string        `json:"call,omitempty"`
	Failed  bool          `json:"failed,omitempty"`
	Stalled bool          `json:"stalled,omitempty"`
	Armed   bool          `json:"armed,omitempty"`
	Fail    string        `json:"fail,omitempty"`
	Errno   syscall.Errno `json:"errno,omitempty"`
	Stall   string        `json:"stall,omitempty"`
	Times   int           `json:"times,omitempty"`
	Resume  bool          `json:"resume,omitempty"`
	Go      bool          `json:"go,omitempty"`
}

// openImage opens an image; the second result adds the hooks of the test that
// asks for them to a machine's options.
func openImage(o backend.Options) (*backend.Owned, func(state.Options) state.Options, error) {
	path := os.Getenv("NBD_EXPORT_HOOKS")
	if path == "" {
		img, err := backend.Open(o)
		return img, func(o state.Options) state.Options { return o }, err
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, nil, fmt.Errorf("NBD_EXPORT_HOOKS: %w", err)
	}
	h := &hook{image: o.Path, conn: conn, next: make(chan struct{}), gone: make(chan struct{}), stalled: map[string]*stall{}}
	h.reset()
	go h.obey()
	img, err := backend.OpenHooked(o, h.fault, func(step string) { h.step(o.Path, state.Step(step)) })
	return img, func(o state.Options) state.Options {
		o.Step = h.step
		o.Unwritten = nil // a call fails until what it is part of has ended
		return o
	}, err
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
	case <-h.next:
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
		h.mu.Lock()
		if m.Fail != "" {
			h.armed[m.Fail] = m.Errno
		}
		if m.Stall != "" {
			h.stalled[m.Stall] = &stall{left: m.Times, over: make(chan struct{})}
			if m.Times == 0 {
				h.stalled[m.Stall].left = -1
			} else {
				h.send(hookMessage{Image: h.image, Call: m.Stall, Armed: true})
			}
		}
		if m.Resume {
			h.resume()
		}
		h.mu.Unlock()
		if m.Go {
			h.next <- struct{}{}
		}
	}
	h.mu.Lock()
	h.reset()
	h.resume()
	h.mu.Unlock()
	close(h.gone)
}

func (h *hook) resume() {
	for _, s := range h.stalled {
		close(s.over)
	}
	clear(h.stalled)
}

func (h *hook) fault(call string, _ int64, n int) (int, error) {
	h.mu.Lock()
	errno := h.armed[call]
	s := h.stalled[call]
	if s != nil && s.left == 0 {
		s = nil
	}
	if !h.seen[call] || errno != 0 && !h.failed[call] || s != nil {
		h.seen[call], h.failed[call] = true, errno != 0
		h.send(hookMessage{Image: h.image, Call: call, Failed: errno != 0, Stalled: s != nil})
	}
	if s != nil {
		s.left--
	}
	h.mu.Unlock()
	if s != nil {
		<-s.over
	}
	if errno != 0 {
		return 0, errno
	}
	return n, nil
}
