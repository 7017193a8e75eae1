package guest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"sync"
	"time"
)

// QMP is a client of QEMU's monitor, just large enough for tests.
type QMP struct {
	conn    net.Conn
	timeout time.Duration
	mu      sync.Mutex // one command at a time
	replies chan qmpMessage
	events  chan Event
}

// Event is an asynchronous message of QEMU.
type Event struct {
	Name string
	Data map[string]any
}

// QMPError is QEMU's refusal of a command.
type QMPError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *QMPError) Error() string { return e.Class + ": " + e.Desc }

type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *QMPError       `json:"error"`
	Event    string          `json:"event"`
	Data     map[string]any  `json:"data"`
}

// DialQMP connects to a monitor's Unix socket, waiting for it to appear. The
// timeout is also that of every command.
func DialQMP(path string, timeout time.Duration) (*QMP, error) {
	var conn net.Conn
	var err error
	for deadline := time.Now().Add(timeout); ; time.Sleep(10 * time.Millisecond) {
		if conn, err = net.Dial("unix", path); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("monitor: %w", err)
		}
	}
	q := &QMP{conn: conn, timeout: timeout, replies: make(chan qmpMessage, 1), events: make(chan Event, 1024)}
	go q.receive()
	if _, err := q.Execute("qmp_capabilities", nil); err != nil {
		conn.Close()
		return nil, fmt.Errorf("monitor: %w", err)
	}
	return q, nil
}

func (q *QMP) receive() {
	defer close(q.replies)
	defer close(q.events)
	dec := json.NewDecoder(bufio.NewReader(q.conn))
	for {
		var m qmpMessage
		if dec.Decode(&m) != nil {
			return
		}
		switch {
		case m.Greeting != nil:
		case m.Event != "":
			select {
			case q.events <- Event{m.Event, m.Data}:
			default: // a test that reads no events does not stop the monitor
			}
		default:
			q.replies <- m
		}
	}
}

// Execute runs a command; args may be nil. A refusal is a *QMPError.
func (q *QMP) Execute(command string, args any) (json.RawMessage, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	if err := json.NewEncoder(q.conn).Encode(request); err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	select {
	case m, ok := <-q.replies:
		if !ok {
			return nil, fmt.Errorf("%s: the monitor closed the connection", command)
		}
		if m.Error != nil {
			return nil, m.Error
		}
		return m.Return, nil
	case <-time.After(q.timeout):
		// A late reply would be taken for the next command's.
		q.conn.Close()
		return nil, fmt.Errorf("%s: no reply within %v", command, q.timeout)
	}
}

// WaitEvent returns the next event of that name for which accept, unless nil,
// says yes; other events before it are dropped.
func (q *QMP) WaitEvent(name string, accept func(Event) bool, timeout time.Duration) (Event, error) {
	deadline := time.After(timeout)
	for {
		select {
		case e, ok := <-q.events:
			if !ok {
				return Event{}, fmt.Errorf("event %s: the monitor closed the connection", name)
			}
			if e.Name == name && (accept == nil || accept(e)) {
				return e, nil
			}
		case <-deadline:
			return Event{}, fmt.Errorf("event %s: none within %v", name, timeout)
		}
	}
}

// Close ends the connection; the guest goes on.
func (q *QMP) Close() error { return q.conn.Close() }
