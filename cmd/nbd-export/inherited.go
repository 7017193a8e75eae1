package main

import (
	"errors"
	"fmt"
	"net"

	"github.com/nbd-export/nbd-export/control"
)

// inherited are sockets that the process was started with.
type inherited struct {
	nbd     []net.Listener
	control net.Listener // nil for none
}

// inheritSockets takes them: the one called control for orders, all others for
// NBD. flag is what --control says.
func inheritSockets(flag string) (i inherited, err error) {
	all, err := control.InheritedSockets()
	if err != nil {
		return inherited{}, err
	}
	defer func() {
		if err != nil {
			for _, s := range all {
				_ = s.Listener.Close()
			}
		}
	}()
	for _, s := range all {
		switch {
		case s.Name != "control":
			i.nbd = append(i.nbd, s.Listener)
		case i.control != nil:
			return inherited{}, errors.New("two of the sockets that the server was started with are called control")
		case s.Listener.Addr().Network() != "unix":
			return inherited{}, fmt.Errorf("the socket called control is %s; orders come over a Unix socket only", s.Listener.Addr())
		case flag != "":
			return inherited{}, fmt.Errorf("--control %s: the server was started with a socket called control; leave --control out", flag)
		default:
			i.control = s.Listener
		}
	}
	return i, nil
}

func (i inherited) empty() bool { return len(i.nbd) == 0 && i.control == nil }

// controlPath is where the control socket is, "" if none was inherited.
func (i inherited) controlPath() string {
	if i.control == nil {
		return ""
	}
	return i.control.Addr().String()
}
