package control

import (
	"slices"
	"sync"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/export"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

// fileSuffix makes the name of a file node of the format node's above it.
const fileSuffix = "-file"

// Target is an image under control: a file node, mostly a format node above
// it, and what is exported of them. Its exported fields do not change.
type Target struct {
	// Node is the name of the upper node: of the format node, or of a file
	// node that has none above it. The file node of an image that did not come
	// by blockdev-add is called Node-file.
	Node    string
	Machine *state.Machine
	Image   backend.Image
	// Disk is what its exports serve.
	Disk *ioloop.Disk
	// Device: the image is a block device. Direct: the page cache is bypassed.
	Device, Direct bool
	// Export is the export that it has from the start, unless the ID is "",
	// and Served the same as clients find it.
	Export Export
	Served *export.Export
	// Stats counts its requests, Locks says what protects it, Record where
	// its owner is noted. They never wait, and may be nil.
	Stats  func() ioloop.Stats
	Locks  func() Locks
	Record func() Record
	// Repairing is how far the repair of the image has come that its
	// activation has begun, in bytes, of 0 if there is none. It never waits,
	// and may be nil.
	Repairing func() (done, total int64)
	// PathLost is where the bytes of the active image are if its path does not
	// name it any more, otherwise "". It never waits, and may be nil.
	PathLost func() string
	// Takeover is how peers get the image, and how it is got from them; nil
	// if peers get it at once and nothing is taken.
	Takeover *Takeover

	file   *blockNode
	format *blockNode        // nil for a file node alone
	below  map[string]string // names of what it leads to; under Registry.mu

	// edit is held while nodes and exports are added and removed. What is
	// held is checked to be registered still. It is taken before all other locks.
	edit sync.Mutex

	mu      sync.Mutex     // a leaf
	exports []*blockExport // the oldest first
	// fileActive: the file node was activated without what is above it. It
	// counts while the machine is inactive, and is false once that was active.
	fileActive bool
}

// Export is the NBD side of a Target.
type Export struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	Writable    bool   `json:"writable"`
}

// Exports returns its exports, the oldest first.
func (t *Target) Exports() []Export {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]Export, len(t.exports))
	for i, e := range t.exports {
		list[i] = e.Export
	}
	return list
}

// firstExport is the oldest of its exports, empty if there is none.
func (t *Target) firstExport() (e Export) {
	if list := t.Exports(); len(list) > 0 {
		e = list[0]
	}
	return e
}

// readOnly reports whether nobody can write: no client, and no command.
func (t *Target) readOnly() bool {
	return t.Image.Info().ReadOnly || t.format != nil && t.format.readOnly
}

// owns reports whether it is to own the image when it is active: a format node
// does, as qcow2 does in QEMU; a file node alone does once it is exported, so
// that it can be added where another process owns the image and an inactive
// format node put above it.
func (t *Target) owns() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.format != nil || len(t.exports) > 0
}

// active says which nodes are active. The image's machine decides, but for a
// file node that owns nothing, or is under an inactive format node: its state
// is only what was ordered.
func (t *Target) active() (format, file bool) {
	s := t.Machine.Status().State
	if s != state.Inactive || t.format == nil && t.owns() {
		return s.Owns(), s.Owns()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return false, t.fileActive
}

// wantsActive reports whether the file node is to be active.
func (t *Target) wantsActive() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.fileActive
}

func (t *Target) setFileActive(active bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fileActive = active
}

func (t *Target) addExport(e *blockExport) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.exports = append(t.exports, e)
}

func (t *Target) removeExport(e *blockExport) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.exports = slices.DeleteFunc(t.exports, func(o *blockExport) bool { return o == e })
}

// upper is the node that stands for the image: what is above has no other.
func (t *Target) upper() *blockNode {
	if t.format != nil {
		return t.format
	}
	return t.file
}

// named is that of its nodes which has this name.
func (t *Target) named(name string) *blockNode {
	if name == t.file.name {
		return t.file
	}
	return t.upper()
}

// nodes are its nodes, the upper one first.
func (t *Target) nodes() []*blockNode {
	if t.format != nil {
		return []*blockNode{t.format, t.file}
	}
	return []*blockNode{t.file}
}

// defaultNodes names the nodes of an image that did not come by blockdev-add.
func (t *Target) defaultNodes() {
	if t.file != nil {
		return
	}
	info := t.Image.Info()
	t.format = &blockNode{name: t.Node, driver: info.Format, unmap: true, direct: t.Direct}
	t.format.readOnly = info.ReadOnly || t.Export.ID != "" && !t.Export.Writable
	file := *t.format
	file.name, file.driver, file.implicit = t.Node+fileSuffix, "file", true
	if t.Device {
		file.driver = "host_device"
	}
	t.file = &file
}

// close ends what runs for a target that is not under control any more, and
// lets its image go.
func (t *Target) close() error {
	if t.Takeover != nil {
		t.Takeover.Close()
	}
	return state.Stop(t.Machine)
}
