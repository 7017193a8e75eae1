package export

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/nbd-export/nbd-export/export/wire"
)

// metaContext is LIST_META_CONTEXT and SET_META_CONTEXT (specification,
// "Metadata querying"). SET replaces what was selected before, also when it
// fails.
func (h *handshake) metaContext(opt, length uint32, data []byte) error {
	set := opt == wire.OptSetMetaContext
	if set {
		h.meta = selection{}
	}
	if !h.structured {
		return h.fail(opt, wire.RepErrInvalid, "%s needs STRUCTURED_REPLY first", optionName(opt))
	}
	if data == nil && length != 0 {
		return h.tooBig(opt, length)
	}
	q, err := parseMeta(data)
	if err != nil {
		return h.fail(opt, wire.RepErrInvalid, "%v", err)
	}
	e := h.exports.Lookup(q.export)
	if e == nil {
		return h.unknownExport(opt, q.export)
	}

	var found []metaContext
	for _, m := range e.contexts() {
		if !q.matches(m.name(), set) {
			continue
		}
		found = append(found, m)
		id := m.id
		if !set {
			id = 0
		}
		err := h.reply(opt, wire.RepMetaContext, func(b []byte) []byte {
			b = binary.BigEndian.AppendUint32(b, id)
			return append(b, m.name()...)
		})
		if err != nil {
			return err
		}
	}
	if set {
		h.meta = selection{e, found}
	}
	return h.reply(opt, wire.RepAck, nil)
}

// metaContext is a metadata context of an export.
type metaContext struct {
	id     uint32
	bitmap string // "" is base:allocation
}

func (m metaContext) name() string {
	if m.bitmap == "" {
		return wire.ContextBaseAllocation
	}
	return wire.ContextDirtyBitmap + m.bitmap
}

// contexts are those of the export, in the order in which they are told.
func (e *Export) contexts() []metaContext {
	all := []metaContext{{id: 1}}
	for i, name := range e.Bitmaps {
		all = append(all, metaContext{uint32(2 + i), name})
	}
	return all
}

// selected are the contexts that the last SET_META_CONTEXT selected, if it was
// for e.
func (h *handshake) selected(e *Export) []metaContext {
	if h.meta.export != e {
		return nil
	}
	return h.meta.contexts
}

// metaQuery is what the queries of one option ask for. Queries of unknown
// namespaces, unknown leaves of a namespace and queries without a namespace
// match nothing.
type metaQuery struct {
	export  string
	queries map[string]bool
}

// matches reports whether a context is asked for. LIST also takes namespaces,
// and no query at all for everything.
func (q *metaQuery) matches(context string, set bool) bool {
	switch {
	case q.queries[context]:
		return true
	case set:
		return false
	case len(q.queries) == 0 || context == wire.ContextBaseAllocation:
		return len(q.queries) == 0 || q.queries[wire.NamespaceBase]
	}
	return q.queries[wire.NamespaceQEMU] || q.queries[wire.ContextDirtyBitmap]
}

var errMetaLength = errors.New("lengths do not fit the option")

// parseMeta takes the data of LIST_META_CONTEXT and SET_META_CONTEXT apart.
func parseMeta(data []byte) (q metaQuery, err error) {
	name, data, ok := cutString(data)
	if !ok || len(data) < 4 {
		return q, errMetaLength
	}
	if err := checkString(string(name)); err != nil {
		return q, fmt.Errorf("export name %s: %w", quote(string(name)), err)
	}
	q.export = string(name)
	count := binary.BigEndian.Uint32(data)
	data = data[4:]
	if uint64(count)*4 > uint64(len(data)) {
		return q, errMetaLength
	}
	q.queries = make(map[string]bool)
	for range count {
		var query []byte
		if query, data, ok = cutString(data); !ok {
			return q, errMetaLength
		}
		if err := checkString(string(query)); err != nil {
			return q, fmt.Errorf("query %s: %w", quote(string(query)), err)
		}
		q.queries[string(query)] = true
	}
	if len(data) != 0 {
		return q, errMetaLength
	}
	return q, nil
}

// cutString takes a string with a 32-bit length from the front of b.
func cutString(b []byte) (s, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, b, false
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, b, false
	}
	return b[4 : 4+n], b[4+n:], true
}
