package backend

import (
	"fmt"
	"io/fs"
	"sync"

	"golang.org/x/sys/unix"
)

// guard keeps a guest from turning its disk into an image of another format,
// which the next program to probe it would follow to files of the host. It is
// on for an image that was itself probed as raw. While a change to the first
// sector is under way it holds the lock, so that two harmless changes cannot
// make a header together.
type guard struct {
	on bool
	mu sync.Mutex // during I/O; before those of File
}

// touches reports whether a change at off must pass the guard.
func (g *guard) touches(off int64) bool { return g.on && off < probeLength }

// enter checks what the first sector of f becomes when [off, off+n) is
// replaced by p, or by zeros where p is nil. On success the guard is locked
// until leave.
func (g *guard) enter(f *File, off int64, p []byte, n int64) error {
	g.mu.Lock()
	first, err := readFirst(f)
	if err != nil {
		g.mu.Unlock()
		return err
	}
	if off < int64(len(first)) {
		change := first[off:min(off+n, int64(len(first)))]
		if p == nil {
			clear(change)
		} else {
			copy(change, p)
		}
	}
	if format := Probe(first); format != "" {
		g.mu.Unlock()
		return &fs.PathError{Op: "write", Path: f.path, Err: &refusal{fmt.Sprintf(
			"this would make the raw image look like %s, and its format was not given but guessed; serve it with -f raw to allow it", format), unix.EPERM}}
	}
	return nil
}

func (g *guard) leave() { g.mu.Unlock() }

// readFirst reads what Probe looks at.
func readFirst(f *File) ([]byte, error) {
	first := make([]byte, min(probeLength, f.size))
	return first, f.ReadAt(first, 0)
}
