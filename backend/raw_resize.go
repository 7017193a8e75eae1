package backend

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Resize makes the file of the active image size bytes long, which is durable
// after the next Flush. What is cut off is lost; what is added reads as zeros. A
// block device keeps its size: a smaller one is granted and changes nothing,
// as in QEMU (raw_co_truncate). Nothing else may use the image meanwhile.
func (r *Raw) Resize(size int64) error {
	v := r.cur.Load()
	f := v.file
	switch {
	case !v.active || !f.writable:
		return r.fail("resize", unix.EPERM)
	case f.traits.BlockDevice && size > v.size:
		return r.fail("resize", fmt.Errorf("cannot grow device files: %w", unix.EINVAL))
	case f.traits.BlockDevice:
		return nil
	}
	if err := f.truncate(size); err != nil {
		return r.fail("resize", err)
	}
	if err := f.load(); err != nil {
		return err
	}
	next := newView(f, f.size, true)
	next.nameless.Store(v.nameless.Load())
	r.cur.Store(next)
	return nil
}

func (f *File) truncate(size int64) error {
	if err := f.faults.check(opTruncate, size); err != nil {
		return err
	}
	return retry(func() error { return unix.Ftruncate(f.fd, size) })
}
