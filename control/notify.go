package control

import (
	"fmt"
	"net"
	"os"
)

// Supervisor is the service manager that wants to know how far the process is:
// systemd, for a unit with Type=notify. Its zero value is nobody.
type Supervisor struct{ path string }

// FindSupervisor finds the one that has started the process, and has programs
// that this starts not talk to it.
func FindSupervisor() Supervisor {
	s := Supervisor{os.Getenv("NOTIFY_SOCKET")}
	_ = os.Unsetenv("NOTIFY_SOCKET")
	return s
}

// Tell sends states, such as "READY=1"; sd_notify(3) lists them.
func (s Supervisor) Tell(states string) error {
	if s.path == "" {
		return nil
	}
	// A name that begins with @ is of the abstract namespace, to Go too.
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: s.path})
	if err == nil {
		_, err = c.Write([]byte(states))
		_ = c.Close()
	}
	if err != nil {
		return fmt.Errorf("the service manager cannot be told %s: %w", states, err)
	}
	return nil
}
