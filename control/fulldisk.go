package control

import (
	"errors"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// fullDiskTime is how long a stop waits for space, for all images of the
	// process; systemd gives a stop 90 s.
	fullDiskTime = time.Minute
	// fullDiskPause is how often it looks.
	fullDiskPause = time.Second
)

// FullDisk keeps a stop from throwing away what a full disk has no room for: the
// tables of a qcow2 image are in this process only. There is time to make space, and
// a second signal ends that.
type FullDisk struct {
	log   *zap.Logger
	now   func() time.Time
	pause func(time.Duration)

	mu       sync.Mutex // a leaf
	stopping bool
	since    time.Time // when the stop first found a disk full
	told     map[string]bool
}

// NewFullDisk makes the one of a process.
func NewFullDisk(log *zap.Logger) *FullDisk {
	return &FullDisk{log: log, now: time.Now, pause: time.Sleep, told: map[string]bool{}}
}

// Stopping says that the process stops. Before that nothing waits: whoever removes a
// node is told of the failure at once.
func (d *FullDisk) Stopping() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopping = true
}

// Again is state.Options.Unwritten.
func (d *FullDisk) Again(image string, err error) bool {
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return false
	}
	if !d.wait(image, err) {
		return false
	}
	d.pause(fullDiskPause)
	return true
}

// wait reports whether there is time left, and tells once of each image.
func (d *FullDisk) wait(image string, err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.stopping {
		return false
	}
	if d.since.IsZero() {
		d.since = d.now()
	}
	left := fullDiskTime - d.now().Sub(d.since)
	if left <= 0 {
		return false
	}
	if !d.told[image] {
		d.told[image] = true
		d.log.Error("the stop waits for space: not all that was acknowledged is on disk; make some, or stop at once with a second signal, which loses it",
			zap.String("image", image), zap.Duration("left", round(left)), zap.Error(err))
	}
	return true
}
