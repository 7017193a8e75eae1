package backend

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Resize makes the active image size bytes long, which is durable after the
// next Flush. What is cut off is lost; what is added reads as zeros. A block
// device keeps its size: a smaller one is granted and changes nothing, as in
// QEMU (raw_co_truncate). Nothing else may use the image meanwhile.
func (o *Owned) Resize(size int64) error {
	v := o.cur.Load()
	if !v.writable() {
		return o.fail("resize", unix.EPERM)
	}
	c, err := v.resize(size)
	if err != nil {
		return err
	}
	next := &view{file: v.file, others: v.others, active: true, content: c}
	next.lost.Store(v.lost.Load())
	o.cur.Store(next)
	return nil
}

// resize implements content.
func (r *raw) resize(size int64) (content, error) {
	f := r.file
	switch {
	case f.traits.BlockDevice && size > r.size:
		return nil, r.image.fail("resize", fmt.Errorf("cannot grow device files: %w", unix.EINVAL))
	case f.traits.BlockDevice:
		return r, nil
	}
	if err := f.truncate(size); err != nil {
		return nil, r.image.fail("resize", err)
	}
	if err := f.load(); err != nil {
		return nil, err
	}
	return r.content(f, f.size, true), nil
}
