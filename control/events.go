package control

import (
	"net"
	"sync"
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
		if !o.post(line) {
			s.cfg.Log.Warn("a control client was disconnected: it does not read its events", zap.Int("unread", mostEvents))
			delete(s.listening, o)
			_ = o.nc.Close()
		}
	}
}

// outbox is the way out to one client: lines, one after the other, so that
// events do not break into an answer. An answer is written by who gives it,
// since handing it to a goroutine took 30 us of a handover; events, which nobody
// is to wait for, by a goroutine that lasts as long as there are any.
type outbox struct {
	nc      net.Conn
	writing sync.Mutex // held during a write; comes before mu
	broken  bool       // under writing: the client is lost

	mu       sync.Mutex // a leaf
	events   [][]byte   // queued, the oldest first
	flushing bool       // a goroutine is about to write them
}

// post queues an event, unless so many are unread that the client is given up.
func (o *outbox) post(line []byte) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.events) == mostEvents {
		return false
	}
	o.events = append(o.events, line)
	if !o.flushing {
		o.flushing = true
		go o.flush()
	}
	return true
}

// flush writes what is queued.
func (o *outbox) flush() {
	o.writing.Lock()
	defer o.writing.Unlock()
	o.flushLocked()
}

func (o *outbox) flushLocked() {
	for {
		o.mu.Lock()
		if len(o.events) == 0 {
			o.events, o.flushing = nil, false
			o.mu.Unlock()
			return
		}
		line := o.events[0]
		o.events = o.events[1:]
		o.mu.Unlock()
		o.writeLocked(line)
	}
}

func (o *outbox) writeLocked(line []byte) {
	if o.broken {
		return
	}
	if _, err := o.nc.Write(line); err != nil {
		o.broken = true
		_ = o.nc.Close() // its reader is to learn of it
	}
}

// send writes a line after what is queued, and reports whether the client can
// still be talked to. line is the caller's again.
func (o *outbox) send(line []byte) bool {
	o.writing.Lock()
	defer o.writing.Unlock()
	o.flushLocked()
	o.writeLocked(line)
	return !o.broken
}

// close writes what is queued, for as long as the client takes it and has its
// time to. Nothing may be queued any more.
func (o *outbox) close() {
	_ = o.nc.SetWriteDeadline(time.Now().Add(farewell))
	o.flush()
}
