package client

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/nbd-export/nbd-export/export/wire"
)

var (
	// ErrClosed is the error of every request on a connection this side closed.
	ErrClosed = errors.New("NBD connection closed")
	// ErrServerClosed means the server ended the connection without being asked to.
	ErrServerClosed = errors.New("NBD server closed the connection")
	// ErrProtocol is wrapped by every error that says the server broke the protocol.
	// The connection is unusable after it.
	ErrProtocol = errors.New("NBD protocol violated by the server")
)

// Cmd is a command of the transmission phase, wire.CmdRead and its siblings.
type Cmd uint16

// String names the command in lower case, as it is used in error texts.
func (c Cmd) String() string {
	switch uint16(c) {
	case wire.CmdRead:
		return "read"
	case wire.CmdWrite:
		return "write"
	case wire.CmdDisc:
		return "disconnect"
	case wire.CmdFlush:
		return "flush"
	case wire.CmdTrim:
		return "trim"
	case wire.CmdCache:
		return "cache"
	case wire.CmdWriteZeroes:
		return "write zeroes"
	case wire.CmdBlockStatus:
		return "block status"
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// Error is a request the server answered with an error. The connection stays
// usable. errors.Is finds the Errno: errors.Is(err, syscall.EPERM).
type Error struct {
	Cmd   Cmd
	Errno syscall.Errno // one of the protocol's errors; what it does not define is EINVAL
	Text  string        // the server's own words, "" if it sent none
}

func (e *Error) Error() string {
	if e.Text == "" {
		return fmt.Sprintf("%v: %v", e.Cmd, e.Errno)
	}
	return fmt.Sprintf("%v: %s (%s)", e.Cmd, e.Text, errnoName(e.Errno))
}

// Unwrap returns the Errno.
func (e *Error) Unwrap() error { return e.Errno }

// OptionError is an option the server refused during the handshake.
type OptionError struct {
	Option uint32 // wire.OptGo and its siblings
	Code   uint32 // wire.RepErrUnknown and its siblings
	Export string // the export that was asked for
	Text   string // the server's own words, "" if it sent none
}

func (e *OptionError) Error() string {
	what := optionErrors[e.Code]
	if what == "" {
		what = fmt.Sprintf("refused with error %#x", e.Code)
	}
	msg := fmt.Sprintf("export %q: %s", e.Export, what)
	if e.Option == wire.OptList {
		msg = "list of exports: " + what
	}
	if e.Text != "" {
		msg += ": " + e.Text
	}
	return msg
}

var optionErrors = map[uint32]string{
	wire.RepErrUnsup:         "option not supported by the server",
	wire.RepErrPolicy:        "forbidden by the server's policy",
	wire.RepErrInvalid:       "request called invalid by the server",
	wire.RepErrPlatform:      "not supported on the server's platform",
	wire.RepErrTLSReqd:       "server requires TLS",
	wire.RepErrUnknown:       "unknown to the server",
	wire.RepErrShutdown:      "server is shutting down",
	wire.RepErrBlockSizeReqd: "server requires block sizes to be negotiated",
	wire.RepErrTooBig:        "request called too big by the server",
}

// errnoOf turns an error of the wire into an errno. The protocol uses Linux's
// numbers; values it does not define are to be taken as EINVAL.
func errnoOf(code uint32) syscall.Errno {
	switch code {
	case wire.EPERM, wire.EIO, wire.ENOMEM, wire.EINVAL, wire.ENOSPC, wire.EOVERFLOW, wire.ENOTSUP, wire.ESHUTDOWN:
		return syscall.Errno(code)
	}
	return syscall.EINVAL
}

func errnoName(e syscall.Errno) string {
	switch uint32(e) {
	case wire.EPERM:
		return "EPERM"
	case wire.EIO:
		return "EIO"
	case wire.ENOMEM:
		return "ENOMEM"
	case wire.EINVAL:
		return "EINVAL"
	case wire.ENOSPC:
		return "ENOSPC"
	case wire.EOVERFLOW:
		return "EOVERFLOW"
	case wire.ENOTSUP:
		return "ENOTSUP"
	case wire.ESHUTDOWN:
		return "ESHUTDOWN"
	}
	return e.Error()
}

// violation is an error that wraps ErrProtocol.
func violation(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)
}
