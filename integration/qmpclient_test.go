package integration

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// qmpConn is a client of the control socket, written against the protocol's
// text and not against the server.
type qmpConn struct {
	net.Conn
	t   testing.TB
	dec *json.Decoder
}

type qmpError struct{ Class, Desc string }

func (e *qmpError) Error() string { return e.Class + ": " + e.Desc }

type qmpReply struct {
	Return json.RawMessage `json:"return"`
	Err    *qmpError       `json:"error"`
	ID     json.RawMessage `json:"id"`
	Event  string          `json:"event"`
	QMP    json.RawMessage `json:"QMP"`
}

func dialQMP(t testing.TB, path string) *qmpConn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &qmpConn{Conn: c, t: t, dec: json.NewDecoder(c)}
}

// openQMP is for processes that may die at any time: nothing fails the test.
// Only try and Close may be called.
func openQMP(path string) (*qmpConn, error) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	q := &qmpConn{Conn: c, dec: json.NewDecoder(c)}
	if _, err = q.tryNext(); err == nil {
		_, err = q.try("qmp_capabilities", nil)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return q, nil
}

// try sends a command and waits for its reply; an error of the command is a
// *qmpError, others are of the connection.
func (q *qmpConn) try(cmd string, args any) (json.RawMessage, error) {
	m := map[string]any{"execute": cmd}
	if args != nil {
		m["arguments"] = args
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if _, err := q.Write(append(b, '\n')); err != nil {
		return nil, err
	}
	r, err := q.tryNext()
	switch {
	case err != nil:
		return nil, err
	case r.Err != nil:
		return nil, r.Err
	}
	return r.Return, nil
}

func (q *qmpConn) tryNext() (qmpReply, error) {
	for {
		var r qmpReply
		q.SetReadDeadline(time.Now().Add(startTimeout))
		if err := q.dec.Decode(&r); err != nil || r.Event == "" {
			return r, err
		}
	}
}

// next returns the next message that is no event.
func (q *qmpConn) next() qmpReply {
	q.t.Helper()
	r, err := q.tryNext()
	if err != nil {
		q.t.Fatalf("control socket: %v", err)
	}
	return r
}

func (q *qmpConn) greeting() qmpReply {
	q.t.Helper()
	r := q.next()
	if r.QMP == nil {
		q.t.Fatalf("control socket: no greeting but %+v", r)
	}
	return r
}

func (q *qmpConn) send(text string) {
	q.t.Helper()
	if _, err := io.WriteString(q, text); err != nil {
		q.t.Fatalf("control socket: %v", err)
	}
}

// execute sends a command and waits for its reply.
func (q *qmpConn) execute(cmd string, args any) (json.RawMessage, error) {
	q.t.Helper()
	ret, err := q.try(cmd, args)
	var no *qmpError
	if err != nil && !errors.As(err, &no) {
		q.t.Fatalf("control socket: %v", err)
	}
	return ret, err
}

// must is execute for a command that has to succeed.
func (q *qmpConn) must(cmd string, args any) json.RawMessage {
	q.t.Helper()
	ret, err := q.execute(cmd, args)
	if err != nil {
		q.t.Fatalf("%s %v: %v", cmd, args, err)
	}
	return ret
}

// active reports what query-named-block-nodes says of the only image.
func (q *qmpConn) active() bool {
	q.t.Helper()
	var nodes []struct {
		Active bool `json:"active"`
	}
	if err := json.Unmarshal(q.must("query-named-block-nodes", nil), &nodes); err != nil || len(nodes) == 0 {
		q.t.Fatalf("query-named-block-nodes: %d nodes, %v", len(nodes), err)
	}
	for _, n := range nodes {
		if n.Active != nodes[0].Active {
			q.t.Fatal("query-named-block-nodes: some nodes are active, some not")
		}
	}
	return nodes[0].Active
}
