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
	if h.exports.Lookup(q.export) == nil {
		return h.unknownExport(opt, q.export)
	}

	id, selected := uint32(0), q.exact || q.wildcard || q.count == 0
	if set {
		id, selected = contextID, q.exact
		h.meta = selection{export: q.export, allocation: selected}
	}
	if selected {
		err := h.reply(opt, wire.RepMetaContext, func(b []byte) []byte {
			b = binary.BigEndian.AppendUint32(b, id)
			return append(b, wire.ContextBaseAllocation...)
		})
		if err != nil {
			return err
		}
	}
	return h.reply(opt, wire.RepAck, nil)
}

// metaQuery is what the queries of one option ask for. Queries of unknown
// namespaces, unknown leaves of base: and queries without a namespace match
// nothing.
type metaQuery struct {
	export   string
	count    int
	exact    bool // base:allocation is among them
	wildcard bool // base: is among them
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
	q.count = int(count)
	for range count {
		var query []byte
		if query, data, ok = cutString(data); !ok {
			return q, errMetaLength
		}
		switch s := string(query); s {
		case wire.ContextBaseAllocation:
			q.exact = true
		case wire.NamespaceBase:
			q.wildcard = true
		default:
			if err := checkString(s); err != nil {
				return q, fmt.Errorf("query %s: %w", quote(s), err)
			}
		}
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
