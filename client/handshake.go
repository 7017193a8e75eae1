package client

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/nbd-export/nbd-export/export/wire"
)

const (
	maxName        = wire.MaxString
	maxOptionReply = 64 << 10 // longest option reply accepted, in bytes
	maxReplies     = 1 << 16  // most replies to one option
)

// Options say what to negotiate, and what to do with what comes.
type Options struct {
	SimpleReplies bool // do not ask for structured replies
	Allocation    bool // ask for base:allocation; implies structured replies

	// Discard has a Batch throw payloads away without copying them out of the
	// socket, where reads of 64 KiB or more have no Op.Data. Smaller reads that are
	// in flight at the same time are then received in small pieces.
	Discard bool
}

// Info is what the server said about an export.
type Info struct {
	Name        string // as asked for, or the canonical name the server gave
	Description string
	Size        uint64 // bytes
	Flags       uint16 // wire.TransReadOnly and its siblings

	// Block sizes in bytes; 0 if the server gave none.
	MinBlock, PreferredBlock, MaxBlock uint32

	Structured bool // structured replies were negotiated
	Allocation bool // base:allocation was negotiated: BLOCK_STATUS works
}

// Has reports whether all of the transmission flags are set.
func (i Info) Has(flags uint16) bool { return i.Flags&flags == flags }

// ReadOnly reports whether the server refuses all writes.
func (i Info) ReadOnly() bool { return i.Has(wire.TransReadOnly) }

// CanFlush reports whether the server takes FLUSH.
func (i Info) CanFlush() bool { return i.Has(wire.TransSendFlush) }

// CanFUA reports whether the server takes FlagFUA.
func (i Info) CanFUA() bool { return i.Has(wire.TransSendFUA) }

// CanMultiConn reports whether all connections see each other's writes, and a
// FLUSH on one covers them all.
func (i Info) CanMultiConn() bool { return i.Has(wire.TransCanMultiConn) }

// shaker is one handshake.
type shaker struct {
	rw       io.ReadWriter
	noZeroes bool
	context  uint32
	head     [wire.OptionReplySize]byte
}

// greet exchanges flags.
func (s *shaker) greet() error {
	var hello [18]byte
	if _, err := io.ReadFull(s.rw, hello[:]); err != nil {
		return fmt.Errorf("greeting: %w", eof(err))
	}
	if binary.BigEndian.Uint64(hello[:]) != wire.MagicInit || binary.BigEndian.Uint64(hello[8:]) != wire.MagicOption {
		return violation("not a newstyle NBD greeting")
	}
	flags := binary.BigEndian.Uint16(hello[16:])
	if flags&wire.FlagFixedNewstyle == 0 {
		return violation("server does not speak fixed newstyle")
	}
	answer := wire.FlagClientFixedNewstyle
	if s.noZeroes = flags&wire.FlagNoZeroes != 0; s.noZeroes {
		answer |= wire.FlagClientNoZeroes
	}
	return s.write(binary.BigEndian.AppendUint32(nil, answer))
}

func (s *shaker) write(b []byte) error {
	_, err := s.rw.Write(b)
	return eof(err)
}

func (s *shaker) send(option uint32, data []byte) error {
	b := make([]byte, 0, wire.OptionSize+len(data))
	b = binary.BigEndian.AppendUint64(b, wire.MagicOption)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return s.write(append(b, data...))
}

// receive reads one option reply.
func (s *shaker) receive(option uint32) (code uint32, data []byte, err error) {
	if _, err := io.ReadFull(s.rw, s.head[:]); err != nil {
		return 0, nil, eof(err)
	}
	h := s.head[:]
	if binary.BigEndian.Uint64(h) != wire.MagicOptionReply {
		return 0, nil, violation("option reply with magic %#x", binary.BigEndian.Uint64(h))
	}
	if got := binary.BigEndian.Uint32(h[8:]); got != option {
		return 0, nil, violation("reply to option %d, option %d was asked", got, option)
	}
	code = binary.BigEndian.Uint32(h[12:])
	n := binary.BigEndian.Uint32(h[16:])
	if n > maxOptionReply {
		return 0, nil, violation("option reply of %d bytes", n)
	}
	data = make([]byte, n)
	if _, err := io.ReadFull(s.rw, data); err != nil {
		return 0, nil, eof(err)
	}
	return code, data, nil
}

// ask sends an option and calls each for every reply before the final ACK.
// An error reply is an *OptionError.
func (s *shaker) ask(option uint32, export string, data []byte, each func(code uint32, data []byte) error) error {
	if err := s.send(option, data); err != nil {
		return err
	}
	for range maxReplies {
		code, reply, err := s.receive(option)
		switch {
		case err != nil:
			return err
		case code == wire.RepAck:
			return nil
		case code&wire.RepFlagError != 0:
			return &OptionError{Option: option, Code: code, Export: export, Text: clip(reply)}
		}
		if each == nil {
			return violation("reply of type %d to option %d", code, option)
		}
		if err := each(code, reply); err != nil {
			return err
		}
	}
	return violation("endless replies to option %d", option)
}

// enter negotiates and enters the transmission phase.
func (s *shaker) enter(name string, opt Options) (Info, error) {
	info := Info{Name: name}
	if err := s.greet(); err != nil {
		return info, err
	}
	if !opt.SimpleReplies || opt.Allocation {
		err := s.ask(wire.OptStructuredReply, name, nil, nil)
		if err != nil && !refused(err) {
			return info, err
		}
		info.Structured = err == nil
	}
	if opt.Allocation && info.Structured {
		if err := s.setContext(name, &info); err != nil && !refused(err) {
			return info, err
		}
	}
	err := s.goOption(name, &info)
	var refusal *OptionError
	if errors.As(err, &refusal) && refusal.Code == wire.RepErrUnsup {
		err = s.exportName(name, &info)
	}
	return info, err
}

// setContext selects base:allocation. A server that has none says so by an ACK
// alone.
func (s *shaker) setContext(name string, info *Info) error {
	q := appendString(nil, name)
	q = binary.BigEndian.AppendUint32(q, 1)
	q = appendString(q, wire.ContextBaseAllocation)
	return s.ask(wire.OptSetMetaContext, name, q, func(code uint32, data []byte) error {
		if code != wire.RepMetaContext || len(data) < 4 {
			return violation("reply of type %d and %d bytes to SET_META_CONTEXT", code, len(data))
		}
		if string(data[4:]) == wire.ContextBaseAllocation {
			s.context, info.Allocation = binary.BigEndian.Uint32(data), true
		}
		return nil
	})
}

func (s *shaker) goOption(name string, info *Info) error {
	q := appendString(nil, name)
	wanted := []uint16{wire.InfoName, wire.InfoDescription, wire.InfoBlockSize}
	q = binary.BigEndian.AppendUint16(q, uint16(len(wanted)))
	for _, t := range wanted {
		q = binary.BigEndian.AppendUint16(q, t)
	}
	sized := false
	err := s.ask(wire.OptGo, name, q, func(code uint32, data []byte) error {
		if code != wire.RepInfo || len(data) < 2 {
			return violation("reply of type %d and %d bytes to GO", code, len(data))
		}
		typ, data := binary.BigEndian.Uint16(data), data[2:]
		switch typ {
		case wire.InfoExport:
			if len(data) != 10 {
				return violation("export information of %d bytes", len(data))
			}
			info.Size, info.Flags = binary.BigEndian.Uint64(data), binary.BigEndian.Uint16(data[8:])
			sized = true
		case wire.InfoName:
			info.Name = clip(data)
		case wire.InfoDescription:
			info.Description = clip(data)
		case wire.InfoBlockSize:
			if len(data) != 12 {
				return violation("block size information of %d bytes", len(data))
			}
			info.MinBlock = binary.BigEndian.Uint32(data)
			info.PreferredBlock = binary.BigEndian.Uint32(data[4:])
			info.MaxBlock = binary.BigEndian.Uint32(data[8:])
		}
		return nil
	})
	if err == nil && !sized {
		err = violation("GO acknowledged without size and flags")
	}
	return err
}

// exportName is the way into transmission that servers without GO have.
func (s *shaker) exportName(name string, info *Info) error {
	if err := s.send(wire.OptExportName, []byte(name)); err != nil {
		return err
	}
	answer := make([]byte, 10+124)
	if s.noZeroes {
		answer = answer[:10]
	}
	if _, err := io.ReadFull(s.rw, answer); err != nil {
		if errors.Is(err, io.EOF) {
			return &OptionError{Option: wire.OptExportName, Code: wire.RepErrUnknown, Export: name}
		}
		return eof(err)
	}
	info.Size, info.Flags = binary.BigEndian.Uint64(answer), binary.BigEndian.Uint16(answer[8:])
	return nil
}

// Export is one entry of a server's list.
type Export struct {
	Name        string
	Description string // "" if the server gives none
}

func (s *shaker) list() ([]Export, error) {
	if err := s.greet(); err != nil {
		return nil, err
	}
	var exports []Export
	err := s.ask(wire.OptList, "", nil, func(code uint32, data []byte) error {
		if code != wire.RepServer || len(data) < 4 {
			return violation("reply of type %d and %d bytes to LIST", code, len(data))
		}
		n := binary.BigEndian.Uint32(data)
		if uint64(n) > uint64(len(data)-4) || n > maxName {
			return violation("export name of %d bytes in a list entry of %d", n, len(data))
		}
		exports = append(exports, Export{Name: string(data[4 : 4+n]), Description: clip(data[4+n:])})
		return nil
	})
	if err != nil {
		return nil, err
	}
	// The answer to ABORT is of no interest: the server may be gone already.
	_ = s.ask(wire.OptAbort, "", nil, nil)
	return exports, nil
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

// refused says whether the server declined an option and goes on haggling.
func refused(err error) bool {
	var e *OptionError
	return errors.As(err, &e)
}

// clip is a string of the server, cut to the protocol's longest.
func clip(b []byte) string { return string(b[:min(len(b), wire.MaxString)]) }

// eof names the end of the stream for what it is here.
func eof(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrServerClosed
	}
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return fmt.Errorf("%w (%v)", ErrServerClosed, err)
	}
	return err
}
