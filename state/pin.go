package state

import "errors"

// ErrPinned refuses to inactivate a pinned image.
var ErrPinned = errors.New("an export of it may not be inactive; delete that export, or add it with allow-inactive")

// Pin keeps the image with this process while it is active: until as many
// Unpin, orders to inactivate it are refused with ErrPinned. One under way goes
// on, and so does giving up a failed image.
func (m *Machine) Pin() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.pins++
}

// Unpin takes back one Pin.
func (m *Machine) Unpin() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.pins--
}

// WhileActive runs f with the image active, no transition under way, and its
// watch stopped; orders that come meanwhile wait. It is for changing what
// requests rely on, such as the size, so the caller sees to it that there are
// none. It returns ErrInactive, without having run f, unless the image is
// active.
func (m *Machine) WhileActive(f func() error) error {
	op := m.exclusive()
	if !m.in(Active) {
		return op.finish(ErrInactive)
	}
	m.endWatch()
	m.synchronize()
	err := f()
	m.startWatch()
	return op.finish(err)
}
