package export

import (
	"math"
	"testing"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
)

func TestCheck(t *testing.T) {
	const size = 1 << 20
	writable := transFlags(testInfo(), false, true)
	readOnly := transFlags(testInfo(), true, true)
	simple := transFlags(testInfo(), false, false)
	noTrim := writable &^ wire.TransSendTrim
	noFast := writable &^ wire.TransSendFastZero
	const (
		ok      = 0
		context = true
	)
	for _, tt := range []struct {
		row        string
		trans      uint16
		context    bool
		cmd, flags uint16
		offset     uint64
		length     uint32
		want       uint32 // wire error, 0 for none
	}{
		{"C1 READ 0", writable, context, wire.CmdRead, 0, 0, 0, ok},
		{"C1 READ 0 at the end", writable, context, wire.CmdRead, 0, size, 0, ok},
		{"C1 WRITE 0", writable, context, wire.CmdWrite, 0, 0, 0, ok},
		{"C1 TRIM 0", writable, context, wire.CmdTrim, 0, 0, 0, ok},
		{"C1 WRITE_ZEROES 0", writable, context, wire.CmdWriteZeroes, 0, 0, 0, ok},
		{"C1 CACHE 0", writable, context, wire.CmdCache, 0, 0, 0, ok},
		{"C1 BLOCK_STATUS 0", writable, context, wire.CmdBlockStatus, 0, 0, 0, wire.EINVAL},
		{"C1 WRITE 0 past the end", writable, context, wire.CmdWrite, 0, size + 1, 0, wire.ENOSPC},

		{"C2 READ last byte", writable, context, wire.CmdRead, 0, size - 1, 1, ok},
		{"C2 READ past end", writable, context, wire.CmdRead, 0, size - 1, 2, wire.EINVAL},
		{"C2 TRIM past end", writable, context, wire.CmdTrim, 0, size, 1, wire.EINVAL},
		{"C2 BLOCK_STATUS past end", writable, context, wire.CmdBlockStatus, 0, size, 1, wire.EINVAL},
		{"C2 CACHE past end", writable, context, wire.CmdCache, 0, size, 1, wire.EINVAL},
		{"C2 WRITE past end", writable, context, wire.CmdWrite, 0, size - 511, 512, wire.ENOSPC},
		{"C2 WRITE_ZEROES past end", writable, context, wire.CmdWriteZeroes, 0, 0, size + 1, wire.ENOSPC},
		{"C2 overflow READ", writable, context, wire.CmdRead, 0, math.MaxUint64, 2, wire.EINVAL},
		{"C2 overflow WRITE", writable, context, wire.CmdWrite, 0, math.MaxUint64 - 10, 512, wire.ENOSPC},
		{"C2 sign", writable, context, wire.CmdRead, 0, 1 << 63, 1, wire.EINVAL},

		{"C3 WRITE", readOnly, context, wire.CmdWrite, 0, 0, 512, wire.EPERM},
		{"C3 TRIM", readOnly, context, wire.CmdTrim, 0, 0, 512, wire.EPERM},
		{"C3 WRITE_ZEROES", readOnly, context, wire.CmdWriteZeroes, wire.CmdFlagFastZero, 0, 512, wire.EPERM},
		{"C3 WRITE past end", readOnly, context, wire.CmdWrite, 0, size, 512, wire.EPERM},
		{"C3 READ is fine", readOnly, context, wire.CmdRead, 0, 0, 512, ok},
		{"C3 FLUSH is fine", readOnly, context, wire.CmdFlush, 0, 0, 0, ok},
		{"C3 CACHE is fine", readOnly, context, wire.CmdCache, 0, 0, 512, ok},
		{"C3 BLOCK_STATUS is fine", readOnly, context, wire.CmdBlockStatus, 0, 0, 512, ok},

		{"C5 READ of 32 MiB + 1", writable, context, wire.CmdRead, 0, 0, 32<<20 + 1, wire.EINVAL},
		{"C5 WRITE of 32 MiB + 1", writable, context, wire.CmdWrite, 0, 0, 32<<20 + 1, wire.EINVAL},
		{"C7 FLUSH", writable, context, wire.CmdFlush, 0, 0, 0, ok},
		{"C7 FLUSH offset", writable, context, wire.CmdFlush, 0, 1, 0, wire.EINVAL},
		{"C7 FLUSH length", writable, context, wire.CmdFlush, 0, 0, 1, wire.EINVAL},

		{"C8 FUA READ", writable, context, wire.CmdRead, wire.CmdFlagFUA, 0, 512, ok},
		{"C8 FUA WRITE", writable, context, wire.CmdWrite, wire.CmdFlagFUA, 0, 512, ok},
		{"C8 FUA FLUSH", writable, context, wire.CmdFlush, wire.CmdFlagFUA, 0, 0, ok},
		{"C8 FUA TRIM", writable, context, wire.CmdTrim, wire.CmdFlagFUA, 0, 512, ok},
		{"C8 FUA CACHE", writable, context, wire.CmdCache, wire.CmdFlagFUA, 0, 512, ok},
		{"C8 FUA WRITE_ZEROES", writable, context, wire.CmdWriteZeroes, wire.CmdFlagFUA, 0, 512, ok},
		{"C8 FUA BLOCK_STATUS", writable, context, wire.CmdBlockStatus, wire.CmdFlagFUA, 0, 512, ok},
		{"F3 FUA read-only", readOnly, context, wire.CmdRead, wire.CmdFlagFUA, 0, 512, ok},

		{"C9 TRIM not offered", noTrim, context, wire.CmdTrim, 0, 0, 512, wire.EINVAL},
		{"C10 NO_HOLE", writable, context, wire.CmdWriteZeroes, wire.CmdFlagNoHole, 0, 512, ok},
		{"C11 FAST_ZERO", writable, context, wire.CmdWriteZeroes, wire.CmdFlagFastZero, 0, 512, ok},
		{"C11 FAST_ZERO not offered", noFast, context, wire.CmdWriteZeroes, wire.CmdFlagFastZero, 0, 512, wire.EINVAL},
		{"C13 no context", writable, false, wire.CmdBlockStatus, 0, 0, 512, wire.EINVAL},
		{"C14 REQ_ONE", writable, context, wire.CmdBlockStatus, wire.CmdFlagReqOne, 0, 512, ok},

		{"C19 command 8", writable, context, 8, 0, 0, 512, wire.EINVAL},
		{"C19 command 65535", writable, context, 65535, 0, 0, 512, wire.EINVAL},
		{"C20 unknown flag", writable, context, wire.CmdRead, 1 << 5, 0, 512, wire.EINVAL},
		{"C20 high flag", writable, context, wire.CmdWrite, 1 << 15, 0, 512, wire.EINVAL},
		{"C20 NO_HOLE on WRITE", writable, context, wire.CmdWrite, wire.CmdFlagNoHole, 0, 512, wire.EINVAL},
		{"C20 DF on WRITE", writable, context, wire.CmdWrite, wire.CmdFlagDF, 0, 512, wire.EINVAL},
		{"C20 REQ_ONE on READ", writable, context, wire.CmdRead, wire.CmdFlagReqOne, 0, 512, wire.EINVAL},
		{"C20 NO_HOLE on FLUSH", writable, context, wire.CmdFlush, wire.CmdFlagNoHole, 0, 0, wire.EINVAL},
		{"F8 flag on CACHE", writable, context, wire.CmdCache, wire.CmdFlagNoHole, 0, 512, wire.EINVAL},
		{"R7 DF", writable, context, wire.CmdRead, wire.CmdFlagDF, 0, 65536, ok},
		{"F5 DF without structured replies", simple, false, wire.CmdRead, wire.CmdFlagDF, 0, 512, wire.EINVAL},
	} {
		table := rules(tt.trans, tt.context)
		err := check(&table, size, tt.cmd, tt.flags, tt.offset, tt.length)
		var got uint32
		if err != nil {
			got = wireErrno(err, request{cmd: tt.cmd, flags: tt.flags})
		}
		if got != tt.want {
			t.Errorf("%s: got %d (%v), want %d", tt.row, got, err, tt.want)
		}
		if err != nil && err.Error() == "" {
			t.Errorf("%s: no text", tt.row)
		}
	}
}

// C10: TRIM, WRITE_ZEROES, CACHE and BLOCK_STATUS have no payload limit.
func TestCheckLong(t *testing.T) {
	table := rules(transFlags(testInfo(), false, true), true)
	for _, cmd := range []uint16{wire.CmdTrim, wire.CmdWriteZeroes, wire.CmdCache, wire.CmdBlockStatus} {
		if err := check(&table, 1<<40, cmd, 0, 1<<39, math.MaxUint32); err != nil {
			t.Errorf("C10 %s: %v", commandName(cmd), err)
		}
	}
}

func TestReadOnlyText(t *testing.T) {
	table := rules(transFlags(testInfo(), true, true), true)
	if err := check(&table, 512, wire.CmdWrite, 0, 0, 512); err == nil || err.Error() != "export is read-only" {
		t.Errorf("C3: %v", err)
	}
}

// FUA reaches the loop with what writes, the other flags with their command.
func TestFlags(t *testing.T) {
	c := newCodec(terms{size: 4096, trans: transFlags(testInfo(), false, true), structured: true, contexts: testContexts(true)})
	for _, tt := range []struct {
		cmd, flags uint16
		op         ioloop.Op
		want       ioloop.Flags
	}{
		{wire.CmdRead, wire.CmdFlagFUA | wire.CmdFlagDF, ioloop.OpRead, ioloop.OneChunk},
		{wire.CmdWrite, wire.CmdFlagFUA, ioloop.OpWrite, ioloop.FUA},
		{wire.CmdTrim, wire.CmdFlagFUA, ioloop.OpDiscard, ioloop.FUA},
		{wire.CmdWriteZeroes, wire.CmdFlagFUA | wire.CmdFlagNoHole | wire.CmdFlagFastZero, ioloop.OpZero,
			ioloop.FUA | ioloop.NoHole | ioloop.FastZero},
		{wire.CmdCache, wire.CmdFlagFUA, ioloop.OpCache, 0},
		{wire.CmdBlockStatus, wire.CmdFlagReqOne | wire.CmdFlagFUA, ioloop.OpStatus, ioloop.OneExtent},
	} {
		var r ioloop.Request
		if _, err := c.Decode(requestHeader(tt.flags, tt.cmd, 0, 0, 512), &r); err != nil || r.Err != nil {
			t.Fatal(err, r.Err)
		}
		if r.Op != tt.op || r.Flags != tt.want {
			t.Errorf("%s %#x: op %d flags %#x, want %d %#x", commandName(tt.cmd), tt.flags, r.Op, r.Flags, tt.op, tt.want)
		}
	}
}

func TestTransFlags(t *testing.T) {
	const always = wire.TransHasFlags | wire.TransSendFlush | wire.TransSendFUA | wire.TransSendCache | wire.TransCanMultiConn
	for _, tt := range []struct {
		row                  string
		info                 backend.Info
		readOnly, structured bool
		want                 uint16
	}{
		{"F1 F3 F4 F6 F7", backend.Info{}, false, false, always | wire.TransSendWriteZeroes | wire.TransSendFastZero},
		{"F1 TRIM", backend.Info{CanTrim: true}, false, false,
			always | wire.TransSendWriteZeroes | wire.TransSendFastZero | wire.TransSendTrim},
		{"F2 read-only", backend.Info{CanTrim: true}, true, false, always | wire.TransReadOnly},
		{"F5 DF", backend.Info{}, true, true, always | wire.TransReadOnly | wire.TransSendDF},
		{"F9 rotational", backend.Info{Rotational: true}, true, false, always | wire.TransReadOnly | wire.TransRotational},
	} {
		if got := transFlags(tt.info, tt.readOnly, tt.structured); got != tt.want {
			t.Errorf("%s: %#x, want %#x", tt.row, got, tt.want)
		}
	}
}

func TestBlockSizes(t *testing.T) {
	for _, tt := range []struct {
		row            string
		mini, pre, max uint32
		want           blockSizes
	}{
		{"7 defaults", 0, 0, 0, blockSizes{1, 4096, 32 << 20}},
		{"7 as given", 1, 65536, 32 << 20, blockSizes{1, 65536, 32 << 20}},
		{"7 preferred at least 512", 1, 1, 1 << 20, blockSizes{1, 512, 1 << 20}},
		{"7 powers of two", 600, 5000, 32 << 20, blockSizes{512, 4096, 32 << 20}},
		{"7 minimum at most 64 KiB", 1 << 20, 4096, 32 << 20, blockSizes{1 << 16, 1 << 16, 32 << 20}},
		{"7 maximum what validation takes", 1, 4096, math.MaxUint32, blockSizes{1, 4096, 32 << 20}},
		{"7 maximum at least preferred", 1, 4096, 1, blockSizes{1, 4096, 4096}},
	} {
		got := blockSizesOf(backend.Info{MinBlock: tt.mini, PreferredBlock: tt.pre, MaxBlock: tt.max})
		if got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.row, got, tt.want)
		}
	}
}
