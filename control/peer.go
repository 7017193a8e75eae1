package control

import (
	"context"
	"errors"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// Peer is a server that is given orders over a connection that may break: it
// connects again for the next one. It is a Side. Its methods may be called
// concurrently.
type Peer struct {
	ctl string

	mu      sync.Mutex // a leaf; not held while the server is waited for
	client  *Client    // nil if there is none that works
	plain   bool       // it is QEMU's daemon, and has no extensions
	process []int      // pidfds of the processes that have answered
	unsure  bool       // something has answered that has no pidfd
	closing sync.WaitGroup
}

// NewPeer is the server at the control socket ctl, as of Dial; nothing is
// connected yet. Close it after use.
func NewPeer(ctl string) *Peer { return &Peer{ctl: ctl} }

// Name is the control socket as given.
func (p *Peer) Name() string { return p.ctl }

// Extended reports whether the server has our extensions; QEMU's daemons have
// not. It is valid once Status has been answered.
func (p *Peer) Extended() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.plain
}

// Close ends the connections, and the commands behind them.
func (p *Peer) Close() {
	p.mu.Lock()
	c := p.client
	p.client = nil
	for _, fd := range p.process {
		_ = unix.Close(fd)
	}
	p.process, p.unsure = nil, true
	p.mu.Unlock()
	if c != nil {
		_ = c.Close()
	}
	p.closing.Wait()
}

// with runs f on the connection, a new one if there is none, and forgets it if
// it gave no answer.
func (p *Peer) with(ctx context.Context, f func(*Client) error) error {
	p.mu.Lock()
	c := p.client
	p.client = nil // ours until we are done
	p.mu.Unlock()
	if c == nil {
		var err error
		if c, err = p.dial(ctx); err != nil {
			return err
		}
	}
	err := f(c)
	_, answered := errors.AsType[*Error](err)
	p.mu.Lock()
	if (err == nil || answered) && p.client == nil {
		p.client, c = c, nil
	}
	p.mu.Unlock()
	if c != nil {
		// A command may take a moment to end; who waits for the server need
		// not wait for that.
		p.closing.Go(func() { _ = c.Close() })
	}
	return err
}

// dial connects, and remembers the process that it has reached.
func (p *Peer) dial(ctx context.Context) (*Client, error) {
	c, err := Dial(ctx, p.ctl)
	if err != nil {
		return nil, err
	}
	fd, pid := peerProcess(c.nc)
	if fd >= 0 {
		// Who listens on a socket need not be who answers: an older process
		// may have opened it. Our servers say who they are.
		var s Status
		if err := c.Execute(ctx, "x-query-status", nil, &s); err != nil || s.PID != pid {
			_ = unix.Close(fd)
			fd = -1
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if fd >= 0 {
		p.process = append(p.process, fd)
	} else {
		p.unsure = true
	}
	return c, nil
}

// peerProcess is a pidfd of the process at the other end, and its pid; -1 if
// that is not known.
func peerProcess(nc net.Conn) (fd, pid int) {
	if pid = peerPID(nc); pid == 0 {
		return -1, 0
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, 0
	}
	return fd, pid
}

// peerPID is the process that listened on the Unix socket at the other end, 0 if
// that is not known.
func peerPID(nc net.Conn) (pid int) {
	u, ok := nc.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(s uintptr) {
		if cred, err := unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = max(int(cred.Pid), 0)
		}
	})
	return pid
}

// Gone implements Side: every process that ever answered here has ended, and
// is of this host.
func (p *Peer) Gone() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.unsure || len(p.process) == 0 {
		return false
	}
	for _, fd := range p.process {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(poll, 0); err != nil || n == 0 {
			return false
		}
	}
	return true
}

// Status implements Side. Of QEMU's daemons it is what their queries tell.
func (p *Peer) Status(ctx context.Context) (s Status, err error) {
	err = p.with(ctx, func(c *Client) error {
		s, err = c.Status(ctx)
		e, answered := errors.AsType[*Error](err)
		plain := answered && e.Class == CommandNotFound
		if err != nil && !plain {
			return err
		}
		p.mu.Lock()
		p.plain = plain
		p.mu.Unlock()
		if plain {
			s = Status{Version: "QEMU's storage daemon"}
			s.Images, err = c.exported(ctx)
		}
		return err
	})
	return s, err
}

// Identify implements Prover.
func (p *Peer) Identify(ctx context.Context, nonce string, nodes ...string) (list []Identity, err error) {
	err = p.with(ctx, func(c *Client) error {
		list, err = c.Identify(ctx, nonce, nodes...)
		return err
	})
	return list, err
}

// SetActive implements Side.
func (p *Peer) SetActive(ctx context.Context, o Order) error {
	return p.with(ctx, func(c *Client) error {
		if p.Extended() {
			return c.setActive(ctx, setActive{Active: o.Active, IfUnchanged: o.IfUnchanged, Abandon: o.Abandon, Order: o.Name}, o.Nodes)
		}
		if len(o.Nodes) > 1 {
			// It knows one node or all, and the caller has seen that it is all.
			o.Nodes = nil
		}
		return c.setActive(ctx, setActive{Active: o.Active}, o.Nodes)
	})
}

// TakeBack implements Side.
func (p *Peer) TakeBack(ctx context.Context, o Order) (running bool, err error) {
	if !p.Extended() {
		return false, nil
	}
	var cancel []string
	if !o.Active { // what the images do for somebody else is not ours to end
		cancel = o.Nodes
	}
	err = p.with(ctx, func(c *Client) error {
		_, running, err = c.takeBack(ctx, o.Name, cancel)
		return err
	})
	return running, err
}
