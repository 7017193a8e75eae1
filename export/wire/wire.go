// Package wire is the vocabulary of the NBD protocol beyond what go-nbd's
// protocol package names: flags, options, structured replies, errors. Names
// follow doc/proto.md of the NBD project. The server (package export) and
// the client (package client) share it; it does no I/O.
package wire

import "github.com/pojntfx/go-nbd/pkg/protocol"

// Magics.
const (
	MagicInit            = protocol.NEGOTIATION_MAGIC_OLDSTYLE // "NBDMAGIC"
	MagicOption          = protocol.NEGOTIATION_MAGIC_OPTION   // "IHAVEOPT"
	MagicOptionReply     = protocol.NEGOTIATION_MAGIC_REPLY
	MagicRequest         = protocol.TRANSMISSION_MAGIC_REQUEST
	MagicSimpleReply     = protocol.TRANSMISSION_MAGIC_REPLY
	MagicStructuredReply = uint32(0x668e33ef)
)

// Handshake flags, server and client.
const (
	FlagFixedNewstyle       = protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE
	FlagNoZeroes            = uint16(1 << 1)
	FlagClientFixedNewstyle = uint32(1 << 0)
	FlagClientNoZeroes      = uint32(1 << 1)
)

// Options.
const (
	OptExportName      = uint32(1)
	OptAbort           = protocol.NEGOTIATION_ID_OPTION_ABORT
	OptList            = protocol.NEGOTIATION_ID_OPTION_LIST
	OptStartTLS        = uint32(5)
	OptInfo            = protocol.NEGOTIATION_ID_OPTION_INFO
	OptGo              = protocol.NEGOTIATION_ID_OPTION_GO
	OptStructuredReply = uint32(8)
	OptListMetaContext = uint32(9)
	OptSetMetaContext  = uint32(10)
	OptExtendedHeaders = uint32(11)
)

// Option replies.
const (
	RepAck         = protocol.NEGOTIATION_TYPE_REPLY_ACK
	RepServer      = protocol.NEGOTIATION_TYPE_REPLY_SERVER
	RepInfo        = protocol.NEGOTIATION_TYPE_REPLY_INFO
	RepMetaContext = uint32(4)

	RepFlagError        = uint32(1 << 31)
	RepErrUnsup         = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED
	RepErrPolicy        = uint32(2) | RepFlagError
	RepErrInvalid       = uint32(3) | RepFlagError
	RepErrPlatform      = uint32(4) | RepFlagError
	RepErrTLSReqd       = uint32(5) | RepFlagError
	RepErrUnknown       = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN
	RepErrShutdown      = uint32(7) | RepFlagError
	RepErrBlockSizeReqd = uint32(8) | RepFlagError
	RepErrTooBig        = uint32(9) | RepFlagError
	RepErrExtHeaderReqd = uint32(10) | RepFlagError
)

// Info types of OptInfo and OptGo.
const (
	InfoExport      = protocol.NEGOTIATION_TYPE_INFO_EXPORT
	InfoName        = protocol.NEGOTIATION_TYPE_INFO_NAME
	InfoDescription = protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION
	InfoBlockSize   = protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE
)

// Transmission flags.
const (
	TransHasFlags        = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS
	TransReadOnly        = uint16(1 << 1)
	TransSendFlush       = uint16(1 << 2)
	TransSendFUA         = uint16(1 << 3)
	TransRotational      = uint16(1 << 4)
	TransSendTrim        = uint16(1 << 5)
	TransSendWriteZeroes = uint16(1 << 6)
	TransSendDF          = uint16(1 << 7)
	TransCanMultiConn    = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
	TransSendResize      = uint16(1 << 9)
	TransSendCache       = uint16(1 << 10)
	TransSendFastZero    = uint16(1 << 11)
)

// Commands.
const (
	CmdRead        = protocol.TRANSMISSION_TYPE_REQUEST_READ
	CmdWrite       = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	CmdDisc        = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	CmdFlush       = uint16(3)
	CmdTrim        = uint16(4)
	CmdCache       = uint16(5)
	CmdWriteZeroes = uint16(6)
	CmdBlockStatus = uint16(7)
)

// Command flags.
const (
	CmdFlagFUA      = uint16(1 << 0)
	CmdFlagNoHole   = uint16(1 << 1)
	CmdFlagDF       = uint16(1 << 2)
	CmdFlagReqOne   = uint16(1 << 3)
	CmdFlagFastZero = uint16(1 << 4)
)

// Structured reply chunks.
const (
	ReplyFlagDone = uint16(1 << 0)

	ReplyNone        = uint16(0)
	ReplyOffsetData  = uint16(1)
	ReplyOffsetHole  = uint16(2)
	ReplyBlockStatus = uint16(5)
	ReplyErrorBit    = uint16(1 << 15)
	ReplyError       = ReplyErrorBit | 1
	ReplyErrorOffset = ReplyErrorBit | 2
)

// Errors on the wire: the only values a reply may carry.
const (
	EPERM     = protocol.TRANSMISSION_ERROR_EPERM
	EIO       = uint32(5)
	ENOMEM    = uint32(12)
	EINVAL    = protocol.TRANSMISSION_ERROR_EINVAL
	ENOSPC    = uint32(28)
	EOVERFLOW = uint32(75)
	ENOTSUP   = uint32(95)
	ESHUTDOWN = uint32(108)
)

// base:allocation.
const (
	NamespaceBase         = "base:" // as a query: every context of the namespace
	ContextBaseAllocation = "base:allocation"
	StateHole             = uint32(1 << 0)
	StateZero             = uint32(1 << 1)
)

// qemu:dirty-bitmap:NAME, a dirty bitmap (QEMU's docs/interop/nbd.rst).
const (
	NamespaceQEMU      = "qemu:"
	ContextDirtyBitmap = "qemu:dirty-bitmap:" // alone as a query: all of them
	StateDirty         = uint32(1 << 0)
)

// Sizes of fixed wire structures, in bytes, and limits of the protocol.
const (
	RequestSize         = 28
	SimpleReplySize     = 16
	StructuredReplySize = 20
	OptionSize          = 16
	OptionReplySize     = 20

	MaxString         = 4096             // any string of the protocol
	MaxRequestPayload = 32 * 1024 * 1024 // largest READ or WRITE, in bytes
)
