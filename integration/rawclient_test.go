package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// The protocol's numbers as its document has them, so that a wrong constant in
// the product cannot hide behind itself.
const (
	nbdMagic         = 0x4e42444d41474943
	optionMagic      = 0x49484156454f5054
	optionReplyMagic = 0x3e889045565a9
	requestMagic     = 0x25609513
	simpleMagic      = 0x67446698
	structuredMagic  = 0x668e33ef

	optExportName = 1
	optAbort      = 2
	optList       = 3
	optStartTLS   = 5
	optInfo       = 6
	optGo         = 7
	optStructured = 8
	optListMeta   = 9
	optSetMeta    = 10

	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMeta        = 4
	repErrUnsup    = 1<<31 | 1
	repErrInvalid  = 1<<31 | 3
	repErrUnknown  = 1<<31 | 6
	repErrShutdown = 1<<31 | 7

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	flagFUA      = 1 << 0
	flagNoHole   = 1 << 1
	flagDF       = 1 << 2
	flagReqOne   = 1 << 3
	flagFastZero = 1 << 4

	nbdEPERM     = 1
	nbdEIO       = 5
	nbdEINVAL    = 22
	nbdENOSPC    = 28
	nbdEOVERFLOW = 75
	nbdENOTSUP   = 95
	nbdESHUTDOWN = 108
)

// rawConn is an NBD connection that sends exactly what a test wants.
type rawConn struct {
	net.Conn
	t          testing.TB
	size       uint64
	flags      uint16
	structured bool
	cookie     uint64
	timeout    time.Duration
	// lost is called when the server has ended the connection, and ends the goroutine;
	// nil: that is not to be.
	lost func()
}

// dialNBD connects and reads the server's greeting.
func dialNBD(t testing.TB, network, address string) *rawConn {
	t.Helper()
	c, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	r := &rawConn{Conn: c, t: t, timeout: startTimeout}
	var b [18]byte
	r.read(b[:])
	if binary.BigEndian.Uint64(b[:]) != nbdMagic || binary.BigEndian.Uint64(b[8:]) != optionMagic {
		t.Fatalf("greeting % x", b)
	}
	if flags := binary.BigEndian.Uint16(b[16:]); flags != 3 {
		t.Fatalf("handshake flags %#x, want fixed newstyle and no zeroes only", flags)
	}
	return r
}

// dialRaw connects to an export on a Unix socket with structured replies and
// base:allocation.
func dialRaw(t testing.TB, socket, export string) *rawConn {
	t.Helper()
	r := dialNBD(t, "unix", socket)
	r.clientFlags(3)
	r.mustOption(optStructured, nil)
	r.structured = true
	r.mustOption(optSetMeta, metaQuery(export, "base:allocation"))
	r.goExport(export)
	return r
}

// dialSimple connects with simple replies.
func dialSimple(t testing.TB, socket, export string) *rawConn {
	t.Helper()
	r := dialNBD(t, "unix", socket)
	r.clientFlags(3)
	r.goExport(export)
	return r
}

func (r *rawConn) read(b []byte) {
	r.t.Helper()
	r.SetReadDeadline(time.Now().Add(r.timeout))
	if _, err := io.ReadFull(r, b); err != nil {
		if r.lost != nil && (err == io.EOF || err == io.ErrUnexpectedEOF || errors.Is(err, syscall.ECONNRESET)) {
			r.lost()
			runtime.Goexit()
		}
		r.t.Fatalf("NBD connection: %v", err)
	}
}

func (r *rawConn) write(b []byte) {
	r.t.Helper()
	r.SetWriteDeadline(time.Now().Add(r.timeout))
	if _, err := r.Write(b); err != nil {
		r.t.Fatalf("NBD connection: %v", err)
	}
}

// wantClosed requires that the server closes the connection, after no more
// than what is on its way.
func (r *rawConn) wantClosed(timeout time.Duration) {
	r.t.Helper()
	r.SetReadDeadline(time.Now().Add(timeout))
	if _, err := io.Copy(io.Discard, r.Conn); err != nil {
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			r.t.Errorf("the connection is still open after %v", timeout)
		}
	}
}

func (r *rawConn) clientFlags(flags uint32) {
	r.t.Helper()
	r.write(binary.BigEndian.AppendUint32(nil, flags))
}

type optionReply struct {
	kind uint32
	data []byte
}

// option sends an option and returns all its replies, the final one last.
func (r *rawConn) option(opt uint32, data []byte) []optionReply {
	r.t.Helper()
	b := binary.BigEndian.AppendUint64(nil, optionMagic)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	r.write(append(b, data...))
	var replies []optionReply
	for {
		var h [20]byte
		r.read(h[:])
		if m := binary.BigEndian.Uint64(h[:]); m != optionReplyMagic {
			r.t.Fatalf("option reply magic %#x", m)
		}
		if o := binary.BigEndian.Uint32(h[8:]); o != opt {
			r.t.Fatalf("reply to option %d, sent %d", o, opt)
		}
		n := binary.BigEndian.Uint32(h[16:])
		if n > 64*kib {
			r.t.Fatalf("option reply of %d bytes", n)
		}
		rep := optionReply{binary.BigEndian.Uint32(h[12:]), make([]byte, n)}
		r.read(rep.data)
		replies = append(replies, rep)
		if rep.kind == repAck || rep.kind&(1<<31) != 0 {
			return replies
		}
	}
}

func (r *rawConn) mustOption(opt uint32, data []byte) []optionReply {
	r.t.Helper()
	replies := r.option(opt, data)
	if last := replies[len(replies)-1]; last.kind != repAck {
		r.t.Fatalf("option %d: reply %#x %q", opt, last.kind, last.data)
	}
	return replies
}

// goQuery is the data of OPT_INFO and OPT_GO.
func goQuery(export string, infos ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	b = append(b, export...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

// metaQuery is the data of OPT_SET_META_CONTEXT and OPT_LIST_META_CONTEXT.
func metaQuery(export string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	b = append(b, export...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = binary.BigEndian.AppendUint32(b, uint32(len(q)))
		b = append(b, q...)
	}
	return b
}

func (r *rawConn) goExport(export string) {
	r.t.Helper()
	for _, rep := range r.mustOption(optGo, goQuery(export)) {
		if rep.kind == repInfo && len(rep.data) == 12 && binary.BigEndian.Uint16(rep.data) == 0 {
			r.size = binary.BigEndian.Uint64(rep.data[2:])
			r.flags = binary.BigEndian.Uint16(rep.data[10:])
			return
		}
	}
	r.t.Fatal("OPT_GO: no NBD_INFO_EXPORT")
}

// send sends a request header and whatever payload is given, and returns the
// cookie.
func (r *rawConn) send(cmd, flags uint16, off uint64, length uint32, payload []byte) uint64 {
	r.t.Helper()
	r.cookie++
	r.write(append(requestHeader(cmd, flags, r.cookie, off, length), payload...))
	return r.cookie
}

func requestHeader(cmd, flags uint16, cookie, off uint64, length uint32) []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 28+length), requestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, length)
}

// extent is one descriptor of a block status.
type extent struct{ length, flags uint32 }

// reply is everything that answered one request.
type reply struct {
	cookie  uint64
	errno   uint32
	text    string
	chunks  int // content chunks of a read
	holes   int // of these, holes
	data    []byte
	extents []extent
}

// receive reads one whole reply; off and length are of the READ it belongs to,
// 0 for others. Replies must not be interleaved: one request at a time.
func (r *rawConn) receive(off uint64, length uint32) reply {
	r.t.Helper()
	var magic [4]byte
	r.read(magic[:])
	switch m := binary.BigEndian.Uint32(magic[:]); m {
	case simpleMagic:
		var h [12]byte
		r.read(h[:])
		rep := reply{errno: binary.BigEndian.Uint32(h[:]), cookie: binary.BigEndian.Uint64(h[4:])}
		if r.structured && length > 0 {
			r.t.Fatal("a READ was answered with a simple reply after structured replies were negotiated")
		}
		if rep.errno == 0 && length > 0 {
			rep.data = make([]byte, length)
			rep.chunks = 1
			r.read(rep.data)
		}
		return rep
	case structuredMagic:
		if !r.structured {
			r.t.Fatal("structured reply, not negotiated")
		}
		return r.receiveStructured(off, length)
	default:
		r.t.Fatalf("reply magic %#x", m)
		return reply{}
	}
}

func (r *rawConn) receiveStructured(off uint64, length uint32) reply {
	r.t.Helper()
	rep := reply{data: make([]byte, length)}
	seen := make([]bool, length)
	for first := true; ; first = false {
		if !first {
			var magic [4]byte
			r.read(magic[:])
			if m := binary.BigEndian.Uint32(magic[:]); m != structuredMagic {
				r.t.Fatalf("chunk magic %#x", m)
			}
		}
		var h [16]byte
		r.read(h[:])
		flags, kind := binary.BigEndian.Uint16(h[:]), binary.BigEndian.Uint16(h[2:])
		cookie, n := binary.BigEndian.Uint64(h[4:]), binary.BigEndian.Uint32(h[12:])
		if !first && cookie != rep.cookie {
			r.t.Fatalf("chunk of request %d within request %d", cookie, rep.cookie)
		}
		rep.cookie = cookie
		if flags&^1 != 0 {
			r.t.Fatalf("chunk flags %#x", flags)
		}
		if n > 33*mib {
			r.t.Fatalf("chunk of %d bytes", n)
		}
		body := make([]byte, n)
		r.read(body)
		cover := func(at uint64, n uint32) []byte {
			if n == 0 || at < off || at-off > uint64(length) || uint64(n) > uint64(length)-(at-off) {
				r.t.Fatalf("chunk %d+%d outside the request %d+%d", at, n, off, length)
			}
			for i := at - off; i < at-off+uint64(n); i++ {
				if seen[i] {
					r.t.Fatalf("chunk %d+%d overlaps another", at, n)
				}
				seen[i] = true
			}
			rep.chunks++
			return rep.data[at-off : at-off+uint64(n)]
		}
		switch kind {
		case 0: // NONE
			if n != 0 || flags&1 == 0 {
				r.t.Fatalf("NBD_REPLY_TYPE_NONE: %d bytes, flags %#x", n, flags)
			}
		case 1: // OFFSET_DATA
			copy(cover(binary.BigEndian.Uint64(body), n-8), body[8:])
		case 2: // OFFSET_HOLE
			if n != 12 {
				r.t.Fatalf("hole chunk of %d bytes", n)
			}
			cover(binary.BigEndian.Uint64(body), binary.BigEndian.Uint32(body[8:]))
			rep.holes++
		case 5: // BLOCK_STATUS
			for b := body[4:]; len(b) >= 8; b = b[8:] {
				rep.extents = append(rep.extents, extent{binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])})
			}
		case 1<<15 | 1, 1<<15 | 2: // ERROR, ERROR_OFFSET
			rep.errno = binary.BigEndian.Uint32(body)
			rep.text = string(body[6 : 6+binary.BigEndian.Uint16(body[4:])])
			if rep.errno == 0 {
				r.t.Fatal("error chunk without an error")
			}
		default:
			r.t.Fatalf("chunk type %#x", kind)
		}
		if flags&1 != 0 {
			break
		}
	}
	if rep.errno == 0 {
		for i, ok := range seen {
			if !ok {
				r.t.Fatalf("byte %d of a successful read is missing", off+uint64(i))
			}
		}
	}
	return rep
}

// do sends a request and waits for its reply.
func (r *rawConn) do(cmd, flags uint16, off uint64, length uint32, payload []byte) reply {
	r.t.Helper()
	cookie := r.send(cmd, flags, off, length, payload)
	var want uint32
	if cmd == cmdRead {
		want = length
	}
	rep := r.receive(off, want)
	if rep.cookie != cookie {
		r.t.Fatalf("reply to request %d, sent %d", rep.cookie, cookie)
	}
	return rep
}

// want is do, and the reply must carry this error.
func (r *rawConn) want(errno uint32, cmd, flags uint16, off uint64, length uint32, payload []byte) reply {
	r.t.Helper()
	rep := r.do(cmd, flags, off, length, payload)
	if rep.errno != errno {
		r.t.Errorf("command %d, flags %#x, %d+%d: error %s %q, want %s",
			cmd, flags, off, length, errName(rep.errno), rep.text, errName(errno))
	}
	return rep
}

func errName(errno uint32) string {
	names := map[uint32]string{0: "0", nbdEPERM: "EPERM", nbdEIO: "EIO", nbdEINVAL: "EINVAL", nbdENOSPC: "ENOSPC",
		nbdEOVERFLOW: "EOVERFLOW", nbdENOTSUP: "ENOTSUP", nbdESHUTDOWN: "ESHUTDOWN"}
	if n, ok := names[errno]; ok {
		return n
	}
	return fmt.Sprint(errno)
}
