package main

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/export/wire"
)

// limitConn is a connection in transmission: one receive, many requests, one
// send, on Go's netpoller.
type limitConn struct {
	raw    syscall.RawConn
	in     []byte
	have   int  // bytes of in not yet parsed
	skip   int  // payload bytes still to come and to be forgotten
	owed   bool // the reply to the write they belong to
	cookie [8]byte
	heads  []byte
	iov    []unix.Iovec
	sent   int // of iov
	queued int // bytes of iov
	n      int // of the last receive
	err    error
}

func newLimitConn(nc net.Conn) *limitConn {
	raw, err := nc.(syscall.Conn).SyscallConn()
	if u, ok := nc.(*net.UnixConn); ok {
		_ = u.SetWriteBuffer(deepBuffer)
	}
	return &limitConn{
		raw: raw, err: err, in: make([]byte, limitInput),
		heads: make([]byte, 0, limitInput), iov: make([]unix.Iovec, 0, 1024),
	}
}

func (c *limitConn) serve() error {
	for c.err == nil {
		if err := c.raw.Read(c.receive); err != nil {
			return err
		}
		c.parse(c.in[:c.have+c.n])
		c.flush()
	}
	return c.err
}

// receive takes what is there. If there is nothing it looks again for a while,
// if this is the only connection, and then has the netpoller wait.
func (c *limitConn) receive(fd uintptr) bool {
	var begin time.Time
	for {
		n, _, errno := syscall.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&c.in[c.have])),
			uintptr(len(c.in)-c.have), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case errno == syscall.EINTR:
		case errno == syscall.EAGAIN:
			if limitConns.Load() > 1 {
				return false
			}
			if begin.IsZero() {
				begin = time.Now()
			} else if time.Since(begin) > limitSpin {
				return false
			}
		case errno != 0:
			c.err = errno
			return true
		case n == 0:
			c.err = io.EOF
			return true
		default:
			c.n = int(n)
			return true
		}
	}
}

// parse answers every request of b, and keeps what is incomplete.
func (c *limitConn) parse(b []byte) {
	be := binary.BigEndian
	for c.err == nil {
		n := min(c.skip, len(b))
		b, c.skip = b[n:], c.skip-n
		if c.owed && c.skip == 0 {
			c.owed = false
			errno := syscall.Errno(0)
			if limitRefuses.Load() {
				errno = syscall.EPERM
			}
			c.reply(c.cookie[:], errno)
		}
		if c.queued >= limitOutput || len(c.iov)+64 > cap(c.iov) {
			c.flush()
		}
		if len(b) < wire.RequestSize {
			break
		}
		head := b[:wire.RequestSize]
		b = b[wire.RequestSize:]
		if be.Uint32(head) != wire.MagicRequest {
			c.err = errors.New("bad request")
			return
		}
		length := int(be.Uint32(head[24:]))
		switch be.Uint16(head[6:]) {
		case wire.CmdRead:
			c.reply(head[8:16], 0)
			for ; length > 0; length -= limitPayload {
				c.push(limitConst[:min(length, limitPayload)])
			}
		case wire.CmdWrite:
			c.skip, c.owed = length, true
			copy(c.cookie[:], head[8:])
		case wire.CmdDisc:
			c.flush()
			c.err = io.EOF
			return
		default:
			c.reply(head[8:16], 0)
		}
	}
	c.have = copy(c.in, b)
}

// reply queues a header; errno is 0 if all is well.
func (c *limitConn) reply(cookie []byte, errno syscall.Errno) {
	at := len(c.heads)
	c.heads = binary.BigEndian.AppendUint32(c.heads, wire.MagicSimpleReply)
	c.heads = binary.BigEndian.AppendUint32(c.heads, uint32(errno))
	c.heads = append(c.heads, cookie...)
	c.push(c.heads[at:])
}

func (c *limitConn) push(p []byte) {
	c.iov = append(c.iov, unix.Iovec{Base: &p[0]})
	c.iov[len(c.iov)-1].SetLen(len(p))
	c.queued += len(p)
}

// flush sends what is queued.
func (c *limitConn) flush() {
	if c.err != nil || len(c.iov) == 0 {
		return
	}
	if err := c.raw.Write(c.send); err != nil && c.err == nil {
		c.err = err
	}
	c.iov, c.heads, c.sent, c.queued = c.iov[:0], c.heads[:0], 0, 0
}

func (c *limitConn) send(fd uintptr) bool {
	for c.sent < len(c.iov) {
		msg := unix.Msghdr{Iov: &c.iov[c.sent]}
		msg.SetIovlen(len(c.iov) - c.sent)
		n, _, errno := syscall.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&msg)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
			c.advance(int(n))
		case syscall.EAGAIN:
			return false
		case syscall.EINTR:
		default:
			c.err = os.NewSyscallError("send", errno)
			return true
		}
	}
	return true
}

// advance forgets the first n bytes of what is queued.
func (c *limitConn) advance(n int) {
	for n > 0 {
		v := &c.iov[c.sent]
		if n < int(v.Len) {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.SetLen(int(v.Len) - n)
			return
		}
		n -= int(v.Len)
		c.sent++
	}
}
