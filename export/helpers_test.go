package export

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, idleWorkers) }

const testSize = 1 << 20 // bytes, of the test export

// fakeImage is an image that has facts but no bytes.
type fakeImage struct {
	backend.Image
	info backend.Info
	size atomic.Int64
}

func (f *fakeImage) Info() backend.Info { return f.info }
func (f *fakeImage) Size() int64        { return f.size.Load() }

func testInfo() backend.Info {
	return backend.Info{
		Format: "raw", MinBlock: 1, PreferredBlock: 4096, MaxBlock: wire.MaxRequestPayload, CanTrim: true,
	}
}

func newImage(size int64) *fakeImage {
	f := &fakeImage{info: testInfo()}
	f.size.Store(size)
	return f
}

// testExports serves "" (writable), "ro" (read-only, described).
func testExports(t testing.TB) (*Exports, *fakeImage) {
	t.Helper()
	img := newImage(testSize)
	x := new(Exports)
	for _, e := range []*Export{
		{Name: "", Disk: &ioloop.Disk{Image: img}},
		{Name: "ro", Description: "read only", ReadOnly: true, Disk: &ioloop.Disk{Image: newImage(512)}},
	} {
		if err := x.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	return x, img
}

// reply is one option reply.
type reply struct {
	typ  uint32
	data []byte
}

// peer is the client's side of a connection. Every reply it reads is checked
// for its frame (row H5).
type peer struct {
	t  testing.TB
	nc net.Conn
}

func (p *peer) write(b []byte) {
	p.t.Helper()
	if _, err := p.nc.Write(b); err != nil {
		p.t.Fatalf("write: %v", err)
	}
}

func (p *peer) read(n int) []byte {
	p.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(p.nc, b); err != nil {
		p.t.Fatalf("read of %d bytes: %v", n, err)
	}
	return b
}

// closed checks that the server has closed the connection and said nothing
// more.
func (p *peer) closed() {
	p.t.Helper()
	if rest, err := io.ReadAll(p.nc); len(rest) != 0 || (err != nil && !gone(err)) {
		p.t.Fatalf("want a closed connection, got %d bytes %x, %v", len(rest), rest[:min(len(rest), 64)], err)
	}
}

func gone(err error) bool { return quiet(err) && !errors.Is(err, os.ErrDeadlineExceeded) }

func (p *peer) greet(flags uint32) {
	p.t.Helper()
	p.read(18)
	p.write(binary.BigEndian.AppendUint32(nil, flags))
}

const fixedNoZeroes = wire.FlagClientFixedNewstyle | wire.FlagClientNoZeroes

func optionHeader(opt, length uint32) []byte {
	b := binary.BigEndian.AppendUint64(nil, wire.MagicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	return binary.BigEndian.AppendUint32(b, length)
}

func (p *peer) send(opt uint32, data []byte) {
	p.t.Helper()
	p.write(append(optionHeader(opt, uint32(len(data))), data...))
}

// replies reads the replies to opt up to the final one.
func (p *peer) replies(opt uint32) []reply {
	p.t.Helper()
	var all []reply
	for {
		b := p.read(20)
		if m := binary.BigEndian.Uint64(b); m != 0x3e889045565a9 {
			p.t.Fatalf("reply magic %#x", m)
		}
		if o := binary.BigEndian.Uint32(b[8:]); o != opt {
			p.t.Fatalf("reply to option %d, want %d", o, opt)
		}
		r := reply{typ: binary.BigEndian.Uint32(b[12:])}
		r.data = p.read(int(binary.BigEndian.Uint32(b[16:])))
		all = append(all, r)
		if r.typ == wire.RepAck && len(r.data) != 0 {
			p.t.Fatalf("ACK with data %q", r.data)
		}
		if r.typ == wire.RepAck || r.typ&wire.RepFlagError != 0 {
			return all
		}
	}
}

// do sends an option and returns its replies.
func (p *peer) do(opt uint32, data []byte) []reply {
	p.t.Helper()
	p.send(opt, data)
	return p.replies(opt)
}

// final sends an option and checks the type of its only reply; it returns the
// text.
func (p *peer) final(opt uint32, data []byte, want uint32) string {
	p.t.Helper()
	r := p.do(opt, data)
	if len(r) != 1 || r[0].typ != want {
		p.t.Fatalf("%s: got %x, want one reply of type %#x", optionName(opt), r, want)
	}
	if want&wire.RepFlagError != 0 && len(r[0].data) == 0 {
		p.t.Fatalf("%s: error without a text (row H13)", optionName(opt)) // every one of ours has one
	}
	return string(r[0].data)
}

// inSync checks that the server still understands the client.
func (p *peer) inSync() {
	p.t.Helper()
	if r := p.do(wire.OptList, nil); len(r) != 3 || r[2].typ != wire.RepAck {
		p.t.Fatalf("LIST: %x", r)
	}
}

func be32(v ...uint32) (b []byte) {
	for _, x := range v {
		b = binary.BigEndian.AppendUint32(b, x)
	}
	return b
}

// goData is the data of INFO and GO.
func goData(name string, infos ...uint16) []byte {
	b := append(be32(uint32(len(name))), name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

// metaData is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
func metaData(name string, queries ...string) []byte {
	b := append(be32(uint32(len(name))), name...)
	b = append(b, be32(uint32(len(queries)))...)
	for _, q := range queries {
		b = append(append(b, be32(uint32(len(q)))...), q...)
	}
	return b
}

// outcome is how a handshake ended.
type outcome struct {
	agreement
	err error
}

// talk runs the server's side of a handshake over a pipe.
func talk(t testing.TB, x *Exports, change ...func(*handshake)) (*peer, <-chan outcome) {
	client, server := net.Pipe()
	h := &handshake{
		conn: server, exports: x,
		stopping: func() bool { return false },
		enter:    func(*Export) error { return nil },
	}
	for _, f := range change {
		f(h)
	}
	done := make(chan outcome, 1)
	go func() {
		a, err := h.run()
		if err != nil {
			_ = server.Close()
		}
		done <- outcome{a, err}
	}()
	t.Cleanup(func() {
		_ = client.Close()
		_ = server.Close()
	})
	_ = client.SetDeadline(time.Now().Add(30 * time.Second)) // a broken server must not hang the tests
	return &peer{t, client}, done
}

// greeted is talk after the greeting of an ordinary client.
func greeted(t testing.TB, x *Exports, change ...func(*handshake)) (*peer, <-chan outcome) {
	t.Helper()
	p, done := talk(t, x, change...)
	p.greet(fixedNoZeroes)
	return p, done
}

// inMemory is a Mover over a byte slice, one request at a time: the contract
// of ioloop.Codec in its plainest form.
type inMemory struct{ disk []byte }

func (m *inMemory) Serve(nc net.Conn, c ioloop.Codec, _ *ioloop.Disk) error {
	defer func() { _ = nc.Close() }()
	var in []byte
	need := func(n int) error {
		for len(in) < n {
			part := make([]byte, 4096)
			k, err := nc.Read(part)
			if in = append(in, part[:k]...); err != nil {
				return err
			}
		}
		return nil
	}
	for {
		var r ioloop.Request
		n, err := c.Decode(in, &r)
		if err != nil {
			return err
		}
		if n == 0 {
			if err := need(len(in) + 1); err != nil {
				return noErrEOF(err)
			}
			continue
		}
		if err := need(n + int(r.Payload)); err != nil {
			return noErrEOF(err)
		}
		payload := in[n : n+int(r.Payload)]
		out, end := m.answer(c, &r, payload)
		in = slices.Clone(in[n+int(r.Payload):])
		if end {
			return nil
		}
		if _, err := nc.Write(out); err != nil {
			return err
		}
	}
}

func (m *inMemory) Shutdown(context.Context) {}

func noErrEOF(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

func (m *inMemory) answer(c ioloop.Codec, r *ioloop.Request, payload []byte) (out []byte, end bool) {
	switch r.Op {
	case ioloop.OpDisconnect:
		return nil, true
	case ioloop.OpReject:
		return c.AppendError(nil, r, r.Err), false
	case ioloop.OpStatus:
		names := c.Contexts()
		for i := range names {
			out = c.AppendStatus(out, r, i, []backend.Status{{Length: r.Length}}, i == len(names)-1)
		}
		return out, false
	case ioloop.OpWrite:
		copy(m.disk[r.Offset:], payload)
	case ioloop.OpZero:
		clear(m.disk[r.Offset : r.Offset+r.Length])
	case ioloop.OpRead:
		if r.Length == 0 {
			break
		}
		data := m.disk[r.Offset : r.Offset+r.Length]
		half := r.Length / 2
		if !c.Chunked(r) || half == 0 {
			return append(c.AppendData(nil, r, 0, r.Length, true), data...), false
		}
		out = append(c.AppendData(nil, r, 0, half, false), data[:half]...)
		if bytes.Count(data[half:], []byte{0}) == len(data)-int(half) {
			return c.AppendHole(out, r, half, r.Length-half, true), false
		}
		return append(c.AppendData(out, r, half, r.Length-half, true), data[half:]...), false
	}
	return c.AppendDone(nil, r), false
}

// requestHeader is a request as it is on the wire.
func requestHeader(flags, cmd uint16, cookie, offset uint64, length uint32) []byte {
	b := be32(wire.MagicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, offset)
	return binary.BigEndian.AppendUint32(b, length)
}

// chunk is one structured reply chunk.
type chunk struct {
	flags, typ uint16
	cookie     uint64
	data       []byte
}

// cutChunk parses the chunk at the front of b.
func cutChunk(t testing.TB, b []byte) (chunk, []byte) {
	t.Helper()
	if len(b) < 20 || binary.BigEndian.Uint32(b) != 0x668e33ef {
		t.Fatalf("not a structured reply: %x", b)
	}
	n := int(binary.BigEndian.Uint32(b[16:]))
	if len(b) < 20+n {
		t.Fatalf("chunk of %d bytes cut short: %x", n, b)
	}
	return chunk{
		flags:  binary.BigEndian.Uint16(b[4:]),
		typ:    binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		data:   b[20 : 20+n],
	}, b[20+n:]
}

// errorOf parses an ERROR chunk.
func (c chunk) errorOf(t testing.TB) (errno uint32, text string) {
	t.Helper()
	if c.typ != 0x8001 || c.flags != 1 || len(c.data) < 6 {
		t.Fatalf("not a final ERROR chunk: %+v", c)
	}
	if n := int(binary.BigEndian.Uint16(c.data[4:])); n != len(c.data)-6 || n > 4096 {
		t.Fatalf("text of %d bytes in a chunk of %d", n, len(c.data))
	}
	return binary.BigEndian.Uint32(c.data), string(c.data[6:])
}
