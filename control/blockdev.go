package control

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"strings"
	"syscall"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// blockdevFields are those of QEMU's BlockdevOptions, of the drivers we have.
func blockdevFields() fields {
	flag := func(name string) param { return param{name: name, kind: boolean} }
	choice := func(name string, values ...string) param { return param{name: name, kind: text, values: values} }
	file := []param{
		{name: "filename", kind: text, required: true},
		choice("locking", "auto", "on", "off"),
		choice("aio", "threads", "native", "io_uring"),
		flag("drop-cache"),
		{name: "x-owner-record", kind: text},
	}
	below := &fields{}
	ref := param{name: "file", kind: nodeRef, required: true, fields: below}
	backing := ref
	backing.name, backing.kind, backing.required = "backing", nodeRefOrNull, false
	*below = fields{
		params: []param{
			required(choice("driver", "file", "host_device", "qcow2", "raw")),
			{name: "node-name", kind: text},
			flag("active"),
			choice("discard", "ignore", "unmap"),
			{name: "cache", kind: nested, fields: &fields{params: []param{flag("direct"), flag("no-flush")}}},
			flag("read-only"), flag("auto-read-only"), flag("force-share"),
			choice("detect-zeroes", "off", "on", "unmap"),
		},
		tag: "driver",
		branches: map[string][]param{
			"file":        file,
			"host_device": file,
			"raw":         {{name: "offset", kind: integer}, {name: "size", kind: integer}, ref},
			"qcow2": {ref, backing, {name: "l2-cache-size", kind: integer}, {name: "cache-size", kind: integer},
				{name: "refcount-cache-size", kind: integer}, flag("lazy-refcounts")},
		},
	}
	return *below
}

// newBlockNode makes a node of checked arguments. above is the node whose
// definition it is part of, nil for none; from there come some defaults
// (bdrv_inherited_options).
func newBlockNode(a args, above *blockNode) (*blockNode, error) {
	n := &blockNode{
		name: arg[string](a, "node-name"), driver: arg[string](a, "driver"), implicit: above != nil,
		active: argOr(a, "active", true), filename: arg[string](a, "filename"), ownerRecord: arg[string](a, "x-owner-record"),
		locking: backend.LockingMode(arg[string](a, "locking")),
	}
	if _, named := a["node-name"]; named || above == nil {
		if !named {
			return nil, generic("'node-name' must be specified for the root node")
		}
		if err := checkNodeName(n.name); err != nil {
			return nil, err
		}
	}
	var inherited blockNode
	discard := "ignore"
	if above != nil {
		inherited, discard = *above, "unmap"
	}
	n.readOnly = argOr(a, "read-only", inherited.readOnly)
	n.forceShare = argOr(a, "force-share", inherited.forceShare)
	n.direct = argOr(arg[args](a, "cache"), "direct", inherited.direct)
	n.unmap = argOr(a, "discard", discard) == "unmap"
	n.l2Cache = cmp.Or(arg[int64](a, "l2-cache-size"), arg[int64](a, "cache-size"))
	_, n.noBacking = a["backing"]
	if drop, ok := a["drop-cache"].(bool); ok {
		n.dropCache = backend.DropCacheOff
		if drop {
			n.dropCache = backend.DropCacheOn
		}
	}
	return n, n.check(a)
}

// check refuses what does not go together, and what we do not have.
func (n *blockNode) check(a args) error {
	_, part := a["size"]
	for _, name := range []string{"cache-size", "l2-cache-size", "refcount-cache-size"} {
		if size := arg[int64](a, name); size < 0 {
			return generic("Value '%d' is out of range for parameter '%s'", size, name)
		}
	}
	switch {
	case n.forceShare && !n.readOnly:
		return generic("force-share=on can only be used with read-only images")
	case a["backing"] != nil && a["backing"] != "": // an option has no other way to say null
		return generic("Parameter 'backing' is not supported by nbd-export but for null: the backing file that the image names is opened")
	case argOr(a, "detect-zeroes", "off") != "off":
		return generic("Parameter 'detect-zeroes' is not supported by nbd-export but for 'off'")
	case part || arg[int64](a, "offset") != 0:
		return generic("Parameters 'offset' and 'size' are not supported by nbd-export: a raw node is the whole file")
	case arg[string](a, "aio") == "native" && !n.direct:
		return generic("aio=native was specified, but it requires cache.direct=on, which was not specified.")
	case n.isFile() && n.filename == "":
		return generic("The '%s' block driver requires a file name", n.driver)
	case n.isFile() && a["x-owner-record"] != nil && n.ownerRecord == "":
		return generic("Parameter 'x-owner-record' needs a path, or off")
	}
	return nil
}

func (n *blockNode) isFile() bool { return n.driver == "file" || n.driver == "host_device" }

// blockdevAdd adds a file node, a format node on a file node that is there, or
// both.
func (s *session) blockdevAdd(a args) (any, error) {
	top, err := newBlockNode(a, nil)
	if err != nil {
		return nil, err
	}
	if top.isFile() {
		return nil, s.addNodes(top, nil)
	}
	switch ref := a["file"].(type) {
	case string:
		return nil, s.addFormat(top, ref)
	case args:
		file, err := newBlockNode(ref, top)
		if err != nil {
			return nil, err
		}
		if !file.isFile() {
			return nil, generic("Parameter 'file' of a %s node must be a file or host_device node, not %s", top.driver, file.driver)
		}
		return nil, s.addNodes(file, top)
	}
	panic("control: unchecked BlockdevRef")
}

// addNodes adds a file node and the format node above it, nil for none.
func (s *session) addNodes(file, format *blockNode) error {
	r := s.server.cfg.Registry
	nodes := []*blockNode{file}
	if format != nil {
		nodes = []*blockNode{format, file}
	}
	if err := r.reserve(nodes...); err != nil {
		return err
	}
	err := attachable(file, file.active, format)
	if err == nil {
		var t *Target
		if t, err = s.open(file, format); err == nil {
			err = s.addTarget(t, nil)
		}
	}
	if err != nil {
		r.release(nodes...)
	}
	return err
}

// attachable holds the rules of bdrv_attach_child_noperm, and that qcow2 tables are
// written as long as the node is active.
func attachable(file *blockNode, active bool, format *blockNode) error {
	switch {
	case format == nil || !format.active:
	case !active:
		return generic("Inactive '%s' can't be a file child of active '%s'", file.name, format.name)
	case format.driver == "qcow2" && file.readOnly && !format.readOnly:
		return generic("Block node is read-only: '%s' is, but '%s' above it is not", file.name, format.name)
	}
	return nil
}

// addTarget activates t if it is to be, and makes it known in the place of old,
// which may be nil. If that fails, t is closed.
func (s *session) addTarget(t, old *Target) error {
	var err error
	t.fileActive = t.file.active
	if t.format != nil && t.format.active {
		err = state.Activate(context.Background(), state.ActivateOptions{}, t.Machine)
		t.fileActive = false
	}
	if err == nil {
		err = s.server.cfg.Registry.publish(t, old)
	}
	if err != nil {
		err = also(err, t.close())
	}
	return err
}

// addFormat puts a format node above a file node that is there.
func (s *session) addFormat(format *blockNode, below string) error {
	r := s.server.cfg.Registry
	if err := r.reserve(format); err != nil {
		return err
	}
	err := s.attach(format, below)
	if err != nil {
		r.release(format)
	}
	return err
}

func (s *session) attach(format *blockNode, below string) error {
	old, unlock := s.server.cfg.Registry.lock(below)
	defer unlock()
	switch {
	case old == nil:
		return generic("Cannot find device='%s' nor node-name='%s'", below, below)
	case below != old.file.name:
		return generic("Node '%s' is no file node: nbd-export has one format node on a file node", below)
	case old.format != nil:
		return generic("Node '%s' has format node '%s' already: nbd-export has one format node on a file node", below, old.format.name)
	case len(old.Exports()) > 0:
		return generic("Node '%s' is exported: nbd-export exports a file node or the format node on it, not both", below)
	}
	_, active := old.active()
	if err := attachable(old.file, active, format); err != nil {
		return err
	}
	file := *old.file
	file.active = active
	t, err := s.reopen(old, &file, format)
	if err != nil {
		return err
	}
	if err := state.Inactivate(context.Background(), old.Machine); err != nil {
		return also(err, t.close())
	}
	return s.replace(old, t)
}

// reopen opens the file of old anew, for other nodes.
func (s *session) reopen(old *Target, file, format *blockNode) (*Target, error) {
	t, err := s.open(file, format)
	if err == nil && !sameFile(old, t) {
		err = generic("Could not open '%s': it is not the file any more that node '%s' has open; remove that node and add it again", file.filename, file.name)
		return nil, also(err, t.close())
	}
	return t, err
}

func sameFile(a, b *Target) bool {
	key := func(t *Target) (k [2]uint64) {
		if i, ok := t.Image.(interface{ Key() (dev, ino uint64) }); ok {
			k[0], k[1] = i.Key()
		}
		return k
	}
	return key(a) == key(b)
}

// replace puts t in the place of old, which is the same file with other nodes and is not
// active, since two machines of one file would keep each other out.
func (s *session) replace(old, t *Target) error {
	old.setFileActive(t.file.active) // if it stays
	if err := s.addTarget(t, old); err != nil {
		return err
	}
	return old.close()
}

// open opens what the nodes describe.
func (s *session) open(file, format *blockNode) (*Target, error) {
	if s.server.cfg.Open == nil {
		return nil, generic("nodes cannot be added here")
	}
	o := backend.Options{
		Path: file.filename, Format: "raw", ReadOnly: file.readOnly,
		Locking: file.locking, DropCache: file.dropCache, OwnerRecord: file.ownerRecord,
		IgnoreDiscard: !file.unmap,
	}
	if format != nil {
		o.Format, o.L2Cache, o.NoBacking = format.driver, format.l2Cache, format.noBacking
		o.ReadOnly = o.ReadOnly || format.readOnly
		o.IgnoreDiscard = o.IgnoreDiscard || !format.unmap
	}
	if file.direct {
		o.Cache = backend.CacheNone
	}
	if file.forceShare {
		o.Locking = backend.LockingOff
	}
	t, err := s.server.cfg.Open(o)
	if err != nil {
		return nil, openFailure(file.filename, err)
	}
	t.file, t.format = file, format
	t.Node = t.upper().name
	switch {
	case file.driver == "file" && t.Device:
		err = generic("'file' driver requires '%s' to be a regular file", file.filename)
	case file.driver == "host_device" && !t.Device:
		err = generic("'host_device' driver requires '%s' to be either a character or block device", file.filename)
	}
	if err != nil {
		return nil, also(err, t.close())
	}
	return t, nil
}

// openFailure words the failure to open a file as QEMU does.
func openFailure(filename string, err error) error {
	errno, known := errors.AsType[syscall.Errno](err)
	path, ok := errors.AsType[*fs.PathError](err)
	if errors.Is(err, backend.ErrNotQcow2) {
		return generic("Image is not in qcow2 format: '%s'; driver raw serves it as it is", filename)
	}
	if !known || !ok {
		return generic("Could not open '%s': %v", filename, err)
	}
	reason, all := errno.Error(), path.Err.Error()
	if more, ok := strings.CutPrefix(all, reason); ok {
		all = more
	} else {
		all = "; " + all
	}
	return generic("Could not open '%s': %s%s%s", filename, strings.ToUpper(reason[:1]), reason[1:], all)
}

// blockdevDel removes a node, and with a format node the file node that came
// with it.
func (s *session) blockdevDel(a args) (any, error) {
	r, name := s.server.cfg.Registry, arg[string](a, "node-name")
	t, unlock := r.lock(name)
	defer unlock()
	switch {
	case t == nil:
		return nil, noNode(name)
	case r.isStopping():
		return nil, errStopping
	case name == t.upper().name && len(t.Exports()) > 0:
		return nil, generic("Node %s is in use", name)
	case name == t.file.name && t.file.implicit:
		return nil, generic("Node %s is not owned by the monitor", name)
	case name == t.file.name && t.format != nil:
		return nil, generic("Block device %s is in use", name)
	case t.format == nil || t.file.implicit:
		if err := letGo(t); err != nil {
			return nil, err
		}
		r.Remove(t)
		return nil, t.close()
	}
	file := *t.file
	_, file.active = t.active()
	alone, err := s.reopen(t, &file, nil)
	if err != nil {
		return nil, s.keepFile(t, &file)
	}
	if err := letGo(t); err != nil {
		return nil, also(err, alone.close())
	}
	return nil, s.replace(t, alone)
}

// letGo inactivates an image that is going to be closed. It fails where nobody else has
// what could not be written, as to a full disk: the node stays. After a failed sync
// there is nothing left to wait for, nor where everything is on disk, and only cannot be
// opened as an inactive image since a backing file is gone.
func letGo(t *Target) error {
	err := state.Inactivate(context.Background(), t.Machine)
	if err == nil || state.Durable(err) || t.Machine.Status().State != state.Active {
		return nil
	}
	return err
}

// keepFile takes the format node of t away where the file cannot be opened
// anew, as after it was deleted or replaced: what is open of it stays, opened as it was.
func (s *session) keepFile(t *Target, file *blockNode) error {
	if err := state.Inactivate(context.Background(), t.Machine); err != nil {
		return err
	}
	return s.server.cfg.Registry.publish(&Target{
		Node: file.name, Machine: t.Machine, Image: t.Image, Disk: t.Disk, Device: t.Device, Direct: t.Direct,
		Stats: t.Stats, Locks: t.Locks, Record: t.Record, Repairing: t.Repairing, Takeover: t.Takeover,
		file: file, fileActive: file.active,
	}, t)
}
