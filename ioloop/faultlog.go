package ioloop

import (
	"errors"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/state"
)

// faultPause is how long no other failure of the same operation is logged: a
// full disk fails thousands of writes a second, and each is like the first.
const faultPause = 10 * time.Second

// faultLog tells the log of a disk whose storage fails: a client may keep to
// itself what it was answered, or be a guest that only stops.
type faultLog struct {
	mu  sync.Mutex // a leaf
	ops [len(opNames)]struct {
		next   time.Time // when there may be a line again
		unsaid uint64    // failures since the last line
	}
}

// logFault logs that r has failed, unless that has other reasons than storage.
func (c *conn) logFault(r *Request, err error) {
	if storageFault(r, err) {
		c.disk.faults.note(c.e.log, c.disk.Image.Info().Path, r, err, time.Now())
	}
}

// storageFault reports whether err is not what the client, the state of the
// image, or a file system that lacks a function has brought about. That an image
// has failed is logged when it does.
func storageFault(r *Request, err error) bool {
	if r.Op == OpReject {
		return false
	}
	if _, failed := errors.AsType[*state.FailedError](err); failed {
		return false
	}
	for _, other := range []error{state.ErrInactive, state.ErrReadOnly, state.ErrStopping, state.ErrDropped, unix.ENOTSUP} {
		if errors.Is(err, other) {
			return false
		}
	}
	return true
}

// note logs the failure of r at the time now, or counts it for the next line.
func (f *faultLog) note(log *zap.Logger, image string, r *Request, err error, now time.Time) {
	f.mu.Lock()
	op := &f.ops[r.Op]
	if now.Before(op.next) {
		op.unsaid++
		f.mu.Unlock()
		return
	}
	unsaid := op.unsaid
	op.next, op.unsaid = now.Add(faultPause), 0
	f.mu.Unlock()
	fields := []zap.Field{
		zap.String("image", image), zap.Stringer("op", r.Op), zap.Int64("offset", r.Offset), zap.Int64("length", r.Length), zap.Error(err),
	}
	if unsaid > 0 {
		fields = append(fields, zap.Uint64("before", unsaid))
	}
	log.Warn("the storage fails requests of clients", fields...)
}
