package client

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/nbd-export/nbd-export/export/wire"
)

// fakeServer is a scripted server: it shakes hands as told, then script speaks.
type fakeServer struct {
	net.Conn
	network     string // unix if empty, or tcp
	size        uint64
	flags       uint16
	noStruct    bool // refuses STRUCTURED_REPLY
	noGo        bool // knows EXPORT_NAME only
	zeroes      bool // does not offer NO_ZEROES
	refuse      uint32
	refuseText  string
	exports     []Export
	structured  bool // negotiated
	allocation  bool // negotiated
	description string
}

// wireBytes are values as they are sent.
func wireBytes(v ...any) []byte {
	var b []byte
	for _, x := range v {
		switch x := x.(type) {
		case uint16:
			b = binary.BigEndian.AppendUint16(b, x)
		case uint32:
			b = binary.BigEndian.AppendUint32(b, x)
		case uint64:
			b = binary.BigEndian.AppendUint64(b, x)
		case string:
			b = append(b, x...)
		case []byte:
			b = append(b, x...)
		default:
			panic(fmt.Sprintf("%T", x))
		}
	}
	return b
}

func (f *fakeServer) put(v ...any) { _, _ = f.Write(wireBytes(v...)) }

func (f *fakeServer) answer(option, typ uint32, data ...any) {
	b := wireBytes(data...)
	f.put(wire.MagicOptionReply, option, typ, uint32(len(b)), b)
}

const fakeContext = uint32(7)

func (f *fakeServer) handshake() error {
	flags := wire.FlagFixedNewstyle
	if !f.zeroes {
		flags |= wire.FlagNoZeroes
	}
	f.put(wire.MagicInit, wire.MagicOption, flags)
	var b [16]byte
	if _, err := io.ReadFull(f, b[:4]); err != nil {
		return err
	}
	for {
		if _, err := io.ReadFull(f, b[:]); err != nil {
			return err
		}
		option := binary.BigEndian.Uint32(b[8:])
		data := make([]byte, binary.BigEndian.Uint32(b[12:]))
		if _, err := io.ReadFull(f, data); err != nil {
			return err
		}
		switch {
		case option == wire.OptStructuredReply && !f.noStruct:
			f.structured = true
			f.answer(option, wire.RepAck)
		case option == wire.OptSetMetaContext && !f.noStruct:
			f.allocation = true
			f.answer(option, wire.RepMetaContext, fakeContext, wire.ContextBaseAllocation)
			f.answer(option, wire.RepAck)
		case option == wire.OptList:
			for _, e := range f.exports {
				f.answer(option, wire.RepServer, uint32(len(e.Name)), e.Name, e.Description)
			}
			f.answer(option, wire.RepAck)
		case option == wire.OptAbort:
			f.answer(option, wire.RepAck)
			return io.EOF
		case option == wire.OptGo && f.refuse != 0:
			f.answer(option, f.refuse, f.refuseText)
		case option == wire.OptGo && !f.noGo:
			f.answer(option, wire.RepInfo, wire.InfoExport, f.size, f.flags)
			f.answer(option, wire.RepInfo, wire.InfoDescription, f.description)
			f.answer(option, wire.RepInfo, wire.InfoBlockSize, uint32(1), uint32(4096), uint32(32<<20))
			f.answer(option, wire.RepAck)
			return nil
		case option == wire.OptExportName:
			f.put(f.size, f.flags)
			if f.zeroes {
				f.put(make([]byte, 124))
			}
			return nil
		default:
			f.answer(option, wire.RepErrUnsup)
		}
	}
}

// request reads one request, with a write's payload.
func (f *fakeServer) request() (op Op, payload []byte, err error) {
	var b [wire.RequestSize]byte
	if _, err := io.ReadFull(f, b[:]); err != nil {
		return op, nil, err
	}
	op = Op{
		Flags: binary.BigEndian.Uint16(b[4:]), Cmd: binary.BigEndian.Uint16(b[6:]), cookie: binary.BigEndian.Uint64(b[8:]),
		Offset: binary.BigEndian.Uint64(b[16:]), Length: binary.BigEndian.Uint32(b[24:]),
	}
	if op.Cmd == wire.CmdWrite {
		payload = make([]byte, op.Length)
		_, err = io.ReadFull(f, payload)
	}
	return op, payload, err
}

func (f *fakeServer) simple(cookie uint64, code uint32, data []byte) {
	f.put(wire.MagicSimpleReply, code, cookie, data)
}

func (f *fakeServer) chunk(cookie uint64, flags, typ uint16, body ...any) {
	f.put(chunk(cookie, flags, typ, body...))
}

// chunk is a structured reply chunk.
func chunk(cookie uint64, flags, typ uint16, body ...any) []byte {
	b := wireBytes(body...)
	return append(wireBytes(uint32(wire.MagicStructuredReply), flags, typ, cookie, uint32(len(b))), b...)
}

// startFake serves every connection with a copy of f: the handshake, then script
// (nil closes). It returns the URI of the default export.
func startFake(t testing.TB, f fakeServer, script func(f *fakeServer)) string {
	t.Helper()
	network, address := "unix", t.TempDir()+"/s"
	uri := UnixURI(address, "")
	if f.network == "tcp" {
		network, address = "tcp", "127.0.0.1:0"
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	if network == "tcp" {
		uri = "nbd://" + l.Addr().String()
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer nc.Close()
				f := f
				f.Conn = nc
				if f.handshake() == nil && script != nil {
					script(&f)
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return uri
}
