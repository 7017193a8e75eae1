package control

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/export"
)

// NBD is the NBD server of the process, which clients can start and stop. Set
// the exported fields before the first use and do not change them. Its methods
// may be called concurrently.
type NBD struct {
	// Mover and Log are those of export.Server.
	Mover export.Mover
	Log   *zap.Logger

	mu       sync.Mutex // see Registry for the lock order
	exports  export.Exports
	server   *export.Server // nil while it is stopped
	reserved bool
	stopping bool
}

// Reserve keeps clients from starting the server before its owner does.
func (n *NBD) Reserve() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.reserved = true
}

// taken reports whether the server runs or is about to.
func (n *NBD) taken() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.reserved || n.server != nil
}

// NBDOptions of a start.
type NBDOptions struct {
	Shared           int           // as in export.Server
	HandshakeTimeout time.Duration // as in export.Server; negative for none
	TLS              *tls.Config   // as in export.Server
	// Failed is told of a listener that fails for good; nil logs it.
	Failed func(error)
}

var (
	errNBDRunning    = generic("NBD server already running")
	errNBDNotRunning = generic("NBD server not running")
)

// Start serves the clients of ls, which it closes in the end, at once if it
// fails.
func (n *NBD) Start(opt NBDOptions, ls ...net.Listener) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var err error
	switch {
	case n.stopping:
		err = errStopping
	case n.server != nil:
		err = errNBDRunning
	}
	if err != nil {
		for _, l := range ls {
			_ = l.Close()
		}
		return err
	}
	if opt.Failed == nil {
		opt.Failed = func(err error) { n.Log.Error("the NBD server does not listen any more", zap.Error(err)) }
	}
	server := &export.Server{
		Exports: &n.exports, Mover: n.Mover, Log: n.Log, Shared: opt.Shared, HandshakeTimeout: opt.HandshakeTimeout,
		TLS: opt.TLS,
	}
	n.server, n.reserved = server, false
	for _, l := range ls {
		server.Own(l)
		go func() {
			if err := server.Serve(l); !errors.Is(err, export.ErrServerClosed) {
				opt.Failed(fmt.Errorf("cannot accept connections on %s: %w", l.Addr(), err))
			}
		}()
	}
	return nil
}

// running returns the server, or nil.
func (n *NBD) running() *export.Server {
	if n == nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.server
}

// Add makes e known to clients, whether the server runs or not. It is for
// exports that are there from the start.
func (n *NBD) Add(e *export.Export) error { return n.exports.Add(e) }

// add makes e known to clients of the running server, and calls then before it
// can be stopped.
func (n *NBD) add(e *export.Export, then func()) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.server == nil {
		return errNBDNotRunning
	}
	if n.exports.Lookup(e.Name) != nil {
		return generic("NBD server already has export named '%s'", e.Name)
	}
	if err := n.exports.Add(e); err != nil {
		return err
	}
	then()
	return nil
}

// halt takes the server away, so that another can be started, and calls then
// before that can happen. The server is the caller's to close.
func (n *NBD) halt(then func()) (*export.Server, error) {
	if n == nil {
		return nil, errNBDNotRunning
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	server := n.server
	if server == nil {
		return nil, errNBDNotRunning
	}
	n.server = nil
	then()
	return server, nil
}

// Refuse implements Front.
func (n *NBD) Refuse() {
	n.mu.Lock()
	n.stopping = true
	server := n.server
	n.mu.Unlock()
	if server != nil {
		server.Refuse()
	}
}

// Shutdown implements Front.
func (n *NBD) Shutdown(ctx context.Context) error {
	n.Refuse()
	if server := n.running(); server != nil {
		return server.Shutdown(ctx)
	}
	return nil
}

// nbdServerFields are those of QEMU's NbdServerOptions.
func nbdServerFields() fields {
	socket := func(params ...param) []param {
		return []param{{name: "data", kind: nested, required: true, fields: &fields{params: params}}}
	}
	flag := func(name string) param { return param{name: name, kind: boolean} }
	must := func(name string) param { return param{name: name, kind: text, required: true} }
	address := &fields{
		params: []param{{name: "type", kind: text, required: true, values: []string{"inet", "unix"}}},
		tag:    "type",
		branches: map[string][]param{
			"inet": socket(must("host"), must("port"), flag("numeric"), flag("ipv4"), flag("ipv6"), flag("keep-alive")),
			"unix": socket(must("path")),
		},
	}
	return fields{params: []param{
		{name: "handshake-max-seconds", kind: uint32s},
		{name: "tls-creds", kind: text},
		{name: "tls-authz", kind: text},
		{name: "max-connections", kind: uint32s},
		{name: "addr", kind: nested, required: true, fields: address},
	}}
}

// nbdServerStart starts the server.
func (s *session) nbdServerStart(a args) (any, error) {
	n := s.server.cfg.NBD
	if n == nil {
		return nil, generic("there is no NBD server to start")
	}
	if n.taken() {
		return nil, errNBDRunning
	}
	if _, given := a["tls-authz"]; given { // to pass it over would let everybody in
		return nil, generic("Parameter 'tls-authz' is not supported: who has a certificate of the authority may connect")
	}
	id, given := a["tls-creds"].(string)
	creds, err := s.server.credentials.ofServer(id, given)
	if err != nil {
		return nil, err
	}
	l, err := listenOn(arg[args](a, "addr"))
	if err != nil {
		return nil, err
	}
	opt := NBDOptions{Shared: int(argOr[int64](a, "max-connections", 100)), TLS: creds}
	if opt.HandshakeTimeout = time.Duration(argOr[int64](a, "handshake-max-seconds", 10)) * time.Second; opt.HandshakeTimeout == 0 {
		opt.HandshakeTimeout = -1
	}
	if err := n.Start(opt, l); err != nil {
		return nil, err
	}
	n.Log.Info("listening", zap.String("on", l.Addr().Network()+":"+l.Addr().String()))
	return nil, nil
}

// listenOn listens on a SocketAddressLegacy.
func listenOn(address args) (net.Listener, error) {
	data := arg[args](address, "data")
	if arg[string](address, "type") == "unix" {
		return export.ListenUnix(arg[string](data, "path"))
	}
	network, err := family(data)
	if err != nil {
		return nil, err
	}
	return export.ListenTCPFamily(network, net.JoinHostPort(arg[string](data, "host"), arg[string](data, "port")))
}

// family is the network of an inet address. One family that is on, or off, alone
// says all (QEMU's inet_ai_family_from_address).
func family(data args) (string, error) {
	v4, given4 := data["ipv4"].(bool)
	v6, given6 := data["ipv6"].(bool)
	switch {
	case given4 && given6 && !v4 && !v6:
		return "", generic("Cannot disable IPv4 and IPv6 at same time")
	case v4 == v6 && given4 == given6: // both, or nothing is said
		return "tcp", nil
	case v4, given6 && !v6:
		return "tcp4", nil
	}
	return "tcp6", nil
}

// nbdServerStop ends the server with all its exports and connections.
func (s *session) nbdServerStop(args) (any, error) {
	var all []*blockExport
	n, r := s.server.cfg.NBD, s.server.cfg.Registry
	server, err := n.halt(func() { all = r.removeExports(&n.exports) })
	if err != nil {
		return nil, err
	}
	_ = server.Close()
	for _, e := range all {
		s.server.exportGone(e)
	}
	for _, e := range r.exportsLeaving() {
		<-e.gone
	}
	return nil, nil
}
