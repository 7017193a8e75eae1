package control

import (
	"fmt"
	"slices"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// bitmapped is an image that can have dirty bitmaps; *backend.Owned is one.
type bitmapped interface {
	Bitmaps() ([]backend.Bitmap, error)
	ActiveBitmaps() ([]backend.Bitmap, error)
}

// bitmaps are those of the image.
func (t *Target) bitmaps() ([]backend.Bitmap, error) { return t.readBitmaps(bitmapped.Bitmaps) }

// readBitmaps calls f under an admission, unless the image is closed.
func (t *Target) readBitmaps(f func(bitmapped) ([]backend.Bitmap, error)) ([]backend.Bitmap, error) {
	img, ok := t.Image.(bitmapped)
	if !ok {
		return nil, nil
	}
	lane := t.Machine.Lane(nil, nil)
	defer lane.Close()
	defer lane.LeaveRead(lane.EnterRead())
	if lane.Stopping() {
		return nil, state.ErrStopping
	}
	return f(img)
}

// dirtyBitmap is QEMU's BlockDirtyInfo.
type dirtyBitmap struct {
	Name         string `json:"name"`
	Recording    bool   `json:"recording"`
	Persistent   bool   `json:"persistent"`
	Busy         bool   `json:"busy"`
	Granularity  int64  `json:"granularity"`
	Count        int64  `json:"count"` // bytes
	Inconsistent bool   `json:"inconsistent,omitempty"`
}

// dirtyBitmaps are those of an image that is active, in QEMU's order, the newest
// first. One is busy while it is exported.
func (t *Target) dirtyBitmaps() (list []dirtyBitmap) {
	all, _ := t.readBitmaps(bitmapped.ActiveBitmaps) // what cannot be read is inconsistent
	exported := t.exportedBitmaps()
	for _, b := range slices.Backward(all) {
		list = append(list, dirtyBitmap{
			Name: b.Name, Recording: b.Auto && !b.Inconsistent, Persistent: true, Busy: slices.Contains(exported, b.Name),
			Granularity: b.Granularity, Count: b.Dirty, Inconsistent: b.Inconsistent,
		})
	}
	return list
}

// exportedBitmaps are the names of those that its exports have.
func (t *Target) exportedBitmaps() (names []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range t.exports {
		if e.served != nil {
			names = append(names, e.served.Bitmaps...)
		}
	}
	return names
}

// bitmap finds a bitmap of the image, nil for none.
func (t *Target) bitmap(name string) (*backend.Bitmap, error) {
	all, err := t.bitmaps()
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(all, func(b backend.Bitmap) bool { return b.Name == name }); i >= 0 {
		return &all[i], nil
	}
	return nil, nil
}

// CheckBitmaps reports what keeps bitmaps of these names from being exported.
// Those of an image that another process owns may be in use by it; if it is
// going to be owned, what is in use was left so by an owner that died.
func (t *Target) CheckBitmaps(names []string, own bool) error {
	for _, name := range names {
		b, err := t.bitmap(name)
		switch {
		case err != nil:
			return fmt.Errorf("bitmap %q: %w", name, err)
		case b == nil:
			return fmt.Errorf("bitmap %q: %s has none of that name; qemu-img bitmap --add makes one in a qcow2 image", name, t.Image.Info().Path)
		case own && b.Inconsistent:
			return fmt.Errorf("bitmap %q of %s is inconsistent: it was not stored by the last owner, or another process has it; if nobody has, remove it with qemu-img bitmap --remove", name, t.Image.Info().Path)
		}
	}
	return nil
}

// checkExportBitmaps is what QEMU's nbd_export_create says of bitmaps of an
// export of t. It comes when the image is active, if it is going to be: only its
// owner knows its bitmaps.
func checkExportBitmaps(r *Registry, t *Target, writable bool, list []bitmap) error {
	active := t.Machine.Status().State == state.Active
	for _, b := range list {
		missing := generic("Bitmap '%s' is not found", b.name)
		if b.node != "" {
			missing = generic("Dirty bitmap '%s' not found", b.name)
			switch other := r.target(b.node); {
			case other == nil:
				return generic("Node '%s' not found", b.node)
			case other != t:
				return generic("Bitmap '%s' is of node '%s', which is another image: nbd-export exports bitmaps with their own", b.name, b.node)
			}
		}
		switch found, err := t.bitmap(b.name); {
		case err != nil:
			return generic("%v", err)
		case found == nil:
			return missing
		case active && found.Inconsistent:
			return generic("Bitmap '%s' is inconsistent and cannot be used", b.name)
		case active && !writable && !t.readOnly() && found.Auto:
			return generic("Enabled bitmap '%s' incompatible with readonly export", b.name)
		}
	}
	return nil
}

func bitmapNames(list []bitmap) (names []string) {
	for _, b := range list {
		names = append(names, b.name)
	}
	return names
}
