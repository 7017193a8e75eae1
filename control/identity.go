package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/nbd-export/nbd-export/backend"
)

// Identity is what a side says about an image so that another can tell whether
// it has the same one; the answer to x-identify is a list of them.
type Identity struct {
	Node   string `json:"node-name"`
	Export string `json:"export"` // its name
	Image  string `json:"image"`  // path, as given
	Format string `json:"format"`
	Size   int64  `json:"size"` // bytes, as the storage says now
	Active bool   `json:"active"`
	// Unusable is why the side could not own it, "" if it could.
	Unusable string `json:"unusable,omitempty"`

	// BootID, Dev and Ino name the file for as long as a kernel runs; "" and 0
	// if they are not known.
	BootID string `json:"boot-id,omitempty"`
	Dev    uint64 `json:"dev,omitempty"`
	Ino    uint64 `json:"ino,omitempty"`

	// Record is the path of the owner record, "" if none is kept, and Nonce
	// what stands in it now; Noted says that this side has just put it there.
	// RecordError is why it cannot be read, or written by its owner.
	Record      string `json:"record,omitempty"`
	RecordError string `json:"record-error,omitempty"`
	// Unnoted is why the owner had no room to put a nonce there.
	Unnoted string    `json:"unnoted,omitempty"`
	Epoch   uint64    `json:"epoch,omitempty"`
	Since   time.Time `json:"since,omitzero"`
	Nonce   string    `json:"nonce,omitempty"`
	Noted   bool      `json:"noted,omitempty"`
	// Lags: the side may see an older record for a while.
	Lags bool `json:"lags,omitempty"`
}

// identifier is the part of an image that Identify needs; *backend.Owned is one.
type identifier interface {
	Identify() backend.Identity
	Note(nonce string) (bool, error)
}

// maxNonce is the longest nonce in bytes that a client may have written.
const maxNonce = 64

// Identify implements Prover for this process. It blocks for as long as the
// storage does.
func (r *Registry) Identify(_ context.Context, nonce string, nodes ...string) ([]Identity, error) {
	if len(nonce) > maxNonce {
		return nil, generic("Parameter 'nonce' is longer than %d bytes", maxNonce)
	}
	ts, err := r.find(nodes)
	if err != nil {
		return nil, err
	}
	list := make([]Identity, len(ts))
	for i, t := range ts {
		list[i] = t.identify(nonce)
	}
	return list, nil
}

// noteFor is what stands in the owner record of a node's image, so that each
// image of a side can be told from its others.
func noteFor(nonce, node string) string { return nonce + "/" + node }

func (t *Target) identify(nonce string) Identity {
	info := t.Image.Info()
	i := Identity{
		Node: t.Node, Export: t.firstExport().Name, Image: info.Path, Format: info.Format, Size: t.Image.Size(),
		Active: t.Machine.Status().State.Owns(),
	}
	if !t.owns() && !i.Active {
		i.Unusable = fmt.Sprintf("file node '%s' would not own it: export the node, or add a format node above it", t.Node)
	}
	img, ok := t.Image.(identifier)
	if !ok {
		return i
	}
	var noteErr error
	if nonce != "" {
		i.Noted, noteErr = img.Note(noteFor(nonce, t.Node))
		if errno, ok := errors.AsType[syscall.Errno](noteErr); ok && (errno == syscall.ENOSPC || errno == syscall.EDQUOT) {
			i.Unnoted, noteErr = noteErr.Error(), nil // a full disk must not keep its owner
		}
	}
	b := img.Identify()
	i.Size, i.BootID, i.Dev, i.Ino = b.Size, b.BootID, b.Dev, b.Ino
	if b.OpenErr != nil {
		i.Unusable = b.OpenErr.Error()
	}
	if i.RecordError = errorText(b.RecordErr); i.RecordError == "" {
		i.RecordError = errorText(noteErr)
	}
	i.Record, i.Epoch, i.Since, i.Nonce, i.Lags = b.Record.Path, b.Epoch, b.Since, b.Nonce, b.Lags
	return i
}

// identify is x-identify.
func (s *session) identify(a args) (any, error) {
	nonce := arg[string](a, "nonce")
	if strings.ContainsFunc(nonce, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return nil, generic("Parameter 'nonce' has to be of visible ASCII characters")
	}
	return s.server.cfg.Registry.Identify(context.Background(), nonce, nodes(a)...)
}

// Identify implements Prover for a server elsewhere. Of QEMU's daemons only
// what their queries say is known, which proves nothing.
func (c *Client) Identify(ctx context.Context, nonce string, nodes ...string) ([]Identity, error) {
	a := struct {
		Nodes []string `json:"x-node-names,omitempty"`
		Nonce string   `json:"nonce,omitempty"`
	}{nodes, nonce}
	var list []Identity
	err := c.Execute(ctx, "x-identify", a, &list)
	if e, ok := errors.AsType[*Error](err); !ok || e.Class != CommandNotFound {
		return list, err
	}
	exported, err := c.exported(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range nodes {
		if !slices.ContainsFunc(exported, func(n ImageStatus) bool { return n.Node == name }) {
			return nil, generic("Failed to find an exported node with node-name='%s'", name)
		}
	}
	for _, n := range exported {
		if len(nodes) == 0 || slices.Contains(nodes, n.Node) {
			list = append(list, Identity{Node: n.Node, Image: n.Image, Format: n.Format, Size: n.Size, Active: n.State.Active()})
		}
	}
	return list, nil
}

// exported asks, in QEMU's words, for the nodes that are exported.
func (c *Client) exported(ctx context.Context) ([]ImageStatus, error) {
	var exports []struct {
		Node string `json:"node-name"`
		ID   string `json:"id"`
	}
	var nodes []blockDevice
	if err := c.Execute(ctx, "query-block-exports", nil, &exports); err != nil {
		return nil, err
	}
	if err := c.Execute(ctx, "query-named-block-nodes", nil, &nodes); err != nil {
		return nil, err
	}
	var list []ImageStatus
	for _, n := range nodes {
		s := ImageStatus{
			Node: n.NodeName, Image: n.Image.Filename, Format: n.Drv, Size: n.Image.VirtualSize, ReadOnly: n.RO,
			State: stateInactive, Locks: Locks{Held: "unknown", Scope: "unknown"},
		}
		if n.Active {
			s.State = stateActive
		}
		for _, e := range exports {
			if e.Node == n.NodeName {
				s.Exports = append(s.Exports, Export{ID: e.ID, Writable: !n.RO})
			}
		}
		if len(s.Exports) > 0 {
			s.Export = s.Exports[0]
			list = append(list, s)
		}
	}
	return list, nil
}
