package export

import (
	"errors"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/state"
)

// refusal is an error that names its own code: a request or an option that is
// refused before anything is done for it. code is a wire error of the
// transmission phase.
type refusal struct {
	code uint32
	text string
}

func (e *refusal) Error() string { return e.text }

// request is what the error map must know of the request that failed, because
// two codes are allowed for certain requests only.
type request struct {
	cmd    uint16 // wire.Cmd...
	flags  uint16 // wire.CmdFlag...
	length int64  // bytes, of a valid request
}

// mayFastFail: ENOTSUP is allowed (specification, "Error values").
func (r request) mayFastFail() bool {
	return r.cmd == wire.CmdWriteZeroes && r.flags&wire.CmdFlagFastZero != 0
}

// mayOverflow: EOVERFLOW is allowed, for DF reads and for effects longer than
// the largest payload. A FAST_ZERO request "SHOULD NOT fail with
// NBD_EOVERFLOW regardless of the client length".
func (r request) mayOverflow() bool {
	switch r.cmd {
	case wire.CmdRead:
		return r.flags&wire.CmdFlagDF != 0
	case wire.CmdTrim, wire.CmdCache, wire.CmdWriteZeroes:
		return r.length > wire.MaxRequestPayload && !r.mayFastFail()
	}
	return false
}

// wireErrno is the one map from Go errors to the error field of a reply. It
// returns one of the eight values that the specification allows ("Error
// values"), never 0, and never the number of a host errno that happens not to
// be among them.
//
// The storage's own ESHUTDOWN is not passed on: it would make clients leave.
func wireErrno(err error, req request) uint32 {
	if r, ok := errors.AsType[*refusal](err); ok {
		return r.code
	}
	if errors.Is(err, state.ErrInactive) || errors.Is(err, state.ErrReadOnly) {
		return wire.EPERM
	}
	if errors.Is(err, state.ErrStopping) {
		return wire.ESHUTDOWN
	}
	if _, ok := errors.AsType[*state.FailedError](err); ok {
		return wire.EIO
	}
	errno, _ := errors.AsType[syscall.Errno](err)
	switch errno {
	case syscall.EPERM, syscall.EROFS:
		return wire.EPERM
	case syscall.EIO:
		return wire.EIO
	case syscall.ENOMEM:
		return wire.ENOMEM
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return wire.ENOSPC
	case syscall.ENOTSUP: // the same number as EOPNOTSUPP
		if req.mayFastFail() {
			return wire.ENOTSUP
		}
	case syscall.EOVERFLOW:
		if req.mayOverflow() {
			return wire.EOVERFLOW
		}
	}
	return wire.EINVAL
}

// wireText is the text that goes with err where the protocol carries one: at
// most wire.MaxString bytes of valid UTF-8 without NUL. It allocates only if
// err's own text does or breaks these rules.
func wireText(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, state.ErrInactive):
		// Exactly, whatever wraps it: clients match on it. That a write was
		// held is worth more words.
		if _, held := errors.AsType[*state.HeldError](err); !held {
			return state.ErrInactive.Error()
		}
	}
	return clean(err.Error(), wire.MaxString)
}

// clean makes s a string of the protocol: valid UTF-8, no NUL, at most limit
// bytes.
func clean(s string, limit int) string {
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "\uFFFD")
	}
	if strings.IndexByte(s, 0) >= 0 {
		s = strings.ReplaceAll(s, "\x00", "\uFFFD")
	}
	if len(s) <= limit {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit]
}
