package export

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // short, unlike t.TempDir's
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// abandon leaves a socket file at path as a server that was killed does.
func abandon(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close()
}

func TestListenUnix(t *testing.T) {
	dir := shortDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	live := filepath.Join(dir, "live")
	l, err := ListenUnix(live)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()

	for _, tt := range []struct{ name, path, want string }{
		{"in use", live, "another server is listening there"},
		{"not a socket", file, "not a socket"},
		{"a directory", dir, "not a socket"},
		{"too long", filepath.Join(dir, strings.Repeat("x", 108-len(dir)-1)), "the most is 107"},
		{"no directory", filepath.Join(dir, "none", "sock"), "directory does not exist"},
		{"under a file", filepath.Join(file, "sock"), ": not a directory; choose a path in a directory"},
		{"empty", "", "empty"},
		{"abstract", "@x", "./@x"},
	} {
		l, err := ListenUnix(tt.path)
		if err == nil {
			_ = l.Close()
			t.Errorf("%s: no error", tt.name)
			continue
		}
		if s := err.Error(); !strings.Contains(s, tt.want) || !strings.Contains(s, tt.path) || strings.Contains(s, "\n") {
			t.Errorf("%s: %q", tt.name, s)
		}
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file was touched")
	}
	if l, err := ListenUnix(filepath.Join(dir, strings.Repeat("x", 107-len(dir)-1))); err != nil {
		t.Errorf("107 bytes: %v", err)
	} else {
		_ = l.Close()
	}
}

func TestListenUnixStale(t *testing.T) {
	path := filepath.Join(shortDir(t), "sock")
	abandon(t, path)
	l, err := ListenUnixMode(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	go func() {
		if nc, err := l.Accept(); err == nil {
			_ = nc.Close()
		}
	}()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	_ = nc.Close()
	_ = l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
	_ = l.Close() // again is harmless
}

// A socket file that has taken ours's place is not removed.
func TestListenUnixReplaced(t *testing.T) {
	path := filepath.Join(shortDir(t), "sock")
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the other server's socket: %v", err)
	}
	_ = other.Close()
}

// Of many servers that start at once over a stale file, exactly one wins.
func TestListenUnixRace(t *testing.T) {
	path := filepath.Join(shortDir(t), "sock")
	for range 50 {
		abandon(t, path)
		var wg sync.WaitGroup
		won := make(chan net.Listener, 8)
		for range cap(won) {
			wg.Go(func() {
				if l, err := ListenUnix(path); err == nil {
					won <- l
				}
			})
		}
		wg.Wait()
		if len(won) != 1 {
			t.Fatalf("%d servers listen on one path", len(won))
		}
		if nc, err := net.Dial("unix", path); err != nil {
			t.Fatalf("the winner cannot be reached: %v", err)
		} else {
			_ = nc.Close()
		}
		_ = (<-won).Close()
	}
}

// TestListenTCPWildcard: 0.0.0.0 is every IPv4 address and no other.
func TestListenTCPWildcard(t *testing.T) {
	l, err := ListenTCP("0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if a := l.Addr().(*net.TCPAddr); a.IP.To4() == nil {
		t.Fatalf("listens on %v", a)
	}
}

func TestListenTCP(t *testing.T) {
	l, err := ListenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	for _, tt := range []struct{ address, want string }{
		{l.Addr().String(), "in use"},
		{"192.0.2.1:0", "no such address"},
		{"127.0.0.1:99999", "invalid port"},
	} {
		if _, err := ListenTCP(tt.address); err == nil || !strings.Contains(err.Error(), tt.want) ||
			!strings.Contains(err.Error(), tt.address) {
			t.Errorf("%s: %v", tt.address, err)
		}
	}
}
