package control

import (
	"crypto/tls"
	"sync"

	"github.com/nbd-export/nbd-export/export"
)

// credentials are the TLS credentials that clients of the socket have made, by
// id: the one type of QEMU's objects that there is. A server that was started
// with some keeps them when they are deleted.
type credentials struct {
	mu   sync.Mutex // a leaf
	byID map[string]*tls.Config
}

// objectFields are those of QEMU's ObjectOptions.
func objectFields() fields {
	return fields{
		params: []param{
			{name: "qom-type", kind: text, required: true, values: []string{"tls-creds-x509"}},
			{name: "id", kind: text, required: true},
		},
		tag: "qom-type",
		branches: map[string][]param{"tls-creds-x509": {
			{name: "verify-peer", kind: boolean},
			{name: "dir", kind: text},
			{name: "endpoint", kind: text, values: []string{"client", "server"}},
			{name: "sanity-check", kind: boolean},
		}},
	}
}

// objectAdd makes TLS credentials. Those of a client, as which QEMU takes them
// unless it is told, are kept for nothing but their id: there is no use for them.
func (s *session) objectAdd(a args) (any, error) {
	id, dir := arg[string](a, "id"), arg[string](a, "dir")
	if !wellFormed(id) {
		return nil, generic("Parameter 'id' expects an identifier")
	}
	c := &s.server.credentials
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, there := c.byID[id]; there {
		return nil, generic("attempt to add duplicate property '%s' to object (type 'container')", id)
	}
	var config *tls.Config
	switch {
	case dir == "":
		return nil, generic("Missing 'dir' property value")
	case arg[string](a, "endpoint") == "server":
		var err error
		if config, err = export.NewTLS(export.TLSOptions{Dir: dir, AnyClient: !argOr(a, "verify-peer", true)}); err != nil {
			return nil, generic("Unable to access credentials: %v", err)
		}
	}
	if c.byID == nil {
		c.byID = make(map[string]*tls.Config)
	}
	c.byID[id] = config
	return nil, nil
}

func (s *session) objectDel(a args) (any, error) {
	id := arg[string](a, "id")
	c := &s.server.credentials
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, there := c.byID[id]; !there {
		return nil, generic("object '%s' not found", id)
	}
	delete(c.byID, id)
	return nil, nil
}

// ofServer finds what a server was told to use; nil for no id.
func (c *credentials) ofServer(id string, given bool) (*tls.Config, error) {
	if !given {
		return nil, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	config, there := c.byID[id]
	switch {
	case !there:
		return nil, generic("No TLS credentials with id '%s'", id)
	case config == nil:
		return nil, generic("Expected TLS credentials for a server endpoint")
	}
	return config, nil
}
