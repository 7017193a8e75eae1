package export

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
)

// maxStatus is the largest number of descriptors in the replies to one
// BLOCK_STATUS: 64 KiB on the wire. The specification asks for at most 2^20; a
// client continues where a short reply ends.
const maxStatus = 1 << 13

// codec is the transmission phase of one connection; it implements
// ioloop.Codec for the 28-byte request header with simple or structured
// replies. All fields but discard are fixed when it is made.
//
// Request.Tag[0] is the cookie, Tag[1] the command (bits 0-15) and its flags
// (bits 16-31) as they came.
type codec struct {
	size       int64 // bytes; the connection's, for its whole life
	structured bool
	contexts   []metaContext
	maps       []string // of the contexts, for the loop
	rules      [numRules]rule

	// discard is why the rest of the stream is not understood any more, with
	// the connection still to be ended in order. Only Decode uses it, and
	// ended, which is called after the loop.
	discard error
}

var _ ioloop.Codec = (*codec)(nil)

// terms is what the handshake agreed on.
type terms struct {
	size       int64  // bytes
	trans      uint16 // transmission flags
	structured bool
	contexts   []metaContext // selected, in the order of replies
	// writeThrough: everything is written as with FUA.
	writeThrough bool
}

func newCodec(t terms) *codec {
	c := &codec{
		size:       t.size,
		structured: t.structured,
		contexts:   t.contexts,
		rules:      rules(t.trans, len(t.contexts) > 0 && t.structured),
	}
	for _, m := range t.contexts {
		c.maps = append(c.maps, m.bitmap)
	}
	if t.writeThrough {
		for i := range c.rules {
			c.rules[i].always = c.rules[i].honour & wire.CmdFlagFUA
		}
	}
	return c
}

// ended says why the client was sent away after a reply, if it was.
func (c *codec) ended() error { return c.discard }

// Decode implements ioloop.Codec. It fails only for a wrong magic, after
// which there is no way to find the next request. A header may be decoded
// again, for instance when the rest of its payload has come.
func (c *codec) Decode(b []byte, r *ioloop.Request) (int, error) {
	if c.discard != nil && len(b) > 0 {
		*r = ioloop.Request{Op: ioloop.OpDisconnect}
		return len(b), nil
	}
	if len(b) < wire.RequestSize {
		return 0, nil
	}
	b = b[:wire.RequestSize]
	if magic := binary.BigEndian.Uint32(b); magic != wire.MagicRequest {
		return 0, fmt.Errorf("bad request magic %#08x", magic)
	}
	flags := binary.BigEndian.Uint16(b[4:])
	cmd := binary.BigEndian.Uint16(b[6:])
	offset := binary.BigEndian.Uint64(b[16:])
	length := binary.BigEndian.Uint32(b[24:])
	r.Tag = [2]uint64{binary.BigEndian.Uint64(b[8:]), uint64(cmd) | uint64(flags)<<16}
	r.Payload = 0
	r.Err = nil
	if cmd == wire.CmdDisc {
		r.Op, r.Flags, r.Offset, r.Length = ioloop.OpDisconnect, 0, 0, 0
		return wire.RequestSize, nil
	}
	if cmd == wire.CmdWrite {
		r.Payload = int64(length)
	}
	if err := check(&c.rules, c.size, cmd, flags, offset, length); err != nil {
		c.reject(r, err)
		return wire.RequestSize, nil
	}
	rule := &c.rules[cmd]
	r.Op = rule.op
	r.Flags = flagTable[flags&rule.honour|rule.always]
	r.Offset = int64(offset)
	r.Length = int64(length)
	return wire.RequestSize, nil
}

// reject makes r a refused request. A payload that is too long even to be
// thrown away is not consumed: whatever follows the reply ends the
// connection.
func (c *codec) reject(r *ioloop.Request, err error) {
	r.Op, r.Flags, r.Offset, r.Length = ioloop.OpReject, 0, 0, 0
	r.Err = err
	if r.Payload > maxDiscard {
		c.discard = fmt.Errorf("WRITE of %d bytes: more than %d bytes are not discarded", r.Payload, maxDiscard)
		r.Payload = 0
	}
}

func requestOf(r *ioloop.Request) request {
	return request{cmd: uint16(r.Tag[1]), flags: uint16(r.Tag[1] >> 16), length: r.Length}
}

// Chunked implements ioloop.Codec.
func (c *codec) Chunked(r *ioloop.Request) bool {
	return c.structured && r.Flags&ioloop.OneChunk == 0
}

func appendSimple(dst []byte, r *ioloop.Request, errno uint32) []byte {
	dst = binary.BigEndian.AppendUint32(dst, wire.MagicSimpleReply)
	dst = binary.BigEndian.AppendUint32(dst, errno)
	return binary.BigEndian.AppendUint64(dst, r.Tag[0])
}

// appendChunk adds the header of a structured reply chunk of n payload bytes.
func appendChunk(dst []byte, r *ioloop.Request, typ uint16, n int64, last bool) []byte {
	var flags uint16
	if last {
		flags = wire.ReplyFlagDone
	}
	dst = binary.BigEndian.AppendUint32(dst, wire.MagicStructuredReply)
	dst = binary.BigEndian.AppendUint16(dst, flags)
	dst = binary.BigEndian.AppendUint16(dst, typ)
	dst = binary.BigEndian.AppendUint64(dst, r.Tag[0])
	return binary.BigEndian.AppendUint32(dst, uint32(n))
}

// AppendData implements ioloop.Codec. off and n are bytes, off counted from
// the start of the request; n > 0.
func (c *codec) AppendData(dst []byte, r *ioloop.Request, off, n int64, last bool) []byte {
	if !c.structured {
		return appendSimple(dst, r, 0)
	}
	dst = appendChunk(dst, r, wire.ReplyOffsetData, 8+n, last)
	return binary.BigEndian.AppendUint64(dst, uint64(r.Offset+off))
}

// AppendHole implements ioloop.Codec; only for a request that is Chunked. off
// and n are as for AppendData.
func (c *codec) AppendHole(dst []byte, r *ioloop.Request, off, n int64, last bool) []byte {
	dst = appendChunk(dst, r, wire.ReplyOffsetHole, 12, last)
	dst = binary.BigEndian.AppendUint64(dst, uint64(r.Offset+off))
	return binary.BigEndian.AppendUint32(dst, uint32(n))
}

// AppendDone implements ioloop.Codec.
func (c *codec) AppendDone(dst []byte, r *ioloop.Request) []byte {
	if !c.structured {
		return appendSimple(dst, r, 0)
	}
	return appendChunk(dst, r, wire.ReplyNone, 0, true)
}

// AppendError implements ioloop.Codec.
func (c *codec) AppendError(dst []byte, r *ioloop.Request, err error) []byte {
	errno := wireErrno(err, requestOf(r))
	if !c.structured {
		return appendSimple(dst, r, errno)
	}
	text := wireText(err)
	dst = appendChunk(dst, r, wire.ReplyError, 6+int64(len(text)), true)
	dst = binary.BigEndian.AppendUint32(dst, errno)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(text)))
	return append(dst, text...)
}

// maxDescriptor is the longest extent of one descriptor, in bytes: what fits
// its 32 bits and is a multiple of 512.
const maxDescriptor = math.MaxUint32 &^ 511

// AppendStatus implements ioloop.Codec. It keeps the specification's rules
// for descriptors whatever ext holds: at least one, none empty, only the last
// one passing the end of the request, and none passing the end of the export.
// An extent too long for a descriptor ends the list.
func (c *codec) AppendStatus(dst []byte, r *ioloop.Request, context int, ext []backend.Status, last bool) []byte {
	limit := c.size - r.Offset
	if r.Flags&ioloop.OneExtent != 0 {
		limit = r.Length
	}
	start := len(dst)
	dst = appendChunk(dst, r, wire.ReplyBlockStatus, 0, last)
	dst = binary.BigEndian.AppendUint32(dst, c.contexts[context].id)
	most := c.MaxStatus(r)
	var covered int64
	count := 0
	for i := range ext {
		if count == most || covered >= r.Length {
			break
		}
		n := min(ext[i].Length, limit-covered)
		if n <= 0 {
			continue
		}
		long := n > maxDescriptor
		n = min(n, maxDescriptor)
		dst = appendDescriptor(dst, n, ext[i].Flags)
		covered += n
		count++
		if long {
			break
		}
	}
	if count == 0 { // nothing is known: data, and dirty
		var flags backend.StatusFlags
		if c.contexts[context].bitmap != "" {
			flags = backend.StatusDirty
		}
		dst = appendDescriptor(dst, min(r.Length, maxDescriptor), flags)
		count = 1
	}
	binary.BigEndian.PutUint32(dst[start+16:], uint32(4+8*count))
	return dst
}

func appendDescriptor(dst []byte, n int64, flags backend.StatusFlags) []byte {
	var state uint32
	if flags&backend.StatusHole != 0 {
		state |= wire.StateHole
	}
	if flags&backend.StatusZero != 0 {
		state |= wire.StateZero
	}
	if flags&backend.StatusDirty != 0 {
		state |= wire.StateDirty
	}
	dst = binary.BigEndian.AppendUint32(dst, uint32(n))
	return binary.BigEndian.AppendUint32(dst, state)
}

// MaxStatus implements ioloop.Codec.
func (c *codec) MaxStatus(r *ioloop.Request) int {
	if r.Flags&ioloop.OneExtent != 0 {
		return 1
	}
	return max(1, maxStatus/len(c.contexts))
}

// Contexts implements ioloop.Codec.
func (c *codec) Contexts() []string { return c.maps }
