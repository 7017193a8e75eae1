package backend

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// bitmapped is a content that can have persistent dirty bitmaps.
type bitmapped interface {
	// bitmaps lists them, in the order in which they stand in the image.
	bitmaps() ([]Bitmap, error)
	// bitmapStatus is Image.BitmapStatus.
	bitmapStatus(dst []Status, bitmap string, off, n int64, max int) ([]Status, error)
}

var _ bitmapped = (*qcow)(nil)

// Bitmaps are the image's persistent dirty bitmaps. Of an image that is not
// active they are what its owner stored last, as of when they were first asked
// for. It reads, and is called under an admission as data methods are.
func (o *Owned) Bitmaps() ([]Bitmap, error) {
	if b, ok := o.cur.Load().content.(bitmapped); ok {
		return b.bitmaps()
	}
	return nil, nil
}

// BitmapStatus implements Image.
func (o *Owned) BitmapStatus(dst []Status, bitmap string, off, n int64, max int) ([]Status, error) {
	if b, ok := o.cur.Load().content.(bitmapped); ok {
		return b.bitmapStatus(dst, bitmap, off, n, max)
	}
	return dst, o.fail("status", fmt.Errorf("%s images have no bitmap %q: %w", o.info.Format, bitmap, unix.ENOENT))
}

// bitmaps implements bitmapped.
func (q *qcow) bitmaps() ([]Bitmap, error) {
	if err := q.followOwner(); err != nil {
		return nil, err
	}
	infos, err := q.disk.BitmapInfos()
	if err != nil {
		return nil, err
	}
	all := make([]Bitmap, len(infos))
	for i, x := range infos {
		all[i] = Bitmap(x)
	}
	return all, nil
}

// bitmapStatus implements bitmapped.
func (q *qcow) bitmapStatus(dst []Status, bitmap string, off, n int64, max int) ([]Status, error) {
	if err := q.within("status", off, n); err != nil {
		return dst, err
	}
	if err := q.followOwner(); err != nil {
		return dst, err
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
	return dst, err
}

// followOwner lets a view that is not the owner's read what its owner has added
// to the file.
func (q *qcow) followOwner() error {
	if q.active {
		return nil
	}
	return q.file.follow()
}
