package export

import (
	"fmt"

	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
)

// maxDiscard is the longest payload of a refused WRITE that is read and
// thrown away, in bytes. A client that announces more is disconnected after
// the reply.
const maxDiscard = 2 * wire.MaxRequestPayload

// What check lets pass the loop has buffers for.
const _ = uint(ioloop.MaxPayload - wire.MaxRequestPayload)

var (
	errReadOnly   = &refusal{wire.EPERM, "export is read-only"}
	errNoTrim     = &refusal{wire.EINVAL, "this export does not support TRIM"}
	errNoContext  = &refusal{wire.EINVAL, "BLOCK_STATUS needs a metadata context: select one in the handshake, as base:allocation"}
	errNoStatus   = &refusal{wire.EINVAL, "BLOCK_STATUS of length 0"}
	errFlushRange = &refusal{wire.EINVAL, "offset and length of FLUSH must be 0"}
)

// rule is how one command is checked on one connection.
type rule struct {
	op     ioloop.Op
	known  bool
	flags  uint16 // command flags accepted
	honour uint16 // of these, the ones that mean something to the loop
	always uint16 // taken as given
	// past is the code for a range that leaves the export.
	past uint32
	// refuse, if set, is why the command is not for this export.
	refuse *refusal
}

// numRules is one more than the largest command known.
const numRules = wire.CmdBlockStatus + 1

// rules makes the table of a connection with the given transmission flags.
// FUA is accepted with every command (specification, "Command flags") and
// honoured where something is written.
func rules(trans uint16, context bool) (t [numRules]rule) {
	const fua = wire.CmdFlagFUA
	readOnly := trans&wire.TransReadOnly != 0
	set := func(cmd uint16, op ioloop.Op, flags, honour uint16, past uint32) *rule {
		t[cmd] = rule{op: op, known: true, flags: flags | fua, honour: honour, past: past}
		return &t[cmd]
	}
	writes := func(r *rule) *rule {
		if readOnly {
			r.refuse = errReadOnly
		}
		return r
	}

	var df, fast uint16
	if trans&wire.TransSendDF != 0 {
		df = wire.CmdFlagDF
	}
	if trans&wire.TransSendFastZero != 0 || readOnly { // EPERM says more than EINVAL
		fast = wire.CmdFlagFastZero
	}
	set(wire.CmdRead, ioloop.OpRead, df, df, wire.EINVAL)
	writes(set(wire.CmdWrite, ioloop.OpWrite, 0, fua, wire.ENOSPC))
	set(wire.CmdFlush, ioloop.OpFlush, 0, 0, wire.EINVAL)
	trim := writes(set(wire.CmdTrim, ioloop.OpDiscard, 0, fua, wire.EINVAL))
	if trim.refuse == nil && trans&wire.TransSendTrim == 0 {
		trim.refuse = errNoTrim
	}
	set(wire.CmdCache, ioloop.OpCache, 0, 0, wire.EINVAL)
	zero := wire.CmdFlagNoHole | fast
	writes(set(wire.CmdWriteZeroes, ioloop.OpZero, zero, zero|fua, wire.ENOSPC))
	status := set(wire.CmdBlockStatus, ioloop.OpStatus, wire.CmdFlagReqOne, wire.CmdFlagReqOne, wire.EINVAL)
	if !context {
		status.refuse = errNoContext
	}
	return t
}

// check validates one request header, once and for all: what it lets pass has
// only flags that its command and this connection know, and lies within size,
// which is the connection's size in bytes. The order is the one in which the
// errors help most: command, flags, permission, length, range.
func check(t *[numRules]rule, size int64, cmd, flags uint16, offset uint64, length uint32) error {
	if cmd >= numRules || !t[cmd].known {
		return &refusal{wire.EINVAL, fmt.Sprintf("unknown command %d", cmd)}
	}
	r := &t[cmd]
	if bad := flags &^ r.flags; bad != 0 {
		return &refusal{wire.EINVAL, fmt.Sprintf("command %s does not take flags %#x here", commandName(cmd), bad)}
	}
	if r.refuse != nil {
		return r.refuse
	}
	switch r.op {
	case ioloop.OpRead, ioloop.OpWrite:
		if length > wire.MaxRequestPayload {
			return &refusal{wire.EINVAL, fmt.Sprintf("%s of %d bytes is longer than the maximum of %d",
				commandName(cmd), length, wire.MaxRequestPayload)}
		}
	case ioloop.OpFlush:
		if offset != 0 || length != 0 {
			return errFlushRange
		}
		return nil
	case ioloop.OpStatus:
		if length == 0 { // there is no valid reply: a descriptor has at least one byte
			return errNoStatus
		}
	}
	if offset > uint64(size) || uint64(length) > uint64(size)-offset {
		return &refusal{r.past, fmt.Sprintf("%s of %d bytes at offset %d leaves the export, which has %d bytes",
			commandName(cmd), length, offset, size)}
	}
	return nil
}

// flagTable translates the five command flags to the loop's.
var flagTable = func() (t [32]ioloop.Flags) {
	for i := range t {
		for _, f := range []struct {
			wire uint16
			loop ioloop.Flags
		}{
			{wire.CmdFlagFUA, ioloop.FUA},
			{wire.CmdFlagNoHole, ioloop.NoHole},
			{wire.CmdFlagDF, ioloop.OneChunk},
			{wire.CmdFlagReqOne, ioloop.OneExtent},
			{wire.CmdFlagFastZero, ioloop.FastZero},
		} {
			if uint16(i)&f.wire != 0 {
				t[i] |= f.loop
			}
		}
	}
	return t
}()

// commandName is how texts call a command.
func commandName(cmd uint16) string {
	switch cmd {
	case wire.CmdRead:
		return "READ"
	case wire.CmdWrite:
		return "WRITE"
	case wire.CmdDisc:
		return "DISC"
	case wire.CmdFlush:
		return "FLUSH"
	case wire.CmdTrim:
		return "TRIM"
	case wire.CmdCache:
		return "CACHE"
	case wire.CmdWriteZeroes:
		return "WRITE_ZEROES"
	case wire.CmdBlockStatus:
		return "BLOCK_STATUS"
	}
	return fmt.Sprintf("%d", cmd)
}
