package bench

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/nbd-export/nbd-export/client"
	"github.com/nbd-export/nbd-export/export/wire"
)

// image is what a fake server serves.
type image interface {
	io.ReaderAt
	io.WriterAt
}

// memory is an image of fixed size.
type memory struct {
	mu sync.RWMutex
	b  []byte
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.b[off:]), nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.b[off:], p), nil
}

// fake is a small NBD server: simple and structured replies, one request after
// the other on each connection.
type fake struct {
	image
	size     int64
	flags    uint16
	maxBlock uint32
	// refuse, if not nil, may answer a request with an error and a text.
	refuse func(cmd uint16) (code uint32, text string)
}

const fakeFlags = wire.TransHasFlags | wire.TransSendFlush | wire.TransSendFUA | wire.TransCanMultiConn

func newFake(size int64) *fake {
	return &fake{image: &memory{b: make([]byte, size)}, size: size, flags: fakeFlags}
}

// start listens until the test ends, and returns the socket's path.
func (f *fake) start(t testing.TB) (socket string) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	var mu sync.Mutex
	conns := map[net.Conn]bool{}
	served.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns[nc] = true
			mu.Unlock()
			served.Go(func() {
				defer nc.Close()
				f.serve(nc)
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for nc := range conns {
			_ = nc.Close()
		}
		mu.Unlock()
		served.Wait()
	})
	return l.Addr().String()
}

func (f *fake) uri(t testing.TB) string { return client.UnixURI(f.start(t), "") }

// be appends big endian integers and strings.
func be(b []byte, v ...any) []byte {
	for _, x := range v {
		switch x := x.(type) {
		case string:
			b = append(b, x...)
		case []byte:
			b = append(b, x...)
		default:
			b, _ = binary.Append(b, binary.BigEndian, x)
		}
	}
	return b
}

func (f *fake) serve(nc net.Conn) {
	in, out := bufio.NewReaderSize(nc, 64<<10), bufio.NewWriterSize(nc, 64<<10)
	structured, ok := f.handshake(nc, in)
	if !ok {
		return
	}
	var head [wire.RequestSize]byte
	buf := make([]byte, 128<<10)
	for {
		if in.Buffered() == 0 && out.Flush() != nil {
			return
		}
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return
		}
		cmd, cookie := binary.BigEndian.Uint16(head[6:]), binary.BigEndian.Uint64(head[8:])
		off, data := int64(binary.BigEndian.Uint64(head[16:])), buf[:binary.BigEndian.Uint32(head[24:])]
		if cmd == wire.CmdWrite {
			if _, err := io.ReadFull(in, data); err != nil {
				return
			}
		}
		var code uint32
		var text string
		if f.refuse != nil {
			code, text = f.refuse(cmd)
		}
		switch {
		case cmd == wire.CmdDisc:
			return
		case code != 0 && structured:
			_, _ = out.Write(be(nil, wire.MagicStructuredReply, wire.ReplyFlagDone, wire.ReplyError, cookie, uint32(6+len(text)), code, uint16(len(text)), text))
			continue
		case code == 0 && cmd == wire.CmdWrite:
			_, _ = f.WriteAt(data, off)
		case code == 0 && cmd == wire.CmdRead:
			_, _ = f.ReadAt(data, off)
			if structured {
				_, _ = out.Write(be(nil, wire.MagicStructuredReply, wire.ReplyFlagDone, wire.ReplyOffsetData, cookie, uint32(8+len(data)), off))
				_, _ = out.Write(data)
				continue
			}
		}
		_, _ = out.Write(be(nil, wire.MagicSimpleReply, code, cookie))
		if cmd == wire.CmdRead && code == 0 {
			_, _ = out.Write(data)
		}
	}
}

func (f *fake) handshake(out io.Writer, in io.Reader) (structured, ok bool) {
	_, _ = out.Write(be(nil, wire.MagicInit, wire.MagicOption, wire.FlagFixedNewstyle|wire.FlagNoZeroes))
	var b [16]byte
	if _, err := io.ReadFull(in, b[:4]); err != nil {
		return false, false
	}
	for {
		if _, err := io.ReadFull(in, b[:]); err != nil {
			return false, false
		}
		option := binary.BigEndian.Uint32(b[8:])
		if _, err := io.CopyN(io.Discard, in, int64(binary.BigEndian.Uint32(b[12:]))); err != nil {
			return false, false
		}
		reply := func(typ uint32, body []byte) {
			_, _ = out.Write(be(nil, wire.MagicOptionReply, option, typ, uint32(len(body)), body))
		}
		switch option {
		case wire.OptStructuredReply:
			structured = true
			reply(wire.RepAck, nil)
		case wire.OptGo:
			reply(wire.RepInfo, be(nil, wire.InfoExport, f.size, f.flags))
			if f.maxBlock != 0 {
				reply(wire.RepInfo, be(nil, wire.InfoBlockSize, uint32(1), uint32(4096), f.maxBlock))
			}
			reply(wire.RepAck, nil)
			return structured, true
		default:
			reply(wire.RepErrUnsup, nil)
		}
	}
}
