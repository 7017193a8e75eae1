package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	startTime = 20 * time.Second // until a server accepts connections
	stopTime  = 10 * time.Second // from SIGTERM to SIGKILL
)

// process is a running server.
type process struct {
	server
	endpoint
	argv  []string
	cmd   *exec.Cmd
	said  tail
	ended chan struct{} // closed when it has been waited for
}

// tail keeps the last words of a process.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-2000):]
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}

// newEndpoint takes an address of its own in directory dir.
func newEndpoint(dir, name string, p place) (endpoint, error) {
	e := endpoint{medium: p.medium, transport: p.transport}
	if p.transport == "unix" {
		e.address = filepath.Join(dir, strings.ReplaceAll(name, "/", "-")+".sock")
		return e, nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return e, err
	}
	e.address = strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	return e, l.Close()
}

// start runs a server and returns when it accepts connections. If it fails
// nothing is left running. It is to be called on the main thread.
func start(ctx context.Context, s server, e endpoint) (*process, error) {
	p := &process{server: s, endpoint: e, argv: s.argv(e)}
	return p, p.start(ctx)
}

func (p *process) start(ctx context.Context) error {
	if p.transport == "unix" {
		_ = os.Remove(p.address)
	}
	p.cmd = exec.Command(p.argv[0], p.argv[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = &p.said, &p.said
	// A group of its own: Ctrl-C is ours to pass on, in order.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	p.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) {
		_ = cmd.Wait()
		close(ended)
	}(p.cmd, p.ended)
	if err := p.awaitReady(ctx); err != nil {
		p.stop()
		return fmt.Errorf("%s: %w: %s", p.shown(p.argv), err, p.said.String())
	}
	return nil
}

func (p *process) awaitReady(ctx context.Context) error {
	for deadline := time.Now().Add(startTime); ; {
		if nc, err := p.dial(); err == nil {
			return nc.Close()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.ended:
			return errors.New("it has ended")
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it accepts no connection after %v", startTime)
		}
	}
}

// alive says whether it has not ended.
func (p *process) alive() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// stop ends it and waits for its end.
func (p *process) stop() {
	if !p.alive() {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(stopTime):
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}

// restart ends it, if it runs, and starts it again at the same address.
func (p *process) restart(ctx context.Context) error {
	p.stop()
	return p.start(ctx)
}

// anonymous is its memory that is not a mapped file's, bytes; 0 if not known.
func (p *process) anonymous() int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "RssAnon:")
	kb, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	n, _ := strconv.ParseInt(kb, 10, 64)
	return n << 10
}
