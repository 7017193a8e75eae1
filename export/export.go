package export

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
)

// MaxName is the longest name or description of an export, in bytes.
const MaxName = wire.MaxString

// Export is a disk under a name. Its fields do not change once it is added to
// Exports.
type Export struct {
	// Name is what clients ask for, at most 4096 bytes of UTF-8 without NUL.
	// "" is the default export: what a client gets that names none.
	Name string
	// Description is a text for people, "" for none; same limits as Name.
	Description string
	// Disk is what the export serves.
	Disk *ioloop.Disk
	// ReadOnly exports refuse every write, whoever owns the image. An export
	// of an image that is never opened for writing is read-only anyway.
	ReadOnly bool
	// Bitmaps are the dirty bitmaps of the image that clients may ask for.
	Bitmaps []string
	// WriteThrough exports make every write, discard and zeroing durable
	// before it is acknowledged.
	WriteThrough bool
}

func (e *Export) readOnly() bool { return e.ReadOnly || e.Disk.Image.Info().ReadOnly }

// Exports is the set of exports of a process. The zero value is empty and
// ready; all methods may be called at any time by any goroutine.
type Exports struct {
	mu sync.RWMutex
	m  map[string]*Export
}

// Add makes e known to clients. It fails if the name is taken or e is not
// valid.
func (x *Exports) Add(e *Export) error {
	if e.Disk == nil || e.Disk.Image == nil {
		return fmt.Errorf("export %s has no disk", quote(e.Name))
	}
	if err := CheckNames(e.Name, e.Description); err != nil {
		return err
	}
	if err := CheckBitmaps(e.Bitmaps); err != nil {
		return fmt.Errorf("export %s: %w", quote(e.Name), err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.m[e.Name] != nil {
		return fmt.Errorf("export %s exists already: choose another name", quote(e.Name))
	}
	if x.m == nil {
		x.m = make(map[string]*Export)
	}
	x.m[e.Name] = e
	return nil
}

// CheckNames reports what keeps an export from having this name and this
// description.
func CheckNames(name, description string) error {
	if err := checkString(name); err != nil {
		return fmt.Errorf("export name %s: %w", quote(name), err)
	}
	if err := checkString(description); err != nil {
		return fmt.Errorf("description of export %s: %w", quote(name), err)
	}
	return nil
}

// CheckBitmaps reports what keeps bitmaps of these names from being exported
// together.
func CheckBitmaps(names []string) error {
	for i, name := range names {
		switch err := checkString(wire.ContextDirtyBitmap + name); {
		case name == "":
			return errors.New("a bitmap's name is empty")
		case err != nil:
			return fmt.Errorf("bitmap %s: %w", quote(name), err)
		case slices.Contains(names[:i], name):
			return fmt.Errorf("bitmap %s is named twice", quote(name))
		}
	}
	return nil
}

// Remove takes the export of that name away and returns it, or nil. New
// clients do not find it any more; those connected go on, see
// Server.Disconnect.
func (x *Exports) Remove(name string) *Export {
	x.mu.Lock()
	defer x.mu.Unlock()
	e := x.m[name]
	delete(x.m, name)
	return e
}

// Lookup returns the export of exactly that name, or nil. "" is a name like
// any other.
func (x *Exports) Lookup(name string) *Export {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.m[name]
}

// All returns the exports sorted by name.
func (x *Exports) All() []*Export {
	x.mu.RLock()
	all := make([]*Export, 0, len(x.m))
	for _, e := range x.m {
		all = append(all, e)
	}
	x.mu.RUnlock()
	slices.SortFunc(all, func(a, b *Export) int { return strings.Compare(a.Name, b.Name) })
	return all
}

var (
	errTooLong = fmt.Errorf("longer than %d bytes", wire.MaxString)
	errNUL     = errors.New("contains a NUL")
	errNotUTF8 = errors.New("not valid UTF-8")
)

// checkString holds s to the specification's rules for strings
// ("Conventions").
func checkString(s string) error {
	switch {
	case len(s) > wire.MaxString:
		return errTooLong
	case strings.IndexByte(s, 0) >= 0:
		return errNUL
	case !utf8.ValidString(s):
		return errNotUTF8
	}
	return nil
}

// quote shortens and quotes a name for a message.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		return fmt.Sprintf("%q...", clean(s, most))
	}
	return fmt.Sprintf("%q", s)
}
