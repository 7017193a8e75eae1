package client

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
)

func mustBatch(t testing.TB, uri string, opt Options, depth int) *Batch {
	t.Helper()
	b, err := DialBatch(t.Context(), uri, opt, depth)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// script is a Source that sends prepared requests.
type script struct {
	ops  []Op
	done []Op
}

func (s *script) Next(op *Op, _ int64) (time.Duration, bool) {
	if len(s.ops) == 0 {
		return 0, false
	}
	next := s.ops[0]
	s.ops = s.ops[1:]
	op.Cmd, op.Flags, op.Offset, op.Length, op.Data, op.Tag = next.Cmd, next.Flags, next.Offset, next.Length, next.Data, next.Tag
	return 0, true
}

func (s *script) Done(op *Op, _ int64) { s.done = append(s.done, *op) }

// TestBatch writes and reads back through simple and structured replies, at
// sizes below and above what is received straight into its place.
func TestBatch(t *testing.T) {
	for _, opt := range []Options{{}, {SimpleReplies: true}} {
		for _, size := range []int{512, 4096, 100_000} {
			image := make([]byte, 8<<20)
			b := mustBatch(t, startFake(t, fakeServer{size: 8 << 20, flags: allFlags}, memory(image)), opt, 8)
			var writes, reads script
			for i := range 64 {
				data := bytes.Repeat([]byte{byte(i + 1)}, size)
				writes.ops = append(writes.ops, Op{Cmd: wire.CmdWrite, Offset: uint64(i * size), Length: uint32(size), Data: data})
				reads.ops = append(reads.ops, Op{Cmd: wire.CmdRead, Offset: uint64(i * size), Length: uint32(size), Data: make([]byte, size), Tag: uint64(i + 1)})
			}
			for _, s := range []*script{&writes, &reads} {
				if err := b.Run(t.Context(), s, time.Time{}, false); err != nil {
					t.Fatal(err)
				}
				if len(s.done) != 64 || b.InFlight() != 0 {
					t.Fatal(len(s.done))
				}
			}
			for _, op := range reads.done {
				if op.Err() != nil || bytes.Count(op.Data, []byte{byte(op.Tag)}) != size {
					t.Fatalf("size %d: read at %d: %v", size, op.Offset, op.Err())
				}
			}
		}
	}
}

// TestBatchErrors sees errors of the server without ending the run.
func TestBatchErrors(t *testing.T) {
	b := mustBatch(t, startFake(t, fakeServer{size: 1 << 20, flags: allFlags}, memory(make([]byte, 1<<20))), Options{}, 4)
	s := script{ops: []Op{
		{Cmd: wire.CmdRead, Offset: 1 << 30, Length: 512},
		{Cmd: wire.CmdFlush},
		{Cmd: wire.CmdRead, Length: 512},
	}}
	if err := b.Run(t.Context(), &s, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	if len(s.done) != 3 || s.done[0].Errno != syscall.EINVAL || s.done[0].Text != "past the end" || s.done[1].Err() != nil || s.done[2].Err() != nil {
		t.Fatalf("%+v", s.done)
	}
}

// TestBatchNoDeadlock meets a server that answers one request after the other
// and does not read while it sends, with more of both than the sockets hold.
func TestBatchNoDeadlock(t *testing.T) {
	image := make([]byte, 8<<20)
	b := mustBatch(t, startFake(t, fakeServer{size: 8 << 20, flags: allFlags}, memory(image)), Options{}, 16)
	var s script
	for i := range 200 {
		op := Op{Cmd: wire.CmdRead, Offset: uint64(i % 8 << 20), Length: 1 << 20}
		if rand.IntN(2) == 0 {
			op.Cmd, op.Data = wire.CmdWrite, make([]byte, 1<<20)
		}
		s.ops = append(s.ops, op)
	}
	if err := b.Run(t.Context(), &s, time.Now().Add(30*time.Second), false); err != nil {
		t.Fatal(err)
	}
	if len(s.done) != 200 {
		t.Fatal(len(s.done))
	}
}

// paced sends a request every gap and notes how late each left.
type paced struct {
	begin, gap int64
	n, sent    int64
	late       []time.Duration
}

func (p *paced) Next(op *Op, now int64) (time.Duration, bool) {
	if p.sent == p.n {
		return 0, false
	}
	due := p.begin + p.sent*p.gap
	if due > now {
		return time.Duration(due - now), true
	}
	p.sent++
	p.late = append(p.late, time.Duration(now-due))
	op.Cmd, op.Start = wire.CmdFlush, due
	return 0, true
}

func (p *paced) Done(*Op, int64) {}

func TestBatchPaced(t *testing.T) {
	b := mustBatch(t, startFake(t, fakeServer{size: 1 << 20, flags: allFlags}, memory(make([]byte, 1<<20))), Options{}, 4)
	p := &paced{begin: Now(), gap: int64(2 * time.Millisecond), n: 100}
	begin := time.Now()
	if err := b.Run(t.Context(), p, time.Time{}, true); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took < 198*time.Millisecond || took > 20*time.Second {
		t.Error(took)
	}
	var sum time.Duration
	for _, l := range p.late {
		sum += l
	}
	t.Log("late on average:", sum/100)
}

func TestBatchEnds(t *testing.T) {
	silent := func(f *fakeServer) { _, _ = io.Copy(io.Discard, f) }
	read := func() *script { return &script{ops: []Op{{Cmd: wire.CmdRead, Length: 512}}} }
	t.Run("at the deadline", func(t *testing.T) {
		for _, exact := range []bool{false, true} {
			b := mustBatch(t, startFake(t, fakeServer{size: 1 << 20}, silent), Options{}, 1)
			err := b.Run(t.Context(), read(), time.Now().Add(20*time.Millisecond), exact)
			if err == nil || !strings.Contains(err.Error(), "1 requests unanswered") {
				t.Fatal(err)
			}
			if again := b.Run(t.Context(), read(), time.Time{}, false); again == nil {
				t.Fatal("ran on a broken connection")
			}
		}
	})
	t.Run("with its context", func(t *testing.T) {
		for _, exact := range []bool{false, true} {
			b := mustBatch(t, startFake(t, fakeServer{size: 1 << 20}, silent), Options{}, 1)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if err := b.Run(ctx, read(), time.Time{}, exact); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
		}
	})
	t.Run("when the server closes", func(t *testing.T) {
		b := mustBatch(t, startFake(t, fakeServer{size: 1 << 20}, func(f *fakeServer) { _, _, _ = f.request() }), Options{}, 1)
		if err := b.Run(t.Context(), read(), time.Time{}, false); !errors.Is(err, ErrServerClosed) {
			t.Fatal(err)
		}
	})
	t.Run("when the server closes and cannot be sent to", func(t *testing.T) {
		b := mustBatch(t, startFake(t, fakeServer{size: 1 << 30}, func(f *fakeServer) { _, _, _ = f.request() }), Options{}, 2)
		s := &script{}
		for range 100 {
			s.ops = append(s.ops, Op{Cmd: wire.CmdWrite, Length: 1 << 20, Data: make([]byte, 1<<20)})
		}
		if err := b.Run(t.Context(), s, time.Time{}, false); !errors.Is(err, ErrServerClosed) {
			t.Fatal(err)
		}
	})
	t.Run("by garbage", func(t *testing.T) {
		b := mustBatch(t, startFake(t, fakeServer{size: 1 << 20}, func(f *fakeServer) { f.put(strings.Repeat("?", 1000)) }), Options{}, 1)
		if err := b.Run(t.Context(), read(), time.Time{}, false); !errors.Is(err, ErrProtocol) {
			t.Fatal(err)
		}
	})
	t.Run("by a stale reply", func(t *testing.T) {
		b := mustBatch(t, startFake(t, fakeServer{size: 1 << 20, flags: allFlags}, func(f *fakeServer) {
			op, _, _ := f.request()
			f.simple(op.cookie, 0, nil)
			f.simple(op.cookie, 0, nil)
		}), Options{}, 1)
		s := &script{ops: []Op{{Cmd: wire.CmdFlush}, {Cmd: wire.CmdFlush}}}
		if err := b.Run(t.Context(), s, time.Time{}, false); !errors.Is(err, ErrProtocol) && !errors.Is(err, ErrServerClosed) {
			t.Fatal(err)
		}
	})
}

// TestBatchNull runs at full speed and must not allocate per request.
func TestBatchNull(t *testing.T) {
	b := mustBatch(t, startNullServer(t), Options{}, 32)
	src := &counted{left: 1000, cmd: wire.CmdRead, length: 4096, rng: rand.NewPCG(1, 2)}
	if err := b.Run(t.Context(), src, time.Time{}, false); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	got := testing.AllocsPerRun(1, func() {
		src.left = 20_000
		if err := b.Run(ctx, src, time.Time{}, false); err != nil {
			t.Fatal(err)
		}
	})
	if got > 100 {
		t.Errorf("%v allocations in 20000 requests", got)
	}
}

// A Batch that has not had to wait for a turn's length gives way, where there are
// others.
func TestGiveWay(t *testing.T) {
	defer running.Store(running.Load())
	for _, c := range []struct {
		what    string
		running int32
		turn    time.Duration // how long it has lasted
		gives   bool
	}{
		{"alone", 1, 2 * turnLength, false},
		{"a short turn", 2, turnLength / 2, false},
		{"a long one", 2, turnLength, true},
	} {
		b := Batch{now: int64(time.Second)}
		b.turn = b.now - int64(c.turn)
		began, rounds := b.turn, others.Rounds()
		running.Store(c.running)
		b.giveWay()
		if gave := others.Rounds() > rounds; gave != c.gives || gave == (b.turn == began) {
			t.Errorf("%s: gives way %v, and a new turn has begun %v", c.what, gave, b.turn != began)
		}
	}
}
