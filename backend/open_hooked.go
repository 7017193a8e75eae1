//go:build testhooks

package backend

// OpenHooked is Open for tests of whole programs. fault runs before each
// system call on the image's files and on its owner record, by any goroutine:
// an error is returned in the call's stead, and a smaller n makes a transfer
// of n bytes at off short. call is the name of a sysop. step is called at each
// qcow2.Step of an image that has them, by who changes its owner.
func OpenHooked(o Options, fault func(call string, off int64, n int) (int, error), step func(string)) (*Owned, error) {
	o.step = step
	return open(o, func(op sysop, off int64, n int) (int, error) { return fault(op.String(), off, n) })
}
