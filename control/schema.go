package control

import (
	"fmt"
	"math"
	"slices"
	"strconv"
)

// kind is the type of a command's argument, in the words of the errors.
type kind string

const (
	boolean kind = "boolean"
	text    kind = "string"
	integer kind = "integer"  // fits in an int64
	uint32s kind = "uint32_t" // an integer that fits in a uint32
	texts   kind = "array"    // of strings
	nested  kind = "object"
	// A reference to a node: its name, or the object that blockdev-add takes.
	nodeRef       kind = "BlockdevRef"
	nodeRefOrNull kind = "BlockdevRefOrNull"
	// An array of names of bitmaps, each alone or in an object with its node.
	bitmaps kind = "BlockDirtyBitmapOrStr"
)

// param is one argument of a command, or a member of such an argument.
type param struct {
	name     string
	kind     kind
	required bool
	values   []string // what a string, or each of texts, may be; nil: anything
	longest  int      // of a string, in bytes; 0: any length
	fields   *fields  // of nested and nodeRef
}

// fields are the members of an object. Where it is a union, tag is the
// member whose value says which branch of further members it has.
type fields struct {
	params   []param
	tag      string
	branches map[string][]param
}

// args are the arguments of a command, checked against its params: an
// argument has the Go type of its kind (bool, string, int64, []string; args for
// nested; string or args for nodeRef, or nil; []bitmap), or is not there.
type args map[string]any

// bitmap names a dirty bitmap; node is "" if it is that of the export.
type bitmap struct{ node, name string }

// arg returns the argument, or the zero value if it is not there.
func arg[T any](a args, name string) T {
	v, _ := a[name].(T)
	return v
}

// argOr returns the argument, or otherwise if it is not there.
func argOr[T any](a args, name string, otherwise T) T {
	if v, ok := a[name].(T); ok {
		return v
	}
	return otherwise
}

// check turns the given arguments, nil for none, into args. All errors are
// found here, before a command has any effect. As in QEMU errors name a member
// by its whole path, but for values that are not among those allowed.
func (f *fields) check(path string, given *object) (args, error) {
	if given == nil {
		given = &object{}
	}
	checked := make(args, len(f.params))
	if err := checkAll(checked, f.params, path, given); err != nil {
		return nil, err
	}
	known := f.params
	if f.tag != "" {
		branch := f.branches[arg[string](checked, f.tag)]
		if err := checkAll(checked, branch, path, given); err != nil {
			return nil, err
		}
		known = slices.Concat(known, branch)
	}
	for _, name := range given.names {
		if !slices.ContainsFunc(known, func(p param) bool { return p.name == name }) {
			return nil, generic("Parameter '%s' is unexpected", path+name)
		}
	}
	return checked, nil
}

func checkAll(checked args, params []param, path string, given *object) error {
	for _, p := range params {
		v, ok := given.values[p.name]
		if !ok {
			if p.required {
				return generic("Parameter '%s' is missing", path+p.name)
			}
			continue
		}
		c, err := p.check(path, v)
		if err != nil {
			return err
		}
		checked[p.name] = c
	}
	return nil
}

func (p param) check(path string, v any) (any, error) {
	expected := p.kind
	w, fromWord := v.(word)
	if fromWord {
		v = w.as(p.kind)
	}
	switch p.kind {
	case boolean:
		if b, ok := v.(bool); ok {
			return b, nil
		}
	case text:
		if s, ok := v.(string); ok {
			if p.longest > 0 && len(s) > p.longest {
				return nil, generic("Parameter '%s' is longer than %d bytes", path+p.name, p.longest)
			}
			return s, p.allowed(p.name, s)
		}
	case integer:
		if n, ok := v.(number); ok {
			if i, err := strconv.ParseInt(string(n), 10, 64); err == nil {
				return i, nil
			}
		}
	case uint32s:
		n, _ := v.(number)
		i, err := strconv.ParseInt(string(n), 10, 64)
		_, above := strconv.ParseUint(string(n), 10, 64)
		switch {
		case err == nil && 0 <= i && i <= math.MaxUint32:
			return i, nil
		case err == nil || above == nil:
			return nil, generic("Parameter '%s' expects %s", path+p.name, uint32s)
		case fromWord:
			return nil, generic("Parameter '%s' expects integer", path+p.name)
		}
		return nil, generic("Parameter '%s' expects uint64", path+p.name)
	case texts:
		if list, ok := v.([]any); ok {
			return p.texts(path, list)
		}
	case nested:
		if o, ok := v.(*object); ok {
			return p.fields.check(path+p.name+".", o)
		}
	case nodeRef, nodeRefOrNull:
		switch v := v.(type) {
		case nil:
			if p.kind == nodeRefOrNull {
				return nil, nil
			}
		case string:
			return v, nil
		case *object:
			return p.fields.check(path+p.name+".", v)
		}
		path = "" // as in QEMU
	case bitmaps:
		expected = texts
		if list, ok := v.([]any); ok {
			return p.bitmaps(path, list)
		}
	}
	switch {
	case fromWord && p.kind == boolean:
		return nil, generic("Parameter '%s' expects 'on' or 'off'", path+p.name)
	case fromWord && p.kind == integer:
		return nil, generic("Parameter '%s' expects integer", path+p.name)
	}
	return nil, generic("Invalid parameter type for '%s', expected: %s", path+p.name, expected)
}

func (p param) texts(path string, list []any) ([]string, error) {
	all := make([]string, len(list))
	for i, e := range list {
		name := fmt.Sprintf("%s[%d]", p.name, i)
		s, ok := e.(string)
		if !ok {
			return nil, generic("Invalid parameter type for '%s', expected: %s", path+name, text)
		}
		if err := p.allowed(name, s); err != nil {
			return nil, err
		}
		all[i] = s
	}
	return all, nil
}

func (p param) bitmaps(path string, list []any) ([]bitmap, error) {
	of := fields{params: []param{{name: "node", kind: text, required: true}, {name: "name", kind: text, required: true}}}
	all := make([]bitmap, len(list))
	for i, e := range list {
		switch e := e.(type) {
		case string:
			all[i] = bitmap{name: e}
		case *object:
			a, err := of.check(fmt.Sprintf("%s%s[%d].", path, p.name, i), e)
			if err != nil {
				return nil, err
			}
			all[i] = bitmap{node: arg[string](a, "node"), name: arg[string](a, "name")}
		default:
			return nil, generic("Invalid parameter type for 'null', expected: %s", bitmaps) // QEMU's words
		}
	}
	return all, nil
}

func (p param) allowed(name, s string) error {
	if p.values != nil && !slices.Contains(p.values, s) {
		return generic("Parameter '%s' does not accept value '%s'", name, s)
	}
	return nil
}
