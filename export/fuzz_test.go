package export

import (
	"bytes"
	"encoding/binary"
	"math"
	"net"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

// FuzzHandshake: whatever a client sends, the handshake ends with the input,
// does not panic, and takes memory for what has arrived, not for what was
// announced.
func FuzzHandshake(f *testing.F) {
	hello := be32(fixedNoZeroes)
	option := func(opt uint32, data []byte) []byte { return append(optionHeader(opt, uint32(len(data))), data...) }
	seed := func(options ...[]byte) { f.Add(append(bytes.Clone(hello), bytes.Join(options, nil)...)) }
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add(append(be32(0), option(wire.OptExportName, nil)...))
	seed(option(wire.OptExportName, []byte("ro")))
	seed(option(wire.OptList, nil), option(wire.OptAbort, nil))
	seed(option(wire.OptStructuredReply, nil), option(wire.OptSetMetaContext, metaData("", "base:allocation", "x:y")),
		option(wire.OptInfo, goData("", 0, 1, 2, 3)), option(wire.OptGo, goData("", 0, 1, 2, 3)))
	seed(option(wire.OptListMetaContext, metaData("ro", "base:")), option(wire.OptStartTLS, nil), option(wire.OptExtendedHeaders, nil))
	seed(optionHeader(wire.OptInfo, 0xffffffff))
	seed(optionHeader(wire.OptSetMetaContext, maxOptionData))

	x, _ := testExports(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		conn := &recorded{in: bytes.NewReader(in)}
		var entered *Export
		h := &handshake{
			conn: conn, exports: x,
			stopping: func() bool { return false },
			enter:    func(e *Export) error { entered = e; return nil },
		}
		a, err := h.run()
		if err == nil && (a.export == nil || a.export != entered) {
			t.Fatalf("an agreement on %v, entered %v", a.export, entered)
		}
		if err == nil && (a.terms.size < 0 || a.terms.trans&wire.TransHasFlags == 0 || len(a.terms.contexts) > 0 && !a.terms.structured) {
			t.Fatalf("terms %+v", a.terms)
		}
		if most := 2*len(in) + 3*4096; cap(h.in) > most {
			t.Fatalf("%d bytes of input took a buffer of %d", len(in), cap(h.in))
		}
		if out := conn.out.Bytes(); len(out) < 18 {
			t.Fatalf("greeting of %d bytes", len(out))
		}
	})
}

// FuzzDecode: what the codec lets through lies within the export and has only
// flags that were negotiated; what it refuses is consumed; every reply is
// well formed.
func FuzzDecode(f *testing.F) {
	for cmd := range uint16(9) {
		f.Add(requestHeader(0, cmd, 1, 0, 512), int64(1<<20), uint16(0xffff), true)
		f.Add(requestHeader(1, cmd, math.MaxUint64, 1<<20-1, 2), int64(1<<20), uint16(3), false)
	}
	f.Add(requestHeader(0, wire.CmdWrite, 1, 0, math.MaxUint32), int64(math.MaxInt64), uint16(0), true)
	f.Add(requestHeader(4, wire.CmdRead, 1, 1<<63, 512), int64(0), uint16(0x80), true)
	f.Fuzz(func(t *testing.T, b []byte, size int64, trans uint16, structured bool) {
		if size < 0 {
			size = -(size + 1)
		}
		if !structured {
			trans &^= wire.TransSendDF
		}
		c := newCodec(terms{size: size, trans: trans, structured: structured, contexts: testContexts(true)})
		var r ioloop.Request
		n, err := c.Decode(b, &r)
		switch {
		case len(b) < wire.RequestSize:
			if n != 0 || err != nil {
				t.Fatalf("part of a header: %d, %v", n, err)
			}
			return
		case binary.BigEndian.Uint32(b) != wire.MagicRequest:
			if err == nil {
				t.Fatal("a wrong magic was accepted")
			}
			return
		case n != wire.RequestSize || err != nil:
			t.Fatalf("%d, %v", n, err)
		}
		flags, cmd := binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
		offset, length := binary.BigEndian.Uint64(b[16:]), binary.BigEndian.Uint32(b[24:])
		if r.Payload < 0 || r.Payload > maxDiscard || (r.Payload != 0 && cmd != wire.CmdWrite) {
			t.Fatalf("payload %d", r.Payload)
		}
		if c.discard == nil && cmd == wire.CmdWrite && r.Payload != int64(length) {
			t.Fatalf("payload %d of a WRITE of %d", r.Payload, length)
		}
		switch r.Op {
		case ioloop.OpDisconnect:
			if cmd != wire.CmdDisc {
				t.Fatal("disconnected")
			}
			return
		case ioloop.OpReject:
			if r.Err == nil || r.Err.Error() == "" {
				t.Fatal("refused without a reason")
			}
			checkReply(t, c, c.AppendError(nil, &r, r.Err), cmd, b[8:16], true)
			return
		}

		// Encoded again from what the loop sees, it is the same request.
		again := requestHeader(uint16(r.Tag[1]>>16), uint16(r.Tag[1]), r.Tag[0], uint64(r.Offset), uint32(r.Length))
		if !bytes.Equal(again, b[:wire.RequestSize]) {
			t.Fatalf("%x became %x", b[:wire.RequestSize], again)
		}
		if r.Offset < 0 || r.Length < 0 || r.Offset > size || r.Length > size-r.Offset {
			t.Fatalf("[%d, +%d) of %d", r.Offset, r.Length, size)
		}
		if offset != uint64(r.Offset) || int64(length) != r.Length || r.Err != nil {
			t.Fatalf("%+v", r)
		}
		switch r.Op {
		case ioloop.OpRead, ioloop.OpWrite:
			if r.Length > wire.MaxRequestPayload {
				t.Fatalf("%d bytes", r.Length)
			}
		case ioloop.OpFlush:
			if r.Offset != 0 || r.Length != 0 {
				t.Fatal("a FLUSH with a range")
			}
		}
		switch r.Op {
		case ioloop.OpWrite, ioloop.OpZero, ioloop.OpDiscard:
			if trans&wire.TransReadOnly != 0 {
				t.Fatal("a write to a read-only export")
			}
		}
		if flags&^uint16(0x1f) != 0 || flags&wire.CmdFlagDF != 0 && trans&wire.TransSendDF == 0 {
			t.Fatalf("flags %#x", flags)
		}

		checkReply(t, c, c.AppendDone(nil, &r), cmd, b[8:16], false)
		for _, err := range []error{state.ErrInactive, state.ErrStopping, net.ErrClosed} {
			checkReply(t, c, c.AppendError(nil, &r, err), cmd, b[8:16], true)
		}
		if r.Op == ioloop.OpStatus {
			checkStatus(t, c, &r, offset)
		}
	})
}

func checkReply(t *testing.T, c *codec, reply []byte, cmd uint16, cookie []byte, failed bool) {
	t.Helper()
	allowed := map[uint32]bool{1: true, 5: true, 12: true, 22: true, 28: true, 75: true, 95: true, 108: true}
	if !c.structured {
		if len(reply) != 16 || !bytes.Equal(reply[8:], cookie) {
			t.Fatalf("simple reply %x", reply)
		}
		if errno := binary.BigEndian.Uint32(reply[4:]); failed != (errno != 0) || failed && !allowed[errno] {
			t.Fatalf("errno %d", errno)
		}
		return
	}
	ch, rest := cutChunk(t, reply)
	if len(rest) != 0 || ch.cookie != binary.BigEndian.Uint64(cookie) || ch.flags != wire.ReplyFlagDone {
		t.Fatalf("command %d: %+v, %d more bytes", cmd, ch, len(rest))
	}
	if !failed {
		if ch.typ != wire.ReplyNone || len(ch.data) != 0 {
			t.Fatalf("%+v", ch)
		}
		return
	}
	if errno, text := ch.errorOf(t); !allowed[errno] || checkString(text) != nil {
		t.Fatalf("errno %d, text %q", errno, text)
	}
}

// checkStatus gives AppendStatus extents made from seed, good and bad.
func checkStatus(t *testing.T, c *codec, r *ioloop.Request, seed uint64) {
	t.Helper()
	var ext []backend.Status
	for i := range seed % 7 {
		ext = append(ext, backend.Status{
			Length: int64(seed>>(i*8)) & (1<<(8*i%60) - 1),
			Flags:  backend.StatusFlags(seed >> i),
		})
	}
	ch, rest := cutChunk(t, c.AppendStatus(nil, r, 0, ext, true))
	if len(rest) != 0 || ch.typ != wire.ReplyBlockStatus || len(ch.data) < 12 || len(ch.data)%8 != 4 {
		t.Fatalf("%+v", ch)
	}
	var sum int64
	for d := ch.data[4:]; len(d) > 0; d = d[8:] {
		if sum >= r.Length {
			t.Fatalf("a descriptor after the end of the request: %x", ch.data)
		}
		n := int64(binary.BigEndian.Uint32(d))
		if n == 0 || binary.BigEndian.Uint32(d[4:])&^3 != 0 {
			t.Fatalf("descriptor %x", d[:8])
		}
		sum += n
	}
	if sum > c.size-r.Offset {
		t.Fatalf("descriptors pass the end of the export")
	}
	if r.Flags&ioloop.OneExtent != 0 && (len(ch.data) != 12 || sum > r.Length) {
		t.Fatalf("REQ_ONE: %x for %d bytes", ch.data, r.Length)
	}
}

// FuzzTransmission: any bytes after a handshake; the loop ends and the disk
// is only changed inside.
func FuzzTransmission(f *testing.F) {
	f.Add(append(requestHeader(0, wire.CmdWrite, 1, 0, 4), "data"...), true)
	f.Add(append(requestHeader(0, wire.CmdRead, 1, 0, 512), requestHeader(0, wire.CmdDisc, 2, 0, 0)...), false)
	f.Fuzz(func(t *testing.T, in []byte, structured bool) {
		m := &inMemory{disk: make([]byte, 4096)}
		c := newCodec(terms{size: 4096, trans: transFlags(testInfo(), false, structured), structured: structured, contexts: testContexts(true)})
		_ = m.Serve(closable{&recorded{in: bytes.NewReader(in)}}, c, nil)
		if len(m.disk) != 4096 {
			t.Fatal("the disk has changed its size")
		}
	})
}

type closable struct{ *recorded }

func (closable) Close() error                { return nil }
func (closable) SetDeadline(time.Time) error { return nil }
