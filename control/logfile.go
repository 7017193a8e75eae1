package control

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// LogFile is a file that a log is appended to, and that can be opened anew when
// what rotates logs has moved it away. It stays open as long as the process lives.
type LogFile struct {
	path string
	fd   int // the same for good: another file is put behind it

	mu     sync.Mutex // of opening anew; a leaf
	stderr bool       // descriptor 2 is this file too
}

// OpenLogFile opens the file at path, or makes it, readable for the group.
func OpenLogFile(path string) (*LogFile, error) {
	fd, err := openLog(path)
	if err != nil {
		return nil, err
	}
	return &LogFile{path: path, fd: fd}, nil
}

func openLog(path string) (fd int, err error) {
	// Nobody reads a FIFO yet: that is an error, and nothing to wait for.
	const flags = unix.O_WRONLY | unix.O_APPEND | unix.O_CREAT | unix.O_CLOEXEC | unix.O_NOCTTY | unix.O_NONBLOCK
	err = again(func() error {
		fd, err = unix.Open(path, flags, 0o640)
		return err
	})
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err == unix.ENXIO {
		return -1, fmt.Errorf("cannot write log file %s: it is a FIFO, and nobody reads it: %w", path, err)
	}
	if err != nil {
		return -1, fmt.Errorf("cannot write log file %s: %w; choose a path in a directory that is writable", path, err)
	}
	return fd, nil
}

// again repeats a system call that a signal has interrupted.
func again(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// Is reports whether it is the file with this device and inode.
func (f *LogFile) Is(dev, ino uint64) bool { return isFile(f.fd, dev, ino) }

// StderrIs is Is of what the standard error leads to.
func StderrIs(dev, ino uint64) bool { return isFile(2, dev, ino) }

func isFile(fd int, dev, ino uint64) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Dev == dev && st.Ino == ino
}

// Write appends b. It may run beside Reopen: b is in the one file or in the other.
func (f *LogFile) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		err = again(func() error {
			k, err := unix.Write(f.fd, b[n:])
			n += max(k, 0)
			return err
		})
	}
	return n, err
}

// Reopen goes on in the file that is at the path now, which is made if there is
// none. After an error it goes on in the one that is open.
func (f *LogFile) Reopen() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	fd, err := openLog(f.path)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := again(func() error { return unix.Dup3(fd, f.fd, unix.O_CLOEXEC) }); err != nil {
		return fmt.Errorf("log file %s: %w", f.path, err)
	}
	return f.dupStderr()
}

// TakeStderr makes the file descriptor 2 as well, for what is no line of the log:
// the last words of the process.
func (f *LogFile) TakeStderr() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stderr = true
	return f.dupStderr()
}

func (f *LogFile) dupStderr() error {
	if !f.stderr {
		return nil
	}
	if err := again(func() error { return unix.Dup3(f.fd, 2, 0) }); err != nil {
		return fmt.Errorf("log file %s as standard error: %w", f.path, err)
	}
	return nil
}
