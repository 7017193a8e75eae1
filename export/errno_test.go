package export

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/state"
)

func TestWireErrno(t *testing.T) {
	var (
		read  = request{cmd: wire.CmdRead, length: 512}
		df    = request{cmd: wire.CmdRead, flags: wire.CmdFlagDF, length: 512}
		write = request{cmd: wire.CmdWrite, length: 512}
		zero  = request{cmd: wire.CmdWriteZeroes, length: 512}
		fast  = request{cmd: wire.CmdWriteZeroes, flags: wire.CmdFlagFastZero, length: 512}
		long  = func(r request) request { r.length = wire.MaxRequestPayload + 1; return r }
		trim  = request{cmd: wire.CmdTrim, length: 512}
	)
	wrapped := func(e syscall.Errno) error {
		return fmt.Errorf("backend: %w", &fs.PathError{Op: "pwrite", Path: "disk", Err: e})
	}
	for _, tt := range []struct {
		row  string
		err  error
		req  request
		want uint32
	}{
		{"6 EPERM", syscall.EPERM, write, wire.EPERM},
		{"6 EROFS", wrapped(syscall.EROFS), write, wire.EPERM},
		{"6 EIO", wrapped(syscall.EIO), read, wire.EIO},
		{"6 ENOMEM", syscall.ENOMEM, read, wire.ENOMEM},
		{"6 EINVAL", syscall.EINVAL, read, wire.EINVAL},
		{"6 ENOSPC", wrapped(syscall.ENOSPC), write, wire.ENOSPC},
		{"6 EDQUOT", syscall.EDQUOT, write, wire.ENOSPC},
		{"6 EFBIG", syscall.EFBIG, write, wire.ENOSPC},
		{"6 anything else", syscall.ENXIO, read, wire.EINVAL},
		{"6 EACCES", syscall.EACCES, write, wire.EINVAL},
		{"6 no errno", errors.New("strange"), read, wire.EINVAL},
		{"6 nil", nil, read, wire.EINVAL},
		{"6 EOVERFLOW with DF", syscall.EOVERFLOW, df, wire.EOVERFLOW},
		{"6 EOVERFLOW without DF", syscall.EOVERFLOW, read, wire.EINVAL},
		{"6 EOVERFLOW oversize TRIM", syscall.EOVERFLOW, long(trim), wire.EOVERFLOW},
		{"6 EOVERFLOW TRIM", syscall.EOVERFLOW, trim, wire.EINVAL},
		{"6 EOVERFLOW oversize ZERO", syscall.EOVERFLOW, long(zero), wire.EOVERFLOW},
		{"6 EOVERFLOW oversize FAST_ZERO", syscall.EOVERFLOW, long(fast), wire.EINVAL},
		{"6 ENOTSUP with FAST_ZERO", wrapped(syscall.EOPNOTSUPP), fast, wire.ENOTSUP},
		{"C11 ENOTSUP without FAST_ZERO", syscall.ENOTSUP, zero, wire.EINVAL},
		{"C11 ENOTSUP of TRIM", syscall.ENOTSUP, trim, wire.EINVAL},
		{"6 ESHUTDOWN is ours only", syscall.ESHUTDOWN, write, wire.EINVAL},
		{"6 stopping", fmt.Errorf("x: %w", state.ErrStopping), write, wire.ESHUTDOWN},
		{"6 inactive", fmt.Errorf("x: %w", state.ErrInactive), trim, wire.EPERM},
		{"6 read-only", fmt.Errorf("x: %w", state.ErrReadOnly), trim, wire.EPERM},
		{"6 failed", &state.FailedError{State: state.FailedIO, Image: "disk", Cause: syscall.ENOSPC}, write, wire.EIO},
		{"6 refusal", &refusal{wire.ENOSPC, "past"}, write, wire.ENOSPC},
	} {
		if got := wireErrno(tt.err, tt.req); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.row, got, tt.want)
		}
	}
}

// No host errno outside the list may reach the wire, whatever the request.
func TestWireErrnoClosed(t *testing.T) {
	allowed := map[uint32]bool{1: true, 5: true, 12: true, 22: true, 28: true, 75: true, 95: true}
	for e := range syscall.Errno(200) {
		for cmd := range uint16(9) {
			for flags := range uint16(32) {
				if got := wireErrno(e, request{cmd, flags, 1 << 40}); !allowed[got] {
					t.Fatalf("errno %d, command %d, flags %#x: %d on the wire", e, cmd, flags, got)
				}
			}
		}
	}
}

func TestWireText(t *testing.T) {
	if got := wireText(fmt.Errorf("gate: %w", state.ErrInactive)); got != "export is inactive" {
		t.Errorf("inactive: %q", got)
	}
	for _, err := range []error{state.ErrLost, state.ErrLate, &state.HeldError{Why: "no room"}} {
		if got := wireText(err); got != err.Error() || !strings.HasPrefix(got, "export is inactive: ") {
			t.Errorf("held: %q", got)
		}
		if got := wireErrno(err, request{cmd: wire.CmdWrite}); got != wire.EPERM {
			t.Errorf("held: error %d", got)
		}
	}
	if got := wireText(nil); got != "" {
		t.Errorf("nil: %q", got)
	}
	for _, s := range []string{
		"plain", "a\x00b", "\xff\xfe", strings.Repeat("x", 5000), strings.Repeat("é", 3000), "x" + strings.Repeat("€", 2000),
	} {
		got := wireText(errors.New(s))
		if !utf8.ValidString(got) || strings.Contains(got, "\x00") || len(got) > wire.MaxString || len(got) < min(len(s), 4090) {
			t.Errorf("%.10q: got %d bytes, valid %v", s, len(got), utf8.ValidString(got))
		}
	}
}
