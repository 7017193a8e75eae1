package client

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/nbd-export/nbd-export/export/wire"
	"golang.org/x/sys/unix"
)

// The null server answers every read with the same bytes and throws writes
// away: what is left is the cost of the client and the socket. It is a process
// of its own so that the client's processor time can be told from its.

const nullServerEnv = "NBD_EXPORT_TEST_NULL_SERVER"

func TestMain(m *testing.M) {
	if path := os.Getenv(nullServerEnv); path != "" {
		nullServer(path)
		return
	}
	os.Exit(m.Run())
}

// startNullServer runs a null server until the test ends.
func startNullServer(t testing.TB) (uri string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), nullServerEnv+"="+path)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for range 3000 {
		if nc, err := net.Dial("unix", path); err == nil {
			_ = nc.Close()
			return UnixURI(path, "")
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("null server did not start")
	return ""
}

func nullServer(path string) {
	l, err := net.Listen("unix", path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer nc.Close()
			if structured, ok := nullHandshake(nc); ok {
				raw, _ := nc.(*net.UnixConn).SyscallConn()
				n := &null{in: make([]byte, 64<<10), data: make([]byte, 4<<20), structured: structured}
				_ = raw.Read(n.serve)
			}
		}()
	}
}

// nullHandshake is the least that this package's handshake needs.
func nullHandshake(nc net.Conn) (structured, ok bool) {
	f := fakeServer{Conn: nc, size: 1 << 40, flags: wire.TransHasFlags | wire.TransSendFlush | wire.TransSendFUA | wire.TransCanMultiConn}
	err := f.handshake()
	return f.structured, err == nil
}

type null struct {
	in         []byte
	have, skip int
	data       []byte
	heads      []byte
	iov        []unix.Iovec
	msg        unix.Msghdr
	structured bool
}

// serve answers what has come; false waits for more.
func (s *null) serve(fd uintptr) bool {
	for {
		r, _, e := syscall.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&s.in[s.have])), uintptr(len(s.in)-s.have))
		if e == syscall.EAGAIN {
			return false
		}
		if e != 0 || r == 0 {
			return true
		}
		s.have += int(r)
		s.iov, s.heads = s.iov[:0], s.heads[:0]
		if cap(s.heads) == 0 {
			s.heads = make([]byte, 0, 1<<20)
		}
		at := 0
		for {
			if s.skip > 0 {
				n := min(s.skip, s.have-at)
				s.skip -= n
				at += n
			}
			b := s.in[at:s.have]
			if s.skip > 0 || len(b) < wire.RequestSize {
				break
			}
			at += wire.RequestSize
			length := int(binary.BigEndian.Uint32(b[24:]))
			switch binary.BigEndian.Uint16(b[6:]) {
			case wire.CmdWrite:
				s.skip = length
				s.reply(b, 0)
			case wire.CmdRead:
				s.reply(b, length)
			case wire.CmdDisc:
				return true
			default:
				s.reply(b, 0)
			}
		}
		s.have = copy(s.in, s.in[at:s.have])
		if !s.send(fd) {
			return true
		}
	}
}

func (s *null) reply(req []byte, length int) {
	at := len(s.heads)
	if s.structured && length > 0 {
		s.heads = binary.BigEndian.AppendUint32(s.heads, wire.MagicStructuredReply)
		s.heads = binary.BigEndian.AppendUint16(s.heads, wire.ReplyFlagDone)
		s.heads = binary.BigEndian.AppendUint16(s.heads, wire.ReplyOffsetData)
		s.heads = append(s.heads, req[8:16]...)
		s.heads = binary.BigEndian.AppendUint32(s.heads, uint32(length+8))
		s.heads = append(s.heads, req[16:24]...)
	} else {
		s.heads = binary.BigEndian.AppendUint32(s.heads, wire.MagicSimpleReply)
		s.heads = binary.BigEndian.AppendUint32(s.heads, 0)
		s.heads = append(s.heads, req[8:16]...)
	}
	v := unix.Iovec{Base: &s.heads[at]}
	v.SetLen(len(s.heads) - at)
	s.iov = append(s.iov, v)
	if length > 0 {
		v = unix.Iovec{Base: &s.data[0]}
		v.SetLen(length)
		s.iov = append(s.iov, v)
	}
}

func (s *null) send(fd uintptr) bool {
	iov := s.iov
	for len(iov) > 0 {
		s.msg.Iov = &iov[0]
		s.msg.SetIovlen(min(len(iov), 1024))
		r, _, e := syscall.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&s.msg)), unix.MSG_NOSIGNAL)
		if e == syscall.EAGAIN {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
			_, _ = unix.Poll(fds, -1)
			continue
		}
		if e != 0 {
			return false
		}
		n := int(r)
		for n > 0 {
			if n < int(iov[0].Len) {
				iov[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(iov[0].Base), n))
				iov[0].SetLen(int(iov[0].Len) - n)
				break
			}
			n -= int(iov[0].Len)
			iov = iov[1:]
		}
	}
	return true
}
