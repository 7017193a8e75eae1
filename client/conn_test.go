package client

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
)

const allFlags = wire.TransHasFlags | wire.TransSendFlush | wire.TransSendFUA | wire.TransSendTrim |
	wire.TransSendWriteZeroes | wire.TransSendCache | wire.TransCanMultiConn

// memory is a fake server's script: an image that answers every request.
func memory(image []byte) func(f *fakeServer) {
	var mu sync.Mutex
	return func(f *fakeServer) {
		for {
			op, payload, err := f.request()
			if err != nil || op.Cmd == wire.CmdDisc {
				return
			}
			mu.Lock()
			switch {
			case op.Cmd == wire.CmdFlush:
				f.simple(op.cookie, 0, nil)
			case op.Offset+uint64(op.Length) > uint64(len(image)):
				if f.structured {
					f.chunk(op.cookie, 1, wire.ReplyError, wire.EINVAL, uint16(12), "past the end")
				} else {
					f.simple(op.cookie, wire.EINVAL, nil)
				}
			case op.Cmd == wire.CmdRead && f.structured && op.Length == 0:
				f.chunk(op.cookie, 1, wire.ReplyNone)
			case op.Cmd == wire.CmdRead && f.structured:
				f.chunk(op.cookie, 1, wire.ReplyOffsetData, op.Offset, image[op.Offset:][:op.Length])
			case op.Cmd == wire.CmdRead:
				f.simple(op.cookie, 0, image[op.Offset:][:op.Length])
			case op.Cmd == wire.CmdBlockStatus:
				f.chunk(op.cookie, 1, wire.ReplyBlockStatus, fakeContext, op.Length, wire.StateHole)
			default:
				if op.Cmd == wire.CmdWrite {
					copy(image[op.Offset:], payload)
				} else if op.Cmd != wire.CmdCache {
					clear(image[op.Offset:][:op.Length])
				}
				f.simple(op.cookie, 0, nil)
			}
			mu.Unlock()
		}
	}
}

func mustDial(t testing.TB, uri string, opt Options) *Conn {
	t.Helper()
	c, err := Dial(t.Context(), uri, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestDial(t *testing.T) {
	for _, c := range []struct {
		name                   string
		f                      fakeServer
		opt                    Options
		structured, allocation bool
	}{
		{name: "everything", opt: Options{Allocation: true}, structured: true, allocation: true},
		{name: "plain", structured: true},
		{name: "simple asked for", opt: Options{SimpleReplies: true}},
		{name: "structured refused", f: fakeServer{noStruct: true}, opt: Options{Allocation: true}},
		{name: "no GO", f: fakeServer{noGo: true}, structured: true},
		{name: "no GO, with zeroes", f: fakeServer{noGo: true, zeroes: true}, structured: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.f.size, c.f.flags, c.f.description = 1<<20, allFlags, "a disk"
			image := make([]byte, 1<<20)
			conn := mustDial(t, startFake(t, c.f, memory(image)), c.opt)
			info := conn.Info()
			if info.Size != 1<<20 || info.Flags != allFlags || info.Structured != c.structured || info.Allocation != c.allocation {
				t.Fatalf("%+v", info)
			}
			if !c.f.noGo && (info.Description != "a disk" || info.PreferredBlock != 4096 || info.MaxBlock != 32<<20) {
				t.Fatalf("%+v", info)
			}
			exercise(t, conn, image)
		})
	}
}

// exercise uses every call once.
func exercise(t *testing.T, c *Conn, image []byte) {
	t.Helper()
	data := bytes.Repeat([]byte("words "), 50_000) // more than a socket holds
	if n, err := c.WriteAt(data, 100, true); n != len(data) || err != nil {
		t.Fatal(n, err)
	}
	got := make([]byte, len(data))
	if n, err := c.ReadAt(got, 100); n != len(got) || err != nil || !bytes.Equal(got, data) || !bytes.Equal(image[100:][:len(data)], data) {
		t.Fatal(n, err, "data differs")
	}
	if n, err := c.ReadAt(nil, 0); n != 0 || err != nil {
		t.Fatal(n, err)
	}
	err := errors.Join(c.Flush(), c.Cache(0, 4096), c.Trim(100, 100, false), c.WriteZeroes(200, 100, wire.CmdFlagNoHole))
	if err != nil {
		t.Fatal(err)
	}
	if !allZeroes(image[:300]) {
		t.Fatal("not zeroed")
	}
	if c.Info().Allocation {
		e, err := c.BlockStatus(0, 4096, 0)
		if err != nil || !slices.Equal(e, []Extent{{4096, wire.StateHole}}) {
			t.Fatal(e, err)
		}
	}
	var refusal *Error
	if _, err := c.ReadAt(got, 1<<30); !errors.As(err, &refusal) || refusal.Errno != syscall.EINVAL || refusal.Cmd != Cmd(wire.CmdRead) ||
		c.Info().Structured != (refusal.Text == "past the end") {
		t.Fatalf("%#v", err)
	}
}

func TestDialRefused(t *testing.T) {
	uri := startFake(t, fakeServer{refuse: wire.RepErrUnknown, refuseText: "no such export here"}, nil)
	_, err := Dial(t.Context(), uri, Options{})
	var refusal *OptionError
	if !errors.As(err, &refusal) || refusal.Code != wire.RepErrUnknown || refusal.Text != "no such export here" {
		t.Fatal(err)
	}
	if strings.ContainsRune(err.Error(), '\n') {
		t.Fatalf("%q", err)
	}
}

func TestDialBadServers(t *testing.T) {
	hello := string(binaryHello(3))
	for _, c := range []struct{ name, sends, want string }{
		{"closes at once", "", "closed the connection"},
		{"speaks something else", "SSH-2.0-OpenSSH_9.2p1 Debian", "not a newstyle"},
		{"closes after its greeting", hello, "closed the connection"},
		{"old style flags", string(binaryHello(0)), "fixed newstyle"},
		{"garbage for replies", hello + strings.Repeat("x", 100), "option reply with magic"},
		{"endless reply", hello + "\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x00\x00\x00\x01\xff\xff\xff\xff", "option reply of 4294967295"},
		{"answers another option", hello + "\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x03\x00\x00\x00\x01\x00\x00\x00\x00", "reply to option 3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			uri := rawServer(t, func(nc net.Conn) {
				_, _ = io.WriteString(nc, c.sends)
				if len(c.sends) > len(hello) {
					_, _ = io.Copy(io.Discard, nc)
				}
			})
			_, err := Dial(t.Context(), uri, Options{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("%v, want %q", err, c.want)
			}
		})
	}
	t.Run("never answers", func(t *testing.T) {
		uri := rawServer(t, func(nc net.Conn) { _, _ = io.Copy(io.Discard, nc) })
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := Dial(ctx, uri, Options{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	})
	t.Run("is not there", func(t *testing.T) {
		if _, err := Dial(t.Context(), UnixURI(t.TempDir()+"/none", ""), Options{}); !errors.Is(err, syscall.ENOENT) {
			t.Fatal(err)
		}
	})
}

func binaryHello(flags byte) []byte { return append([]byte("NBDMAGICIHAVEOPT\x00"), flags) }

// rawServer runs f on every connection.
func rawServer(t *testing.T, f func(net.Conn)) (uri string) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				f(nc)
			}()
		}
	}()
	return UnixURI(l.Addr().String(), "")
}

func TestList(t *testing.T) {
	want := []Export{{"", "the default"}, {"disk \"1\"", ""}}
	got, err := List(t.Context(), startFake(t, fakeServer{exports: want}, nil))
	if err != nil || !slices.Equal(got, want) {
		t.Fatal(got, err)
	}
}

// TestConnConcurrent has many goroutines on one connection whose server answers
// in the opposite order.
func TestConnConcurrent(t *testing.T) {
	const n = 64
	uri := startFake(t, fakeServer{size: 1 << 30, flags: allFlags}, func(f *fakeServer) {
		for {
			var ops []Op
			for len(ops) < n {
				op, _, err := f.request()
				if err != nil || op.Cmd == wire.CmdDisc {
					return
				}
				ops = append(ops, op)
			}
			for _, op := range slices.Backward(ops) {
				f.chunk(op.cookie, 1, wire.ReplyOffsetData, op.Offset, bytes.Repeat([]byte{byte(op.Offset)}, int(op.Length)))
			}
		}
	})
	c := mustDial(t, uri, Options{})
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			for range 20 {
				p := make([]byte, 1000*i+1)
				if _, err := c.ReadAt(p, int64(i)); err != nil || bytes.Count(p, []byte{byte(i)}) != len(p) {
					t.Error(i, err)
				}
			}
		})
	}
	all.Wait()
}

// TestConnBroken has calls in flight when the connection breaks in some way.
func TestConnBroken(t *testing.T) {
	for _, c := range []struct {
		name   string
		breaks func(f *fakeServer, op Op)
		want   error
	}{
		{"closes", func(*fakeServer, Op) {}, ErrServerClosed},
		{"closes within a header", func(f *fakeServer, op Op) { f.put(wire.MagicSimpleReply, uint16(0)) }, ErrServerClosed},
		{"closes within data", func(f *fakeServer, op Op) {
			f.put(chunk(op.cookie, 1, wire.ReplyOffsetData, op.Offset, make([]byte, op.Length))[:5000])
		}, ErrServerClosed},
		{"garbage", func(f *fakeServer, op Op) { f.put(strings.Repeat("garbage", 10)) }, ErrProtocol},
		{"half of the data", func(f *fakeServer, op Op) {
			f.chunk(op.cookie, 1, wire.ReplyOffsetData, op.Offset, make([]byte, op.Length/2))
		}, ErrProtocol},
	} {
		t.Run(c.name, func(t *testing.T) {
			const n = 8
			uri := startFake(t, fakeServer{size: 1 << 30, flags: allFlags}, func(f *fakeServer) {
				var op Op
				for range n {
					op, _, _ = f.request()
				}
				c.breaks(f, op)
			})
			conn := mustDial(t, uri, Options{})
			var all sync.WaitGroup
			for range n {
				all.Go(func() {
					if _, err := conn.ReadAt(make([]byte, 8192), 0); !errors.Is(err, c.want) {
						t.Error(err)
					}
				})
			}
			all.Wait()
			if err := conn.Flush(); !errors.Is(err, c.want) {
				t.Error("later:", err)
			}
		})
	}
}

func TestConnClose(t *testing.T) {
	came, discs := make(chan struct{}), make(chan bool, 1)
	uri := startFake(t, fakeServer{size: 1 << 30, flags: allFlags}, func(f *fakeServer) {
		_, _, _ = f.request()
		close(came)
		op, _, err := f.request()
		discs <- err == nil && op.Cmd == wire.CmdDisc
	})
	c := mustDial(t, uri, Options{})
	failed := make(chan error)
	go func() { failed <- c.Flush() }()
	<-came
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if !<-discs {
		t.Error("no DISC")
	}
	if err := c.Flush(); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	c.Abort()
	_ = c.Close()
}

// TestConnAbortStalled ends a connection whose server neither reads nor answers.
func TestConnAbortStalled(t *testing.T) {
	hold := make(chan struct{})
	uri := startFake(t, fakeServer{size: 1 << 30, flags: allFlags}, func(f *fakeServer) { <-hold })
	defer close(hold)
	c := mustDial(t, uri, Options{})
	failed := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := c.WriteAt(make([]byte, 8<<20), 0, false)
			failed <- err
		}()
	}
	for n := 0; n < 2; runtime.Gosched() {
		c.mu.Lock()
		n = len(c.pending)
		c.mu.Unlock()
	}
	c.Abort()
	for range 2 {
		if err := <-failed; !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	}
}

func TestParseURI(t *testing.T) {
	for uri, want := range map[string]Target{
		"nbd://host":                        {"tcp", "host:10809", ""},
		"nbd://host/":                       {"tcp", "host:10809", ""},
		"nbd://host:99/a/b":                 {"tcp", "host:99", "a/b"},
		"nbd://[::1]:99//x":                 {"tcp", "[::1]:99", "/x"},
		"nbd+unix:///?socket=/run/s":        {"unix", "/run/s", ""},
		"nbd+unix:///a%20b?socket=/r%3Fn/s": {"unix", "/r?n/s", "a b"},
	} {
		if got, err := ParseURI(uri); err != nil || got != want {
			t.Errorf("%s: %+v %v", uri, got, err)
		}
	}
	for _, uri := range []string{
		"", "host", "nbd://", "nbd:///x", "nbd+unix:///x", "http://host", "nbds://host", "nbd://host/%zz",
		"nbd://host/a%00b", "nbd://host/" + strings.Repeat("x", 4097),
	} {
		if got, err := ParseURI(uri); err == nil {
			t.Errorf("%.40s: %+v", uri, got)
		}
	}
	odd := Target{"unix", "/tmp/a b&c=d?#%", "x y/z?#%"}
	if got, err := ParseURI(UnixURI(odd.Address, odd.Export)); err != nil || got != odd {
		t.Errorf("%s: %+v %v", UnixURI(odd.Address, odd.Export), got, err)
	}
}
