package control

import (
	"context"
	"slices"
	"sync"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

// fileSuffix makes the name of a file node of the format node's above it.
const fileSuffix = "-file"

// Target is an image under control. Its fields do not change.
type Target struct {
	// Node is the name of the format node; the file node is Node-file.
	Node    string
	Machine *state.Machine
	Image   backend.Image
	// Device: the image is a block device. Direct: the page cache is bypassed.
	Device, Direct bool
	// Export is how clients find it.
	Export Export
	// Stats counts its requests, Locks says what protects it, Record where
	// its owner is noted. They never wait, and may be nil.
	Stats  func() ioloop.Stats
	Locks  func() Locks
	Record func() Record
	// Takeover is how peers get the image, and how it is got from them; nil
	// if peers get it at once and nothing is taken.
	Takeover *Takeover
}

// Export is the NBD side of a Target.
type Export struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	Writable    bool   `json:"writable"`
}

// Registry holds the images of the process and carries out orders on them.
// The zero value is empty and ready; its methods may be called concurrently.
type Registry struct {
	mu       sync.Mutex // a leaf
	targets  []*Target
	stopping bool
}

// Add puts t under control.
func (r *Registry) Add(t *Target) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopping {
		return errStopping
	}
	for _, other := range r.targets {
		for _, name := range []string{t.Node, t.Node + fileSuffix} {
			if other.Node == name || other.Node+fileSuffix == name {
				return generic("Duplicate nodes with node-name='%s'", name)
			}
		}
	}
	r.targets = append(r.targets, t)
	return nil
}

// Remove ends the control of t. What becomes of it is the caller's business.
func (r *Registry) Remove(t *Target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.targets = slices.DeleteFunc(slices.Clone(r.targets), func(o *Target) bool { return o == t })
}

// Targets returns the images in the order in which they were added.
func (r *Registry) Targets() []*Target {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.targets)
}

// find returns the targets with these nodes, each once, or all if none is
// named.
func (r *Registry) find(nodes []string) ([]*Target, error) {
	all := r.Targets()
	if len(nodes) == 0 {
		return all, nil
	}
	var found []*Target
	for _, name := range nodes {
		i := slices.IndexFunc(all, func(t *Target) bool { return t.Node == name || t.Node+fileSuffix == name })
		if i < 0 {
			return nil, generic("Failed to find node with node-name='%s'", name)
		}
		if !slices.Contains(found, all[i]) {
			found = append(found, all[i])
		}
	}
	return found, nil
}

// isStopping reports whether orders are refused for good.
func (r *Registry) isStopping() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stopping
}

// order is find for an order that changes ownership.
func (r *Registry) order(nodes []string) ([]*Target, error) {
	if r.isStopping() {
		return nil, errStopping
	}
	return r.find(nodes)
}

// stop refuses orders from now on and returns what there is to stop.
func (r *Registry) stop() []*Target {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopping = true
	return slices.Clone(r.targets)
}

// Activate makes this process the owner of the images with these nodes, or
// of all if none is named; of none of them if one fails.
func (r *Registry) Activate(ctx context.Context, opt state.ActivateOptions, nodes ...string) error {
	ts, err := r.order(nodes)
	if err != nil {
		return err
	}
	return state.Activate(ctx, opt, machines(ts)...)
}

// InactivateOptions refine Inactivate.
type InactivateOptions struct {
	// Abandon gives up failed images too, although writes may be lost.
	Abandon bool
}

// Inactivate hands back the images with these nodes, or all if none is
// named; none of them if one fails.
func (r *Registry) Inactivate(ctx context.Context, opt InactivateOptions, nodes ...string) error {
	ts, err := r.order(nodes)
	if err != nil {
		return err
	}
	for _, name := range nodes {
		for _, t := range ts {
			if name == t.Node+fileSuffix && !slices.Contains(nodes, t.Node) && t.Machine.Status().State != state.Inactive {
				return generic("Node has active parent node (inactivate '%s' instead of '%s')", t.Node, name)
			}
		}
	}
	if opt.Abandon {
		var failed []*state.Machine
		for _, t := range ts {
			if s := t.Machine.Status().State; s == state.FailedIO || s == state.FailedFenced {
				failed = append(failed, t.Machine)
			}
		}
		// Its error says what is lost, which is logged; the images are given
		// up all the same. One that is not is refused below.
		_ = state.Abandon(ctx, failed...)
	}
	return state.Inactivate(ctx, machines(ts)...)
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
