package control

import (
	"bytes"
	"encoding/json"
	"fmt"
	"unicode/utf16"
	"unicode/utf8"
)

// Bounds of one JSON value on the control socket.
const (
	maxMessage = 1 << 20   // bytes
	maxTokens  = 128 << 10 // 2 MiB of memory beside the text
	maxNesting = 1024
)

// A JSON value is nil, bool, string, number, []any or *object. encoding/json
// is not used for input because QMP allows single quotes, tells apart more
// errors, and goes on after each at a place that clients rely on.

// number is a JSON number as it was written.
type number string

// MarshalJSON makes number a json.Marshaler.
func (n number) MarshalJSON() ([]byte, error) { return []byte(n), nil }

// object is a JSON object; it keeps the order of its members.
type object struct {
	names  []string
	values map[string]any
}

// MarshalJSON makes *object a json.Marshaler.
func (o *object) MarshalJSON() ([]byte, error) { return appendJSON(nil, o), nil }

// appendJSON appends a JSON value. It goes down by itself: encoding/json copies
// and checks at each level again what a json.Marshaler has made.
func appendJSON(dst []byte, v any) []byte {
	switch v := v.(type) {
	case number:
		return append(dst, v...)
	case []any:
		dst = append(dst, '[')
		for i, e := range v {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendJSON(dst, e)
		}
		return append(dst, ']')
	case *object:
		dst = append(dst, '{')
		for i, name := range v.names {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = append(append(dst, marshal(name)...), ':')
			dst = appendJSON(dst, v.values[name])
		}
		return append(dst, '}')
	}
	return append(dst, marshal(v)...)
}

const (
	kindString  = 's' // text in its quotes, escapes as they stood
	kindNumber  = 'n'
	kindKeyword = 'k'
)

// marshal encodes a value of this package, which cannot fail, on one line.
func marshal(v any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic("control: cannot encode an answer: " + err.Error())
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// appendLine appends v as the socket sends it: spaces after commas and
// colons, everything beyond ASCII escaped, CRLF.
func appendLine(dst []byte, v any) []byte {
	return append(appendSpaced(dst, marshal(v)), "\r\n"...)
}

// appendSpaced is appendLine of JSON without spaces, without the CRLF.
func appendSpaced(dst, src []byte) []byte {
	quoted := false
	for i := 0; i < len(src); {
		c := src[i]
		switch {
		case c >= 0x7F:
			r, n := utf8.DecodeRune(src[i:])
			if r > 0xFFFF {
				high, low := utf16.EncodeRune(r)
				dst = fmt.Appendf(dst, `\u%04X\u%04X`, high, low)
			} else {
				dst = fmt.Appendf(dst, `\u%04X`, r)
			}
			i += n
			continue
		case quoted && c == '\\':
			n := 2
			if src[i+1] == 'u' {
				n = 6
			}
			dst = append(dst, '\\', src[i+1])
			dst = append(dst, bytes.ToUpper(src[i+2:i+n])...)
			i += n
			continue
		case c == '"':
			quoted = !quoted
		}
		dst = append(dst, c)
		if !quoted && (c == ',' || c == ':') {
			dst = append(dst, ' ')
		}
		i++
	}
	return dst
}
