package export

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/nbd-export/nbd-export/export/wire"
)

// option answers one option, adding the replies to h.out. data is nil if
// length was more than maxOptionData. The agreement has an export if the
// transmission phase starts; an error ends the connection.
func (h *handshake) option(opt, length uint32, data []byte) (agreement, error) {
	if opt != wire.OptGo {
		h.last.valid = false
	}
	if done, err := h.tooOpen(opt); done {
		return agreement{}, err
	}
	if h.stopping() && opt != wire.OptAbort {
		if opt == wire.OptExportName {
			return agreement{}, errStopping
		}
		return agreement{}, h.fail(opt, wire.RepErrShutdown, "%v", errStopping)
	}

	switch opt {
	case wire.OptExportName:
		return h.exportName(string(data))
	case wire.OptAbort:
		// A client that does not wait for the reply is fine too.
		if err := h.reply(opt, wire.RepAck, nil); err == nil {
			_ = h.flush()
		}
		return agreement{}, errAbort
	case wire.OptInfo, wire.OptGo:
		return h.infoOrGo(opt, length, data)
	case wire.OptListMetaContext, wire.OptSetMetaContext:
		return agreement{}, h.metaContext(opt, length, data)
	case wire.OptList, wire.OptStructuredReply, wire.OptStartTLS:
		if length != 0 {
			return agreement{}, h.fail(opt, wire.RepErrInvalid, "%s takes no data", optionName(opt))
		}
	}
	switch opt {
	case wire.OptList:
		return agreement{}, h.list()
	case wire.OptStructuredReply:
		h.structured = true
		return agreement{}, h.reply(opt, wire.RepAck, nil)
	case wire.OptStartTLS:
		return agreement{}, h.startTLS()
	}
	return agreement{}, h.fail(opt, wire.RepErrUnsup, "%s is not supported", optionName(opt))
}

// exportName is EXPORT_NAME: it cannot be refused but by disconnecting.
func (h *handshake) exportName(name string) (agreement, error) {
	if err := checkString(name); err != nil {
		return agreement{}, fmt.Errorf("EXPORT_NAME %s: %w", quote(name), err)
	}
	e := h.exports.Lookup(name)
	if e == nil {
		return agreement{}, fmt.Errorf("EXPORT_NAME: no export is named %s", quote(name))
	}
	if err := h.enter(e); err != nil {
		return agreement{}, err
	}
	f := h.facts(e)
	h.out = binary.BigEndian.AppendUint64(h.out, uint64(f.size))
	h.out = binary.BigEndian.AppendUint16(h.out, f.trans)
	if !h.noZeroes {
		h.out = append(h.out, make([]byte, 124)...)
	}
	return h.agree(f), nil
}

// list is LIST.
func (h *handshake) list() error {
	for _, e := range h.exports.All() {
		err := h.reply(wire.OptList, wire.RepServer, func(b []byte) []byte {
			b = binary.BigEndian.AppendUint32(b, uint32(len(e.Name)))
			b = append(b, e.Name...)
			return append(b, e.Description...)
		})
		if err != nil {
			return err
		}
	}
	return h.reply(wire.OptList, wire.RepAck, nil)
}

// infoOrGo is INFO and GO.
func (h *handshake) infoOrGo(opt, length uint32, data []byte) (agreement, error) {
	last := h.last
	h.last.valid = false
	if data == nil && length != 0 {
		return agreement{}, h.tooBig(opt, length)
	}
	name, requests, err := parseInfo(data)
	if err != nil {
		return agreement{}, h.fail(opt, wire.RepErrInvalid, "%v", err)
	}
	e := h.exports.Lookup(name)
	if e == nil {
		return agreement{}, h.unknownExport(opt, name)
	}
	f := h.facts(e)
	if last.valid && last.facts.export == e && bytes.Equal(last.data, data) {
		f = last.facts
	}
	if opt == wire.OptGo {
		if err := h.enter(e); errors.Is(err, errGone) {
			return agreement{}, h.unknownExport(opt, name)
		} else if err != nil {
			return agreement{}, h.fail(opt, wire.RepErrShutdown, "%v", err)
		}
	}
	if err := h.infos(opt, &f, requests); err != nil {
		return agreement{}, err
	}
	if opt == wire.OptGo {
		return h.agree(f), nil
	}
	h.last = frozen{valid: true, data: append(last.data[:0], data...), facts: f}
	return agreement{}, nil
}

// parseInfo takes the data of INFO and GO apart. requests are the information
// requests as they came, two bytes each.
func parseInfo(data []byte) (name string, requests []byte, err error) {
	if len(data) < 6 {
		return "", nil, errors.New("data too short")
	}
	n := binary.BigEndian.Uint32(data)
	if uint64(n) > uint64(len(data)-6) {
		return "", nil, fmt.Errorf("name length %d does not fit the option", n)
	}
	name = string(data[4 : 4+n])
	requests = data[4+n+2:]
	if count := int(binary.BigEndian.Uint16(data[4+n:])); len(requests) != 2*count {
		return "", nil, fmt.Errorf("%d information requests in %d bytes", count, len(requests))
	}
	if err := checkString(name); err != nil {
		return "", nil, fmt.Errorf("export name %s: %w", quote(name), err)
	}
	return name, requests, nil
}

// infos sends EXPORT and BLOCK_SIZE always, the others on request, each once,
// and ACK. Requests not understood are ignored.
func (h *handshake) infos(opt uint32, f *facts, requests []byte) error {
	send := [...]bool{
		wire.InfoExport: true, wire.InfoName: false,
		wire.InfoDescription: false, wire.InfoBlockSize: true,
	}
	for ; len(requests) >= 2; requests = requests[2:] {
		if typ := int(binary.BigEndian.Uint16(requests)); typ < len(send) {
			send[typ] = true
		}
	}
	for typ, want := range send {
		if !want {
			continue
		}
		info, ok := f.appendInfo(nil, uint16(typ))
		if !ok {
			continue
		}
		if err := h.reply(opt, wire.RepInfo, func(b []byte) []byte { return append(b, info...) }); err != nil {
			return err
		}
	}
	return h.reply(opt, wire.RepAck, nil)
}

// agree makes the agreement that the transmission phase is held to.
func (h *handshake) agree(f facts) agreement {
	return agreement{
		export: f.export,
		secure: h.secure,
		terms: terms{
			size:         f.size,
			trans:        f.trans,
			structured:   h.structured,
			contexts:     h.selected(f.export),
			writeThrough: f.export.WriteThrough,
		},
	}
}

func (h *handshake) unknownExport(opt uint32, name string) error {
	return h.fail(opt, wire.RepErrUnknown, "no export is named %s: LIST shows the names", quote(name))
}

func (h *handshake) tooBig(opt, length uint32) error {
	return h.fail(opt, wire.RepErrTooBig, "%s with %d bytes of data: the most is %d", optionName(opt), length, maxOptionData)
}

// optionName is how texts call an option.
func optionName(opt uint32) string {
	switch opt {
	case wire.OptExportName:
		return "EXPORT_NAME"
	case wire.OptAbort:
		return "ABORT"
	case wire.OptList:
		return "LIST"
	case wire.OptStartTLS:
		return "STARTTLS"
	case wire.OptInfo:
		return "INFO"
	case wire.OptGo:
		return "GO"
	case wire.OptStructuredReply:
		return "STRUCTURED_REPLY"
	case wire.OptListMetaContext:
		return "LIST_META_CONTEXT"
	case wire.OptSetMetaContext:
		return "SET_META_CONTEXT"
	case wire.OptExtendedHeaders:
		return "EXTENDED_HEADERS"
	}
	return fmt.Sprintf("option %d", opt)
}
