package control

import (
	"fmt"
	"slices"
	"strconv"
)

// kind is the type of a command's argument, in the words of the errors.
type kind string

const (
	boolean kind = "boolean"
	text    kind = "string"
	integer kind = "integer" // fits in an int64
	texts   kind = "array"   // of strings
)

// param is one argument of a command.
type param struct {
	name     string
	kind     kind
	required bool
	values   []string // what a string, or each of texts, may be; nil: anything
}

// args are the arguments of a command, checked against its params: an
// argument has the Go type of its kind (bool, string, int64, []string), or is
// not there.
type args map[string]any

// arg returns the argument, or the zero value if it is not there.
func arg[T any](a args, name string) T {
	v, _ := a[name].(T)
	return v
}

// check turns the given arguments, nil for none, into args. All errors are
// found here, before a command has any effect.
func check(params []param, given *object) (args, error) {
	if given == nil {
		given = &object{}
	}
	checked := make(args, len(params))
	for _, p := range params {
		v, ok := given.values[p.name]
		if !ok {
			if p.required {
				return nil, generic("Parameter '%s' is missing", p.name)
			}
			continue
		}
		c, err := p.check(v)
		if err != nil {
			return nil, err
		}
		checked[p.name] = c
	}
	for _, name := range given.names {
		if !slices.ContainsFunc(params, func(p param) bool { return p.name == name }) {
			return nil, generic("Parameter '%s' is unexpected", name)
		}
	}
	return checked, nil
}

func (p param) check(v any) (any, error) {
	wrong := generic("Invalid parameter type for '%s', expected: %s", p.name, p.kind)
	switch p.kind {
	case boolean:
		if b, ok := v.(bool); ok {
			return b, nil
		}
	case text:
		if s, ok := v.(string); ok {
			return s, p.allowed(p.name, s)
		}
	case integer:
		if n, ok := v.(number); ok {
			if i, err := strconv.ParseInt(string(n), 10, 64); err == nil {
				return i, nil
			}
		}
	case texts:
		list, ok := v.([]any)
		if !ok {
			return nil, wrong
		}
		all := make([]string, len(list))
		for i, e := range list {
			name := fmt.Sprintf("%s[%d]", p.name, i)
			s, ok := e.(string)
			if !ok {
				return nil, generic("Invalid parameter type for '%s', expected: %s", name, text)
			}
			if err := p.allowed(name, s); err != nil {
				return nil, err
			}
			all[i] = s
		}
		return all, nil
	}
	return nil, wrong
}

func (p param) allowed(name, s string) error {
	if p.values != nil && !slices.Contains(p.values, s) {
		return generic("Parameter '%s' does not accept value '%s'", name, s)
	}
	return nil
}
