package control

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// firstInherited is the first descriptor that a service manager passes on.
const firstInherited = 3

// InheritedSocket listens, and somebody else made it: systemd (see
// sd_listen_fds(3)), or a client of libnbd that starts a server for itself.
// Closing the listener leaves the socket's file to who made it.
type InheritedSocket struct {
	Name     string // FileDescriptorName= of systemd's, or ""
	Listener net.Listener
}

// InheritedSockets takes the sockets that the process was started with, none in
// most cases, and has programs that it starts not take them for theirs. Call it
// once. An error leaves none open.
func InheritedSockets() ([]InheritedSocket, error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name)
	}
	// Those of another process, as of one that has started this, are not meant.
	if count == "" || pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > 1024 {
		return nil, fmt.Errorf("LISTEN_FDS is %q, which is no number of sockets; start the server by a socket unit, or without LISTEN_FDS", count)
	}
	return inherit(firstInherited, n, strings.Split(names, ":"))
}

// inherit takes the descriptors first to first+n-1.
func inherit(first, n int, names []string) (all []InheritedSocket, err error) {
	for i := range n {
		s, e := inheritOne(first + i)
		if i < len(names) {
			s.Name = names[i]
		}
		if e != nil {
			err = errors.Join(err, fmt.Errorf("descriptor %d of LISTEN_FDS: %w", first+i, e))
			continue
		}
		all = append(all, s)
	}
	if err != nil {
		for _, s := range all {
			_ = s.Listener.Close()
		}
		return nil, err
	}
	return all, nil
}

func inheritOne(fd int) (InheritedSocket, error) {
	listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil && !errors.Is(err, unix.ENOTSOCK) {
		return InheritedSocket{}, err // as it is not open: none of ours to close
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close() // the listener has its own
	switch {
	case err != nil:
		return InheritedSocket{}, errors.New("it is no socket")
	case listens == 0:
		return InheritedSocket{}, errors.New("it does not listen; a socket unit for this server is a stream, with Accept=no")
	}
	l, err := net.FileListener(f)
	return InheritedSocket{Listener: l}, err
}
