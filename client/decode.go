package client

import (
	"encoding/binary"

	"github.com/nbd-export/nbd-export/export/wire"
)

const (
	dataHead    = wire.StructuredReplySize + 8  // header and offset of a data chunk
	holeSize    = wire.StructuredReplySize + 12 // a whole hole chunk
	maxErrChunk = 4 + 2 + wire.MaxString + 8
	// maxStatusChunk bounds a block status chunk: the protocol's advice is at most
	// 2^20 descriptors.
	maxStatusChunk = 4 + 8<<20
	// longestHead is the most bytes that may stay unparsed for want of more.
	longestHead = holeSize
)

// requests is where a decoder finds what a reply answers. Both methods are
// called on the goroutine that feeds it.
type requests interface {
	lookup(cookie uint64) *Op // nil: no such request in flight
	done(op *Op)              // op is answered; the cookie is free again
}

// decoder turns the byte stream of one connection into answered requests. It
// accepts any split of the stream, simple and structured replies in any order,
// and trusts nothing. It does not allocate, errors and block status aside.
type decoder struct {
	reqs       requests
	structured bool   // negotiated
	context    uint32 // id of base:allocation
	hasContext bool

	// discardFrom is the least length of reads whose payloads may be passed over
	// unseen if they have no place to go to; 0: all are fed.
	discardFrom uint32

	op   *Op    // whose chunk is being received; nil between chunks
	left uint32 // payload bytes still to come
	pos  uint32 // where in op.Data the next of them goes
	last bool   // the chunk ends the reply

	control     []byte // an error or status chunk being collected
	controlWant int    // its length; 0: none
	controlType uint16
}

// direct is where the next bytes of the stream may be received instead of into
// a buffer that is fed; nil if they must be fed. The caller then calls wrote.
func (d *decoder) direct() []byte {
	if d.left == 0 || d.op.Data == nil {
		return nil
	}
	return d.op.Data[d.pos : d.pos+d.left]
}

// unwanted reports whether op is a read whose payload may be passed over.
func (d *decoder) unwanted(op *Op) bool {
	return d.discardFrom > 0 && op.Cmd == wire.CmdRead && op.Length >= d.discardFrom && op.Data == nil
}

// discards is how many of the next bytes of the stream may be passed over instead
// of being fed; 0 if they must be fed. The caller then calls wrote.
func (d *decoder) discards() int {
	if d.left == 0 || !d.unwanted(d.op) {
		return 0
	}
	return int(d.left)
}

// wrote says that the first n bytes of direct() have been received, or that as many
// of discards() have been passed over.
func (d *decoder) wrote(n int) error {
	d.pos += uint32(n)
	d.left -= uint32(n)
	if d.left == 0 {
		return d.endChunk()
	}
	return nil
}

// feed consumes b as far as it goes and says how much that is. The rest, fewer
// than longestHead bytes, is to be offered again with more behind it.
func (d *decoder) feed(b []byte) (used int, err error) {
	for {
		rest := b[used:]
		var n int
		switch {
		case d.left > 0:
			if n, err = d.payload(rest); err != nil {
				return used, err
			}
			if d.left > 0 {
				return used + n, nil
			}
		case d.controlWant > 0:
			n = min(d.controlWant-len(d.control), len(rest))
			d.control = append(d.control, rest[:n]...)
			if len(d.control) < d.controlWant {
				return used + n, nil
			}
			if err := d.endControl(); err != nil {
				return used, err
			}
		default:
			if n, err = d.header(rest); n == 0 || err != nil {
				return used, err
			}
		}
		used += n
	}
}

// payload takes what b has of the data of a read.
func (d *decoder) payload(b []byte) (n int, err error) {
	n = len(b)
	if uint64(n) > uint64(d.left) {
		n = int(d.left)
	}
	if d.op.Data != nil {
		copy(d.op.Data[d.pos:], b[:n])
	}
	return n, d.wrote(n)
}

// header parses one reply header. n is 0 if b holds too little.
func (d *decoder) header(b []byte) (n int, err error) {
	if len(b) < 4 {
		return 0, nil
	}
	magic := binary.BigEndian.Uint32(b)
	switch {
	case magic == wire.MagicSimpleReply:
		if len(b) < wire.SimpleReplySize {
			return 0, nil
		}
		return wire.SimpleReplySize, d.simple(binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint64(b[8:]))
	case magic == wire.MagicStructuredReply && d.structured:
		if len(b) < wire.StructuredReplySize {
			return 0, nil
		}
		return d.chunk(b)
	case magic == wire.MagicStructuredReply:
		return 0, violation("structured reply without having negotiated it")
	}
	return 0, violation("reply with magic %#08x", magic)
}

func (d *decoder) simple(code uint32, cookie uint64) error {
	op := d.reqs.lookup(cookie)
	if op == nil {
		return violation("reply to unknown request %#x", cookie)
	}
	if op.cover.bytes() != 0 || op.status || op.Errno != 0 {
		return violation("simple reply amid a structured one")
	}
	if code != 0 {
		op.fail(code, "")
		return d.finish(op)
	}
	if op.Cmd == wire.CmdRead {
		if d.structured {
			return violation("simple reply to a read where structured ones are negotiated")
		}
		op.cover.head = op.Length
		return d.data(op, 0, op.Length, true)
	}
	return d.finish(op)
}

// chunk parses the header of a structured reply chunk.
func (d *decoder) chunk(b []byte) (n int, err error) {
	flags := binary.BigEndian.Uint16(b[4:])
	typ := binary.BigEndian.Uint16(b[6:])
	cookie := binary.BigEndian.Uint64(b[8:])
	length := binary.BigEndian.Uint32(b[16:])
	if flags&^wire.ReplyFlagDone != 0 {
		return 0, violation("reply chunk with unknown flags %#x", flags)
	}
	last := flags&wire.ReplyFlagDone != 0
	op := d.reqs.lookup(cookie)
	if op == nil {
		return 0, violation("reply chunk for unknown request %#x", cookie)
	}
	switch {
	case typ == wire.ReplyNone:
		if length != 0 || !last {
			return 0, violation("empty reply chunk of %d bytes with flags %#x", length, flags)
		}
		return wire.StructuredReplySize, d.finish(op)

	case typ == wire.ReplyOffsetData:
		if length < 9 {
			return 0, violation("data chunk of %d bytes", length)
		}
		if len(b) < dataHead {
			return 0, nil
		}
		lo, err := op.place(binary.BigEndian.Uint64(b[20:]), length-8)
		if err != nil {
			return 0, err
		}
		return dataHead, d.data(op, lo, length-8, last)

	case typ == wire.ReplyOffsetHole:
		if length != 12 {
			return 0, violation("hole chunk of %d bytes", length)
		}
		if len(b) < holeSize {
			return 0, nil
		}
		size := binary.BigEndian.Uint32(b[28:])
		lo, err := op.place(binary.BigEndian.Uint64(b[20:]), size)
		if err != nil {
			return 0, err
		}
		if op.Data != nil {
			clear(op.Data[lo : lo+size])
		}
		if last {
			return holeSize, d.finish(op)
		}
		return holeSize, nil

	case typ == wire.ReplyBlockStatus:
		if op.Cmd != wire.CmdBlockStatus || length < 12 || (length-4)%8 != 0 || length > maxStatusChunk {
			return 0, violation("block status chunk of %d bytes in answer to a %v", length, Cmd(op.Cmd))
		}

	case typ&wire.ReplyErrorBit != 0:
		if length < 6 || length > maxErrChunk {
			return 0, violation("error chunk of %d bytes", length)
		}

	default:
		return 0, violation("reply chunk of unknown type %d", typ)
	}
	d.op, d.last = op, last
	d.control, d.controlWant, d.controlType = d.control[:0], int(length), typ
	return wire.StructuredReplySize, nil
}

// place checks where a chunk of n bytes at offset off lies within the read, and
// says how far from its beginning.
func (op *Op) place(off uint64, n uint32) (lo uint32, err error) {
	if op.Cmd != wire.CmdRead {
		return 0, violation("data in answer to a %v", Cmd(op.Cmd))
	}
	rel := off - op.Offset
	if n == 0 || off < op.Offset || rel > uint64(op.Length) || uint64(n) > uint64(op.Length)-rel {
		return 0, violation("%d bytes at %d in answer to a read of %d bytes at %d", n, off, op.Length, op.Offset)
	}
	if !op.cover.add(uint32(rel), n) {
		return 0, violation("%d bytes at %d sent twice", n, off)
	}
	return uint32(rel), nil
}

// data begins the payload of a read.
func (d *decoder) data(op *Op, lo, n uint32, last bool) error {
	d.op, d.pos, d.left, d.last = op, lo, n, last
	if n == 0 {
		return d.endChunk()
	}
	return nil
}

func (d *decoder) endChunk() error {
	op := d.op
	d.op = nil
	if d.last {
		return d.finish(op)
	}
	return nil
}

// endControl acts on a collected error or block status chunk.
func (d *decoder) endControl() error {
	op, c := d.op, d.control
	d.controlWant = 0
	if d.controlType == wire.ReplyBlockStatus {
		if !d.hasContext || binary.BigEndian.Uint32(c) != d.context {
			return violation("block status of unknown context %d", binary.BigEndian.Uint32(c))
		}
		if op.status {
			return violation("block status sent twice")
		}
		op.status = true
		for c = c[4:]; len(c) > 0; c = c[8:] {
			e := Extent{Length: binary.BigEndian.Uint32(c), Flags: binary.BigEndian.Uint32(c[4:])}
			if e.Length == 0 {
				return violation("block status with an empty extent")
			}
			op.Extents = append(op.Extents, e)
		}
		return d.endChunk()
	}
	code, n := binary.BigEndian.Uint32(c), int(binary.BigEndian.Uint16(c[4:]))
	if code == 0 || n > len(c)-6 || n > wire.MaxString {
		return violation("malformed error chunk: error %d, %d bytes of text in %d", code, n, len(c)-6)
	}
	op.fail(code, string(c[6:6+n]))
	return d.endChunk()
}

func (d *decoder) finish(op *Op) error {
	if err := op.complete(); err != nil {
		return err
	}
	d.reqs.done(op)
	return nil
}
