package export

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"github.com/nbd-export/nbd-export/export/wire"
)

const (
	// maxOptionData is the longest option data that is looked at, in bytes.
	maxOptionData = 64 << 10
	// maxOptionDiscard is the longest option data that is read at all.
	maxOptionDiscard = 32 << 20
	// maxOptions a client may send. A client that asks for details of each of
	// a thousand exports needs a few thousand.
	maxOptions = 10000
	// flushAt is when a long reply is sent in parts, in bytes.
	flushAt = 64 << 10
)

// errAbort is a handshake that the client ended with ABORT.
var errAbort = errors.New("client aborted the handshake")

// handshake is one connection's negotiation, from the greeting to the
// transmission phase. It runs on one goroutine.
//
// It reads from conn exactly what it consumes: what the client sends after
// its last option belongs to whoever gets the connection next (the loop, or
// a TLS handshake).
type handshake struct {
	conn    net.Conn
	exports *Exports
	// stopping reports whether the server is shutting down.
	stopping func() bool
	// enter is asked before a client is told that transmission starts. An
	// error is errStopping or errGone.
	enter func(*Export) error
	// alone: a second connection of the client would be refused.
	alone bool
	tls   *tls.Config // nil for none; otherwise nothing is told without it

	noZeroes bool
	secure   *tls.Conn // conn, once STARTTLS has made it one

	// What options have agreed on so far. STARTTLS clears it.
	structured bool
	meta       selection
	last       frozen

	in, out []byte // buffers, reused from option to option
}

// agreement is what a handshake that succeeded came to.
type agreement struct {
	export *Export
	terms  terms
	secure *tls.Conn // nil without TLS
}

// selection is what the last SET_META_CONTEXT selected.
type selection struct {
	export   *Export
	contexts []metaContext
}

// frozen is a successful INFO: a GO that follows with the same parameters
// must get the same answer (specification, NBD_OPT_INFO).
type frozen struct {
	valid bool
	data  []byte
	facts facts
}

var (
	errStopping = errors.New("server is shutting down")
	errGone     = errors.New("export was removed")
)

// run negotiates. The caller has set the deadline, and closes the connection
// if there is an error: errAbort, io.EOF (the client left between options),
// another I/O error, or what the client did wrong.
func (h *handshake) run() (agreement, error) {
	if err := h.greet(); err != nil {
		return agreement{}, err
	}
	for range maxOptions {
		opt, length, err := h.readOption()
		if err != nil {
			return agreement{}, err
		}
		data, err := h.readData(opt, length)
		if err != nil {
			return agreement{}, err
		}
		a, err := h.option(opt, length, data)
		if err == nil {
			err = h.flush()
		}
		if err != nil || a.export != nil {
			return a, err
		}
	}
	return agreement{}, fmt.Errorf("more than %d options", maxOptions)
}

// greet exchanges magics and flags.
func (h *handshake) greet() error {
	h.out = binary.BigEndian.AppendUint64(h.out, wire.MagicInit)
	h.out = binary.BigEndian.AppendUint64(h.out, wire.MagicOption)
	h.out = binary.BigEndian.AppendUint16(h.out, wire.FlagFixedNewstyle|wire.FlagNoZeroes)
	if err := h.flush(); err != nil {
		return err
	}
	b, err := h.read(4)
	if err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(b)
	if flags&^(wire.FlagClientFixedNewstyle|wire.FlagClientNoZeroes) != 0 {
		return fmt.Errorf("unknown client flags %#08x (%q): not an NBD client?", flags, b)
	}
	h.noZeroes = flags&wire.FlagClientNoZeroes != 0
	return nil
}

// readOption reads the header of an option.
func (h *handshake) readOption() (opt, length uint32, err error) {
	b, err := h.read(wire.OptionSize)
	if err != nil {
		return 0, 0, err
	}
	if magic := binary.BigEndian.Uint64(b); magic != wire.MagicOption {
		return 0, 0, fmt.Errorf("bad option magic %#016x", magic)
	}
	return binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:]), nil
}

// readData reads an option's data, always exactly length bytes, so that
// nothing a client puts there can desynchronise the stream. Data longer than
// maxOptionData is thrown away and nil returned. Memory grows with what has
// arrived, not with what was announced.
func (h *handshake) readData(opt, length uint32) ([]byte, error) {
	switch {
	case opt == wire.OptExportName && length > wire.MaxString:
		return nil, fmt.Errorf("EXPORT_NAME of %d bytes: %w", length, errTooLong)
	case length > maxOptionDiscard:
		return nil, fmt.Errorf("%s with %d bytes of data", optionName(opt), length)
	case length > maxOptionData:
		if _, err := io.CopyN(io.Discard, h.conn, int64(length)); err != nil {
			return nil, noEOF(err)
		}
		return nil, nil
	}
	b, err := h.read(int(length))
	return b, noEOF(err)
}

// read reads n bytes into the buffer, whose content is gone at the next read.
func (h *handshake) read(n int) ([]byte, error) {
	const step = 4096
	b := h.in[:0]
	for len(b) < n {
		k := min(n-len(b), step)
		b = slices.Grow(b, k)
		part := b[len(b) : len(b)+k]
		if _, err := io.ReadFull(h.conn, part); err != nil {
			if len(b) > 0 {
				err = noEOF(err)
			}
			return nil, err
		}
		b = b[:len(b)+k]
	}
	h.in = b
	return b, nil
}

// noEOF says that the client left where it should not have.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// flush sends what has been added to out.
func (h *handshake) flush() error {
	if len(h.out) == 0 {
		return nil
	}
	_, err := h.conn.Write(h.out)
	h.out = h.out[:0]
	return err
}

// reply adds one option reply; fill, if not nil, appends its data. A reply
// that makes out long is sent at once.
func (h *handshake) reply(opt, typ uint32, fill func([]byte) []byte) error {
	h.out = binary.BigEndian.AppendUint64(h.out, wire.MagicOptionReply)
	h.out = binary.BigEndian.AppendUint32(h.out, opt)
	h.out = binary.BigEndian.AppendUint32(h.out, typ)
	h.out = binary.BigEndian.AppendUint32(h.out, 0)
	start := len(h.out)
	if fill != nil {
		h.out = fill(h.out)
		binary.BigEndian.PutUint32(h.out[start-4:], uint32(len(h.out)-start))
	}
	if len(h.out) < flushAt {
		return nil
	}
	return h.flush()
}

// fail answers an option with an error and a text for people.
func (h *handshake) fail(opt, typ uint32, format string, args ...any) error {
	text := clean(fmt.Sprintf(format, args...), wire.MaxString)
	return h.reply(opt, typ, func(b []byte) []byte { return append(b, text...) })
}
