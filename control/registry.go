package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/nbd-export/nbd-export/state"
)

// Registry holds the images of the process, with their nodes and exports, and
// carries out orders on them. The zero value is empty and ready; its methods
// may be called concurrently.
//
// Lock order: Target.edit, NBD.mu, Registry.mu, Target.mu and the others.
type Registry struct {
	mu       sync.Mutex
	targets  []*Target
	names    map[string]*Target // of nodes; nil for one that is being added
	exports  []*blockExport     // the oldest first
	numbered int                // nodes named by us so far
	stopping bool
}

// Add puts t under control.
func (r *Registry) Add(t *Target) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopping {
		return errStopping
	}
	t.defaultNodes()
	var first *blockExport
	if t.Export.ID != "" {
		first = &blockExport{Export: t.Export, node: t.Node, target: t, served: t.Served, ready: true, gone: make(chan struct{})}
		if r.exportLocked(t.Export.ID) != nil {
			return generic("Block export id '%s' is already in use", t.Export.ID)
		}
	}
	if err := r.reserveLocked(t.nodes()...); err != nil {
		return err
	}
	if first != nil {
		r.exports = append(r.exports, first)
		t.addExport(first)
	}
	r.publishLocked(t)
	return nil
}

// reserve takes the names of nodes that are being added, until publish or
// release. Those without a name get one.
func (r *Registry) reserve(nodes ...*blockNode) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reserveLocked(nodes...)
}

func (r *Registry) reserveLocked(nodes ...*blockNode) error {
	if r.stopping {
		return errStopping
	}
	for i, n := range nodes {
		_, taken := r.names[n.name]
		if taken || n.name != "" && slices.ContainsFunc(nodes[:i], func(o *blockNode) bool { return o.name == n.name }) {
			return generic("Duplicate nodes with node-name='%s'", n.name)
		}
	}
	if r.names == nil {
		r.names = make(map[string]*Target)
	}
	for _, n := range nodes {
		if n.name == "" {
			n.name = r.numberLocked()
		}
		r.names[n.name] = nil
	}
	return nil
}

// numberLocked makes a name that no client may choose.
func (r *Registry) numberLocked() string {
	r.numbered++
	return fmt.Sprintf("#block%03d", r.numbered)
}

// nameBelow names what an image leads to, which is told from the others by key.
// The name remains as long as the image is under control, and no command knows it.
func (r *Registry) nameBelow(t *Target, key string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	name, ok := t.below[key]
	if !ok {
		if t.below == nil {
			t.below = make(map[string]string)
		}
		name = r.numberLocked()
		t.below[key] = name
	}
	return name
}

// release gives reserved names back.
func (r *Registry) release(nodes ...*blockNode) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range nodes {
		if t, ok := r.names[n.name]; ok && t == nil {
			delete(r.names, n.name)
		}
	}
}

// publish makes t, whose names are reserved or those of old, known in the place
// of old, nil for none. It fails when the process is stopping.
func (r *Registry) publish(t, old *Target) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopping {
		return errStopping
	}
	if old != nil {
		r.removeLocked(old)
	}
	r.publishLocked(t)
	return nil
}

func (r *Registry) publishLocked(t *Target) {
	for _, n := range t.nodes() {
		r.names[n.name] = t
	}
	r.targets = append(slices.Clone(r.targets), t)
}

// Remove ends the control of t. What becomes of it is the caller's business.
func (r *Registry) Remove(t *Target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.removeLocked(t)
}

func (r *Registry) removeLocked(t *Target) {
	for _, n := range t.nodes() {
		delete(r.names, n.name)
	}
	r.targets = slices.DeleteFunc(slices.Clone(r.targets), func(o *Target) bool { return o == t })
}

// Targets returns the images in the order in which they were added.
func (r *Registry) Targets() []*Target {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.targets[:len(r.targets):len(r.targets)] // never changed in place
}

// target returns the image that has a node of this name, or nil.
func (r *Registry) target(node string) *Target {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.names[node]
}

// lock takes the edit lock of the image that has this node, which is nil if
// there is none.
func (r *Registry) lock(node string) (t *Target, unlock func()) {
	for {
		t = r.target(node)
		if t == nil {
			return nil, func() {}
		}
		t.edit.Lock()
		if r.target(node) == t {
			return t, t.edit.Unlock
		}
		t.edit.Unlock() // removed or replaced meanwhile
	}
}

// find returns the targets with these nodes, each once, or all if none is
// named.
func (r *Registry) find(nodes []string) ([]*Target, error) {
	if len(nodes) == 0 {
		return r.Targets(), nil
	}
	var found []*Target
	seen := make(map[*Target]bool)
	for _, name := range nodes {
		t := r.target(name)
		if t == nil {
			return nil, noNode(name)
		}
		if !seen[t] {
			seen[t] = true
			found = append(found, t)
		}
	}
	return found, nil
}

func noNode(name string) *Error { return generic("Failed to find node with node-name='%s'", name) }

// isStopping reports whether orders are refused for good.
func (r *Registry) isStopping() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stopping
}

// order is whom an order that changes ownership concerns: targets by their
// machines, and files that change alone.
type order struct{ targets, files []*Target }

// order sorts what is named, or everything.
func (r *Registry) order(nodes []string) (o order, err error) {
	if r.isStopping() {
		return o, errStopping
	}
	ts, err := r.find(nodes)
	if err != nil {
		return o, err
	}
	named := make(map[string]bool, len(nodes))
	for _, n := range nodes {
		named[n] = true
	}
	for _, t := range ts {
		involved := t.owns() || t.Machine.Status().State != state.Inactive
		if involved && (len(nodes) == 0 || named[t.upper().name]) {
			o.targets = append(o.targets, t)
		} else {
			o.files = append(o.files, t)
		}
	}
	return o, nil
}

// done notes what the order has made of file nodes.
func (o order) done(active bool) {
	for _, t := range o.targets {
		t.setFileActive(false)
	}
	for _, t := range o.files {
		t.setFileActive(active)
	}
}

// stop refuses orders from now on and returns what there is to stop.
func (r *Registry) stop() []*Target {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopping = true
	return r.targets
}

// Activate makes this process the owner of the images with these nodes, or
// of all if none is named; of none of them if one fails. A file node below a
// format node is activated alone, which owns nothing.
func (r *Registry) Activate(ctx context.Context, opt state.ActivateOptions, nodes ...string) error {
	return r.carryOut(nodes, func(o order) error {
		if err := state.Activate(ctx, opt, machines(o.targets)...); err != nil {
			return err
		}
		o.done(true)
		return nil
	})
}

// carryOut gives f the images with these nodes. Where one of them is removed
// meanwhile, the order is for those that are there then.
func (r *Registry) carryOut(nodes []string, f func(order) error) error {
	for {
		o, err := r.order(nodes)
		if err == nil {
			err = f(o)
		}
		// An image that refuses orders for good is not in the registry any more.
		if !errors.Is(err, state.ErrStopping) || r.isStopping() {
			return err
		}
	}
}

// InactivateOptions refine Inactivate.
type InactivateOptions struct {
	// Abandon gives up failed images too, although writes may be lost.
	Abandon bool
}

// Inactivate hands back the images with these nodes, or all if none is
// named; none of them if one fails.
func (r *Registry) Inactivate(ctx context.Context, opt InactivateOptions, nodes ...string) error {
	return r.carryOut(nodes, func(o order) error { return inactivate(ctx, opt, o) })
}

func inactivate(ctx context.Context, opt InactivateOptions, o order) error {
	for _, t := range o.files {
		if t.format != nil && t.Machine.Status().State != state.Inactive {
			return generic("Node has active parent node (inactivate '%s' instead of '%s')", t.format.name, t.file.name)
		}
	}
	var failed, others []*state.Machine
	for _, t := range o.targets {
		if s := t.Machine.Status().State; opt.Abandon && (s == state.FailedIO || s == state.FailedFenced) {
			failed = append(failed, t.Machine)
		} else {
			others = append(others, t.Machine)
		}
	}
	for _, t := range o.targets {
		if t.Machine.Status().State != state.Inactive {
			t.setFileActive(false) // before it counts
		}
	}
	// First what may be refused.
	if err := state.Inactivate(ctx, others...); err != nil {
		return err
	}
	if len(failed) > 0 {
		// Its error says what is lost, which is logged; the images are given up all
		// the same. One that is not, since another order was quicker, is refused, or
		// moved, now. Nobody gives up in the middle.
		ctx = context.WithoutCancel(ctx)
		_ = state.Abandon(ctx, failed...)
		if err := state.Inactivate(ctx, machines(o.targets)...); err != nil {
			return err
		}
	}
	o.done(false)
	return nil
}

// Cancel ends the inactivation of images that still serve writes, and returns
// their nodes.
func (r *Registry) Cancel(nodes ...string) ([]string, error) {
	ts, err := r.find(nodes)
	if err != nil {
		return nil, err
	}
	cancelled := []string{}
	for _, t := range ts {
		if t.Machine.Cancel() {
			cancelled = append(cancelled, t.Node)
		}
	}
	return cancelled, nil
}

func machines(ts []*Target) []*state.Machine {
	ms := make([]*state.Machine, len(ts))
	for i, t := range ts {
		ms[i] = t.Machine
	}
	return ms
}
