package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// greetingTimeout is how long a server may take to greet a client: one that
// serves a single client at a time lets the others wait for ever.
const greetingTimeout = 5 * time.Second

// maxAnswer bounds an answer, in bytes: a server that has lost its mind must not
// take ours. One about a thousand images has some megabytes.
const maxAnswer = 64 << 20

// answers is a server's stream, of which left bytes more, of most, may be the
// answer.
type answers struct {
	r          io.Reader
	most, left int
}

// Read implements io.Reader.
func (a *answers) Read(p []byte) (int, error) {
	if a.left == 0 {
		return 0, fmt.Errorf("its answer is longer than %d bytes", a.most)
	}
	n, err := a.r.Read(p[:min(len(p), a.left)])
	a.left -= n
	return n, err
}

// Client orders on a control socket: ours, or the QMP monitor of QEMU's
// daemons. Its methods may be called concurrently; commands run one after
// the other.
type Client struct {
	peer string // for messages

	mu     sync.Mutex
	nc     net.Conn
	stream answers
	in     *json.Decoder // of stream
	nextID uint64
	broken error // the stream is out of step
}

// Dial connects to a control socket: ctl is its path, which may begin with
// "unix:", or "exec:" and a command whose standard input and output are the
// control stream; that is run by /bin/sh and ends with the Client.
func Dial(ctx context.Context, ctl string) (*Client, error) {
	if command, ok := strings.CutPrefix(ctl, execPrefix); ok {
		nc, err := startExec(command)
		if err != nil {
			return nil, fmt.Errorf("cannot run %s: %w", ctl, err)
		}
		return NewClient(ctx, nc, ctl)
	}
	path := strings.TrimPrefix(ctl, "unix:")
	nc, err := DialSocket(ctx, path)
	if err != nil {
		reason, advice := err, fmt.Sprintf(`is "nbd-export serve --control %s" running?`, path)
		if op, ok := errors.AsType[*net.OpError](err); ok {
			reason = op.Err
			if sys, ok := errors.AsType[syscall.Errno](err); ok {
				reason = sys
			}
		}
		switch {
		case errors.Is(err, fs.ErrPermission):
			advice = "the socket is for its owner only; use the user that runs the server, or root"
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
			advice = "give it more time"
		case errors.Is(err, syscall.EINVAL):
			advice = "the name of the socket is too long"
		}
		return nil, fmt.Errorf("no server answers at %s: %w; %s", path, reason, advice)
	}
	return NewClient(ctx, nc, path)
}

// maxSocketPath is the longest path that the kernel takes a socket by, in bytes.
const maxSocketPath = 107

// DialSocket connects to the Unix socket at path. That may be longer than the kernel
// takes it, as in an owner record, whose paths are absolute: then it is reached by
// way of its directory.
func DialSocket(ctx context.Context, path string) (net.Conn, error) {
	if len(path) > maxSocketPath {
		dir, err := os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return nil, err
		}
		defer func() { _ = dir.Close() }()
		path = fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path))
	}
	return (&net.Dialer{}).DialContext(ctx, "unix", path)
}

// NewClient makes a client of an open connection, which it closes on failure.
// peer is what messages call the other side.
func NewClient(ctx context.Context, nc net.Conn, peer string) (*Client, error) {
	c := &Client{peer: peer, nc: nc, stream: answers{r: nc, most: maxAnswer}}
	c.in = json.NewDecoder(&c.stream)
	limit := greetingTimeout
	if _, ok := nc.(*execConn); ok {
		limit = execTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var hello struct{ QMP *json.RawMessage }
	err := c.during(ctx, func() error { return c.receive(&hello) })
	_, noJSON := errors.AsType[*json.SyntaxError](err)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		err = noGreeting(c.silence())
	case noJSON && c.isNBD():
		err = fmt.Errorf("%s %w: it is for NBD clients; give the path that the server has as --control", peer, errStranger)
	case noJSON || err == nil && hello.QMP == nil:
		err = fmt.Errorf("%s %w: it does not speak QMP", peer, errStranger)
	case err != nil && ctx.Err() == nil:
		err = fmt.Errorf("%s is no control socket: no QMP greeting: %w", peer, c.explain(err))
	}
	if err == nil {
		err = c.Execute(ctx, negotiate, nil, nil)
	}
	if err != nil {
		_ = nc.Close()
		return nil, err
	}
	return c, nil
}

// errStranger is what another program is, which will not become one of ours.
var errStranger = errors.New("is no control socket")

// noGreeting says that a server does not greet: a context.DeadlineExceeded.
type noGreeting string

func (e noGreeting) Error() string { return string(e) }

func (noGreeting) Is(err error) bool { return err == context.DeadlineExceeded }

// silence is the text of noGreeting.
func (c *Client) silence() string {
	if x, ok := c.nc.(*execConn); ok {
		text := "nothing comes from " + c.peer + "; does it hang, or wait for a password, or does the server behind it hang or serve another client?"
		if said := x.said.text(); said != "" {
			text += " It says: " + said
		}
		return text
	}
	process := ""
	if pid := peerPID(c.nc); pid > 0 {
		process = fmt.Sprintf(", pid %d,", pid)
	}
	return fmt.Sprintf("%s accepts connections but does not greet; does its process%s hang, is another client using it, or is it no control socket?", c.peer, process)
}

// isNBD reports whether what came instead of a greeting is that of an NBD server.
func (c *Client) isNBD() bool {
	const magic = "NBDMAGIC"
	b := make([]byte, len(magic))
	_, err := io.ReadFull(c.in.Buffered(), b)
	return err == nil && string(b) == magic
}

// Close ends the connection.
func (c *Client) Close() error { return c.nc.Close() }

// Execute runs a command and decodes what it returns into result; args and
// result may be nil. An answer that is an error is an *Error; after any other
// error it is not known whether the command was carried out, and the client
// is of no more use.
func (c *Client) Execute(ctx context.Context, command string, args, result any) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return c.broken
	}
	c.nextID++
	request := struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, c.nextID}
	line, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("command %s: %w", command, err)
	}
	var reply struct {
		ID     *uint64
		Event  string
		Return json.RawMessage
		Error  *Error
	}
	err = c.during(ctx, func() error {
		if _, err := c.nc.Write(append(line, '\n')); err != nil {
			return err
		}
		for {
			reply.ID, reply.Event, reply.Return, reply.Error = nil, "", nil, nil
			if err := c.receive(&reply); err != nil {
				return err
			}
			if reply.ID != nil && *reply.ID == request.ID {
				return nil
			}
			// Events go unheard. An error without id is about a request that
			// was not understood, which can only be this one.
			if reply.ID == nil && reply.Error != nil {
				return nil
			}
		}
	})
	if err != nil {
		c.broken = fmt.Errorf("%s: command %s: %w", c.peer, command, c.explain(err))
		return c.broken
	}
	if reply.Error != nil {
		return reply.Error
	}
	if reply.Return == nil {
		c.broken = fmt.Errorf("%s: command %s: the answer has neither a result nor an error", c.peer, command)
		return c.broken
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(reply.Return, result); err != nil {
		return fmt.Errorf("%s: answer to %s: %w", c.peer, command, err)
	}
	return nil
}

// receive takes the next answer, or event, off the stream.
func (c *Client) receive(v any) error {
	c.stream.left = c.stream.most
	return c.in.Decode(v)
}

// explain makes a sentence of what ended the stream.
func (c *Client) explain(err error) error {
	if x, ok := c.nc.(*execConn); ok {
		return x.explain(err)
	}
	if errors.Is(err, io.EOF) {
		return errors.New("it closed the connection before it answered")
	}
	return err
}

// during runs f, whose I/O fails when ctx ends.
func (c *Client) during(ctx context.Context, f func() error) error {
	if ctx.Err() != nil {
		return causeOf(ctx)
	}
	over := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(over)
		_ = c.nc.SetDeadline(time.Unix(1, 0))
	})
	err := f()
	if stop() {
		return err
	}
	<-over
	if err != nil {
		return causeOf(ctx)
	}
	return c.nc.SetDeadline(time.Time{}) // it came just in time; the next may wait
}

// tooLate is a context.DeadlineExceeded in words.
type tooLate struct{}

func (tooLate) Error() string { return "it did not answer in time" }

func (tooLate) Is(err error) bool { return err == context.DeadlineExceeded }

// causeOf is why ctx has ended.
func causeOf(ctx context.Context) error {
	if err := context.Cause(ctx); err != context.DeadlineExceeded {
		return err
	}
	return tooLate{}
}

// setActive are the arguments of blockdev-set-active.
type setActive struct {
	Node        *string  `json:"node-name,omitempty"`
	Nodes       []string `json:"x-node-names,omitempty"`
	Active      bool     `json:"active"`
	IfUnchanged bool     `json:"x-if-unchanged,omitempty"`
	Abandon     bool     `json:"x-abandon,omitempty"`
	Order       string   `json:"x-order,omitempty"`
}

func (c *Client) setActive(ctx context.Context, a setActive, nodes []string) error {
	// QEMU knows one node or all; several as one group are our extension.
	if len(nodes) == 1 {
		a.Node = &nodes[0] // "" too, which is no node, and not all of them
	} else {
		a.Nodes = nodes
	}
	return c.Execute(ctx, "blockdev-set-active", a, nil)
}

// SetActive activates or inactivates the images with these nodes, or all if
// none is named. It returns when that is done, or has failed.
func (c *Client) SetActive(ctx context.Context, active bool, nodes ...string) error {
	return c.setActive(ctx, setActive{Active: active}, nodes)
}

// Cancel stops an inactivation that has not closed the gate yet, on another
// connection than the one that ordered it. It returns the nodes concerned.
func (c *Client) Cancel(ctx context.Context, nodes ...string) ([]string, error) {
	cancelled, _, err := c.takeBack(ctx, "", nodes)
	return cancelled, err
}

// takeBack is Cancel, or if order is not "" it takes back the order with this name:
// unless it is running it will never begin. If nodes are named too, an inactivation
// that runs for no other order ends; cancelled does not tell.
func (c *Client) takeBack(ctx context.Context, order string, nodes []string) (cancelled []string, running bool, err error) {
	a := struct {
		Nodes []string `json:"x-node-names,omitempty"`
		Order string   `json:"order,omitempty"`
	}{nodes, order}
	var r struct {
		Cancelled []string
		Running   bool
	}
	err = c.Execute(ctx, "x-cancel", a, &r)
	return r.Cancelled, r.Running, err
}

// Status asks for the state of everything the server serves.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.Execute(ctx, "x-query-status", nil, &s)
	return s, err
}

// Quit asks the server to stop in order, and does not wait until it has.
func (c *Client) Quit(ctx context.Context) error {
	err := c.Execute(ctx, "quit", nil, nil)
	if _, refused := errors.AsType[*Error](err); err != nil && !refused && ctx.Err() == nil {
		return nil // it may be gone before it has answered
	}
	return err
}
