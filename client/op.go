package client

import (
	"sort"
	"syscall"

	"github.com/nbd-export/nbd-export/export/wire"
)

// What an Op can be, its flags, and the protocol's limit.
const (
	CmdRead        = wire.CmdRead
	CmdWrite       = wire.CmdWrite
	CmdFlush       = wire.CmdFlush
	CmdTrim        = wire.CmdTrim
	CmdCache       = wire.CmdCache
	CmdWriteZeroes = wire.CmdWriteZeroes

	FlagFUA      = wire.CmdFlagFUA
	FlagNoHole   = wire.CmdFlagNoHole
	FlagFastZero = wire.CmdFlagFastZero

	MaxRequest = wire.MaxRequestPayload // most bytes of a read or write
)

// Op is one request and, once answered, its outcome.
type Op struct {
	Cmd    uint16 // CmdRead and its siblings
	Flags  uint16 // FlagFUA and its siblings
	Offset uint64 // bytes
	Length uint32 // bytes

	// Data is a WRITE's payload (Length bytes, unchanged until the reply), or
	// where a READ's bytes go (Length bytes; nil throws them away). nil for
	// everything else.
	Data []byte

	Start int64  // when its latency begins, on the clock of Now
	Slot  int    // Batch only: which of the depth slots it has
	Tag   uint64 // the caller's own

	Errno syscall.Errno // 0: the server says it succeeded
	Text  string        // the server's words on an error, "" if none

	// Extents is the answer to a BLOCK_STATUS.
	Extents []Extent

	cookie uint64
	cover  coverage
	status bool // a block status chunk has come
	busy   bool // Batch only
}

// Extent is a run of bytes of one allocation status.
type Extent struct {
	Length uint32 // bytes
	Flags  uint32 // wire.StateHole, wire.StateZero
}

// reset clears what an earlier request left, but what is not of it: Slot and Tag.
func (op *Op) reset() {
	op.Cmd, op.Flags, op.Offset, op.Length, op.Data = 0, 0, 0, 0, nil
	op.Errno, op.Text, op.status = 0, "", false
	op.Extents = op.Extents[:0]
	op.cover.reset()
}

// Err is the outcome of an answered request: nil, or an *Error.
func (op *Op) Err() error {
	if op.Errno == 0 {
		return nil
	}
	return &Error{Cmd: Cmd(op.Cmd), Errno: op.Errno, Text: op.Text}
}

// fail notes an error of the reply; the first one counts.
func (op *Op) fail(code uint32, text string) {
	if op.Errno == 0 {
		op.Errno, op.Text = errnoOf(code), text
	}
}

// complete says whether a reply that claims success carried everything that was
// asked for.
func (op *Op) complete() error {
	switch {
	case op.Errno != 0:
		return nil
	case op.Cmd == wire.CmdRead && !op.cover.full(op.Length):
		return violation("read of %d bytes at %d was answered with %d", op.Length, op.Offset, op.cover.bytes())
	case op.Cmd == wire.CmdBlockStatus && !op.status:
		return violation("block status of %d bytes at %d was answered without any", op.Length, op.Offset)
	}
	return nil
}

// coverage notes which bytes of a read have come, to find overlaps and gaps.
// Chunks in ascending order cost an addition.
type coverage struct {
	head uint32 // [0, head) has come
	rest []span // later runs, ascending, apart from each other
}

type span struct{ lo, hi uint32 }

// maxSpans bounds how scattered a reply may be.
const maxSpans = 1 << 14

func (c *coverage) reset() { c.head, c.rest = 0, c.rest[:0] }

func (c *coverage) full(length uint32) bool { return c.head == length && len(c.rest) == 0 }

func (c *coverage) bytes() uint64 {
	n := uint64(c.head)
	for _, s := range c.rest {
		n += uint64(s.hi - s.lo)
	}
	return n
}

// add notes [lo, lo+n); false if any of it has come before, or the reply is too
// scattered. lo+n must not overflow.
func (c *coverage) add(lo, n uint32) bool {
	if lo == c.head && len(c.rest) == 0 {
		c.head += n
		return true
	}
	hi := lo + n
	i := sort.Search(len(c.rest), func(i int) bool { return c.rest[i].hi > lo })
	if lo < c.head || (i < len(c.rest) && c.rest[i].lo < hi) || len(c.rest) >= maxSpans {
		return false
	}
	left := i > 0 && c.rest[i-1].hi == lo
	right := i < len(c.rest) && c.rest[i].lo == hi
	switch {
	case left && right:
		c.rest[i-1].hi = c.rest[i].hi
		c.rest = append(c.rest[:i], c.rest[i+1:]...)
	case left:
		c.rest[i-1].hi = hi
	case right:
		c.rest[i].lo = lo
	default:
		c.rest = append(c.rest, span{})
		copy(c.rest[i+1:], c.rest[i:])
		c.rest[i] = span{lo, hi}
	}
	if c.rest[0].lo == c.head {
		c.head = c.rest[0].hi
		c.rest = append(c.rest[:0], c.rest[1:]...)
	}
	return true
}
