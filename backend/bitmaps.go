package backend

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2"
)

// Bitmaps are the image's persistent dirty bitmaps, in the order in which they
// stand in it. Of an image that is not active it tells what is in the file now,
// and how much is dirty of none. It reads, and is called under an admission as
// data methods are.
func (o *Owned) Bitmaps() ([]Bitmap, error) {
	if q, ok := o.cur.Load().content.(*qcow); ok {
		return q.bitmaps()
	}
	return nil, nil
}

// ActiveBitmaps are those of an image that is active, and none of another. It
// reads those that nobody has asked for yet, waits for no transition, and is
// called as Bitmaps is. What cannot be read is inconsistent, and the error says
// why.
func (o *Owned) ActiveBitmaps() ([]Bitmap, error) {
	if q, ok := o.cur.Load().content.(*qcow); ok && q.active {
		return q.bitmaps()
	}
	return nil, nil
}

// BitmapStatus implements Image.
func (o *Owned) BitmapStatus(dst []Status, bitmap string, off, n int64, max int) ([]Status, error) {
	if q, ok := o.cur.Load().content.(*qcow); ok {
		return q.bitmapStatus(dst, bitmap, off, n, max)
	}
	return dst, o.fail("status", fmt.Errorf("%s images have no bitmap %q: %w", o.info.Format, bitmap, unix.ENOENT))
}

// bitmaps is Owned.Bitmaps.
func (q *qcow) bitmaps() ([]Bitmap, error) {
	if !q.active {
		return q.storedBitmaps()
	}
	infos, err := q.disk.BitmapInfos()
	all := make([]Bitmap, len(infos))
	for i, x := range infos {
		all[i] = Bitmap(x)
	}
	return all, err
}

// storedBitmaps reads them anew.
func (q *qcow) storedBitmaps() ([]Bitmap, error) {
	if err := q.file.follow(); err != nil {
		return nil, err
	}
	h, err := qcow2.ReadHeader(q.file)
	if err != nil || !h.HasBitmaps() {
		return nil, err
	}
	entries, err := qcow2.Bitmaps(q.file, h)
	var all []Bitmap
	for _, e := range entries {
		all = append(all, Bitmap{Name: e.Name, Granularity: 1 << e.Granularity, Auto: e.Auto, Inconsistent: e.InUse})
	}
	return all, err
}

// bitmapStatus is Owned.BitmapStatus. Of a view that is not the owner's it tells
// what was in the file when it was first asked.
func (q *qcow) bitmapStatus(dst []Status, bitmap string, off, n int64, max int) ([]Status, error) {
	if err := q.within("status", off, n); err != nil {
		return dst, err
	}
	if !q.active {
		if err := q.file.follow(); err != nil {
			return dst, err
		}
	}
	err := q.disk.DirtyRuns(bitmap, off, n, func(n int64, dirty bool) bool {
		var flags StatusFlags
		if dirty {
			flags = StatusDirty
		}
		dst = append(dst, Status{Length: n, Flags: flags})
		max--
		return max > 0
	})
	if !tellsNothing(err) {
		return dst, err
	}
	if _, logged := q.silent.LoadOrStore(bitmap, nil); !logged {
		q.image.warnf("clients that ask for bitmap %q are told that all is dirty: %v", bitmap, err)
	}
	return append(dst, Status{Length: n, Flags: StatusDirty}), nil
}

// tellsNothing reports whether an error is about the bitmap, and not about
// reading it.
func tellsNothing(err error) bool {
	_, damaged := errors.AsType[*qcow2.FormatError](err)
	return damaged || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EFBIG)
}
