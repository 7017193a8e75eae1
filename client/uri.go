package client

import (
	"fmt"
	"net"
	"net/url"
	"strings"
)

// DefaultPort is the TCP port of NBD, used where a URI names none.
const DefaultPort = "10809"

// Target is where a URI leads: a server and the name of one of its exports.
type Target struct {
	Network string // "tcp" or "unix"
	Address string // host:port, or the path of the socket
	Export  string // "" is the server's default export
}

// ParseURI understands nbd://host[:port]/name and nbd+unix:///name?socket=PATH.
// Host, name and path may be percent-encoded. TLS URIs (nbds, nbds+unix) are an
// error.
func ParseURI(uri string) (Target, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return Target{}, fmt.Errorf("NBD URI: %w", err)
	}
	t := Target{Export: strings.TrimPrefix(u.Path, "/")}
	if len(t.Export) > maxName {
		return Target{}, fmt.Errorf("NBD URI: export name of %d bytes, at most %d are allowed", len(t.Export), maxName)
	}
	if strings.IndexByte(t.Export, 0) >= 0 {
		return Target{}, fmt.Errorf("NBD URI %q: export name contains a NUL byte", uri)
	}
	switch u.Scheme {
	case "nbd", "nbd+tcp":
		if u.Hostname() == "" {
			return Target{}, fmt.Errorf("NBD URI %q: no host, want nbd://HOST[:PORT]/NAME", uri)
		}
		port := u.Port()
		if port == "" {
			port = DefaultPort
		}
		t.Network, t.Address = "tcp", net.JoinHostPort(u.Hostname(), port)
	case "nbd+unix":
		query, err := url.ParseQuery(u.RawQuery)
		if err != nil {
			return Target{}, fmt.Errorf("NBD URI %q: %w", uri, err)
		}
		t.Network, t.Address = "unix", query.Get("socket")
		if t.Address == "" {
			return Target{}, fmt.Errorf("NBD URI %q: no socket, want nbd+unix:///NAME?socket=PATH", uri)
		}
	case "nbds", "nbds+tcp", "nbds+unix":
		return Target{}, fmt.Errorf("NBD URI %q: TLS is not supported by this client", uri)
	default:
		return Target{}, fmt.Errorf("NBD URI %q: unknown scheme %q, want nbd or nbd+unix", uri, u.Scheme)
	}
	return t, nil
}

// UnixURI is the URI of an export on a Unix socket.
func UnixURI(socket, export string) string {
	u := url.URL{Scheme: "nbd+unix", Path: "/" + export, RawQuery: "socket=" + url.QueryEscape(socket)}
	return u.String()
}
