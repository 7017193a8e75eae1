package control

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// FullDiskTime is how long a stop waits for space if nothing else is said;
	// systemd gives a stop 90 s.
	FullDiskTime = time.Minute
	// fullDiskPause is how often it looks.
	fullDiskPause = time.Second
	// fullDiskGrace is how long a service manager is asked to let the process live,
	// each time it looks: so long may another try take, on a slow disk too.
	fullDiskGrace = 30 * time.Second
)

// FullDisk keeps a stop from throwing away what a full disk has no room for: the
// tables of a qcow2 image are in this process only. There is time to make space, and
// a second signal ends that.
type FullDisk struct {
	log   *zap.Logger
	limit time.Duration // for all images of the process
	tell  func(states string)
	now   func() time.Time
	pause func(time.Duration)

	mu       sync.Mutex // a leaf
	stopping bool
	since    time.Time // when the stop first found a disk full
	told     map[string]bool
}

// NewFullDisk makes the one of a process, whose stop waits for space for at most
// limit, not at all if that is 0. tell tells a service manager states, as
// Supervisor.Tell.
func NewFullDisk(limit time.Duration, tell func(states string), log *zap.Logger) *FullDisk {
	return &FullDisk{log: log, limit: limit, tell: tell, now: time.Now, pause: time.Sleep, told: map[string]bool{}}
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
	// A service manager that gives a stop less time than the user has chosen here
	// would kill what is to be kept.
	d.tell(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d\nSTATUS=The stop waits for space: %s", fullDiskGrace.Microseconds(), oneLine(err.Error())))
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
	left := d.limit - d.now().Sub(d.since)
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

// oneLine keeps a text from being more than one state.
func oneLine(s string) string { return strings.ReplaceAll(s, "\n", "; ") }
