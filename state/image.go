package state

import "context"

// Image is what a Machine moves between owners. One goroutine at a time calls
// these methods; requests run beside them as the gate allows.
//
// An error that has a SyncFailed() bool method returning true means that the
// kernel reported lost writes: the Machine goes to FailedIO. One with such a
// Fenced method means that another process took the image: FailedFenced.
type Image interface {
	// Key identifies the file: images of a group lock in this order, so that
	// two processes activating the same group cannot each get a half.
	Key() (dev, ino uint64)
	// Name is what messages call the image; asked once.
	Name() string

	// SyncAhead makes durable what was written so far while writes are still
	// served, so that Settle has little left to do. Cancelled by ctx, also when
	// the image fails meanwhile.
	SyncAhead(ctx context.Context) error
	// Settle makes everything durable and clean, with no request but reads
	// under way, and prepares the inactive view. The locks stay. An error leaves
	// the image as it was. What may follow is PublishInactive, Unsettle, or, if
	// the image fails now, Abandon or Close.
	Settle() error
	// Unsettle undoes Settle: the image stays with this owner after all. If
	// that fails the image takes no writes any more (FailedIO).
	Unsettle() error
	// PublishInactive makes the read-only view the current one.
	PublishInactive()
	// Release closes every writable descriptor and drops the locks, when no
	// request uses the old view any more. Errors are reported, the image is
	// released all the same.
	Release() error

	// Acquire opens the image for writing and takes its locks, or fails
	// holding nothing.
	Acquire() error
	// Load reads and checks everything anew under the locks. With ifUnchanged
	// it fails if the image is not as this process left it.
	Load(ifUnchanged bool) error
	// Claim makes it known that this process owns the image from now on, once
	// every image of the group is loaded, and returns the epoch of that
	// ownership: higher than own, the last that this process had, and than any
	// other process is known to have had.
	Claim(own uint64) (epoch uint64, err error)
	// PublishActive makes what was loaded the current view.
	PublishActive()
	// Withdraw undoes Acquire, Load and Claim, also one that failed.
	Withdraw()
	// Retire closes the old read-only view, when no request uses it any more.
	Retire()

	// Check looks, about once a second while this process owns the image, for
	// what no request would notice. Errors that mean neither a failed sync nor
	// a fence are ignored. It may run beside any other method except Release,
	// Retire and Close.
	Check() error

	// Abandon prepares giving up a failed image without making anything
	// durable: it drops caches and prepares the inactive view. Whatever it
	// returns, PublishInactive and Release follow.
	Abandon() error
	// Close closes whatever is open and writes nothing.
	Close() error
}
