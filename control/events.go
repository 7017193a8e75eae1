package control

import (
	"net"
	"time"

	"go.uber.org/zap"
)

// mostEvents is how many events a client may leave unread before it is
// dropped.
const mostEvents = 1000

// event is what clients are told without having asked.
type event struct {
	Timestamp timestamp `json:"timestamp"`
	Event     string    `json:"event"`
	Data      any       `json:"data"`
}

type timestamp struct {
	Seconds      int64 `json:"seconds"`
	Microseconds int64 `json:"microseconds"`
}

// emit tells all negotiated clients. It waits for none of them.
func (s *Server) emit(name string, data any) {
	now := time.Now()
	line := appendLine(nil, event{timestamp{now.Unix(), int64(now.Nanosecond() / 1000)}, name, data})
	s.mu.Lock()
	defer s.mu.Unlock()
	for o := range s.listening {
		select {
		case o.queue <- outgoing{line: line}:
		default:
			s.cfg.Log.Warn("a control client was disconnected: it does not read its events", zap.Int("unread", mostEvents))
			delete(s.listening, o)
			_ = o.nc.Close()
		}
	}
}

// outbox is the way out to one client. Lines are written one after the other
// by a goroutine of its own, so that events neither break into an answer nor
// wait for a client.
type outbox struct {
	nc    net.Conn
	queue chan outgoing
	done  chan struct{} // the writer has ended
}

// outgoing is a line. What became of it is told to written, unless that is nil.
type outgoing struct {
	line    []byte
	written chan<- bool
}

func newOutbox(nc net.Conn) *outbox {
	o := &outbox{nc: nc, queue: make(chan outgoing, mostEvents), done: make(chan struct{})}
	go o.write()
	return o
}

func (o *outbox) write() {
	defer close(o.done)
	ok := true
	for next := range o.queue {
		if ok {
			if _, err := o.nc.Write(next.line); err != nil {
				ok = false
				_ = o.nc.Close() // its reader is to learn of it
			}
		}
		if next.written != nil {
			next.written <- ok
		}
	}
}

// send writes a line after what is queued, and reports whether the client can
// still be talked to. line is the caller's again.
func (o *outbox) send(line []byte) bool {
	written := make(chan bool, 1)
	o.queue <- outgoing{line, written}
	return <-written
}

// close ends the writer when it has written what is queued, or the client has
// had its time to read it. Nothing may be queued any more.
func (o *outbox) close() {
	_ = o.nc.SetWriteDeadline(time.Now().Add(farewell))
	close(o.queue)
	<-o.done
}
