package control

import (
	"context"
	"errors"
	"math"

	"github.com/nbd-export/nbd-export/state"
)

// maxSize is the most bytes that an image may be given; QEMU has none that is larger.
const maxSize int64 = math.MaxInt64 &^ (1<<30 - 1)

// blockResize changes the size of an image that nobody has exported.
func (s *session) blockResize(a args) (any, error) {
	device, node, size := arg[string](a, "device"), arg[string](a, "node-name"), arg[int64](a, "size")
	t, unlock := s.server.cfg.Registry.lock(node)
	defer unlock()
	format, file := true, true
	if t != nil {
		format, file = t.active()
	}
	switch {
	case t == nil: // no image has a device's name
		return nil, generic("Cannot find device='%s' nor node-name='%s'", device, node)
	case size < 0:
		return nil, generic("Parameter 'size' expects a >0 size")
	case node == t.file.name && !file, node != t.file.name && !format:
		return nil, errInactiveResize
	case node == t.file.name && t.format != nil && t.format.driver == "qcow2":
		return nil, generic("Permission conflict on node '%s': permissions 'resize' are both required by an unnamed block device (uses node '%s' as 'root' child) and unshared by node '%s' (uses node '%s' as 'file' child).", node, node, t.format.name, node)
	case len(t.Exports()) > 0:
		return nil, generic("Permission conflict on node '%s': permissions 'resize' are both required by an unnamed block device (uses node '%s' as 'root' child) and unshared by an export (remove it first)", node, node)
	case t.readOnly():
		return nil, generic("Image is read-only")
	case size > maxSize:
		return nil, generic("offset(%d) exceeds maximum(%d)", size, maxSize)
	}
	if node != t.file.name {
		for _, b := range t.dirtyBitmaps() {
			if b.Inconsistent {
				return nil, generic("Bitmap '%s' is inconsistent and cannot be used; remove it with qemu-img bitmap --remove", b.Name)
			}
		}
	}
	img, ok := t.Image.(interface{ Resize(size int64) error })
	if !ok {
		return nil, generic("Image format driver does not support resize")
	}
	err := owning(t, func() error {
		return t.Machine.WhileActive(func() error { return img.Resize(size) })
	})
	if errors.Is(err, state.ErrInactive) {
		return nil, errInactiveResize
	}
	return nil, err
}

// owning runs f, and has a file node that owns nothing of itself own the image
// meanwhile.
func owning(t *Target, f func() error) error {
	if t.owns() || t.Machine.Status().State != state.Inactive {
		return f()
	}
	if err := state.Activate(context.Background(), state.ActivateOptions{}, t.Machine); err != nil {
		return err
	}
	err := f()
	if e := state.Inactivate(context.Background(), t.Machine); e != nil && err == nil {
		err = e
	}
	return err
}

var errInactiveResize = generic("Permission 'resize' unavailable on inactive node")
