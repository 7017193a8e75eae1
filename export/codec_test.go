package export

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

func testCodec(structured bool) *codec {
	return newCodec(terms{
		size: 1 << 40, trans: transFlags(testInfo(), false, structured), structured: structured, contexts: testContexts(structured),
	})
}

// testContexts are base:allocation and the dirty bitmap "b", or nothing.
func testContexts(some bool) []metaContext {
	if !some {
		return nil
	}
	return (&Export{Bitmaps: []string{"b"}}).contexts()
}

// selectedIn reports whether base:allocation was selected.
func selectedIn(t terms) bool { return slices.Contains(t.contexts, metaContext{id: 1}) }

func decode(t testing.TB, c *codec, b []byte) *ioloop.Request {
	t.Helper()
	r := new(ioloop.Request)
	n, err := c.Decode(b, r)
	if err != nil || n != wire.RequestSize {
		t.Fatalf("Decode: %d, %v", n, err)
	}
	return r
}

// Golden bytes of every kind of reply, rows R1 to R9 and C14.
func TestReplies(t *testing.T) {
	const cookie = 0x0123456789abcdef // R1: echoed as it came
	simple, structured := testCodec(false), testCodec(true)
	read := requestHeader(0, wire.CmdRead, cookie, 0x1000, 0x200)
	write := requestHeader(0, wire.CmdWrite, cookie, 0x1000, 0x200)
	status := requestHeader(0, wire.CmdBlockStatus, cookie, 0x1000, 0x3000)
	one := requestHeader(wire.CmdFlagReqOne, wire.CmdBlockStatus, cookie, 0x1000, 0x3000)
	ext := []backend.Status{{Length: 0x1000}, {Length: 0x3000, Flags: backend.StatusHole | backend.StatusZero}, {Length: 5}}

	type request = *ioloop.Request
	for _, tt := range []struct {
		row    string
		c      *codec
		header []byte
		reply  func(*codec, request) []byte
		want   string
	}{
		{"R2 simple read", simple, read,
			func(c *codec, r request) []byte { return c.AppendData(nil, r, 0, 0x200, true) },
			"67446698 00000000 0123456789abcdef"},
		{"R2 simple read error has no payload", simple, read,
			func(c *codec, r request) []byte { return c.AppendError(nil, r, syscall.EIO) },
			"67446698 00000005 0123456789abcdef"},
		{"R2 simple done", simple, write,
			func(c *codec, r request) []byte { return c.AppendDone(nil, r) },
			"67446698 00000000 0123456789abcdef"},
		{"R4 done", structured, write,
			func(c *codec, r request) []byte { return c.AppendDone(nil, r) },
			"668e33ef 0001 0000 0123456789abcdef 00000000"},
		{"R3 R8 error", structured, read,
			func(c *codec, r request) []byte { return c.AppendError(nil, r, state.ErrInactive) },
			"668e33ef 0001 8001 0123456789abcdef 00000018 00000001 0012 " + hex.EncodeToString([]byte("export is inactive"))},
		{"R5 data", structured, read,
			func(c *codec, r request) []byte { return c.AppendData(nil, r, 0x80, 0x100, false) },
			"668e33ef 0000 0001 0123456789abcdef 00000108 0000000000001080"},
		{"R4 R5 last data", structured, read,
			func(c *codec, r request) []byte { return c.AppendData(nil, r, 0, 0x200, true) },
			"668e33ef 0001 0001 0123456789abcdef 00000208 0000000000001000"},
		{"R5 hole", structured, read,
			func(c *codec, r request) []byte { return c.AppendHole(nil, r, 0x180, 0x80, true) },
			"668e33ef 0001 0002 0123456789abcdef 0000000c 0000000000001180 00000080"},
		{"C14 C16 status", structured, status,
			func(c *codec, r request) []byte { return c.AppendStatus(nil, r, 0, ext, true) },
			"668e33ef 0001 0005 0123456789abcdef 00000014 00000001 00001000 00000000 00003000 00000003"},
		{"C14 REQ_ONE", structured, one,
			func(c *codec, r request) []byte { return c.AppendStatus(nil, r, 0, ext, true) },
			"668e33ef 0001 0005 0123456789abcdef 0000000c 00000001 00001000 00000000"},
		{"C14 REQ_ONE never longer than the request", structured, one,
			func(c *codec, r request) []byte {
				return c.AppendStatus(nil, r, 0, []backend.Status{{Length: 1 << 33, Flags: backend.StatusZero}}, true)
			},
			"668e33ef 0001 0005 0123456789abcdef 0000000c 00000001 00003000 00000002"},
		{"C14 at least one descriptor", structured, status,
			func(c *codec, r request) []byte { return c.AppendStatus(nil, r, 0, nil, true) },
			"668e33ef 0001 0005 0123456789abcdef 0000000c 00000001 00003000 00000000"},
		{"C14 32 bits", structured, status,
			func(c *codec, r request) []byte {
				return c.AppendStatus(nil, r, 0, []backend.Status{{Length: 1 << 35}}, true)
			},
			"668e33ef 0001 0005 0123456789abcdef 0000000c 00000001 fffffe00 00000000"},
		{"C14 of a dirty bitmap, not the last context", structured, status,
			func(c *codec, r request) []byte {
				return c.AppendStatus(nil, r, 1, []backend.Status{{Length: 4096}, {Length: 8192, Flags: backend.StatusDirty}}, false)
			},
			"668e33ef 0000 0005 0123456789abcdef 00000014 00000002 00001000 00000000 00002000 00000001"},
		{"a dirty bitmap of which nothing is known", structured, status,
			func(c *codec, r request) []byte { return c.AppendStatus(nil, r, 1, nil, true) },
			"668e33ef 0001 0005 0123456789abcdef 0000000c 00000002 00003000 00000001"},
		{"C15 not past the export", structured, requestHeader(0, wire.CmdBlockStatus, cookie, 1<<40-512, 512),
			func(c *codec, r request) []byte {
				return c.AppendStatus(nil, r, 0, []backend.Status{{Length: 4096}}, true)
			},
			"668e33ef 0001 0005 0123456789abcdef 0000000c 00000001 00000200 00000000"},
	} {
		r := decode(t, tt.c, tt.header)
		if r.Err != nil {
			t.Errorf("%s: refused: %v", tt.row, r.Err)
			continue
		}
		got := hex.EncodeToString(tt.reply(tt.c, r))
		if want := strings.ReplaceAll(tt.want, " ", ""); got != want {
			t.Errorf("%s:\n got %s\nwant %s", tt.row, got, want)
		}
	}
}

// R3: with structured replies, no error of a READ is a simple reply, early or
// late; R8: errors have a text within its bounds.
func TestEarlyErrors(t *testing.T) {
	c := testCodec(true)
	for _, h := range [][]byte{
		requestHeader(1<<7, wire.CmdRead, 7, 0, 512),
		requestHeader(0, wire.CmdRead, 7, 1<<41, 512),
		requestHeader(0, wire.CmdRead, 7, 0, 1<<30),
	} {
		r := decode(t, c, h)
		if r.Op != ioloop.OpReject || r.Payload != 0 {
			t.Fatalf("%+v", r)
		}
		ch, rest := cutChunk(t, c.AppendError(nil, r, r.Err))
		if errno, text := ch.errorOf(t); errno != wire.EINVAL || text == "" || ch.cookie != 7 || len(rest) != 0 {
			t.Errorf("errno %d, text %q, %d more", errno, text, len(rest))
		}
	}
	long := errors.New(strings.Repeat("x", 10000))
	r := decode(t, c, requestHeader(0, wire.CmdRead, 7, 0, 512))
	reply := c.AppendError(nil, r, long)
	if len(reply) > ioloop.MaxHeader+4096 {
		t.Errorf("R8: %d bytes", len(reply))
	}
	ch, _ := cutChunk(t, reply)
	ch.errorOf(t)
}

func TestChunked(t *testing.T) {
	simple, structured := testCodec(false), testCodec(true)
	plain := requestHeader(0, wire.CmdRead, 0, 0, 512)
	df := requestHeader(wire.CmdFlagDF, wire.CmdRead, 0, 0, 512)
	if simple.Chunked(decode(t, simple, plain)) {
		t.Error("R2: a simple reply is one piece")
	}
	if !structured.Chunked(decode(t, structured, plain)) {
		t.Error("structured replies may be chunked")
	}
	if structured.Chunked(decode(t, structured, df)) {
		t.Error("R7: DF must not be chunked")
	}
}

func TestDecodeStream(t *testing.T) {
	t.Run("partial header", func(t *testing.T) {
		b := requestHeader(0, wire.CmdRead, 1, 0, 512)
		for n := range b {
			if used, err := testCodec(true).Decode(b[:n], new(ioloop.Request)); used != 0 || err != nil {
				t.Fatalf("%d bytes: %d, %v", n, used, err)
			}
		}
	})
	t.Run("C21 bad magic", func(t *testing.T) {
		b := requestHeader(0, wire.CmdRead, 1, 0, 512)
		b[0] ^= 1
		if _, err := testCodec(true).Decode(b, new(ioloop.Request)); err == nil {
			t.Error("no error")
		}
	})
	t.Run("C18 DISC", func(t *testing.T) {
		// Whatever else it says.
		r := decode(t, testCodec(true), requestHeader(0xffff, wire.CmdDisc, 1, 99, 99))
		if r.Op != ioloop.OpDisconnect || r.Payload != 0 {
			t.Errorf("%+v", r)
		}
	})
	t.Run("C4 a refused WRITE's payload is consumed", func(t *testing.T) {
		for _, n := range []uint32{0, 1, 512, 32 << 20, 32<<20 + 1, maxDiscard} {
			r := decode(t, testCodec(true), requestHeader(1<<9, wire.CmdWrite, 1, 0, n))
			if r.Op != ioloop.OpReject || r.Payload != int64(n) || r.Err == nil {
				t.Errorf("%d: %+v", n, r)
			}
		}
	})
	t.Run("C4 only a WRITE has a payload", func(t *testing.T) {
		for cmd := range uint16(20) {
			if cmd == wire.CmdWrite {
				continue
			}
			if r := decode(t, testCodec(true), requestHeader(1<<9, cmd, 1, 0, 512)); r.Payload != 0 {
				t.Errorf("command %d: payload %d", cmd, r.Payload)
			}
		}
	})
	t.Run("C5 too much to consume", func(t *testing.T) {
		c := testCodec(true)
		r := decode(t, c, requestHeader(0, wire.CmdWrite, 9, 0, math.MaxUint32))
		if r.Op != ioloop.OpReject || r.Payload != 0 || c.ended() == nil {
			t.Fatalf("%+v, %v", r, c.ended())
		}
		// The reply goes out, then whatever comes ends the connection.
		if n, err := c.Decode(nil, r); n != 0 || err != nil {
			t.Errorf("nothing: %d, %v", n, err)
		}
		if n, err := c.Decode([]byte("payload"), r); n != 7 || err != nil || r.Op != ioloop.OpDisconnect {
			t.Errorf("payload: %d, %v, %+v", n, err, r)
		}
	})
	t.Run("MaxStatus", func(t *testing.T) {
		c := testCodec(true)
		if n := c.MaxStatus(decode(t, c, requestHeader(wire.CmdFlagReqOne, wire.CmdBlockStatus, 1, 0, 512))); n != 1 {
			t.Errorf("REQ_ONE: %d", n)
		}
		if n := c.MaxStatus(decode(t, c, requestHeader(0, wire.CmdBlockStatus, 1, 0, 512))); n < 1 || n > 1<<20 {
			t.Errorf("C15: %d", n)
		}
	})
}

// What every Append adds stays within what the loop reserves for it.
func TestReplyBounds(t *testing.T) {
	for _, structured := range []bool{false, true} {
		c := testCodec(structured)
		r := decode(t, c, requestHeader(0, wire.CmdRead, 1, 0, 512))
		for name, b := range map[string][]byte{
			"data": c.AppendData(nil, r, 0, 512, true),
			"hole": c.AppendHole(nil, r, 0, 512, true),
			"done": c.AppendDone(nil, r),
		} {
			if len(b) > ioloop.MaxHeader {
				t.Errorf("structured %v, %s: %d bytes", structured, name, len(b))
			}
		}
		if !structured {
			continue
		}
		ext := make([]backend.Status, maxStatus+10)
		for i := range ext {
			ext[i].Length = 1
		}
		r = &ioloop.Request{Op: ioloop.OpStatus, Length: 1 << 30}
		b := c.AppendStatus(nil, r, 0, ext, true)
		if len(b) > ioloop.MaxHeader+16*maxStatus {
			t.Errorf("status: %d bytes", len(b))
		}
	}
}

func TestCodecAllocates(t *testing.T) {
	c := testCodec(true)
	header := requestHeader(0, wire.CmdRead, 1, 4096, 4096)
	inactive := requestHeader(0, wire.CmdTrim, 1, 4096, 4096)
	dst := make([]byte, 0, 4096)
	var r ioloop.Request
	ext := []backend.Status{{Length: 4096}}
	for name, f := range map[string]func(){
		"Decode, AppendData": func() { _, _ = c.Decode(header, &r); dst = c.AppendData(dst[:0], &r, 0, 4096, true) },
		"AppendDone":         func() { _, _ = c.Decode(header, &r); dst = c.AppendDone(dst[:0], &r) },
		"AppendHole":         func() { _, _ = c.Decode(header, &r); dst = c.AppendHole(dst[:0], &r, 0, 4096, true) },
		"AppendStatus":       func() { _, _ = c.Decode(header, &r); dst = c.AppendStatus(dst[:0], &r, 0, ext, true) },
		"refused while inactive": func() {
			_, _ = c.Decode(inactive, &r)
			dst = c.AppendError(dst[:0], &r, state.ErrInactive)
		},
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkCodec(b *testing.B) {
	for _, structured := range []bool{false, true} {
		for _, cmd := range []uint16{wire.CmdRead, wire.CmdWrite} {
			b.Run(fmt.Sprintf("structured=%v/%s", structured, commandName(cmd)), func(b *testing.B) {
				c := testCodec(structured)
				header := requestHeader(0, cmd, 1, 4096, 4096)
				dst := make([]byte, 0, 64)
				var r ioloop.Request
				b.ReportAllocs()
				for i := uint64(0); b.Loop(); i++ {
					binary.BigEndian.PutUint64(header[8:], i)
					if _, err := c.Decode(header, &r); err != nil {
						b.Fatal(err)
					}
					if cmd == wire.CmdRead {
						dst = c.AppendData(dst[:0], &r, 0, 4096, true)
					} else {
						dst = c.AppendDone(dst[:0], &r)
					}
				}
			})
		}
	}
}
