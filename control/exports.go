package control

import (
	"context"
	"slices"

	"github.com/nbd-export/nbd-export/export"
	"github.com/nbd-export/nbd-export/state"
)

// blockExport is an export as control clients know it.
type blockExport struct {
	Export
	node   string
	target *Target
	served *export.Export // nil in tests without a server
	pinned bool           // it keeps its image from being inactivated
	gone   chan struct{}  // closed when nothing is left of it

	// Under Registry.mu. One that is not ready has its id, and no clients.
	ready, leaving bool
}

// exportLocked finds an export by its id.
func (r *Registry) exportLocked(id string) *blockExport {
	for _, e := range r.exports {
		if e.ID == id {
			return e
		}
	}
	return nil
}

// claimExport registers an export that is being made.
func (r *Registry) claimExport(e *blockExport) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.stopping:
		return errStopping
	case r.exportLocked(e.ID) != nil:
		return generic("Block export id '%s' is already in use", e.ID)
	}
	r.exports = append(r.exports, e)
	e.target.addExport(e)
	if e.pinned {
		e.target.Machine.Pin()
	}
	return nil
}

func (r *Registry) exportReady(e *blockExport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e.ready = true
}

// dropExport forgets an export.
func (r *Registry) dropExport(e *blockExport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.exports = slices.DeleteFunc(r.exports, func(o *blockExport) bool { return o == e })
	e.target.removeExport(e)
	if e.pinned {
		e.target.Machine.Unpin()
	}
	close(e.gone)
}

// removeExport begins to remove an export. Unless it is hard, that fails while
// clients are connected. server is the one that has them, nil while none runs.
func (r *Registry) removeExport(id string, n *NBD, hard bool) (e *blockExport, server *export.Server, err error) {
	if n != nil {
		n.mu.Lock()
		defer n.mu.Unlock()
		server = n.server
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	e = r.exportLocked(id)
	switch {
	case e == nil || !e.ready:
		return nil, nil, generic("Export '%s' is not found", id)
	case e.leaving:
		return nil, nil, generic("Export '%s' is already shutting down", id)
	case n == nil || e.served == nil:
	case hard || server == nil: // a server yet to be started would have it
		n.exports.Remove(e.served.Name)
	case !server.RemoveUnused(e.served):
		return nil, nil, generic("export '%s' still in use", id)
	}
	e.leaving = true
	return e, server, nil
}

// removeExports begins to remove all exports that clients can find.
func (r *Registry) removeExports(x *export.Exports) (list []*blockExport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.exports {
		if e.ready && !e.leaving {
			e.leaving = true
			list = append(list, e)
			if e.served != nil {
				x.Remove(e.served.Name)
			}
		}
	}
	return list
}

// exportsLeaving are those that others are removing.
func (r *Registry) exportsLeaving() (list []*blockExport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.exports {
		if e.leaving {
			list = append(list, e)
		}
	}
	return list
}

// blockExportFields are those of QEMU's BlockExportOptions, of type nbd.
func blockExportFields() fields {
	must := func(name string) param { return param{name: name, kind: text, required: true} }
	flag := func(name string) param { return param{name: name, kind: boolean} }
	typ := must("type")
	typ.values = []string{"nbd"}
	return fields{params: []param{
		typ, must("id"), flag("fixed-iothread"), {name: "iothread", kind: text}, must("node-name"),
		flag("writable"), flag("writethrough"), flag("allow-inactive"),
		{name: "name", kind: text},
		{name: "description", kind: text},
		{name: "bitmaps", kind: bitmaps},
		flag("allocation-depth"),
	}}
}

// blockExportAdd makes an export. Checks come in QEMU's order (blk_exp_add,
// nbd_export_create), but all before the image is activated, except those of
// bitmaps.
func (s *session) blockExportAdd(a args) (any, error) {
	r, n := s.server.cfg.Registry, s.server.cfg.NBD
	node := arg[string](a, "node-name")
	e := &blockExport{
		Export: Export{
			ID: arg[string](a, "id"), Name: argOr(a, "name", node), Description: arg[string](a, "description"),
			Writable: arg[bool](a, "writable"),
		},
		node: node, gone: make(chan struct{}),
	}
	wanted := arg[[]bitmap](a, "bitmaps")
	inactive := arg[bool](a, "allow-inactive")
	e.pinned = !inactive && e.Writable // as blk_can_inactivate
	if !wellFormed(e.ID) {
		return nil, generic("Invalid block export id")
	}
	t, unlock := r.lock(node)
	defer unlock()
	if err := checkExport(r, t, e, a); err != nil {
		return nil, err
	}
	if n.running() == nil {
		return nil, errNBDNotRunning
	}
	if err := checkNames(e, n); err != nil {
		return nil, err
	}
	if err := checkContents(t, e, a); err != nil {
		return nil, err
	}
	if err := export.CheckBitmaps(bitmapNames(wanted)); err != nil {
		return nil, generic("%v", err)
	}
	e.target = t
	e.served = &export.Export{
		Name: e.Name, Description: e.Description, Disk: t.Disk, ReadOnly: !e.Writable,
		Bitmaps: bitmapNames(wanted), WriteThrough: arg[bool](a, "writethrough"),
	}
	if err := r.claimExport(e); err != nil {
		return nil, err
	}
	if !inactive || t.format == nil && t.wantsActive() {
		if err := state.Activate(context.Background(), state.ActivateOptions{}, t.Machine); err != nil {
			r.dropExport(e)
			return nil, err
		}
		t.setFileActive(false) // the machine has it from here on
	}
	if err := checkExportBitmaps(r, t, e.Writable, wanted); err != nil {
		r.dropExport(e)
		return nil, err
	}
	if err := n.add(e.served, func() { r.exportReady(e) }); err != nil {
		r.dropExport(e)
		return nil, err
	}
	return nil, nil
}

func checkExport(r *Registry, t *Target, e *blockExport, a args) error {
	r.mu.Lock()
	taken := r.exportLocked(e.ID) != nil
	r.mu.Unlock()
	switch {
	case taken:
		return generic("Block export id '%s' is already in use", e.ID)
	case t == nil:
		return generic("Cannot find device='' nor node-name='%s'", e.node)
	case e.Writable && t.named(e.node).readOnly:
		return generic("Cannot export read-only node as writable")
	case e.node != t.upper().name:
		return generic("Node '%s' is under format node '%s': export that, nbd-export cannot export both", e.node, t.upper().name)
	case a["iothread"] != nil:
		return generic("iothread \"%s\" not found", a["iothread"])
	}
	return nil
}

func checkNames(e *blockExport, n *NBD) error {
	switch {
	case len(e.Name) > export.MaxName:
		return generic("export name '%s' too long", e.Name)
	case len(e.Description) > export.MaxName:
		return generic("description '%s' too long", e.Description)
	case n.exports.Lookup(e.Name) != nil:
		return generic("NBD server already has export named '%s'", e.Name)
	}
	if err := export.CheckNames(e.Name, e.Description); err != nil {
		return generic("%v", err)
	}
	return nil
}

func checkContents(t *Target, e *blockExport, a args) error {
	if e.Writable && t.readOnly() {
		return generic("Block node is read-only")
	}
	if arg[bool](a, "allocation-depth") {
		return generic("Parameter 'allocation-depth' is not supported: nbd-export does not tell how deep in a chain data is")
	}
	return nil
}

// blockExportDel removes an export. Where no client has to leave first, the
// event comes before the answer, as in QEMU.
func (s *session) blockExportDel(a args) (any, error) {
	e, server, err := s.server.cfg.Registry.removeExport(arg[string](a, "id"), s.server.cfg.NBD, arg[string](a, "mode") == "hard")
	if err != nil {
		return nil, err
	}
	if server == nil || e.served == nil {
		s.server.exportGone(e)
		return nil, nil
	}
	server.Disconnect(e.served)
	gone := server.Gone(e.served)
	select {
	case <-gone:
		s.server.exportGone(e)
	default:
		go func() {
			<-gone
			s.server.exportGone(e)
		}()
	}
	return nil, nil
}

// exportGone is called when no client of a removed export is left.
func (s *Server) exportGone(e *blockExport) {
	s.cfg.Registry.dropExport(e)
	s.emit("BLOCK_EXPORT_DELETED", struct {
		ID string `json:"id"`
	}{e.ID})
}

func (s *session) queryBlockExports(args) (any, error) {
	type blockExport struct {
		NodeName     string `json:"node-name"`
		ShuttingDown bool   `json:"shutting-down"`
		Type         string `json:"type"`
		ID           string `json:"id"`
	}
	list := []blockExport{}
	r := s.server.cfg.Registry
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.exports {
		if e.ready {
			leaving := e.leaving || e.target.Machine.Status().State == state.Closed
			list = append(list, blockExport{NodeName: e.node, Type: "nbd", ID: e.ID, ShuttingDown: leaving})
		}
	}
	return list, nil
}
