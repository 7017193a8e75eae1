package control

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestSupervisor(t *testing.T) {
	for _, path := range []string{filepath.Join(t.TempDir(), "notify"), "@nbd-export-test-" + filepath.Base(t.TempDir()) + t.Name()} {
		c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("NOTIFY_SOCKET", path)
		s := FindSupervisor()
		if v, ok := os.LookupEnv("NOTIFY_SOCKET"); ok {
			t.Errorf("programs that are started get NOTIFY_SOCKET=%s", v)
		}
		if err := s.Tell("READY=1"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		if n, err := c.Read(b); err != nil || string(b[:n]) != "READY=1" {
			t.Errorf("got %q, %v", b[:n], err)
		}
		_ = c.Close()
		if err := s.Tell("STOPPING=1"); err == nil {
			t.Error("nobody was told, and there was no error")
		}
	}
	if err := (Supervisor{}).Tell("READY=1"); err != nil {
		t.Errorf("nobody to tell: %v", err)
	}
}
