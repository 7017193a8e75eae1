package control

import (
	"bufio"
	"errors"
	"io"
	"strconv"
	"strings"
)

// word is a value that came as KEY=VALUE and has no type of its own. It becomes
// what the argument is: "on" and "off" a boolean, digits a number.
type word string

// as is the value for an argument of that kind; one that does not fit stays a
// string, which the argument then refuses.
func (w word) as(k kind) any {
	switch k {
	case boolean:
		switch w {
		case "on", "yes", "true", "y":
			return true
		case "off", "no", "false", "n":
			return false
		}
	case integer, uint32s:
		return number(w)
	}
	return string(w)
}

// parseOptions parses the value of an option of qemu-storage-daemon: JSON, or
// KEY=VALUE,... where a dot in a key goes into an object, or a list if numbers follow,
// and two commas are one in a value (QEMU's keyval.c). The first value may go without
// its key, which is then implied, unless that is "".
func parseOptions(text, implied string) (*object, error) {
	if strings.HasPrefix(text, "{") {
		d := decoder{r: bufio.NewReader(strings.NewReader(text + " "))}
		v, err := d.next()
		if errors.Is(err, io.EOF) {
			err = parseError("premature EOI")
		}
		if err != nil {
			return nil, err
		}
		if _, err := d.next(); !errors.Is(err, io.EOF) {
			return nil, generic("Expecting at most one JSON value")
		}
		return v.(*object), nil // it began with a brace
	}
	if first, _, _ := strings.Cut(text, ","); implied != "" && first != "" && !strings.Contains(first, "=") {
		text = implied + "=" + text
	}
	root := &object{values: make(map[string]any)}
	for text != "" {
		key, rest, ok := strings.Cut(text, "=")
		if key, _, cut := strings.Cut(key, ","); key == "" {
			return nil, generic("Invalid parameter ''")
		} else if !ok || cut {
			return nil, generic("Expected '=' after parameter '%s'", key)
		}
		var value strings.Builder
		for rest != "" {
			before, after, comma := strings.Cut(rest, ",")
			value.WriteString(before)
			rest = after
			if !comma || !strings.HasPrefix(after, ",") {
				break
			}
			value.WriteByte(',')
			rest = after[1:]
		}
		text = rest
		if err := root.put(key, word(value.String())); err != nil {
			return nil, err
		}
	}
	return root, root.makeLists("")
}

// makeLists makes lists of the objects in o whose members are numbered. o is at path.
func (o *object) makeLists(path string) error {
	for _, name := range o.names {
		below, ok := o.values[name].(*object)
		if !ok {
			continue
		}
		path := path + name + "."
		if err := below.makeLists(path); err != nil {
			return err
		}
		list, err := below.list(path)
		if err != nil {
			return err
		}
		if list != nil {
			o.values[name] = list
		}
	}
	return nil
}

// list is o as a list, nil if its members are not numbered. It has strings, and no
// words, since arguments that are lists have no other values without a type.
func (o *object) list(path string) ([]any, error) {
	numbered := make(map[uint64]any)
	for _, name := range o.names {
		i, err := strconv.ParseUint(name, 10, 31)
		if err != nil {
			continue
		}
		numbered[i] = o.values[name]
		if w, ok := numbered[i].(word); ok {
			numbered[i] = string(w)
		}
	}
	switch len(numbered) {
	case 0:
		return nil, nil
	case len(o.names):
	default:
		return nil, generic("Parameters '%s*' used inconsistently", path)
	}
	list := make([]any, len(numbered))
	for i := range list {
		v, ok := numbered[uint64(i)]
		if !ok {
			return nil, generic("Parameter '%s%d' missing", path, i)
		}
		list[i] = v
	}
	return list, nil
}

// put sets a member by its path; the last one given counts.
func (o *object) put(path string, v word) error {
	names := strings.Split(path, ".")
	for i, name := range names {
		old, there := o.values[name]
		if name == "" {
			return generic("Invalid parameter '%s'", path)
		}
		if !there {
			o.names = append(o.names, name)
		}
		below, isObject := old.(*object)
		last := i == len(names)-1
		switch {
		case there && isObject == last:
			return generic("Parameters '%s.*' used inconsistently", strings.Join(names[:i+1], "."))
		case last:
			o.values[name] = v
		case !there:
			below = &object{values: make(map[string]any)}
			o.values[name] = below
		}
		o = below
	}
	return nil
}

// Run carries out a command that came with the start of the process: its
// options are those of qemu-storage-daemon's --object, --blockdev, --export and
// --nbd-server, whose addr is flat.
func (s *Server) Run(command, options string) error {
	implied := map[string]string{"blockdev-add": "driver", "block-export-add": "type", "object-add": "qom-type"}[command]
	given, err := parseOptions(options, implied)
	if err != nil {
		return err
	}
	if addr, ok := given.values["addr"].(*object); ok && command == "nbd-server-start" {
		data := &object{values: addr.values}
		legacy := &object{names: []string{"data"}, values: map[string]any{"data": data}}
		for _, name := range addr.names {
			if name == "type" {
				legacy.names, legacy.values[name] = append(legacy.names, name), addr.values[name]
			} else {
				data.names = append(data.names, name)
			}
		}
		given.values["addr"] = legacy
	}
	cmd := findCommand(command)
	checked, err := cmd.check("", given)
	if err != nil { // in the words of who gave it
		return errors.New(strings.Replace(err.Error(), "'addr.data.", "'addr.", 1))
	}
	_, err = cmd.run(&session{server: s}, checked)
	return err
}
