package export

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// conn is one client of a Server, from accept to close.
//
// It recovers from no panic: bad input has none to offer, so a panic is a
// broken invariant, and a process that owns a disk must not go on after one.
type conn struct {
	srv      *Server
	number   uint64   // in the order of arrival
	nc       net.Conn // below TLS
	remote   string
	since    time.Time
	deadline time.Time // of the handshake; zero means none

	export *Export // under srv.mu; nil during the handshake
}

func (c *conn) run() {
	defer c.srv.ended(c)
	log := c.srv.log
	a, err := c.handshake()
	if err != nil {
		_ = c.nc.Close()
		log.Check(handshakeLevel(err), "no handshake").
			Write(zap.String("client", c.remote), zap.String("reason", reason(err)))
		return
	}
	c.transmit()

	name := zap.String("export", a.export.Name)
	client := zap.String("client", c.remote)
	stream := c.nc
	if a.secure == nil {
		log.Info("client connected", client, name)
	} else {
		// c.nc stays what it was: closing TLS waits to say goodbye.
		stream = a.secure
		log.Info("client connected over TLS", client, name, zap.String("certificate", a.certificate()))
	}
	codec := newCodec(a.terms)
	err = c.srv.Mover.Serve(stream, codec, a.export.Disk)
	if err == nil {
		err = codec.ended()
	}
	if err != nil {
		log.Info("client disconnected", client, name, zap.String("reason", reason(err)))
		return
	}
	log.Info("client disconnected", client, name)
}

// handshake runs in a frame of its own, so that its buffers are garbage when
// the transmission phase starts.
func (c *conn) handshake() (agreement, error) {
	h := handshake{
		conn:     c.nc,
		exports:  c.srv.Exports,
		stopping: c.srv.isStopping,
		enter:    c.enter,
		alone:    c.srv.Shared == 1,
		tls:      c.srv.TLS,
	}
	return h.run()
}

// enter makes c a connection of e, unless the server is stopping or e has
// been removed: from here on Shutdown and Disconnect find it.
func (c *conn) enter(e *Export) error {
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	if c.srv.stopping {
		return errStopping
	}
	if c.srv.Exports.Lookup(e.Name) != e {
		return errGone
	}
	c.export = e
	return nil
}

// transmit lifts the deadline of the handshake.
func (c *conn) transmit() {
	c.srv.mu.Lock()
	defer c.srv.mu.Unlock()
	_ = c.nc.SetDeadline(time.Time{})
	if c.srv.stopping {
		c.endInput()
	}
}

// hurry ends the handshake soon. Called under srv.mu.
func (c *conn) hurry() {
	soon := time.Now().Add(shutdownGrace)
	if c.deadline.IsZero() || soon.Before(c.deadline) {
		c.deadline = soon
		_ = c.nc.SetDeadline(soon)
	}
}

// endInput makes the connection's reader see the end of the stream, after
// what has arrived; replies can still be sent. Called under srv.mu.
func (c *conn) endInput() {
	if h, ok := c.nc.(interface{ CloseRead() error }); ok {
		_ = h.CloseRead()
		return
	}
	_ = c.nc.SetReadDeadline(time.Unix(1, 0))
}

// tune sets what a TCP connection needs: small replies at once (the
// specification's SHOULD), and an end for clients whose host is gone.
func tune(nc net.Conn) {
	t, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	_ = t.SetNoDelay(true)
	_ = t.SetKeepAliveConfig(net.KeepAliveConfig{
		Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 6,
	})
}

// remoteName is what logs and status call a client.
func remoteName(nc net.Conn) string {
	if u, ok := nc.(*net.UnixConn); ok {
		if raw, err := u.SyscallConn(); err == nil {
			var cred *unix.Ucred
			_ = raw.Control(func(fd uintptr) {
				cred, _ = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
			})
			if cred != nil {
				return fmt.Sprintf("unix pid %d", cred.Pid)
			}
		}
		return "unix"
	}
	if a := nc.RemoteAddr(); a != nil {
		return a.String()
	}
	return "unknown"
}

// quiet reports whether err is a client that just left, or was cut off by us.
func quiet(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// handshakeLevel of the line for a handshake that came to nothing: probes and
// listings are everyday, clients that do wrong are worth a line.
func handshakeLevel(err error) zapcore.Level {
	if quiet(err) || errors.Is(err, errAbort) || errors.Is(err, errStopping) {
		return zap.DebugLevel
	}
	return zap.InfoLevel
}

// reason words err, which ended a connection, for a log line.
func reason(err error) string {
	switch {
	case errors.Is(err, net.ErrClosed):
		return "closed by the server"
	case quiet(err):
		return "the client left: " + err.Error()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "time is up"
	}
	return err.Error()
}
