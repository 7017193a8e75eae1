package control

import (
	"bufio"
	"fmt"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// inputError is a value that is no JSON: it is answered, and input goes on
// behind it.
type inputError struct{ text string }

func (e *inputError) Error() string { return e.text }

func parseError(format string, args ...any) *inputError {
	return &inputError{"JSON parse error, " + fmt.Sprintf(format, args...)}
}

// errTooLarge is a value beyond the bounds; the stream cannot be followed.
var errTooLarge = &inputError{"JSON token size limit exceeded"}

// decoder takes JSON values off a stream, one after the other. A value is
// first cut into tokens until its brackets balance, and only then parsed: so
// an error inside it does not make its remainder a value of its own.
type decoder struct {
	r    *bufio.Reader
	used int    // bytes of the current value
	text []byte // of the current token
	toks []token
	skip bool // what follows an error, up to where a client can start anew
}

type token struct {
	kind byte // one of {}[]:, or one of the constants below
	text string
}

// next returns the next value. Errors are *inputError, or the stream's.
func (d *decoder) next() (any, error) {
	d.used, d.toks = 0, d.toks[:0]
	braces, brackets := 0, 0
	for {
		t, err := d.token()
		if err != nil {
			return nil, err
		}
		d.toks = append(d.toks, t)
		switch t.kind {
		case '{':
			braces++
		case '}':
			braces--
		case '[':
			brackets++
		case ']':
			brackets--
		}
		switch {
		case len(d.toks) > maxTokens:
			return nil, errTooLarge
		case braces+brackets > maxNesting:
			return nil, &inputError{"JSON nesting depth limit exceeded"}
		case braces > 0 && brackets >= 0, brackets > 0 && braces >= 0:
			continue
		}
		p := parser{d.toks}
		v, perr := p.value()
		if perr != nil {
			return nil, perr
		}
		return v, nil
	}
}

func (d *decoder) read() (byte, error) {
	if d.used >= maxMessage {
		return 0, errTooLarge
	}
	c, err := d.r.ReadByte()
	if err == nil {
		d.used++
	}
	return c, err
}

func (d *decoder) unread() {
	d.used--
	_ = d.r.UnreadByte()
}

func space(c byte) bool      { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }
func structural(c byte) bool { return strings.IndexByte("{}[]:,", c) >= 0 }
func lower(c byte) bool      { return 'a' <= c && c <= 'z' }
func digit(c byte) bool      { return '0' <= c && c <= '9' }

// restarts says that what follows an error ends at c. Brackets and the ends of
// lines are where clients begin anew; with a byte that no text has one can force it.
func restarts(c byte) bool { return structural(c) || c < ' ' && c != '\t' || c >= 0xFE }

func (d *decoder) token() (token, error) {
	var c byte
	var err error
	for {
		if c, err = d.read(); err != nil {
			return token{}, err
		}
		if d.skip {
			if !restarts(c) {
				continue
			}
			d.skip = false
		}
		if !space(c) {
			break
		}
		if len(d.toks) == 0 {
			d.used = 0 // space between values belongs to none
		}
	}
	d.text = append(d.text[:0], c)
	switch {
	case structural(c):
		return token{kind: c}, nil
	case c == '"' || c == '\'':
		return d.stringToken(c)
	case c == '-' || digit(c):
		return d.numberToken(c)
	case lower(c):
		for {
			if c, err = d.read(); err != nil {
				return token{}, err
			}
			if !lower(c) {
				d.unread()
				return token{kindKeyword, string(d.text)}, nil
			}
			d.text = append(d.text, c)
		}
	}
	return d.stray()
}

func (d *decoder) stringToken(quote byte) (token, error) {
	for {
		c, err := d.read()
		if err != nil {
			return token{}, err
		}
		d.text = append(d.text, c)
		switch {
		case c == quote:
			return token{kindString, string(d.text)}, nil
		case c == '\\':
			if c, err = d.read(); err != nil {
				return token{}, err
			}
			d.text = append(d.text, c)
		}
		if c < 0x20 || c >= 0xFE {
			return d.stray()
		}
	}
}

// numberToken follows JSON's grammar: -? (0|[1-9]\d*) (.\d+)? ([eE][+-]?\d+)?
func (d *decoder) numberToken(c byte) (token, error) {
	const (
		minus = iota
		zero
		integer
		point
		fraction
		e
		sign
		exponent
	)
	at := integer
	switch c {
	case '-':
		at = minus
	case '0':
		at = zero
	}
	for {
		c, err := d.read()
		if err != nil {
			return token{}, err
		}
		switch {
		case digit(c) && at == minus:
			at = integer
			if c == '0' {
				at = zero
			}
		case digit(c) && (at == integer || at == fraction || at == exponent):
		case digit(c) && at == point:
			at = fraction
		case digit(c) && (at == e || at == sign):
			at = exponent
		case c == '.' && (at == zero || at == integer):
			at = point
		case (c == 'e' || c == 'E') && (at == zero || at == integer || at == fraction):
			at = e
		case (c == '+' || c == '-') && at == e:
			at = sign
		case digit(c) || at != zero && at != integer && at != fraction && at != exponent:
			d.text = append(d.text, c)
			return d.stray()
		default:
			d.unread()
			return token{kindNumber, string(d.text)}, nil
		}
		d.text = append(d.text, c)
	}
}

// stray reports d.text, which is no token. What follows is skipped up to
// where a token may start again.
func (d *decoder) stray() (token, error) {
	d.skip = true
	bad := string(d.text)
	if len(bad) > 64 {
		bad = bad[:64] + "..."
	}
	return token{}, parseError("stray '%s'", bad)
}

// parser makes a value of balanced tokens. Its depth is bounded by maxNesting.
type parser struct{ toks []token }

func (p *parser) pop() token {
	if len(p.toks) == 0 {
		return token{}
	}
	t := p.toks[0]
	p.toks = p.toks[1:]
	return t
}

func (p *parser) value() (any, *inputError) {
	t := p.pop()
	switch t.kind {
	case '{':
		return p.object()
	case '[':
		return p.array()
	case kindString:
		return unquote(t.text)
	case kindNumber:
		return number(t.text), nil
	case kindKeyword:
		switch t.text {
		case "true":
			return true, nil
		case "false":
			return false, nil
		case "null":
			return nil, nil
		}
		return nil, parseError("invalid keyword '%s'", t.text)
	}
	return nil, parseError("expecting value")
}

func (p *parser) object() (any, *inputError) {
	o := &object{values: make(map[string]any)}
	if len(p.toks) > 0 && p.toks[0].kind == '}' {
		p.pop()
		return o, nil
	}
	for {
		k, err := p.value()
		if err != nil {
			return nil, err
		}
		name, ok := k.(string)
		if !ok {
			return nil, parseError("key is not a string in object")
		}
		if p.pop().kind != ':' {
			return nil, parseError("missing : in object pair")
		}
		v, err := p.value()
		if err != nil {
			return nil, err
		}
		if _, ok := o.values[name]; ok {
			return nil, parseError("duplicate key")
		}
		o.names, o.values[name] = append(o.names, name), v
		switch p.pop().kind {
		case ',':
		case '}':
			return o, nil
		default:
			return nil, parseError("expected separator in dict")
		}
	}
}

func (p *parser) array() (any, *inputError) {
	list := []any{}
	if len(p.toks) > 0 && p.toks[0].kind == ']' {
		p.pop()
		return list, nil
	}
	for {
		v, err := p.value()
		if err != nil {
			return nil, err
		}
		list = append(list, v)
		switch p.pop().kind {
		case ',':
		case ']':
			return list, nil
		default:
			return nil, parseError("expected separator in list")
		}
	}
}

// unquote resolves the escapes of a string token.
func unquote(s string) (any, *inputError) {
	s = s[1 : len(s)-1]
	if !utf8.ValidString(s) {
		return nil, parseError("invalid UTF-8 sequence in string")
	}
	if strings.IndexByte(s, '\\') < 0 {
		return s, nil
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			b = append(b, s[i])
			continue
		}
		i++ // the tokenizer saw to it that a byte follows
		switch s[i] {
		case '"', '\'', '\\', '/':
			b = append(b, s[i])
		case 'b':
			b = append(b, '\b')
		case 'f':
			b = append(b, '\f')
		case 'n':
			b = append(b, '\n')
		case 'r':
			b = append(b, '\r')
		case 't':
			b = append(b, '\t')
		case 'u':
			text := s[i-1 : min(i+5, len(s))]
			r, ok := hex4(s[i+1:])
			i += 4
			if ok && utf16.IsSurrogate(r) {
				low := rune(0)
				if strings.HasPrefix(s[i+1:], `\u`) {
					low, _ = hex4(s[i+3:])
				}
				r = utf16.DecodeRune(r, low)
				ok = r != utf8.RuneError
				i += 6
			}
			if !ok {
				return nil, parseError("%s is not a valid Unicode character", text)
			}
			b = utf8.AppendRune(b, r)
		default:
			return nil, parseError("invalid escape sequence in string")
		}
	}
	return string(b), nil
}

func hex4(s string) (r rune, ok bool) {
	if len(s) < 4 {
		return 0, false
	}
	for _, c := range []byte(s[:4]) {
		switch {
		case digit(c):
			r = r<<4 | rune(c-'0')
		case 'a' <= c|0x20 && c|0x20 <= 'f':
			r = r<<4 | rune(c|0x20-'a'+10)
		default:
			return 0, false
		}
	}
	return r, true
}
