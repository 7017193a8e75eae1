package client

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
)

// link is a connection in the transmission phase.
type link struct {
	nc      net.Conn
	info    Info
	context uint32 // id of base:allocation, if info.Allocation
}

// sendBuffer is what clients ask for on Unix sockets, in bytes, as QEMU does from
// 10.1 on, and libnbd from 1.22.4. TCP finds its size itself.
const sendBuffer = 2 << 20

// connect opens a connection, with ctx bounding what run does on it.
func connect(ctx context.Context, uri string, run func(nc net.Conn, t Target) error) (net.Conn, error) {
	t, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	var dialer net.Dialer
	nc, err := dialer.DialContext(ctx, t.Network, t.Address)
	if err != nil {
		return nil, err
	}
	if u, ok := nc.(*net.UnixConn); ok {
		// A large request then fits the socket whole. A smaller buffer than asked
		// for (net.core.wmem_max) is only slower.
		_ = u.SetWriteBuffer(sendBuffer)
	}
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	err = run(nc, t)
	if !stop() && err != nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = nc.SetDeadline(time.Time{})
	}
	if err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("%s: %w", uri, err)
	}
	return nc, nil
}

func dial(ctx context.Context, uri string, opt Options) (*link, error) {
	var l link
	var err error
	l.nc, err = connect(ctx, uri, func(nc net.Conn, t Target) error {
		s := shaker{rw: nc}
		l.info, err = s.enter(t.Export, opt)
		l.context = s.context
		return err
	})
	if err != nil {
		return nil, err
	}
	return &l, nil
}

func (l *link) decoder(r requests) decoder {
	return decoder{reqs: r, structured: l.info.Structured, context: l.context, hasContext: l.info.Allocation}
}

// partTime is how long a goodbye may take.
const partTime = time.Second

// part says goodbye; the server then closes. The caller bounds the time.
func (l *link) part() {
	var head [wire.RequestSize]byte
	putRequest(head[:], wire.CmdDisc, 0, 0, 0, 0)
	_, _ = l.nc.Write(head[:])
}

// List asks a server for its exports. The URI's export name is not used.
// Servers may forbid listing: an *OptionError.
func List(ctx context.Context, uri string) ([]Export, error) {
	var exports []Export
	nc, err := connect(ctx, uri, func(nc net.Conn, _ Target) (err error) {
		exports, err = (&shaker{rw: nc}).list()
		return err
	})
	if err != nil {
		return nil, err
	}
	return exports, nc.Close()
}
