package export

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
)

// pipes is a listener whose connections are pipes, for use in a bubble of
// synctest: nothing there takes real time.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	fail   chan error
}

func newPipes() *pipes {
	return &pipes{conns: make(chan net.Conn), closed: make(chan struct{}), fail: make(chan error)}
}

func (l *pipes) Accept() (net.Conn, error) {
	select {
	case nc := <-l.conns:
		return nc, nil
	case err := <-l.fail:
		return nil, err
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipes) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipes) Addr() net.Addr { return nil }

func (l *pipes) dial(t *testing.T) *peer {
	client, server := net.Pipe()
	l.conns <- server
	return &peer{t, client}
}

// enter negotiates the default export, plainly: the transmission phase
// begins.
func (p *peer) enter() {
	p.t.Helper()
	p.greet(fixedNoZeroes)
	p.do(wire.OptGo, goData(""))
}

// served runs a server on pipes inside a bubble.
func served(t *testing.T, f func(t *testing.T, s *Server, l *pipes, logs *observer.ObservedLogs), change ...func(*Server)) {
	defer goleak.VerifyNone(t, idleWorkers)
	synctest.Test(t, func(t *testing.T) {
		x, _ := testExports(t)
		core, logs := observer.New(zapcore.DebugLevel)
		s := &Server{Exports: x, Mover: &inMemory{disk: make([]byte, testSize)}, Log: zap.New(core)}
		for _, c := range change {
			c(s)
		}
		l := newPipes()
		done := make(chan error, 1)
		go func() { done <- s.Serve(l) }()
		synctest.Wait()
		f(t, s, l, logs)
		_ = s.Close()
		if err := <-done; !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
}

func TestServerBookkeeping(t *testing.T) {
	served(t, func(t *testing.T, s *Server, l *pipes, logs *observer.ObservedLogs) {
		a := l.dial(t)
		a.enter()
		b := l.dial(t)
		b.greet(fixedNoZeroes)
		synctest.Wait()
		list := s.Connections()
		if len(list) != 2 || !list[0].Transmission || list[0].Export != "" || list[1].Transmission {
			t.Errorf("%+v", list)
		}
		a.write(requestHeader(0, wire.CmdDisc, 1, 0, 0))
		a.closed()
		_ = b.nc.Close()
		synctest.Wait()
		if n := len(s.Connections()); n != 0 {
			t.Errorf("%d connections left", n)
		}
		if n := logs.FilterMessage("client disconnected").Len(); n != 1 {
			t.Errorf("%d lines for one client", n)
		}
	})
}

func TestH12Shared(t *testing.T) {
	served(t, func(t *testing.T, s *Server, l *pipes, logs *observer.ObservedLogs) {
		a := l.dial(t)
		a.greet(fixedNoZeroes)
		b := l.dial(t)
		b.enter()
		c := l.dial(t)
		c.closed() // no greeting
		synctest.Wait()
		if n := logs.FilterMessageSnippet("refused").Len(); n != 1 {
			t.Errorf("%d log lines", n)
		}
		_ = a.nc.Close()
		synctest.Wait()
		d := l.dial(t)
		d.enter()
		_, _ = b.nc.Close(), d.nc.Close()
	}, func(s *Server) { s.Shared = 2 })
}

// Clients that speak something else, or nothing, leave one line each at most,
// and the sampler keeps a flood of them down.
func TestNoise(t *testing.T) {
	served(t, func(t *testing.T, s *Server, l *pipes, logs *observer.ObservedLogs) {
		for _, say := range []string{"", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00", "\x00\x00\x00\x03garbage and more of it"} {
			p := l.dial(t)
			p.read(18)
			_, _ = p.nc.Write([]byte(say)) // may be cut short
			_ = p.nc.Close()
			synctest.Wait()
			lines := logs.TakeAll()
			if len(lines) != 1 || lines[0].Level > zap.InfoLevel || len(lines[0].ContextMap()["reason"].(string)) == 0 {
				t.Errorf("%q: %+v", say, lines)
			}
		}
		for range 500 {
			p := l.dial(t)
			p.read(18)
			_ = p.nc.Close()
		}
		synctest.Wait()
		if n := logs.Len(); n > 30 {
			t.Errorf("%d log lines", n)
		}
	})
}

func TestAcceptErrors(t *testing.T) {
	served(t, func(t *testing.T, s *Server, l *pipes, logs *observer.ObservedLogs) {
		for range 5 {
			l.fail <- &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
		}
		p := l.dial(t) // it goes on
		p.enter()
		_ = p.nc.Close()
		if logs.FilterMessageSnippet("cannot accept").Len() == 0 {
			t.Error("nothing was logged")
		}
		l.fail <- &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
		// Closing does not wait for the pause to end; served closes.
	})
	s := &Server{Exports: new(Exports), Mover: &inMemory{}}
	l := newPipes()
	bad := errors.New("broken listener")
	go func() { l.fail <- bad }()
	if err := s.Serve(l); !errors.Is(err, bad) {
		t.Errorf("got %v", err)
	}
}

// waiting is a Mover whose connections stay until their input ends; it
// answers nothing.
type waiting struct{}

func (waiting) Serve(nc net.Conn, _ ioloop.Codec, _ *ioloop.Disk) error {
	defer func() { _ = nc.Close() }()
	if _, err := io.Copy(io.Discard, nc); !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

func (waiting) Shutdown(context.Context) {}

// stuck is a Mover that only ends when its connection is closed.
type stuck struct{}

func (stuck) Serve(nc net.Conn, _ ioloop.Codec, _ *ioloop.Disk) error {
	for {
		if _, err := nc.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return nc.Close()
		}
		time.Sleep(time.Millisecond)
	}
}

func (stuck) Shutdown(context.Context) {}

// orderly is a Mover that has its own way of ending connections.
type orderly struct {
	waiting
	asked chan struct{}
}

func (o orderly) Shutdown(context.Context) { close(o.asked) }

func TestShutdown(t *testing.T) {
	t.Run("in order", func(t *testing.T) {
		served(t, func(t *testing.T, s *Server, l *pipes, _ *observer.ObservedLogs) {
			a, b := l.dial(t), l.dial(t)
			a.enter()
			b.greet(fixedNoZeroes)
			synctest.Wait()
			done := make(chan error, 1)
			go func() { done <- s.Shutdown(t.Context()) }()
			synctest.Wait()
			select {
			case <-l.closed:
			default:
				t.Error("the listener is open")
			}
			a.closed()
			b.final(wire.OptList, nil, wire.RepErrShutdown) // H10
			b.final(wire.OptAbort, nil, wire.RepAck)
			b.closed()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if err := s.Serve(newPipes()); !errors.Is(err, ErrServerClosed) {
				t.Errorf("Serve after Shutdown: %v", err)
			}
			if err := s.Shutdown(t.Context()); err != nil {
				t.Errorf("again: %v", err)
			}
		}, func(s *Server) { s.Mover = waiting{} })
	})
	t.Run("a silent handshake is cut off", func(t *testing.T) {
		served(t, func(t *testing.T, s *Server, l *pipes, _ *observer.ObservedLogs) {
			p := l.dial(t)
			p.greet(fixedNoZeroes)
			start := time.Now()
			if err := s.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			if d := time.Since(start); d != shutdownGrace {
				t.Errorf("took %v", d)
			}
			p.closed()
		})
	})
	t.Run("the mover's own way", func(t *testing.T) {
		o := orderly{asked: make(chan struct{})}
		served(t, func(t *testing.T, s *Server, l *pipes, _ *observer.ObservedLogs) {
			p := l.dial(t)
			p.enter()
			synctest.Wait()
			if err := s.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			<-o.asked
			p.closed()
		}, func(s *Server) { s.Mover = o })
	})
	t.Run("time is up", func(t *testing.T) {
		served(t, func(t *testing.T, s *Server, l *pipes, _ *observer.ObservedLogs) {
			p := l.dial(t)
			p.enter()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			start := time.Now()
			if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 5*time.Second {
				t.Errorf("%v after %v", err, time.Since(start))
			}
			p.closed()
		}, func(s *Server) { s.Mover = stuck{} })
	})
	t.Run("Close does not wait", func(t *testing.T) {
		served(t, func(t *testing.T, s *Server, l *pipes, _ *observer.ObservedLogs) {
			a, b := l.dial(t), l.dial(t)
			a.enter()
			b.greet(fixedNoZeroes)
			start := time.Now()
			if err := s.Close(); err != nil || time.Since(start) != 0 {
				t.Errorf("%v after %v", err, time.Since(start))
			}
			a.closed()
			b.closed()
		}, func(s *Server) { s.Mover = waiting{} })
	})
	t.Run("before use", func(t *testing.T) {
		s := &Server{Exports: new(Exports), Mover: waiting{}}
		if err := s.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// Refuse ends no connection: what it asks from then on is answered.
func TestRefuse(t *testing.T) {
	served(t, func(t *testing.T, s *Server, l *pipes, _ *observer.ObservedLogs) {
		a, b := l.dial(t), l.dial(t)
		a.enter()
		b.greet(fixedNoZeroes)
		synctest.Wait()
		s.Refuse()
		s.Refuse()
		b.final(wire.OptGo, goData(""), wire.RepErrShutdown)
		b.closed() // a second later
		a.write(requestHeader(0, wire.CmdFlush, 1, 0, 0))
		a.read(16)
		_ = a.nc.Close()
	})
}

// A client that may have one connection is not invited to open several.
func TestF7Alone(t *testing.T) {
	for _, shared := range []int{0, 1, 2} {
		served(t, func(t *testing.T, s *Server, l *pipes, _ *observer.ObservedLogs) {
			p := l.dial(t)
			p.greet(fixedNoZeroes)
			info := p.do(wire.OptInfo, goData(""))[0].data // EXPORT comes first
			multi := binary.BigEndian.Uint16(info[10:])&wire.TransCanMultiConn != 0
			if multi != (shared != 1) {
				t.Errorf("%d connections: CAN_MULTI_CONN %t", shared, multi)
			}
			_ = p.nc.Close()
		}, func(s *Server) { s.Shared = shared })
	}
}

// Descriptors are left for handing over, whatever clients do.
func TestDescriptorsAreLeft(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if most := uint64(mostConnections()); most >= limit.Cur || most < limit.Cur/2 {
		t.Errorf("%d connections with %d descriptors", most, limit.Cur)
	}
	served(t, func(t *testing.T, s *Server, l *pipes, logs *observer.ObservedLogs) {
		a := l.dial(t)
		a.enter()
		l.dial(t).closed()
		synctest.Wait()
		if logs.FilterMessageSnippet("ulimit -n").Len() != 1 {
			t.Errorf("%+v", logs.All())
		}
		_ = a.nc.Close()
	}, func(s *Server) { s.init(); s.most = 1 })
}

func TestRemoveAndDisconnect(t *testing.T) {
	served(t, func(t *testing.T, s *Server, l *pipes, _ *observer.ObservedLogs) {
		a, b := l.dial(t), l.dial(t)
		a.enter()
		b.greet(fixedNoZeroes)
		e := s.Exports.Remove("")
		b.final(wire.OptGo, goData(""), wire.RepErrUnknown)
		synctest.Wait()
		if n := s.Disconnect(e); n != 1 {
			t.Errorf("%d connections closed", n)
		}
		a.closed()
		if r := b.do(wire.OptList, nil); len(r) != 2 {
			t.Errorf("%x", r)
		}
		_ = b.nc.Close()
	}, func(s *Server) { s.Mover = waiting{} })
}

// A whole conversation, with the plainest Mover.
func TestConversation(t *testing.T) {
	for _, structured := range []bool{false, true} {
		t.Run(map[bool]string{false: "simple", true: "structured"}[structured], func(t *testing.T) {
			served(t, func(t *testing.T, s *Server, l *pipes, logs *observer.ObservedLogs) {
				p := l.dial(t)
				p.greet(fixedNoZeroes)
				if structured {
					p.final(wire.OptStructuredReply, nil, wire.RepAck)
					p.do(wire.OptSetMetaContext, metaData("", "base:allocation"))
				}
				p.do(wire.OptGo, goData(""))
				converse(t, p, structured)
				p.write(requestHeader(0, wire.CmdWrite, 9, 0, 1<<31)) // C5: answered, then the end
				if errno, _ := p.answer(structured, 0); errno != wire.EINVAL {
					t.Errorf("errno %d", errno)
				}
				_, _ = p.nc.Write(make([]byte, 100))
				p.closed()
				synctest.Wait()
				last := logs.FilterMessage("client disconnected").All()
				if len(last) != 1 || !strings.Contains(last[0].ContextMap()["reason"].(string), "WRITE of 2147483648") {
					t.Errorf("%+v", last)
				}
			})
		})
	}
}

// answer reads one reply with n bytes of READ data.
func (p *peer) answer(structured bool, n int) (errno uint32, data []byte) {
	p.t.Helper()
	if !structured {
		b := p.read(16)
		if binary.BigEndian.Uint32(b) != wire.MagicSimpleReply || binary.BigEndian.Uint64(b[8:]) != 9 {
			p.t.Fatalf("reply %x", b)
		}
		if errno = binary.BigEndian.Uint32(b[4:]); errno == 0 {
			data = p.read(n)
		}
		return errno, data
	}
	for {
		head := p.read(20)
		b := append(head, p.read(int(binary.BigEndian.Uint32(head[16:])))...)
		c, _ := cutChunk(p.t, b)
		if c.cookie != 9 {
			p.t.Fatalf("cookie %d", c.cookie)
		}
		switch c.typ {
		case wire.ReplyOffsetData:
			data = append(data, c.data[8:]...)
		case wire.ReplyOffsetHole:
			data = append(data, make([]byte, binary.BigEndian.Uint32(c.data[8:]))...)
		case wire.ReplyBlockStatus:
			data = c.data
		case wire.ReplyError:
			errno, _ = c.errorOf(p.t)
		}
		if c.flags&wire.ReplyFlagDone != 0 {
			if errno == 0 && len(data) != n {
				p.t.Fatalf("%d bytes, want %d", len(data), n)
			}
			return errno, data
		}
	}
}

func converse(t *testing.T, p *peer, structured bool) {
	t.Helper()
	payload := bytes.Repeat([]byte("nbd!"), 128)
	for _, tt := range []struct {
		row        string
		cmd, flags uint16
		offset     uint64
		length     uint32
		payload    []byte
		errno      uint32
		data       []byte
	}{
		{"write", wire.CmdWrite, 0, 1024, 512, payload, 0, nil},
		{"read", wire.CmdRead, 0, 1024, 512, nil, 0, payload},
		{"read with a hole", wire.CmdRead, 0, 1024, 1024, nil, 0, append(bytes.Clone(payload), make([]byte, 512)...)},
		{"C1 empty read", wire.CmdRead, 0, 0, 0, nil, 0, nil},
		{"C1 empty write", wire.CmdWrite, 0, 0, 0, nil, 0, nil},
		{"C2 read past the end", wire.CmdRead, 0, testSize, 1, nil, wire.EINVAL, nil},
		{"C4 refused write", wire.CmdWrite, 0, testSize, 512, payload, wire.ENOSPC, nil},
		{"C4 refused write, bad flag", wire.CmdWrite, 1 << 9, 0, 512, payload, wire.EINVAL, nil},
		{"C4 refused write, oversize", wire.CmdWrite, 0, 0, 32<<20 + 1, make([]byte, 32<<20+1), wire.EINVAL, nil},
		{"C10 zeroes", wire.CmdWriteZeroes, wire.CmdFlagNoHole, 1024, 256, nil, 0, nil},
		{"C8 flush", wire.CmdFlush, wire.CmdFlagFUA, 0, 0, nil, 0, nil},
		{"C12 cache", wire.CmdCache, 0, 0, testSize, nil, 0, nil},
		{"C19 unknown", 99, 0, 0, 512, nil, wire.EINVAL, nil},
		{"the stream is in step", wire.CmdRead, 0, 1280, 256, nil, 0, payload[256:]},
	} {
		p.write(append(requestHeader(tt.flags, tt.cmd, 9, tt.offset, tt.length), tt.payload...))
		errno, data := p.answer(structured, len(tt.data))
		if errno != tt.errno || !bytes.Equal(data, tt.data) {
			t.Errorf("%s: errno %d, %d bytes", tt.row, errno, len(data))
		}
	}
	p.write(requestHeader(0, wire.CmdBlockStatus, 9, 512, 512))
	n, want := 12, uint32(0)
	if !structured {
		n, want = 0, wire.EINVAL // C13
	}
	if errno, _ := p.answer(structured, n); errno != want {
		t.Errorf("BLOCK_STATUS: %d", errno)
	}
}

// H11, and what sockets need beyond pipes.
func TestSockets(t *testing.T) {
	defer goleak.VerifyNone(t, idleWorkers)
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path := filepath.Join(dir, "sock")
	u, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	x, _ := testExports(t)
	mover := &optionsOf{entered: make(chan map[string]int, 1)}
	s := &Server{Exports: x, Mover: mover}
	for _, l := range []net.Listener{u, tcp} {
		go func() { _ = s.Serve(l) }()
	}
	var peers []*peer
	for _, l := range []net.Listener{tcp, u} {
		nc, err := net.Dial(l.Addr().Network(), l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		p := &peer{t, nc}
		p.enter()
		got := <-mover.entered
		if l == tcp && (got["nodelay"] == 0 || got["keepalive"] == 0) {
			t.Errorf("H11: %v", got)
		}
		peers = append(peers, p)
	}
	list := s.Connections()
	if len(list) != 2 || !strings.HasPrefix(list[0].Client, "127.0.0.1:") || !strings.HasPrefix(list[1].Client, "unix pid ") {
		t.Errorf("%+v", list)
	}
	// The end of input reaches a mover that waits for the socket.
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	for _, p := range peers {
		p.closed()
		_ = p.nc.Close()
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket file is still there: %v", err)
	}
}

// optionsOf is waiting, and tells the options of TCP sockets.
type optionsOf struct {
	waiting
	entered chan map[string]int
}

func (o *optionsOf) Serve(nc net.Conn, c ioloop.Codec, d *ioloop.Disk) error {
	got := make(map[string]int)
	if t, ok := nc.(*net.TCPConn); ok {
		raw, _ := t.SyscallConn()
		_ = raw.Control(func(fd uintptr) {
			got["nodelay"], _ = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_NODELAY)
			got["keepalive"], _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_KEEPALIVE)
		})
	}
	o.entered <- got
	return o.waiting.Serve(nc, c, d)
}

// A server that is stopped before its listener's goroutine has begun leaves
// nothing behind.
func TestOwnBeforeServe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nbd")
	for range 2 {
		l, err := ListenUnix(path)
		if err != nil {
			t.Fatal(err)
		}
		s := &Server{Exports: new(Exports)}
		s.Own(l)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := s.Serve(l); !errors.Is(err, ErrServerClosed) {
			t.Errorf("served after all: %v", err)
		}
	}
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Exports: new(Exports)}
	s.Refuse()
	s.Own(l)
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
}
