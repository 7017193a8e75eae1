package ioloop

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What of the kernel's interface is used: include/uapi/linux/io_uring.h, and
// io_uring(7), io_uring_setup(2), io_uring_enter(2) and io_uring_register(2).
const (
	ringOpNop   = 0
	ringOpRead  = 22
	ringOpWrite = 23

	ringSetupCQSize = 1 << 3
	ringSetupClamp  = 1 << 4

	// The queues share one mapping (Linux 5.4); completions that find the
	// queue full are kept (5.5); what an entry points to is read while it is
	// submitted (5.5).
	ringFeatSingleMmap   = 1 << 0
	ringFeatNoDrop       = 1 << 1
	ringFeatSubmitStable = 1 << 2

	ringOffQueues  = 0
	ringOffEntries = 0x10000000

	ringEnterGetEvents = 1 << 0
	ringSQOverflow     = 1 << 1 // the kernel keeps completions that did not fit

	ringRegisterProbe = 8
	ringOpSupported   = 1 << 0
)

type ringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFd uint32
	_                                                                      [3]uint32
	sqOff                                                                  struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		_                                                   uint64
	}
	cqOff struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		_                                                   uint64
	}
}

// ringEntry is one submission.
type ringEntry struct {
	op, flags uint8
	_         uint16
	fd        int32
	off       uint64
	addr      uint64
	length    uint32
	rwFlags   uint32
	user      uint64
	_         [3]uint64
}

// completion is one operation's result: bytes, or a negated errno.
type completion struct {
	user uint64
	res  int32
	_    uint32
}

// These have the kernel's sizes.
const (
	_ = -uint(unsafe.Sizeof(ringParams{}) ^ 120)
	_ = -uint(unsafe.Sizeof(ringEntry{}) ^ 64)
	_ = -uint(unsafe.Sizeof(completion{}) ^ 16)
)

// ring is an io_uring: push, submit and take back are for one goroutine at a
// time, and so are reap and wait, which may run beside them. What the kernel
// reads and writes asynchronously lies in mappings outside the Go heap, except
// for the payloads, which their owner keeps reachable until reap has told of
// the end: Go's heap moves nothing.
type ring struct {
	fd   int
	file *os.File        // owner of fd; in Go's netpoller
	rc   syscall.RawConn // of file

	queues, entryMem []byte // mappings

	entries []ringEntry
	sqHead  *uint32 // written by the kernel
	sqTail  *uint32
	sqFlags *uint32 // written by the kernel
	tail    uint32  // of what was pushed

	done   []completion
	cqHead *uint32
	cqTail *uint32 // written by the kernel
}

// openRing makes a ring for entries submissions at a time and twice or more
// completions that wait to be reaped, both powers of two, and tries it. The
// error says why there is none, and what to do.
func openRing(entries, completions uint32) (_ *ring, err error) {
	p := ringParams{flags: ringSetupCQSize | ringSetupClamp, cqEntries: completions}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, noRing(errno)
	}
	r := &ring{fd: int(fd)}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	// The netpoller waits for the ring's own descriptor: it is readable when
	// there are completions.
	if err := unix.SetNonblock(r.fd, true); err != nil {
		return nil, fmt.Errorf("io_uring: %w", err)
	}
	r.file = os.NewFile(fd, "io_uring")
	if r.rc, err = r.file.SyscallConn(); err != nil {
		return nil, fmt.Errorf("io_uring: %w", err)
	}
	const need = ringFeatSingleMmap | ringFeatNoDrop | ringFeatSubmitStable
	if p.features&need != need {
		return nil, fmt.Errorf("the kernel's io_uring has features %#x of %#x; Linux 5.6 or later has all", p.features&need, need)
	}
	if err := r.probe(ringOpRead, ringOpWrite); err != nil {
		return nil, err
	}
	if err := r.mmap(&p); err != nil {
		return nil, fmt.Errorf("io_uring: cannot map its queues: %w", err)
	}
	return r, r.try()
}

// noRing explains why there is no ring.
func noRing(errno unix.Errno) error {
	why := "cannot be set up"
	switch errno {
	case unix.ENOSYS:
		why = "is not in this kernel, or a seccomp filter hides it"
	case unix.EPERM, unix.EACCES:
		why = "is forbidden here, as by a container's seccomp profile"
		b, _ := os.ReadFile("/proc/sys/kernel/io_uring_disabled")
		if s := strings.TrimSpace(string(b)); s != "" && s != "0" {
			why = "is forbidden by the sysctl kernel.io_uring_disabled=" + s
		}
	case unix.ENOMEM:
		why = "gets no memory; raise the limit of locked memory (ulimit -l)"
	}
	return fmt.Errorf("io_uring %s: %w", why, errno)
}

// probe asks whether the kernel has these operations.
func (r *ring) probe(ops ...uint8) error {
	const max = 64
	var p struct {
		last, n uint8
		_       uint16
		_       [3]uint32
		ops     [max]struct {
			op, _ uint8
			flags uint16
			_     uint32
		}
	}
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), ringRegisterProbe, uintptr(unsafe.Pointer(&p)), max, 0, 0); errno != 0 {
		return fmt.Errorf("the kernel's io_uring cannot be asked what it can do: %w; Linux 5.6 or later can", errno)
	}
	for _, op := range ops {
		if op > p.last || p.ops[op].flags&ringOpSupported == 0 {
			return fmt.Errorf("the kernel's io_uring lacks operation %d; Linux 5.6 or later has it: %w", op, unix.EOPNOTSUPP)
		}
	}
	return nil
}

func (r *ring) mmap(p *ringParams) (err error) {
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	size := max(int(p.sqOff.array)+4*int(p.sqEntries),
		int(p.cqOff.cqes)+int(p.cqEntries)*int(unsafe.Sizeof(completion{})))
	if r.queues, err = unix.Mmap(r.fd, ringOffQueues, size, prot, flags); err != nil {
		return err
	}
	size = int(p.sqEntries) * int(unsafe.Sizeof(ringEntry{}))
	if r.entryMem, err = unix.Mmap(r.fd, ringOffEntries, size, prot, flags); err != nil {
		return err
	}
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.queues[off])) }
	r.sqHead, r.sqTail, r.sqFlags = word(p.sqOff.head), word(p.sqOff.tail), word(p.sqOff.flags)
	r.cqHead, r.cqTail = word(p.cqOff.head), word(p.cqOff.tail)
	r.entries = unsafe.Slice((*ringEntry)(unsafe.Pointer(&r.entryMem[0])), p.sqEntries)
	r.done = unsafe.Slice((*completion)(unsafe.Pointer(&r.queues[p.cqOff.cqes])), p.cqEntries)
	for i, array := 0, unsafe.Slice(word(p.sqOff.array), p.sqEntries); i < len(array); i++ {
		array[i] = uint32(i) // entries are submitted as they lie
	}
	return nil
}

// try sends an operation that does nothing through the ring: a filter may let
// the setup pass and nothing else.
func (r *ring) try() error {
	r.push(ringEntry{op: ringOpNop, user: 1})
	if n, err := r.submit(); n != 1 || err != nil {
		return fmt.Errorf("io_uring takes no operation: %w", err)
	}
	var got [1]completion
	if n := r.reap(got[:]); n != 1 || got[0].user != 1 || got[0].res != 0 {
		return fmt.Errorf("io_uring answers %d to an operation that does nothing: %w", got[0].res, unix.EIO)
	}
	return nil
}

// push adds an operation to what submit will submit; false if it is full.
func (r *ring) push(e ringEntry) bool {
	if r.tail-atomic.LoadUint32(r.sqHead) >= uint32(len(r.entries)) {
		return false
	}
	r.entries[r.tail&uint32(len(r.entries)-1)] = e
	r.tail++
	return true
}

// submit hands what was pushed to the kernel, which does not wait for any of
// it. It returns how many it has; those will be reaped, also if they failed.
// The others, from the last pushed back, are the caller's again, and err says
// why.
func (r *ring) submit() (n int, err error) {
	from := atomic.LoadUint32(r.sqHead)
	atomic.StoreUint32(r.sqTail, r.tail)
	for {
		head := atomic.LoadUint32(r.sqHead)
		if head == r.tail {
			return int(head - from), nil
		}
		// Raw, as it does not wait; the kernel refuses (EBUSY) while it keeps
		// completions that did not fit.
		_, _, errno := unix.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(r.tail-head), 0, 0, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			// It looks at the tail in no other call.
			r.tail = atomic.LoadUint32(r.sqHead)
			atomic.StoreUint32(r.sqTail, r.tail)
			return int(r.tail - from), errno
		}
	}
}

// reap moves completions to dst, oldest first, and returns how many. It does
// not wait.
func (r *ring) reap(dst []completion) (n int) {
	head := atomic.LoadUint32(r.cqHead)
	tail := atomic.LoadUint32(r.cqTail)
	if head == tail && atomic.LoadUint32(r.sqFlags)&ringSQOverflow != 0 {
		// Those that did not fit come on demand.
		unix.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 0, 0, ringEnterGetEvents, 0, 0)
		tail = atomic.LoadUint32(r.cqTail)
	}
	for ; n < len(dst) && head != tail; n++ {
		dst[n] = r.done[head&uint32(len(r.done)-1)]
		head++
	}
	atomic.StoreUint32(r.cqHead, head)
	return n
}

// wait calls fn, and again whenever there may be completions, until it
// answers true. An error means that the ring was closed.
func (r *ring) wait(fn func() bool) error {
	return r.rc.Read(func(uintptr) bool { return fn() })
}

// stop makes wait fail, now and for ever. No operation may be under way.
func (r *ring) stop() { _ = r.file.Close() }

// close gives everything back. Nothing else may be called then or later.
func (r *ring) close() error {
	if r.file == nil {
		return unix.Close(r.fd)
	}
	_ = r.file.Close() // again, after stop, is harmless
	var errs [2]error
	for i, m := range [...]*[]byte{&r.queues, &r.entryMem} {
		if *m != nil {
			errs[i] = unix.Munmap(*m)
			*m = nil
		}
	}
	return errors.Join(errs[:]...)
}
