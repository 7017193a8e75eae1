package control

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nbd-export/nbd-export/backend"
)

const (
	execPrefix = "exec:"
	// execTimeout is how long a command may take until the server behind it
	// greets: it may have to log in first.
	execTimeout = 30 * time.Second
	// execFarewell is how long it may take to end when its input has.
	execFarewell = 500 * time.Millisecond
	// execSaid is how much is kept of what it says on standard error, in bytes.
	execSaid = 2048
)

// execConn is a command whose standard input and output are a connection.
// Close ends the command.
type execConn struct {
	in, out *os.File // pipes: what we read, what we write
	pid     int
	said    lastBytes
	ended   chan struct{} // closed once it has, with status set
	status  error
	close   sync.Once
}

// startExec runs command by /bin/sh, in a session of its own: a Ctrl-C that
// tells us to stop is not for it, since it still has to carry our last orders,
// and what wants to ask for a password fails instead of being stopped.
func startExec(command string) (*execConn, error) {
	if strings.TrimSpace(command) == "" {
		return nil, errors.New(`no command follows "exec:"`)
	}
	stdin, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	in, stdout, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, stdin.Close(), out.Close())
	}
	c := &execConn{in: in, out: out, ended: make(chan struct{})}
	cmd := exec.Command("/bin/sh", "-c", command)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, &c.said
	// Its input ends with us, which is an end for most; SIGKILL is for the rest.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = execFarewell
	err = cmd.Start()
	_, _ = stdin.Close(), stdout.Close()
	if err != nil {
		return nil, errors.Join(err, in.Close(), out.Close())
	}
	c.pid = cmd.Process.Pid
	go func() {
		c.status = cmd.Wait()
		c.kill() // what it left behind
		close(c.ended)
	}()
	return c, nil
}

// kill ends the command and what it has started.
func (c *execConn) kill() { _ = syscall.Kill(-c.pid, syscall.SIGKILL) }

func (c *execConn) Read(b []byte) (int, error)  { return c.in.Read(b) }
func (c *execConn) Write(b []byte) (int, error) { return c.out.Write(b) }

// Close lets the command end by itself for a moment, and then kills it. It
// returns when it has ended.
func (c *execConn) Close() error {
	c.close.Do(func() {
		_, _ = c.out.Close(), c.in.Close()
		select {
		case <-c.ended:
		case <-time.After(execFarewell):
			c.kill()
			<-c.ended
		}
	})
	return nil
}

// explain says of a stream that broke what the command had to say about it.
func (c *execConn) explain(err error) error {
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.EPIPE) {
		return err
	}
	text := "its output ended before it answered"
	select {
	case <-c.ended:
		text = "the command ended before it answered"
		if c.status != nil {
			text += fmt.Sprintf(" (%v)", c.status)
		}
	case <-time.After(execFarewell):
	}
	if said := c.said.text(); said != "" {
		text += ": " + said
	}
	return errors.New(text)
}

func (c *execConn) LocalAddr() net.Addr  { return execAddr{} }
func (c *execConn) RemoteAddr() net.Addr { return execAddr{} }

func (c *execConn) SetDeadline(t time.Time) error {
	return errors.Join(c.in.SetDeadline(t), c.out.SetDeadline(t))
}
func (c *execConn) SetReadDeadline(t time.Time) error  { return c.in.SetReadDeadline(t) }
func (c *execConn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }

type execAddr struct{}

func (execAddr) Network() string { return "exec" }
func (execAddr) String() string  { return "exec" }

// lastBytes keeps the end of what is written to it.
type lastBytes struct {
	mu sync.Mutex
	b  []byte
}

func (l *lastBytes) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	l.b = l.b[max(0, len(l.b)-execSaid):]
	return len(p), nil
}

// text is that in one line.
func (l *lastBytes) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := bytes.FieldsFunc(l.b, func(c rune) bool { return c == '\n' || c == '\r' })
	return backend.Printable(string(bytes.Join(lines, []byte("; "))))
}
