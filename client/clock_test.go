package client

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/export/wire"
)

// timed sends a request and notes what it hears of the time.
type timed struct {
	op    Op
	sent  bool
	start int64 // Op.Start
	asked int64 // when it was asked for the request, before that left
	told  int64 // Done's now
	heard int64 // when Done was called
}

func (s *timed) Next(op *Op, _ int64) (time.Duration, bool) {
	if s.sent {
		return 0, false
	}
	s.sent = true
	op.Cmd, op.Length, op.Data = s.op.Cmd, s.op.Length, s.op.Data
	s.asked = Now()
	return 0, true
}

func (s *timed) Done(op *Op, now int64) { s.start, s.told, s.heard = op.Start, now, Now() }

// TestBatchClock finds the reply in the socket before the request is sent, so
// that it is received in the turn that sends it.
func TestBatchClock(t *testing.T) {
	const cookie = 1 << 16 // of a Batch's first request
	there := make(chan struct{})
	b := mustBatch(t, startFake(t, fakeServer{size: 1 << 20, noStruct: true}, func(f *fakeServer) {
		f.simple(cookie, 0, make([]byte, 4096))
		close(there)
		_, _, _ = f.request()
		_, _, _ = f.request() // the goodbye
	}), Options{}, 1)
	<-there
	s := &timed{op: Op{Cmd: wire.CmdRead, Length: 4096}}
	if err := b.Run(t.Context(), s, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	if s.told <= s.start {
		t.Errorf("a latency of %d ns", s.told-s.start)
	}
	if s.told < s.asked || s.told > s.heard {
		t.Errorf("answered at %d: sent after %d, heard of at %d", s.told, s.asked, s.heard)
	}
}

// stamped is a book that notes when each reply came, as its receiver says.
type stamped struct {
	*book
	in *receiver
	at []int64
}

func (s *stamped) done(op *Op) {
	s.book.done(op)
	s.at = append(s.at, s.in.at)
}

// TestReceiveClock has the end of a payload come with its header, into the buffer,
// and apart from it, straight into its place.
func TestReceiveClock(t *testing.T) {
	const length = 2 * directFrom
	reply := simple(1, 0, string(make([]byte, length)))
	for _, pieces := range [][][]byte{{reply}, {reply[:100], reply[100:]}} {
		here, there := socketPair(t)
		var r receiver
		r.init()
		s := &stamped{book: newBook(), in: &r}
		s.ops[1] = &Op{cookie: 1, Cmd: wire.CmdRead, Length: length, Data: make([]byte, length)}
		d := decoder{reqs: s}
		var before int64
		for _, p := range pieces {
			if _, err := unix.Write(there, p); err != nil {
				t.Fatal(err)
			}
			before = Now()
			if n, err := r.receive(uintptr(here), &d); n != len(p) || err != nil {
				t.Fatal(n, err)
			}
		}
		if len(s.at) != 1 || s.at[0] < before || s.at[0] > Now() {
			t.Errorf("in %d pieces: received at %v, the last one after %d", len(pieces), s.at, before)
		}
	}
}

// socketPair are two connected nonblocking sockets with room for some replies.
func socketPair(t *testing.T) (here, there int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Close(fds[0])
		_ = unix.Close(fds[1])
	})
	return fds[0], fds[1]
}
