package main

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
)

// The limit server answers from a constant buffer and forgets what is written:
// the sockets and the protocol without any file. What it reaches, a server that
// copies cannot beat. It is this program, started with limitArg, so that its
// processor time is its own.

const limitArg = "limit-server"

const (
	limitPayload = 1 << 20   // of the constant buffer; longer replies repeat it
	limitInput   = 256 << 10 // received at most at once
	limitOutput  = 256 << 10 // replies collected before a send
	limitSpin    = 50 * time.Microsecond
)

var (
	limitConns atomic.Int32
	limitConst [limitPayload]byte
)

// runLimit serves an export of a size on an address until killed.
func runLimit(args []string) error {
	if len(args) != 3 {
		return errors.New("want unix|tcp, an address and a size")
	}
	size, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return err
	}
	l, err := net.Listen(args[0], args[1])
	if err != nil {
		return err
	}
	return serveLimit(l, size)
}

// serveLimit serves until l is closed.
func serveLimit(l net.Listener, size int64) error {
	for i := range limitConst {
		limitConst[i] = byte(i * 7)
	}
	for {
		nc, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer nc.Close()
			if err := limitHandshake(nc, size); err != nil {
				return
			}
			limitConns.Add(1)
			defer limitConns.Add(-1)
			_ = newLimitConn(nc).serve()
		}()
	}
}

// limitHandshake returns when the client enters transmission.
func limitHandshake(nc net.Conn, size int64) error {
	const flags = wire.TransHasFlags | wire.TransSendFlush | wire.TransSendFUA | wire.TransCanMultiConn
	be := binary.BigEndian
	hello := be.AppendUint64(be.AppendUint64(nil, wire.MagicInit), wire.MagicOption)
	if _, err := nc.Write(be.AppendUint16(hello, wire.FlagFixedNewstyle|wire.FlagNoZeroes)); err != nil {
		return err
	}
	var head [wire.OptionSize]byte
	if _, err := io.ReadFull(nc, head[:4]); err != nil {
		return err
	}
	for {
		if _, err := io.ReadFull(nc, head[:]); err != nil {
			return err
		}
		opt, length := be.Uint32(head[8:]), be.Uint32(head[12:])
		if be.Uint64(head[:]) != wire.MagicOption || length > 1<<16 {
			return errors.New("bad option")
		}
		if _, err := io.CopyN(io.Discard, nc, int64(length)); err != nil {
			return err
		}
		reply := func(kind uint32, data []byte) error {
			b := be.AppendUint64(nil, wire.MagicOptionReply)
			b = be.AppendUint32(be.AppendUint32(be.AppendUint32(b, opt), kind), uint32(len(data)))
			_, err := nc.Write(append(b, data...))
			return err
		}
		export := be.AppendUint16(be.AppendUint64(nil, uint64(size)), flags)
		switch opt {
		case wire.OptExportName:
			_, err := nc.Write(export)
			return err
		case wire.OptAbort:
			return errors.Join(reply(wire.RepAck, nil), io.EOF)
		case wire.OptInfo, wire.OptGo:
			info := append(be.AppendUint16(nil, wire.InfoExport), export...)
			if err := errors.Join(reply(wire.RepInfo, info), reply(wire.RepAck, nil)); err != nil || opt == wire.OptGo {
				return err
			}
		default:
			if err := reply(wire.RepErrUnsup, nil); err != nil {
				return err
			}
		}
	}
}
