package export

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is the longest path of a Unix socket on Linux, in bytes.
const maxSocketPath = 107

// ListenTCP listens on address, which is "host:port" or ":port".
func ListenTCP(address string) (net.Listener, error) { return ListenTCPFamily("tcp", address) }

// ListenTCPFamily is ListenTCP for one family of addresses: network is "tcp4",
// "tcp6", or "tcp" for both. An IPv4 address is of its own family in any case:
// Go takes 0.0.0.0 for every address of the host, and who wrote that would serve
// on IPv6 too, where no rule of his firewall may be.
func ListenTCPFamily(network, address string) (net.Listener, error) {
	if host, _, err := net.SplitHostPort(address); err == nil && network == "tcp" {
		if a, err := netip.ParseAddr(host); err == nil && a.Is4() {
			network = "tcp4"
		}
	}
	l, err := net.Listen(network, address)
	dns, unresolved := errors.AsType[*net.DNSError](err)
	switch {
	case unresolved:
		return nil, fmt.Errorf("cannot listen on TCP %s: cannot resolve %s: %s; give an address of this host", address, dns.Name, dns.Err)
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("cannot listen on TCP %s: the port is in use; choose another, or stop the server that has it", address)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("cannot listen on TCP %s: no such address on this host", address)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("cannot listen on TCP %s: permission denied; ports below 1024 need privileges", address)
	case err != nil:
		return nil, fmt.Errorf("cannot listen on TCP %s: %w", address, err)
	}
	return l, nil
}

// ListenUnix listens on a Unix socket at path. A socket file that a dead
// server left there is replaced; a live server, or a file that is not a
// socket, is an error. Closing the listener removes the file, if it is still
// its own. The permissions are what the umask leaves.
func ListenUnix(path string) (net.Listener, error) { return ListenUnixMode(path, 0o777) }

// ListenUnixMode is ListenUnix with the permissions of the socket file, less
// the umask. At no moment is the file there with more.
func ListenUnixMode(path string, mode fs.FileMode) (net.Listener, error) {
	fail := func(format string, args ...any) (net.Listener, error) {
		return nil, fmt.Errorf("cannot listen on Unix socket %s: "+format, append([]any{path}, args...)...)
	}
	switch {
	case path == "":
		return nil, errors.New("cannot listen on a Unix socket: the path is empty")
	case len(path) > maxSocketPath:
		return fail("the path has %d bytes, the most is %d; choose a shorter one", len(path), maxSocketPath)
	case path[0] == '@':
		return fail("a path that starts with @ is not a file; write ./%s", path)
	}
	defer lockDirectory(filepath.Dir(path))()

	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != fs.ModeSocket {
			return fail("a file that is not a socket is there; choose another path")
		}
		switch err := probe(path); {
		case err == nil:
			return fail("another server is listening there; stop it or choose another path")
		case errors.Is(err, syscall.ECONNREFUSED):
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fail("a dead server left it, and it cannot be removed: %w", err)
			}
		case errors.Is(err, fs.ErrNotExist): // its server stopped just now
		case errors.Is(err, fs.ErrPermission):
			return fail("a socket of another user is there; choose another path")
		default:
			return fail("something is there that cannot be reached: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fail("%w; choose a path in a directory that the user that runs nbd-export may use", errors.Unwrap(err))
	}

	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		// The socket's own mode is what bind gives the file.
		if e := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), uint32(mode.Perm())) }); e != nil {
			err = e
		}
		return err
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fail("its directory does not exist; make it or choose another path")
	case errors.Is(err, syscall.EADDRINUSE):
		return fail("another server has just taken it; stop it or choose another path")
	case errors.Is(err, fs.ErrPermission):
		return fail("permission denied; choose a directory in which the user that runs nbd-export may write")
	case errors.Is(err, syscall.EROFS):
		return fail("its file system is read-only; choose another path")
	case err != nil:
		return fail("%w", errors.Unwrap(err))
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false)
	st, err := os.Lstat(path)
	if err != nil {
		_ = u.Close()
		return fail("it has vanished: %w", err)
	}
	return &unixListener{UnixListener: u, path: path, file: st}, nil
}

// probe connects to the socket at path. EAGAIN, a full backlog, is life too.
func probe(path string) error {
	nc, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = nc.Close()
		return nil
	}
	if errors.Is(err, syscall.EAGAIN) || errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// lockDirectory keeps servers that start at the same moment from taking each
// other's new socket for a dead one's. It is advisory and best effort: where
// the lock cannot be had soon, life goes on without it.
func lockDirectory(dir string) (unlock func()) {
	f, err := os.Open(dir)
	if err != nil {
		return func() {}
	}
	for range 1000 {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK && err != unix.EINTR {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return func() { _ = f.Close() }
}

// unixListener removes its socket file when it is closed, unless another
// server's has taken its place.
type unixListener struct {
	*net.UnixListener
	path string
	file os.FileInfo
	once sync.Once
}

func (l *unixListener) Close() error {
	l.once.Do(func() {
		if st, err := os.Lstat(l.path); err == nil && os.SameFile(st, l.file) {
			_ = os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}
