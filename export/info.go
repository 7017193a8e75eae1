package export

import (
	"encoding/binary"
	"math/bits"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/export/wire"
)

// facts are what the handshake tells of an export, taken at one moment.
type facts struct {
	export *Export
	size   int64  // bytes
	trans  uint16 // transmission flags
	blocks blockSizes
}

func (e *Export) facts(structured bool) facts {
	info := e.Disk.Image.Info()
	return facts{
		export: e,
		size:   e.Disk.Image.Size(),
		trans:  transFlags(info, e.readOnly(), structured),
		blocks: blockSizesOf(info),
	}
}

// facts of e for this client. One that is told CAN_MULTI_CONN opens several
// connections, and fails if it gets only one.
func (h *handshake) facts(e *Export) facts {
	f := e.facts(h.structured)
	if h.alone {
		f.trans &^= wire.TransCanMultiConn
	}
	return f
}

// transFlags are the transmission flags of an export (specification,
// "Transmission flags"). READ_ONLY is an attribute of the export; who owns
// the image has no part in it. CAN_MULTI_CONN is the truth because a process
// has one image object per image: caches, drains and flushes are shared by
// all connections. FAST_ZERO is understood everywhere, and fails where it
// would not be fast.
func transFlags(info backend.Info, readOnly, structured bool) uint16 {
	f := wire.TransHasFlags | wire.TransSendFlush | wire.TransSendFUA |
		wire.TransSendCache | wire.TransCanMultiConn
	if info.Rotational {
		f |= wire.TransRotational
	}
	if structured {
		f |= wire.TransSendDF
	}
	if readOnly {
		return f | wire.TransReadOnly
	}
	f |= wire.TransSendWriteZeroes | wire.TransSendFastZero
	if info.CanTrim {
		f |= wire.TransSendTrim
	}
	return f
}

// blockSizes are in bytes (specification, "Size constraints").
type blockSizes struct{ minimum, preferred, maximum uint32 }

// blockSizesOf takes what the image says and keeps it within the rules:
// powers of two, minimum <= 65536, preferred >= 512 and >= minimum, maximum
// >= preferred and no larger than what validation lets pass.
func blockSizesOf(info backend.Info) blockSizes {
	b := blockSizes{
		minimum:   min(powerOfTwo(info.MinBlock, 1), 1<<16),
		preferred: min(powerOfTwo(info.PreferredBlock, 4096), wire.MaxRequestPayload),
		maximum:   info.MaxBlock,
	}
	b.preferred = max(b.preferred, b.minimum, 512)
	if b.maximum == 0 || b.maximum > wire.MaxRequestPayload {
		b.maximum = wire.MaxRequestPayload
	}
	b.maximum = max(b.maximum, b.preferred)
	return b
}

// powerOfTwo rounds n down to a power of two; 0 stands for def.
func powerOfTwo(n, def uint32) uint32 {
	if n == 0 {
		return def
	}
	return 1 << (bits.Len32(n) - 1)
}

// appendInfo adds the payload of one NBD_REP_INFO of type typ. ok is false if
// there is nothing to say of it.
func (f *facts) appendInfo(dst []byte, typ uint16) (b []byte, ok bool) {
	start := binary.BigEndian.AppendUint16(dst, typ)
	switch typ {
	case wire.InfoExport:
		b = binary.BigEndian.AppendUint64(start, uint64(f.size))
		return binary.BigEndian.AppendUint16(b, f.trans), true
	case wire.InfoName:
		return append(start, f.export.Name...), true
	case wire.InfoDescription:
		if f.export.Description != "" {
			return append(start, f.export.Description...), true
		}
	case wire.InfoBlockSize:
		b = binary.BigEndian.AppendUint32(start, f.blocks.minimum)
		b = binary.BigEndian.AppendUint32(b, f.blocks.preferred)
		return binary.BigEndian.AppendUint32(b, f.blocks.maximum), true
	}
	return dst, false
}
