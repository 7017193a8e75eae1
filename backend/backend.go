// Package backend maps: it knows where guest bytes live. An Image turns a
// guest range into extents of host files (raw or qcow2), takes and drops the
// image's locks, and carries out the storage side of an ownership change.
// It knows no sockets, no protocol and not who is asking.
package backend

import (
	"errors"

	"github.com/nbd-export/nbd-export/backend/qcow2"
)

// ErrWait is returned by Map and Prepare without MayBlock when the answer
// needs something that can wait for a device or for another request. The
// caller asks again with MayBlock from where waiting hurts nobody.
var ErrWait = errors.New("backend: the mapping must wait")

// Kind says what stands behind an extent.
type Kind uint8

const (
	// Data: the bytes live in File at Offset.
	Data Kind = iota
	// Zero: the range reads as zeros and has no bytes on the host.
	Zero
	// Opaque: only Image.ReadOpaque can produce the bytes (compressed).
	Opaque
)

// Extent is a contiguous part of a mapped guest range.
type Extent struct {
	Kind   Kind
	File   *File // Data only; valid until the Plan is released
	Offset int64 // Data only: byte offset in File
	Length int64 // bytes, > 0
	// Fixed: as long as File is open these bytes of it are what the guest has
	// there, and never become another's. So they may be sent as pages that stay
	// part of the file until the client takes them, after the plan is released.
	// Not where activation drops the page cache: pages in a socket stay in it,
	// and may be older than what another host has written since.
	Fixed bool
	// Fresh: of a write, of a place that was taken for it, where there is no page
	// of the file yet. To receive into a map of it (File.Place) would fault and
	// clear one first: 4 KiB writes to an empty qcow2 image on tmpfs were 187k to
	// 206k/s, and 196k to 225k when these are written, six runs by turns.
	Fresh bool
}

// Plan is one request's mapping and the pins it holds. The zero value is
// ready; a Plan is reused from request to request so that mapping allocates
// nothing. It belongs to one request at a time.
type Plan struct {
	// Extents cover the asked range in order, without gaps.
	Extents []Extent
	// Pin is the format's own: what Unmap, Commit and Abort need.
	Pin any

	// view is whose extents these are, which may no longer be the current one
	// when the request ends; nil while nothing is planned.
	view *view
}

// Recycle forgets what the plan, of which nothing is held, was last used for.
// Its memory stays for the next request, of whatever image, unless it is much.
func (p *Plan) Recycle() {
	const much = 4096 // extents
	if clear(p.Extents); cap(p.Extents) > much {
		p.Extents = nil
	}
	p.Extents = p.Extents[:0]
	if q, ok := p.Pin.(*qcow2.Plan); ok {
		q.Recycle()
	} else {
		p.Pin = nil
	}
}

// take ends what view says.
func (p *Plan) take() *view {
	v := p.view
	p.view = nil // a plan that rests must not keep it in memory
	return v
}

// Mode says what Map and Prepare may do.
type Mode uint8

const (
	// MayBlock allows waiting for storage or for other requests.
	MayBlock Mode = 1 << iota
	// FindHoles asks Map to tell holes as Zero extents where that is cheap.
	FindHoles
)

// ZeroFlags refine Image.Zero (NBD_CMD_WRITE_ZEROES).
type ZeroFlags uint8

const (
	// NoHole: the range must be allocated afterwards (NBD_CMD_FLAG_NO_HOLE).
	NoHole ZeroFlags = 1 << iota
	// FastZero: fail with unix.EOPNOTSUPP, changing nothing, unless zeroing
	// is faster than writing zeros (NBD_CMD_FLAG_FAST_ZERO).
	FastZero
)

// StatusFlags are what a map of the image reports of an extent.
type StatusFlags uint32

const (
	// StatusHole: not allocated; a write there may run out of space.
	StatusHole StatusFlags = 1 << iota
	// StatusZero: reads as zeros.
	StatusZero
	// StatusDirty: a dirty bitmap says that it was changed.
	StatusDirty
)

// Status is one extent of a map of the image.
type Status struct {
	Length int64 // bytes, > 0
	Flags  StatusFlags
}

// Info describes an image; it does not change while the process lives,
// except for the size, which Image.Size reports.
type Info struct {
	Path     string // as given by the user
	Format   string // "raw" or "qcow2"
	ReadOnly bool   // never opened for writing
	// Block sizes in bytes as advertised: minimum 1, preferred a power of
	// two >= 512, maximum the largest request (32 MiB).
	MinBlock, PreferredBlock, MaxBlock uint32
	Rotational                         bool
	// CanTrim and CanFastZero: what the host file system does, probed at
	// open. Zeroing by other means always works.
	CanTrim, CanFastZero bool
	// Mapped: where a write goes stands in tables, which Commit may leave to be
	// made durable by a Flush.
	Mapped bool
	// Cached: what is read comes from the page cache, so Cache may be of use.
	Cached bool
	// InMemory: the image's own file is on tmpfs, where nothing waits for a device;
	// what it is based on may be elsewhere.
	InMemory bool
	// WriteThrough: every write, discard and zeroing is to be durable when it
	// is acknowledged. The image does not see to that: its caller treats each
	// as one with FUA.
	WriteThrough bool
}

// Image is one disk image. The data methods may be called by any number of
// goroutines at once; callers hold an admission of the image's gate (package
// state) around them, which is what keeps the descriptors behind an extent
// open. Errors wrap a syscall.Errno.
//
// A range handed to a data method is never empty and lies inside Size at the
// time of admission; what has shrunk since gives EIO.
type Image interface {
	Info() Info
	// Size of the current view in bytes. It changes only where a view is
	// published (activation), never under an admitted request.
	Size() int64

	// Map plans the read of [off, off+n). Unmap ends it.
	Map(p *Plan, off, n int64, mode Mode) error
	// Unmap gives back what Map pinned. It cannot fail. Kind and Length of
	// the plan's extents stay readable until the plan is used again.
	Unmap(p *Plan)
	// ReadOpaque fills dst with the bytes of the Opaque extent p.Extents[i],
	// starting skip bytes into it. May block.
	ReadOpaque(p *Plan, i int, skip int64, dst []byte) error

	// Prepare plans the write of payload at off: every extent of the plan is
	// Data, and the caller puts the bytes there. payload is only looked at
	// during the call. Then exactly one of Commit or Abort.
	Prepare(p *Plan, off int64, payload []byte, mode Mode) error
	// Commit publishes the mapping after all bytes are in place. It cannot fail.
	// durable says that the mapping is on disk, so that a write of durable bytes
	// needs no Flush to survive power loss.
	Commit(p *Plan) (durable bool)
	// Abort publishes nothing and gives back what Prepare took.
	Abort(p *Plan)

	// The rest may block for as long as the storage does.

	// Flush makes every completed write, discard and zeroing durable,
	// those of other connections included (fdatasync). Concurrent flushes
	// share one. An error that satisfies SyncFailed is sticky.
	Flush() error
	// Discard tells the storage that the range is no longer needed. The
	// bytes there read as zeros or as before. Like Zero it is durable after
	// the next Flush, also with WriteThrough.
	Discard(off, n int64) error
	// Zero makes the range read as zeros.
	Zero(off, n int64, flags ZeroFlags) error
	// Cache asks for the range to be read ahead; a hint.
	Cache(off, n int64) error
	// Status appends the allocation of [off, off+n) to dst, neighbours with
	// equal flags merged, at most max entries; what they cover may end
	// before off+n if max was reached.
	Status(dst []Status, off, n int64, max int) ([]Status, error)
	// BitmapStatus is Status of the persistent dirty bitmap of that name. Where
	// that tells nothing, as one that is gone or inconsistent, all is dirty: who
	// copies what is dirty then copies all.
	BitmapStatus(dst []Status, bitmap string, off, n int64, max int) ([]Status, error)
}

// Bitmap is a persistent dirty bitmap of an image.
type Bitmap struct {
	Name        string
	Granularity int64 // bytes that a bit stands for
	// Auto: it is updated while the image is written.
	Auto bool
	// Inconsistent: it is not to be trusted, or in use by the owner.
	Inconsistent bool
	Dirty        int64 // bytes that its set bits stand for; 0 if it is inconsistent
}

// Receiver is an Image that can plan a write whose payload nobody has seen, to
// be received straight into its place (File.Place).
type Receiver interface {
	// PrepareUnseen is Prepare without MayBlock for n bytes to come. ErrWait
	// also says that the payload has to be looked at.
	PrepareUnseen(p *Plan, off, n int64) error
}

// SyncFailed reports whether err, or what it wraps, is a failed sync: the
// kernel may have dropped dirty pages and says so only once, so the image
// must not be handed over as clean.
func SyncFailed(err error) bool {
	var s interface{ SyncFailed() bool }
	return errors.As(err, &s) && s.SyncFailed()
}
