package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The orders of a handover come from a program of their own, as in life they do:
// amid the load's goroutines an answer waits for Go's scheduler. It is this program,
// started with ordersArg and an orderConfig in JSON, with both control sockets open
// already. It does nothing else, so that what it measures is the exporters' time: its
// system calls block, and go past the scheduler.

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

// ordersSaid is what such a program writes when it is ready, and after each line of
// []oneOrder that it reads: how long they took, one after the other.
type ordersSaid struct {
	Took  time.Duration `json:"took_ns"`
	Error string        `json:"error,omitempty"`
}

// runOrders is that program. It is to be called on the main thread, which stays there.
func runOrders(args []string, in io.Reader, out io.Writer) error {
	var c orderConfig
	if len(args) != 1 {
		return errors.New("want whom to give orders, in JSON")
	}
	if err := json.Unmarshal([]byte(args[0]), &c); err != nil {
		return fmt.Errorf("orders: %w", err)
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
	say := json.NewEncoder(out)
	if err := say.Encode(ordersSaid{}); err != nil {
		return err
	}
	given := json.NewDecoder(in)
	for {
		var orders []oneOrder
		if err := given.Decode(&orders); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		var said ordersSaid
		start := time.Now()
		for _, o := range orders {
			if err := sides[o.Side].execute(lines[o.Active]); err != nil {
				said.Error = fmt.Sprintf("%s: %v", c.Controls[o.Side], err)
				break
			}
		}
		said.Took = time.Since(start)
		if err := say.Encode(said); err != nil {
			return err
		}
	}
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
type orderer struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	says *json.Decoder
	said tail // on standard error
}

// startOrders runs file, which is this program, and returns when it has both sockets.
// If this fails nothing is left running. It is to be called on the main thread.
func startOrders(ctx context.Context, file string, c orderConfig) (*orderer, error) {
	whom, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	o := &orderer{cmd: exec.CommandContext(ctx, file, ordersArg, string(whom))}
	o.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	o.cmd.Stderr = &o.said
	if o.in, err = o.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := o.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := o.cmd.Start(); err != nil {
		return nil, err
	}
	o.says = json.NewDecoder(bufio.NewReader(out))
	if _, err := o.answer(); err != nil {
		o.stop()
		return nil, fmt.Errorf("%w: %s", err, o.said.String())
	}
	return o, nil
}

// give has orders given, one after the other until one fails, and returns how long
// that took.
func (o *orderer) give(orders ...oneOrder) (time.Duration, error) {
	line, err := json.Marshal(orders)
	if err == nil {
		_, err = o.in.Write(append(line, '\n'))
	}
	if err != nil {
		return 0, fmt.Errorf("orders: %w", err)
	}
	return o.answer()
}

func (o *orderer) answer() (time.Duration, error) {
	var said ordersSaid
	if err := o.says.Decode(&said); err != nil {
		return 0, fmt.Errorf("orders: %w", err)
	}
	if said.Error != "" {
		return 0, errors.New(said.Error)
	}
	return said.Took, nil
}

// stop ends it and waits for that.
func (o *orderer) stop() {
	_ = o.in.Close()
	_ = o.cmd.Process.Kill()
	_ = o.cmd.Wait()
}
