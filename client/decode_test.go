package client

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/nbd-export/nbd-export/export/wire"
)

// book is the requests a decoder under test may find.
type book struct {
	ops  map[uint64]*Op
	over []*Op // answered, in order
}

func (b *book) lookup(cookie uint64) *Op { return b.ops[cookie] }

func (b *book) done(op *Op) {
	delete(b.ops, op.cookie)
	b.over = append(b.over, op)
}

// newBook has in flight: read 1 of 16 bytes at 1000, read 2 of 32 bytes at 2000
// that throws its bytes away, write 3, block status 4, flush 5, read 6 of nothing.
func newBook() *book {
	b := &book{ops: map[uint64]*Op{}}
	for _, op := range []*Op{
		{cookie: 1, Cmd: wire.CmdRead, Offset: 1000, Length: 16, Data: bytes.Repeat([]byte{0xee}, 16)},
		{cookie: 2, Cmd: wire.CmdRead, Offset: 2000, Length: 32},
		{cookie: 3, Cmd: wire.CmdWrite, Offset: 3000, Length: 8, Data: make([]byte, 8)},
		{cookie: 4, Cmd: wire.CmdBlockStatus, Offset: 0, Length: 1 << 20},
		{cookie: 5, Cmd: wire.CmdFlush},
		{cookie: 6, Cmd: wire.CmdRead, Offset: 6000},
	} {
		b.ops[op.cookie] = op
	}
	return b
}

func (b *book) decoder(structured bool) *decoder {
	return &decoder{reqs: b, structured: structured, context: fakeContext, hasContext: true, discardFrom: 32}
}

// feedSplit feeds stream in pieces of n bytes; direct also takes payloads by
// direct, passes over those that may be, and says wrote.
func feedSplit(d *decoder, stream []byte, n int, direct bool) error {
	var buf []byte
	for len(stream) > 0 {
		k := min(n, len(stream))
		if dst := d.direct(); direct && dst != nil && len(buf) == 0 {
			k = copy(dst, stream[:k])
			stream = stream[k:]
			if err := d.wrote(k); err != nil {
				return err
			}
			continue
		}
		if over := d.discards(); direct && over > 0 && len(buf) == 0 {
			k = min(over, k)
			stream = stream[k:]
			if err := d.wrote(k); err != nil {
				return err
			}
			continue
		}
		buf = append(buf, stream[:k]...)
		stream = stream[k:]
		used, err := d.feed(buf)
		if err != nil {
			return err
		}
		buf = buf[used:]
		if len(buf) >= longestHead {
			return errors.New("decoder left a whole header unparsed")
		}
	}
	return nil
}

func simple(cookie uint64, code uint32, data string) []byte {
	b := binary.BigEndian.AppendUint32(nil, wire.MagicSimpleReply)
	b = binary.BigEndian.AppendUint32(b, code)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return append(b, data...)
}

const sixteen = "0123456789abcdef"

func TestDecoder(t *testing.T) {
	const done, none = wire.ReplyFlagDone, wire.ReplyNone
	const data, hole, status = wire.ReplyOffsetData, wire.ReplyOffsetHole, wire.ReplyBlockStatus
	big := chunk(1, 0, data, uint64(1000), sixteen)
	for _, c := range []struct {
		name   string
		simple bool // structured replies are not negotiated
		stream []byte
		check  func(b *book) bool // of what came out
		broken string             // or part of the violation's text
	}{
		{name: "simple read", simple: true, stream: simple(1, 0, sixteen), check: func(b *book) bool {
			return string(b.over[0].Data) == sixteen
		}},
		{name: "simple reads, discarded and of nothing", simple: true, stream: slices.Concat(simple(2, 0, sixteen+sixteen), simple(6, 0, ""), simple(3, 0, "")), check: func(b *book) bool {
			return len(b.over) == 3 && b.over[0].cookie == 2
		}},
		{name: "simple error has no data", simple: true, stream: slices.Concat(simple(1, wire.EIO, ""), simple(3, 0, "")), check: func(b *book) bool {
			return len(b.over) == 2 && b.over[0].Errno == syscall.EIO && b.over[1].Errno == 0
		}},
		{name: "unknown error is EINVAL", stream: simple(3, 9999, ""), check: func(b *book) bool {
			return b.over[0].Errno == syscall.EINVAL
		}},
		{name: "one data chunk", stream: chunk(1, done, data, uint64(1000), sixteen), check: func(b *book) bool {
			return string(b.over[0].Data) == sixteen
		}},
		{name: "data, then an empty end", stream: slices.Concat(big, chunk(1, done, none)), check: func(b *book) bool {
			return string(b.over[0].Data) == sixteen
		}},
		{name: "hole", stream: chunk(1, done, hole, uint64(1000), uint32(16)), check: func(b *book) bool {
			return allZeroes(b.over[0].Data)
		}},
		{name: "chunks backwards, with a hole, amid another reply", stream: slices.Concat(
			chunk(1, 0, data, uint64(1012), "cdef"),
			chunk(2, 0, data, uint64(2000), sixteen),
			chunk(1, 0, hole, uint64(1004), uint32(8)),
			chunk(2, done, hole, uint64(2016), uint32(16)),
			chunk(1, done, data, uint64(1000), "0123"),
		), check: func(b *book) bool {
			return b.over[0].cookie == 2 && string(b.over[1].Data) == "0123\x00\x00\x00\x00\x00\x00\x00\x00cdef"
		}},
		{name: "error with text", stream: chunk(3, done, wire.ReplyError, wire.EPERM, uint16(18), "export is inactive"), check: func(b *book) bool {
			e := b.over[0].Err().(*Error)
			return e.Errno == syscall.EPERM && e.Text == "export is inactive" && errors.Is(e, syscall.EPERM) && e.Cmd == Cmd(wire.CmdWrite)
		}},
		{name: "error at an offset after half of the data, then the end", stream: slices.Concat(
			chunk(1, 0, data, uint64(1000), "01234567"),
			chunk(1, 0, wire.ReplyErrorOffset, wire.EIO, uint16(3), "bad", uint64(1008)),
			chunk(1, 0, wire.ReplyError, wire.ENOMEM, uint16(0)),
			chunk(1, done, none),
		), check: func(b *book) bool { return b.over[0].Errno == syscall.EIO && b.over[0].Text == "bad" }},
		{name: "error of unknown type", stream: chunk(1, done, wire.ReplyErrorBit|77, wire.ENOSPC, uint16(1), "x", "and more"), check: func(b *book) bool {
			return b.over[0].Errno == syscall.ENOSPC && b.over[0].Text == "x"
		}},
		{name: "block status", stream: chunk(4, done, status, fakeContext, uint32(4096), uint32(0), uint32(8192), uint32(3)), check: func(b *book) bool {
			return slices.Equal(b.over[0].Extents, []Extent{{4096, 0}, {8192, 3}})
		}},
		{name: "simple flush among structured", stream: simple(5, 0, ""), check: func(b *book) bool { return len(b.over) == 1 }},
		{name: "simple error of a read among structured", stream: simple(1, wire.EINVAL, ""), check: func(b *book) bool { return b.over[0].Errno == syscall.EINVAL }},

		{name: "garbage", stream: []byte("HTTP/1.1 400 Bad Request"), broken: "magic 0x48545450"},
		{name: "unknown cookie", stream: simple(99, 0, ""), broken: "unknown request 0x63"},
		{name: "unknown cookie of a chunk", stream: chunk(99, done, none), broken: "unknown request 0x63"},
		{name: "answered twice", stream: slices.Concat(simple(3, 0, ""), simple(3, 0, "")), broken: "unknown request 0x3"},
		{name: "structured without negotiation", simple: true, stream: big, broken: "without having negotiated"},
		{name: "simple read in structured", stream: simple(1, 0, sixteen), broken: "simple reply to a read"},
		{name: "simple amid chunks", stream: slices.Concat(chunk(1, 0, data, uint64(1000), "0123"), simple(1, wire.EIO, "")), broken: "amid a structured"},
		{name: "unknown flags", stream: chunk(1, 4, none), broken: "unknown flags"},
		{name: "unknown type", stream: chunk(1, done, uint16(99)), broken: "unknown type 99"},
		{name: "empty chunk that is not the end", stream: chunk(1, 0, none), broken: "empty reply chunk"},
		{name: "empty chunk with content", stream: chunk(1, done, none, "x"), broken: "empty reply chunk"},
		{name: "data chunk of nothing", stream: chunk(1, 0, data, uint64(1000)), broken: "data chunk of 8 bytes"},
		{name: "hole of nothing", stream: chunk(1, 0, hole, uint64(1000), uint32(0)), broken: "0 bytes at 1000"},
		{name: "hole of wrong length", stream: chunk(1, 0, hole, uint64(1000)), broken: "hole chunk of 8"},
		{name: "data before the range", stream: chunk(1, 0, data, uint64(999), "0"), broken: "at 999"},
		{name: "data past the range", stream: chunk(1, 0, data, uint64(1008), sixteen), broken: "16 bytes at 1008"},
		{name: "data far away", stream: chunk(1, 0, data, uint64(1<<63), sixteen), broken: "at 9223372036854775808"},
		{name: "data twice", stream: slices.Concat(chunk(1, 0, data, uint64(1004), "4567"), chunk(1, 0, data, uint64(1000), "012345")), broken: "sent twice"},
		{name: "hole over data", stream: slices.Concat(big, chunk(1, 0, hole, uint64(1000), uint32(16))), broken: "sent twice"},
		{name: "gap", stream: slices.Concat(chunk(1, 0, data, uint64(1000), "0123"), chunk(1, done, data, uint64(1008), "89abcdef")), broken: "answered with 12"},
		{name: "end without data", stream: chunk(1, done, none), broken: "answered with 0"},
		{name: "data for a write", stream: chunk(3, done, data, uint64(3000), "01234567"), broken: "in answer to a write"},
		{name: "status for a read", stream: chunk(1, done, status, fakeContext, uint32(1), uint32(1)), broken: "in answer to a read"},
		{name: "status of another context", stream: chunk(4, done, status, uint32(8), uint32(1), uint32(1)), broken: "unknown context 8"},
		{name: "status of odd length", stream: chunk(4, done, status, fakeContext, uint32(1), uint32(1), "x"), broken: "status chunk of 13"},
		{name: "empty extent", stream: chunk(4, done, status, fakeContext, uint32(0), uint32(1)), broken: "empty extent"},
		{name: "status twice", stream: slices.Concat(chunk(4, 0, status, fakeContext, uint32(1), uint32(1)), chunk(4, 0, status, fakeContext, uint32(1), uint32(1))), broken: "sent twice"},
		{name: "end without status", stream: chunk(4, done, none), broken: "without any"},
		{name: "error 0", stream: chunk(1, done, wire.ReplyError, uint32(0), uint16(0)), broken: "malformed error"},
		{name: "error text past its chunk", stream: chunk(1, done, wire.ReplyError, wire.EIO, uint16(5), "abc"), broken: "malformed error"},
		{name: "error chunk too short", stream: chunk(1, done, wire.ReplyError, wire.EIO), broken: "error chunk of 4"},
		{name: "error chunk too long", stream: chunk(1, done, wire.ReplyError, wire.EIO, uint16(0), make([]byte, 8192)), broken: "error chunk of 8198"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, n := range []int{1, 3, 7, 31, 1 << 20} {
				for _, direct := range []bool{false, true} {
					b := newBook()
					err := feedSplit(b.decoder(!c.simple), c.stream, n, direct)
					if c.broken == "" {
						if err != nil || !c.check(b) {
							t.Fatalf("pieces of %d, direct %v: error %v, %d answered", n, direct, err, len(b.over))
						}
					} else if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), c.broken) {
						t.Fatalf("pieces of %d, direct %v: error %v, want %q", n, direct, err, c.broken)
					}
				}
			}
		})
	}
}

func allZeroes(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }

func TestCoverage(t *testing.T) {
	var c coverage
	for i := uint32(1); i < 64; i += 2 { // every other byte, so that nothing joins
		if !c.add(i, 1) {
			t.Fatal(i)
		}
	}
	if c.add(5, 1) || c.add(4, 2) || c.add(0, 64) {
		t.Fatal("overlap not found")
	}
	for i := uint32(62); i > 0; i -= 2 {
		if !c.add(i, 1) {
			t.Fatal(i)
		}
	}
	if c.full(64) || c.bytes() != 63 {
		t.Fatal(c.bytes())
	}
	if !c.add(0, 1) || !c.full(64) || len(c.rest) != 0 {
		t.Fatal(c)
	}
	c.reset()
	for i := range uint32(maxSpans) {
		if !c.add(2*i+1, 1) {
			t.Fatal(i)
		}
	}
	if c.add(1<<20, 1) {
		t.Fatal("endless scatter accepted")
	}
}

// FuzzReply feeds any stream in any pieces: it must not panic, and how the stream
// is cut must not matter.
func FuzzReply(f *testing.F) {
	for _, s := range [][]byte{
		simple(1, 0, sixteen),
		slices.Concat(simple(3, wire.EPERM, ""), simple(2, 0, sixteen+sixteen)),
		chunk(1, 1, wire.ReplyOffsetData, uint64(1000), sixteen),
		slices.Concat(chunk(1, 0, wire.ReplyOffsetData, uint64(1008), "89abcdef"), chunk(1, 1, wire.ReplyOffsetHole, uint64(1000), uint32(8))),
		chunk(3, 1, wire.ReplyError, wire.EPERM, uint16(18), "export is inactive"),
		chunk(4, 1, wire.ReplyBlockStatus, fakeContext, uint32(4096), uint32(0)),
		chunk(1, 0, wire.ReplyErrorOffset, wire.EIO, uint16(3), "bad", uint64(1008)),
	} {
		f.Add(s, uint8(5), true)
		f.Add(s, uint8(1), false)
	}
	f.Fuzz(func(t *testing.T, stream []byte, piece uint8, structured bool) {
		whole, cut := newBook(), newBook()
		err1 := feedSplit(whole.decoder(structured), stream, max(len(stream), 1), false)
		err2 := feedSplit(cut.decoder(structured), stream, int(piece)%40+1, true)
		if (err1 == nil) != (err2 == nil) || len(whole.over) != len(cut.over) {
			t.Fatalf("whole: %v, %d answered; cut: %v, %d answered", err1, len(whole.over), err2, len(cut.over))
		}
		if err1 != nil && !errors.Is(err1, ErrProtocol) {
			t.Fatal(err1)
		}
		for i, a := range whole.over {
			b := cut.over[i]
			if a.cookie != b.cookie || a.Errno != b.Errno || a.Text != b.Text || !bytes.Equal(a.Data, b.Data) || !slices.Equal(a.Extents, b.Extents) {
				t.Fatalf("reply %d differs: %+v, %+v", i, a, b)
			}
			if a.Cmd == wire.CmdRead && a.Errno == 0 && !a.cover.full(a.Length) {
				t.Fatalf("read %d succeeded with %d of %d bytes", a.cookie, a.cover.bytes(), a.Length)
			}
		}
	})
}
