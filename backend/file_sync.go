package backend

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// SyncError is a failed fdatasync (or durable write). The kernel reports the
// loss of dirty pages once, so after it nobody can say what is on the disk:
// the File repeats it for ever.
type SyncError struct {
	Path string
	Err  error // a syscall.Errno
}

func (e *SyncError) Error() string {
	return fmt.Sprintf("sync %s: %v; the kernel may have dropped what was not on disk", e.Path, e.Err)
}

func (e *SyncError) Unwrap() error { return e.Err }

// SyncFailed marks the error for the function of that name.
func (e *SyncError) SyncFailed() bool { return true }

// syncer lets concurrent callers share syncs: who arrives while one runs
// waits for the next one, which then covers all who wait.
type syncer struct {
	mu        sync.Mutex // a leaf
	cur, next *syncRound // running, and the one being joined
	err       *SyncError // sticky
}

type syncRound struct {
	done chan struct{}
	err  error // valid once done is closed
}

func (s *syncer) failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return nil
}

// fail makes err sticky and returns it.
func (s *syncer) fail(path string, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = &SyncError{Path: path, Err: err}
	}
	return s.err
}

// Sync makes every write completed before the call durable (fdatasync).
// Concurrent callers share one. It may block. The error is a *SyncError, and
// once it failed every later Sync and durable write fails the same way.
func (f *File) Sync() error {
	s := &f.syncer
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return s.err
	}
	if r := s.next; r != nil {
		s.mu.Unlock()
		<-r.done
		return r.err
	}
	r := &syncRound{done: make(chan struct{})}
	if running := s.cur; running != nil {
		s.next = r
		s.mu.Unlock()
		<-running.done
		s.mu.Lock()
		s.next = nil
	}
	s.cur = r
	s.mu.Unlock()

	if r.err = s.failed(); r.err == nil {
		if err := f.fdatasync(); err != nil {
			r.err = s.fail(f.path, err)
		} else {
			r.err = s.failed() // by a durable write meanwhile
		}
	}

	s.mu.Lock()
	s.cur = nil
	s.mu.Unlock()
	close(r.done)
	return r.err
}

// dirtied notes that something was written, or that it may have been. That is
// looked at when the file is let go, so it is never taken back.
func (f *File) dirtied() {
	if f.dirt.Load() != dirtWritten {
		f.dirt.Store(dirtWritten)
	}
}

// settle is Sync at the end of an ownership, with no write under way. It does
// nothing if nothing was written through this description, and nothing was
// dirty when it was opened: an fdatasync of a file that ext4 has nothing to write of flushes the
// disk's cache all the same, which took 0.3 ms.
func (f *File) settle() error {
	if f.dirt.Load() != dirtNone {
		return f.Sync()
	}
	return f.syncer.failed()
}

func (f *File) fdatasync() error {
	return retry(func() error {
		if err := f.faults.check(opSync, 0); err != nil {
			return err
		}
		return unix.Fdatasync(f.fd)
	})
}
