package control

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// spare duplicates the descriptor of f, at a number above those in use, for
// inherit to take; the next ones are free.
func spare(t *testing.T, f *os.File) int {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 200)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func listenerFile(t *testing.T, path string) *os.File {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestInheritedSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	all, err := inherit(spare(t, listenerFile(t, path)), 1, []string{"disk"})
	if err != nil || len(all) != 1 || all[0].Name != "disk" || all[0].Listener.Addr().String() != path {
		t.Fatalf("got %v, %v", all, err)
	}
	accepted := make(chan error, 1)
	go func() {
		nc, err := all[0].Listener.Accept()
		if err == nil {
			_ = nc.Close()
		}
		accepted <- err
	}()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	_ = nc.Close()
	if err := <-accepted; err != nil {
		t.Error(err)
	}
	_ = all[0].Listener.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket's file is not ours to remove: %v", err)
	}
}

// What is no listening socket is refused with what to do, and closed; what is
// not open is nobody's.
func TestInheritedIsNoListener(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	connected, peer := os.NewFile(uintptr(pair[0]), "a"), os.NewFile(uintptr(pair[1]), "b")
	defer connected.Close()
	defer peer.Close()
	file, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for want, f := range map[string]*os.File{"Accept=no": connected, "no socket": file} {
		fd := spare(t, f)
		all, err := inherit(fd, 1, nil)
		if err == nil || !strings.Contains(err.Error(), want) || len(all) != 0 {
			t.Errorf("want %q, got %v, %v", want, all, err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
			t.Errorf("%s: descriptor %d is still open: %v", want, fd, err)
		}
	}
	fd := spare(t, file)
	_ = unix.Close(fd)
	if _, err := inherit(fd, 1, nil); err == nil {
		t.Error("a descriptor that is not open was taken")
	}
}

func TestInheritedEnvironment(t *testing.T) {
	for _, c := range []struct {
		pid, fds string
		wrong    bool
	}{
		{"", "", false},
		{strconv.Itoa(os.Getpid()), "", false},
		{strconv.Itoa(os.Getpid() + 1), "1", false}, // somebody else's
		{strconv.Itoa(os.Getpid()), "0", false},
		{strconv.Itoa(os.Getpid()), "some", true},
		{strconv.Itoa(os.Getpid()), "-1", true},
		{strconv.Itoa(os.Getpid()), "99999999", true},
	} {
		t.Setenv("LISTEN_PID", c.pid)
		t.Setenv("LISTEN_FDS", c.fds)
		t.Setenv("LISTEN_FDNAMES", "a")
		all, err := InheritedSockets()
		if len(all) != 0 || (err != nil) != c.wrong {
			t.Errorf("%+v: got %v, %v", c, all, err)
		}
		for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
			if v, ok := os.LookupEnv(name); ok {
				t.Errorf("%+v: programs that are started get %s=%s", c, name, v)
			}
		}
	}
}
