package state

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

var (
	// ErrInactive refuses a write-class request while another process may own
	// the image. The text is the one QEMU's NBD server sends.
	ErrInactive = errors.New("export is inactive")
	// ErrReadOnly refuses a write-class request on an image that is only read.
	ErrReadOnly = errors.New("export is read-only")
	// ErrStopping refuses every request of a process that is shutting down.
	ErrStopping = errors.New("server is shutting down")
)

// HeldError refuses a write that was, or would have been, held while the image
// was inactive. It is an ErrInactive.
type HeldError struct{ Why string }

func (e *HeldError) Error() string { return ErrInactive.Error() + ": " + e.Why }

func (e *HeldError) Unwrap() error { return ErrInactive }

var (
	// ErrLost and ErrLate refuse a write with the verdict of that name.
	ErrLost = &HeldError{"the server has owned the image and given it away since this write came"}
	ErrLate = &HeldError{"this connection wrote when the server owned the image before, so its writes do not take the image back; connect anew, or serve with --takeover-back"}
)

// ErrDropped refuses a FLUSH with the verdict of that name.
var ErrDropped = fmt.Errorf("the image was given up before this flush, and what was written until then may be lost: %w", unix.EIO)

// FailedError refuses a request on an image that has lost its footing.
type FailedError struct {
	State State // FailedIO or FailedFenced
	Image string
	Cause error
}

func (e *FailedError) Error() string {
	return fmt.Sprintf("image %s is %s: %v; writes are refused until it is given up with inactivate --abandon, or the process ends",
		e.Image, e.State, e.Cause)
}

func (e *FailedError) Unwrap() error { return e.Cause }

// OrderError refuses an order that the state does not allow.
type OrderError struct {
	Image string
	Order Event
	State State
	Step  Step  // of a transition under way, "" otherwise
	Cause error // why the image failed, ErrPinned, ErrStopping at the end, nil otherwise
}

func (e *OrderError) Error() string {
	what := fmt.Sprintf("cannot %s image %s: ", e.Order, e.Image)
	switch {
	case errors.Is(e.Cause, ErrStopping):
		return what + ErrStopping.Error()
	case errors.Is(e.Cause, ErrPinned):
		return what + ErrPinned.Error()
	case e.State == FailedIO || e.State == FailedFenced:
		return what + fmt.Sprintf("it is %s: %v; only inactivate --abandon, or ending the process, leaves that state", e.State, e.Cause)
	case e.State == Active:
		return what + "it is active, not failed; hand it back with inactivate"
	}
	return what + fmt.Sprintf("it is %s (step %s); try again when that is done", e.State, e.Step)
}

func (e *OrderError) Unwrap() error { return e.Cause }

// syncFailed reports whether err is a failed sync, which poisons an image.
// Backends mark such errors with a SyncFailed method, since this package
// knows none of them.
func syncFailed(err error) bool {
	var s interface{ SyncFailed() bool }
	return errors.As(err, &s) && s.SyncFailed()
}

// fenced reports whether err says that another process may own the image;
// such errors have a Fenced method.
func fenced(err error) bool {
	var f interface{ Fenced() bool }
	return errors.As(err, &f) && f.Fenced()
}

// failure is the event that an error of an image's method means.
func failure(err error) Event {
	switch {
	case fenced(err):
		return Fenced
	case syncFailed(err):
		return SyncFailed
	}
	return InactivateFailed
}

// joinErrors makes one line of two errors.
func joinErrors(a, b error) error {
	if a == nil {
		return b
	}
	if b == nil {
		return a
	}
	return fmt.Errorf("%w; %w", a, b)
}
