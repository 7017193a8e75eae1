package control

import (
	"context"
	"errors"
	"slices"

	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/state"
)

// command is a row of the table of commands.
type command struct {
	name string
	fields
	// run executes the command; its arguments have been checked. A nil result
	// is answered with {}. What it returns must be encodable as JSON.
	run func(s *session, a args) (any, error)
	// last: after the answer nothing more is read from any client.
	last bool
}

// negotiate is the only command of a client that has not used it yet.
const negotiate = "qmp_capabilities"

// commands is the table, in the order of query-commands. It is set by init
// because query-commands refers to it.
var commands []command

func init() {
	node := param{name: "node-name", kind: text}
	nodes := param{name: "x-node-names", kind: texts}
	id := param{name: "id", kind: text, required: true}
	with := func(params ...param) fields { return fields{params: params} }
	commands = []command{
		{name: negotiate, fields: with(param{name: "enable", kind: texts, values: []string{"oob"}}), run: (*session).negotiate},
		{name: "query-version", run: (*session).queryVersion},
		{name: "query-commands", run: (*session).queryCommands},
		{name: "object-add", fields: objectFields(), run: (*session).objectAdd},
		{name: "object-del", fields: with(id), run: (*session).objectDel},
		{name: "nbd-server-start", fields: nbdServerFields(), run: (*session).nbdServerStart},
		{name: "nbd-server-stop", run: (*session).nbdServerStop},
		{name: "blockdev-add", fields: blockdevFields(), run: (*session).blockdevAdd},
		{name: "blockdev-del", fields: with(required(node)), run: (*session).blockdevDel},
		{name: "block-export-add", fields: blockExportFields(), run: (*session).blockExportAdd},
		{
			name:   "block-export-del",
			fields: with(id, param{name: "mode", kind: text, values: []string{"safe", "hard"}}),
			run:    (*session).blockExportDel,
		},
		{name: "query-block-exports", run: (*session).queryBlockExports},
		{name: "query-named-block-nodes", fields: with(param{name: "flat", kind: boolean}), run: (*session).queryNodes},
		{
			name: "blockdev-set-active",
			fields: with(
				node,
				param{name: "active", kind: boolean, required: true},
				param{name: "x-if-unchanged", kind: boolean},
				param{name: "x-abandon", kind: boolean},
				nodes,
				param{name: "x-order", kind: text, longest: maxOrderName},
			),
			run: (*session).setActive,
		},
		{
			name:   "block_resize",
			fields: with(param{name: "device", kind: text}, node, param{name: "size", kind: integer, required: true}),
			run:    (*session).blockResize,
		},
		{name: "quit", run: (*session).quit, last: true},
		{name: "x-query-status", run: (*session).queryStatus},
		{name: "x-identify", fields: with(nodes, param{name: "nonce", kind: text}), run: (*session).identify},
		{
			name: "x-takeover",
			fields: with(
				required(node),
				param{name: "host", kind: text, required: true},
				param{name: "pid", kind: integer, required: true},
				param{name: "id", kind: text},
			),
			run: (*session).takeover,
		},
		{name: "x-cancel", fields: with(node, nodes, param{name: "order", kind: text, longest: maxOrderName}), run: (*session).cancel},
	}
}

func required(p param) param {
	p.required = true
	return p
}

func findCommand(name string) *command {
	i := slices.IndexFunc(commands, func(c command) bool { return c.name == name })
	if i < 0 {
		return nil
	}
	return &commands[i]
}

func (s *session) negotiate(a args) (any, error) {
	if s.negotiated {
		return nil, &Error{CommandNotFound, "Capabilities negotiation is already complete, command ignored"}
	}
	if enable := arg[[]string](a, "enable"); len(enable) > 0 {
		return nil, generic("Capability %s not available", enable[0])
	}
	s.negotiated = true
	return nil, nil
}

// version is the version of QEMU whose commands we have; scripts compare it.
type version struct {
	QEMU struct {
		Micro int `json:"micro"`
		Minor int `json:"minor"`
		Major int `json:"major"`
	} `json:"qemu"`
	Package string `json:"package"`
}

func (s *session) version() version {
	v := version{Package: "nbd-export " + s.server.cfg.Version}
	v.QEMU.Major = 10
	return v
}

func (s *session) queryVersion(args) (any, error) { return s.version(), nil }

func (s *session) queryCommands(args) (any, error) {
	type row struct {
		Name string `json:"name"`
	}
	rows := make([]row, len(commands))
	for i, c := range commands {
		rows[i].Name = c.name
	}
	return rows, nil
}

// nodes are the nodes a command names, none for all.
func nodes(a args) []string {
	list := slices.Clone(arg[[]string](a, "x-node-names"))
	if name, ok := a["node-name"].(string); ok {
		list = append(list, name)
	}
	return list
}

func (s *session) setActive(a args) (any, error) {
	active, unchanged, abandon := arg[bool](a, "active"), arg[bool](a, "x-if-unchanged"), arg[bool](a, "x-abandon")
	list := nodes(a)
	switch {
	case unchanged && !active:
		return nil, generic("Parameter 'x-if-unchanged' needs 'active' true")
	case abandon && active:
		return nil, generic("Parameter 'x-abandon' needs 'active' false")
	case a["x-node-names"] != nil && len(list) == 0:
		return nil, generic("Parameter 'x-node-names' names no node; leave it out to mean all")
	}
	s.server.cfg.Log.Debug("a control client orders ownership",
		zap.Bool("active", active), zap.Strings("nodes", list), zap.Bool("abandon", abandon))
	o, err := s.server.orders.begin(arg[string](a, "x-order"))
	if err != nil {
		return nil, err
	}
	defer s.server.orders.end(o)
	// An order is carried out to its end even if the client leaves: an end in
	// the middle would be a surprise to whoever asks next.
	r := s.server.cfg.Registry
	if active {
		return nil, r.Activate(context.Background(), state.ActivateOptions{IfUnchanged: unchanged}, list...)
	}
	err = r.Inactivate(o.ctx, InactivateOptions{Abandon: abandon}, list...)
	if err == nil {
		return nil, nil
	}
	if e, ok := errors.AsType[*Error](err); ok { // the request is wrong, nothing was done
		return nil, e
	}
	what, why := "node", ""
	if len(list) == 0 {
		what = "all nodes"
	}
	if errors.Is(err, state.ErrPinned) {
		why = "Operation not permitted: " // QEMU's whole reason
	}
	return nil, generic("Failed to inactivate %s: %s%v", what, why, err)
}

func (s *session) quit(args) (any, error) { return nil, nil }

func (s *session) queryStatus(args) (any, error) { return s.server.status(), nil }

func (s *session) cancel(a args) (any, error) {
	var r struct {
		Cancelled []string `json:"cancelled"`
		Running   bool     `json:"running,omitempty"` // the order named
	}
	list, name := nodes(a), arg[string](a, "order")
	if name != "" {
		// It is void whether its images are still here or not. What they do may be
		// for somebody else as well: whether it ends is not known here.
		r.Running, r.Cancelled = s.server.orders.takeBack(name, len(list) > 0), []string{}
		return r, nil
	}
	var err error
	r.Cancelled, err = s.server.cfg.Registry.Cancel(list...)
	return r, err
}
