package integration

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// logBuffer collects a process's output and wakes who waits for a line.
type logBuffer struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	changed chan struct{}
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// lines returns the complete lines so far.
func (l *logBuffer) lines() []string {
	s := l.String()
	i := strings.LastIndexByte(s, '\n')
	if i < 0 {
		return nil
	}
	return strings.Split(s[:i], "\n")
}

// wait returns the first line after the first skip ones for which match holds.
func (l *logBuffer) wait(t testing.TB, skip int, what string, match func(string) bool) string {
	t.Helper()
	timeout := time.After(startTimeout)
	for {
		l.mu.Lock()
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed := l.changed
		l.mu.Unlock()
		lines := l.lines()
		for i := skip; i < len(lines); i++ {
			if match(lines[i]) {
				return lines[i]
			}
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("no log line: %s", what)
		}
	}
}

// process is a long-running child. It ends with its test.
type process struct {
	t      testing.TB
	name   string
	pid    int
	cmd    *exec.Cmd
	log    *logBuffer
	exited chan struct{}
	ended  bool // the test knows that it has ended, or has made it end
	quiet  bool // what it said is of no interest to a test that fails
}

// spawn starts a process; prepare may change the command before.
func spawn(t testing.TB, name string, prepare func(*exec.Cmd), argv ...string) *process {
	t.Helper()
	p := &process{t: t, name: name, log: new(logBuffer), exited: make(chan struct{})}
	p.cmd = command(context.Background(), argv...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if prepare != nil {
		prepare(p.cmd)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	p.pid = p.cmd.Process.Pid
	go func() {
		p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.exited
		if t.Failed() && !p.quiet {
			t.Logf("%s (pid %d, %v) said:\n%s", p.name, p.pid, p.cmd.ProcessState, p.log)
		}
	})
	return p
}

func (p *process) alive() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

func (p *process) signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("%s: signal %v: %v", p.name, sig, err)
	}
}

// wait returns the exit status, or 128+n for a death by signal n.
func (p *process) wait(timeout time.Duration) int {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(timeout):
		p.t.Fatalf("%s: still running after %v", p.name, timeout)
	}
	p.ended = true
	ws := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// stop ends the process in order and requires exit status 0.
func (p *process) stop() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	if code := p.wait(startTimeout); code != 0 {
		p.t.Errorf("%s: exit status %d after SIGTERM, want 0", p.name, code)
	}
}

// kill ends the process by SIGKILL.
func (p *process) kill() {
	p.t.Helper()
	p.signal(syscall.SIGKILL)
	p.wait(startTimeout)
}

func waitReady(p *process, pidFile string) {
	p.t.Helper()
	waitFor(p.t, startTimeout, p.name+" accepts connections", func() bool {
		if !p.alive() {
			p.ended = true
			p.t.Fatalf("%s ended at start: %v\n%s", p.name, p.cmd.ProcessState, p.log)
		}
		return saysReady(p, pidFile)
	})
}

// saysReady tells whether the pid file is there, and not left from another
// process.
func saysReady(p *process, pidFile string) bool {
	b, err := os.ReadFile(pidFile)
	return err == nil && string(b) == strconv.Itoa(p.pid)+"\n"
}
