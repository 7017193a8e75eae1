package ioloop

import "github.com/nbd-export/nbd-export/backend"

// Op is what a request asks of the image.
type Op uint8

const (
	OpRead Op = iota
	OpWrite
	OpFlush
	OpDiscard
	OpZero
	OpCache
	OpStatus
	// OpReject is a request the codec refused: Request.Err says why. Its
	// payload, if any, is consumed and the connection goes on.
	OpReject
	// OpDisconnect ends the connection once what is under way is answered.
	OpDisconnect
)

// Flags of a request, independent of the protocol's bit values.
type Flags uint8

const (
	// FUA: the reply is sent only when the effect is durable.
	FUA Flags = 1 << iota
	// NoHole and FastZero refine OpZero; see backend.ZeroFlags.
	NoHole
	FastZero
	// OneChunk: an OpRead's data must travel in one piece (NBD's DF).
	OneChunk
	// OneExtent: OpStatus wants the first extent only (NBD's REQ_ONE).
	OneExtent
)

// Request is one decoded request. The codec fills it; the loop never looks
// at Tag.
type Request struct {
	Op     Op
	Flags  Flags
	Offset int64 // bytes; validated against the connection's size
	Length int64 // bytes of the image concerned; 0 is answered with success; see MaxPayload
	// Payload is the number of bytes that follow the header on the wire. It
	// equals Length for an OpWrite, and for an OpReject it is what has to be
	// consumed.
	Payload int64
	// Err is why an OpReject is refused.
	Err error
	// Tag belongs to the codec: the cookie and what else its replies need.
	Tag [2]uint64
}

// MaxPayload bounds the Length of an OpRead and of an OpWrite, in bytes: the loop
// has no larger buffers. What is larger the codec rejects.
const MaxPayload = 1 << maxClass

// MaxHeader bounds what one Append call of a Codec adds, in bytes, except
// AppendError (MaxHeader plus 4096 of text) and AppendStatus (MaxHeader plus
// 16 for each extent).
const MaxHeader = 64

// Codec is one connection's protocol, negotiated before the loop starts. It
// holds no sockets. Decode is called by one goroutine; the Append methods by
// several at once, so they only read the codec.
//
// A reply is either one AppendError, one AppendDone, one AppendStatus for each of
// Contexts in order, or for an OpRead a sequence of AppendData (each followed by
// exactly n payload bytes that the loop supplies) and AppendHole calls that cover
// the request in order; last marks the final one. An error in the middle of such a
// sequence ends the connection.
type Codec interface {
	// Decode takes one request header from the front of b. It returns the
	// bytes used, or 0 if b does not hold a whole header. An error means that
	// the stream cannot be followed any more: the connection is closed.
	Decode(b []byte, r *Request) (int, error)

	// Chunked reports whether the reply to this OpRead may be made of several
	// pieces and holes. If not, it is exactly one AppendData(0, Length, true).
	Chunked(r *Request) bool
	// AppendData is what precedes n bytes of an OpRead, off bytes into it.
	AppendData(dst []byte, r *Request, off, n int64, last bool) []byte
	// AppendHole says that n bytes are zeroes; only where Chunked says yes.
	AppendHole(dst []byte, r *Request, off, n int64, last bool) []byte

	// AppendDone is success without content.
	AppendDone(dst []byte, r *Request) []byte
	// AppendError maps err to what the protocol has for it. The text a user
	// can act on is err.Error() where the protocol carries one.
	AppendError(dst []byte, r *Request, err error) []byte
	// Contexts are the maps that an OpStatus asks for: "" is the allocation,
	// everything else a dirty bitmap of that name. There is at least one if
	// Decode lets an OpStatus pass.
	Contexts() []string
	// AppendStatus answers an OpStatus for number i of Contexts; last marks the
	// final one.
	AppendStatus(dst []byte, r *Request, i int, ext []backend.Status, last bool) []byte
	// MaxStatus is the largest number of extents AppendStatus should get.
	MaxStatus(r *Request) int
}
