package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The orders of a handover come from a program of their own, as in life they do:
// amid the load's goroutines an answer waits for Go's scheduler. It has both control
// sockets open, and does nothing else, so that what it measures is the exporters'
// time: its system calls block, and go past the scheduler. See asked.

const ordersArg = "orders"

// orderConfig says whom such a program gives orders.
type orderConfig struct {
	Controls [2]string `json:"controls"` // paths of the control sockets
	Node     string    `json:"node"`
}

// oneOrder is what a side is told.
type oneOrder struct {
	Side   int  `json:"side"`
	Active bool `json:"active"`
}

// ordersSaid is what such a program answers to []oneOrder: how long they took, one
// after the other.
type ordersSaid struct {
	Took  time.Duration `json:"took_ns"`
	Error string        `json:"error,omitempty"`
}

// runOrders is that program. It is to be called on the main thread, which stays there.
func runOrders(args []string, in io.Reader, out io.Writer) error {
	var c orderConfig
	if err := configure(args, &c); err != nil {
		return err
	}
	var sides [2]*monitor
	for i, path := range c.Controls {
		var err error
		if sides[i], err = dialMonitor(path); err != nil {
			return err
		}
	}
	lines := map[bool][]byte{}
	for _, active := range []bool{false, true} {
		lines[active] = fmt.Appendf(nil, `{"execute": "blockdev-set-active", "arguments": {"node-name": %q, "active": %t}}`+"\n", c.Node, active)
	}
	return answer(in, out, func(orders []oneOrder) any {
		var said ordersSaid
		start := time.Now()
		for _, o := range orders {
			if err := sides[o.Side].execute(lines[o.Active]); err != nil {
				said.Error = fmt.Sprintf("%s: %v", c.Controls[o.Side], err)
				break
			}
		}
		said.Took = time.Since(start)
		return said
	})
}

// monitor is an open control socket that speaks QMP.
type monitor struct {
	fd     uintptr
	unread []byte
}

func dialMonitor(path string) (*monitor, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	limit := unix.NsecToTimeval(int64(orderTimeout))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	m := &monitor{fd: uintptr(fd)}
	if _, err := m.line(); err != nil { // the greeting
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return m, m.execute([]byte(`{"execute": "qmp_capabilities"}` + "\n"))
}

// execute sends a command and waits for its answer.
func (m *monitor) execute(command []byte) error {
	if _, err := rawCall(unix.SYS_WRITE, m.fd, command); err != nil {
		return err
	}
	for {
		line, err := m.line()
		if err != nil {
			return err
		}
		var a struct {
			Return *json.RawMessage
			Error  *struct{ Desc string }
		}
		switch err := json.Unmarshal(line, &a); {
		case err != nil:
			return err
		case a.Error != nil:
			return errors.New(a.Error.Desc)
		case a.Return != nil:
			return nil
		}
		// An event.
	}
}

func (m *monitor) line() ([]byte, error) {
	for {
		if line, rest, ok := bytes.Cut(m.unread, []byte("\n")); ok {
			m.unread = rest
			return line, nil
		}
		var b [4096]byte
		n, err := rawCall(unix.SYS_READ, m.fd, b[:])
		if err == nil && n == 0 {
			err = io.EOF
		}
		if err != nil {
			return nil, err
		}
		m.unread = append(m.unread, b[:n]...)
	}
}

// rawCall is read or write.
func rawCall(call, fd uintptr, p []byte) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		runtime.KeepAlive(p)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// orderer is a running program of orders.
type orderer struct{ *asked }

// startOrders is to be called on the main thread.
func startOrders(ctx context.Context, file string, c orderConfig) (*orderer, error) {
	a, err := startAsked(ctx, file, ordersArg, c)
	if err != nil {
		return nil, err
	}
	return &orderer{a}, nil
}

// give has orders given, one after the other until one fails, and returns how long
// that took.
func (o *orderer) give(orders ...oneOrder) (time.Duration, error) {
	var said ordersSaid
	if err := o.ask(orders, &said); err != nil {
		return 0, err
	}
	if said.Error != "" {
		return 0, errors.New(said.Error)
	}
	return said.Took, nil
}
