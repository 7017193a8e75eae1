package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The limit server as an exporter whose image has an owner: it refuses writes while it
// is inactive, and when it is ordered to change that it makes the system calls that
// this takes, and no others: locks, and a record that is read, written anew and put in
// its place. It understands nothing else, one client after the other, on a thread that
// does nothing else and waits in its system calls. What a change of owner takes it, and
// what a client finds, is what this machine takes.

const limitOwnerArg = "limit-owner"

// limitRefuses: writes are refused.
var limitRefuses atomic.Bool

// limitLocks are the bytes that an owner locks (docs/locks.md).
var limitLocks = []int64{100, 101, 103, 201, 203}

// runLimitOwner serves an export on a socket, and takes orders on another, until killed.
func runLimitOwner(args []string) error {
	if len(args) != 3 {
		return errors.New("want a socket, a control socket and an image")
	}
	limitRefuses.Store(true)
	st, err := os.Stat(args[2])
	if err != nil {
		return err
	}
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1) // the control thread never gives up its place
	debug.SetGCPercent(-1)                        // it would wait for that thread
	_ = os.Remove(args[1])                        // of one that was killed
	control, err := net.Listen("unix", args[1])
	if err != nil {
		return err
	}
	owner, err := newLimitOwner(args[2])
	if err != nil {
		return err
	}
	go owner.obey(control)
	l, err := net.Listen("unix", args[0])
	if err != nil {
		return err
	}
	return serveLimit(l, st.Size())
}

type limitOwner struct {
	image, record, was []byte // paths, ending with 0
	content            []byte // of the record
	fd                 int    // of the image while it is active, otherwise -1

	st    unix.Stat_t
	errno unix.Errno // the first of a change of owner
}

func newLimitOwner(image string) (*limitOwner, error) {
	o := &limitOwner{content: bytes.Repeat([]byte("."), 512), fd: -1}
	at := func(suffix string) []byte { return append([]byte(image+suffix), 0) }
	o.image, o.record, o.was = at(""), at(".limit"), at(".limit.was")
	for _, path := range []string{image + ".limit", image + ".limit.was"} {
		if err := os.WriteFile(path, o.content, 0o600); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// obey takes orders.
func (o *limitOwner) obey(l net.Listener) {
	runtime.LockOSThread()
	for {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		f, err := nc.(*net.UnixConn).File() // a description that blocks
		_ = nc.Close()
		if err == nil {
			_ = o.serve(f.Fd())
			_ = f.Close()
		}
	}
}

// serve ends when the client leaves.
func (o *limitOwner) serve(fd uintptr) error {
	var in [4096]byte
	for reply := `{"QMP": {}}` + "\r\n"; ; {
		if _, err := rawCall(unix.SYS_WRITE, fd, []byte(reply)); err != nil {
			return err
		}
		n, err := rawCall(unix.SYS_READ, fd, in[:])
		if err == nil && n == 0 {
			err = io.EOF
		}
		if err != nil {
			return err
		}
		reply = `{"return": {}}` + "\r\n"
		if order := string(in[:n]); strings.Contains(order, "blockdev-set-active") {
			if err := o.turn(strings.Contains(order, "true")); err != nil {
				reply = fmt.Sprintf(`{"error": {"class": "GenericError", "desc": %q}}`+"\r\n", err)
			}
		}
	}
}

func (o *limitOwner) turn(active bool) error {
	switch {
	case active == (o.fd >= 0):
		return nil
	case active:
		return o.activate()
	}
	return o.inactivate()
}

func (o *limitOwner) activate() error {
	o.errno = 0
	fd := o.open(o.image, unix.O_RDWR)
	o.stat(fd)
	for _, b := range limitLocks {
		o.lock(fd, unix.F_OFD_SETLK, unix.Flock_t{Type: unix.F_RDLCK, Start: b, Len: 1})
	}
	o.lock(fd, unix.F_OFD_GETLK, unix.Flock_t{Type: unix.F_WRLCK, Start: limitLocks[0], Len: 104})
	o.statPath(o.image)
	record := o.open(o.record, unix.O_RDONLY)
	o.move(unix.SYS_READ, record)
	o.close(record)
	o.write()
	if o.errno != 0 {
		return o.errno
	}
	o.fd = int(fd)
	limitRefuses.Store(false)
	return nil
}

func (o *limitOwner) inactivate() error {
	o.errno = 0
	limitRefuses.Store(true)
	fd := uintptr(o.fd)
	o.statPath(o.record)
	o.stat(fd)
	o.write()
	o.lock(fd, unix.F_OFD_SETLK, unix.Flock_t{Type: unix.F_UNLCK})
	o.close(fd)
	o.fd = -1
	if o.errno != 0 {
		return o.errno
	}
	return nil
}

// write puts a new record into its place.
func (o *limitOwner) write() {
	fd := o.open(o.was, unix.O_WRONLY)
	o.move(unix.SYS_WRITE, fd)
	_, _, errno := unix.RawSyscall6(unix.SYS_RENAMEAT2, limitHere, uintptr(unsafe.Pointer(&o.was[0])),
		limitHere, uintptr(unsafe.Pointer(&o.record[0])), unix.RENAME_EXCHANGE, 0)
	o.note(errno)
	o.stat(fd)
	o.close(fd)
}

// The system calls go past the scheduler, which would wake its monitor for them.

const limitHere = ^uintptr(99) // AT_FDCWD

// note keeps the first error.
func (o *limitOwner) note(errno unix.Errno) {
	if o.errno == 0 {
		o.errno = errno
	}
}

func (o *limitOwner) open(path []byte, flags uintptr) (fd uintptr) {
	fd, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, limitHere, uintptr(unsafe.Pointer(&path[0])), flags|unix.O_CLOEXEC, 0, 0, 0)
	o.note(errno)
	return fd
}

func (o *limitOwner) stat(fd uintptr) {
	_, _, errno := unix.RawSyscall(unix.SYS_FSTAT, fd, uintptr(unsafe.Pointer(&o.st)), 0)
	o.note(errno)
}

func (o *limitOwner) statPath(path []byte) {
	_, _, errno := unix.RawSyscall6(unix.SYS_NEWFSTATAT, limitHere, uintptr(unsafe.Pointer(&path[0])), uintptr(unsafe.Pointer(&o.st)), 0, 0, 0)
	o.note(errno)
}

func (o *limitOwner) lock(fd, how uintptr, l unix.Flock_t) {
	_, _, errno := unix.RawSyscall(unix.SYS_FCNTL, fd, how, uintptr(unsafe.Pointer(&l)))
	o.note(errno)
}

// move reads or writes the record.
func (o *limitOwner) move(call, fd uintptr) {
	_, _, errno := unix.RawSyscall(call, fd, uintptr(unsafe.Pointer(&o.content[0])), uintptr(len(o.content)))
	o.note(errno)
}

func (o *limitOwner) close(fd uintptr) {
	_, _, errno := unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
	o.note(errno)
}
