package ioloop

import (
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
)

// With io_uring, reads and writes that would wait for a device wait in the
// kernel instead of on a worker:
//
//  1. conn.start prepares a task in the receiving goroutine: admission, mapping
//     and all, as a worker would (task.prepareRead, task.prepareWrite).
//  2. What a batch of requests brought is submitted by one system call
//     (conn.submit), at the latest before the goroutine waits for anything: a
//     prepared task is admitted, and that is not held across a wait.
//  3. The reaper, woken by the netpoller, ends tasks whose operations have all
//     ended, and sends the replies of a connection together.
//
// A task whose operation failed or moved too little, or for which there is no
// place, goes to a worker, which does all of it again: so there is one place
// where errors are found out.
const (
	ringEntries = 256  // submitted by one system call
	ringOps     = 1024 // under way on one ring
	ringShare   = ringOps - ringOps/4
	ringReap    = 128 // completions handled at once
)

// Uring is what the io_uring engine needs beyond the portable one: a ring with
// the tasks that are on it.
//
// All connections share it. A ring for each, or four, were no faster: 4 KiB
// O_DIRECT reads of 4 connections at depth 32 on a virtual disk, paired runs,
// 50,000 operations/s at 6.9 us of processor time with one ring and 39,000 at
// 7.1 with four (workers: 15,000 at 36), one connection 28,000 at 7.5 and
// 24,000 at 8.2 (workers: 10,600 at 38); the rates vary with the disk, the
// times do not. IORING_SETUP_COOP_TASKRUN saved another 10% of the time with
// four connections, but then completions wait for a thread that happens to
// compute.
//
// What a file system does not do without waiting, as a write to a hole, the kernel
// gives to threads of its own, up to four for each processor and each thread of ours
// that submits. IORING_REGISTER_IOWQ_MAX_WORKERS bounds those of a submitter, not of
// the process. With 4, 2 and 1 instead of 8 there were 12, 6 and 3 of them in all and
// not 24, and 4 KiB O_DIRECT writes to holes of 16 connections at depth 32 on ext4,
// where they wait for one another anyway, 67,000 to 83,000, 74,000 to 83,000 and
// 75,000 operations/s, and not 72,000 to 81,000: alike. Where nothing is done without
// waiting, on NFS, it would bound what is under way. Idle ones end after five seconds.
type Uring struct {
	ring *ring

	// submitting guards the ring's submission side. It is taken before mu.
	submitting sync.Mutex
	reaped     chan struct{} // closed when the reaper has ended; nil before the first task
	closed     bool
	pushed     []uint32 // slots, to be submitted
	refused    []*task

	mu    sync.Mutex // leaf
	slots []slot     // by user data
	free  []uint32   // slots
	// results is the seam by which tests hold up the reaper and change what
	// the kernel says; nil in production.
	results func(res int32) int32

	// Of the reaper only:
	done  [ringReap]completion
	ended []*task
	held  []*conn
}

// slot is an operation under way: extent i of t's plan.
type slot struct {
	t *task
	i int
}

// OpenUring opens the ring if io_uring can be used here; the error says why
// not, and what to do. The Engine that gets it closes it.
func OpenUring() (*Uring, error) {
	r, err := openRing(ringEntries, 2*ringOps)
	if err != nil {
		return nil, err
	}
	u := &Uring{ring: r, slots: make([]slot, ringOps), free: make([]uint32, ringOps)}
	for i := range u.free {
		u.free[i] = uint32(i)
	}
	return u, nil
}

// close is called when no connection is left, and may be called again.
func (u *Uring) close() error {
	u.submitting.Lock()
	defer u.submitting.Unlock()
	if u.closed {
		return nil
	}
	u.closed = true
	if u.reaped != nil {
		u.ring.stop()
		<-u.reaped
	}
	return u.ring.close()
}

// submit hands the prepared tasks to the kernel. It does not wait for them.
func (c *conn) submit() {
	if len(c.prepared) == 0 {
		return
	}
	u := c.ring
	u.submitting.Lock()
	if u.reaped == nil {
		u.reaped = make(chan struct{})
		go u.reap()
	}
	refused := u.refused[:0]
	for _, t := range c.prepared {
		refused = u.push(t, refused)
	}
	refused = u.flush(refused)
	for _, t := range refused {
		t.endRing()
	}
	clear(refused)
	u.refused = refused[:0]
	u.submitting.Unlock()
	clear(c.prepared)
	c.prepared = c.prepared[:0]
}

// push adds t's operations to those to submit. It appends tasks that the ring
// has no place for to refused, as flush does. The caller holds submitting.
func (u *Uring) push(t *task, refused []*task) []*task {
	n := 0
	for i := range t.plan.Extents {
		if t.plan.Extents[i].Kind == backend.Data {
			n++
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	c := t.conn
	if n > len(u.free) || c.onRing+n > ringShare {
		t.ring.redo = true
		return append(refused, t)
	}
	c.onRing += n
	t.ring.left = n
	rest := t.buf.payload(t.req.Length)
	for i := range t.plan.Extents {
		e := &t.plan.Extents[i]
		part := rest[:e.Length]
		rest = rest[e.Length:]
		if e.Kind != backend.Data {
			continue
		}
		k := u.free[len(u.free)-1]
		u.free = u.free[:len(u.free)-1]
		u.slots[k] = slot{t, i}
		entry := ringEntry{
			op: ringOpRead, fd: int32(e.File.Fd()), off: uint64(e.Offset),
			addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(part)))), length: uint32(len(part)), user: uint64(k),
		}
		if t.req.Op == OpWrite {
			entry.op, entry.rwFlags = ringOpWrite, uint32(t.ring.flags)
		}
		for !u.ring.push(entry) {
			u.mu.Unlock()
			refused = u.flush(refused)
			u.mu.Lock()
		}
		u.pushed = append(u.pushed, k)
	}
	return refused
}

// flush submits what was pushed. It appends tasks that the kernel does not
// take, and that have no operation left, to refused.
func (u *Uring) flush(refused []*task) []*task {
	n, err := u.ring.submit()
	if err != nil {
		u.mu.Lock()
		for _, k := range u.pushed[n:] {
			if t := u.endLocked(k, -int32(unix.EAGAIN)); t != nil {
				refused = append(refused, t)
			}
		}
		u.mu.Unlock()
	}
	u.pushed = u.pushed[:0]
	return refused
}

// endLocked notes the result of an operation, and returns its task if that was
// the last.
func (u *Uring) endLocked(k uint32, res int32) *task {
	t, i := u.slots[k].t, u.slots[k].i
	u.slots[k] = slot{}
	u.free = append(u.free, k)
	t.conn.onRing--
	on := &t.ring
	if int64(res) != t.plan.Extents[i].Length {
		on.redo = true
		if errno := syscall.Errno(-res); res < 0 && !notDone(errno) && on.errno != unix.EIO {
			on.errno, on.failed = errno, i
		}
	}
	if on.left--; on.left > 0 {
		return nil
	}
	return t
}

// notDone reports whether an operation with this result was not carried out, which says
// nothing of the file. The kernel cancels what is for a thread of its own if that cannot be
// started in three attempts, each of which a pending signal ends (io-wq.c,
// WORKER_INIT_LIMIT, also in the stable kernels of 6.1 and later; described in the patch
// "always retry worker create on ERESTART*" of December 2025); and Go's scheduler sends
// signals. On Debian's 6.1 a durable write ended so once in two runs of all tests, and with
// it the image: failed(io).
func notDone(errno syscall.Errno) bool {
	return errno == unix.ECANCELED || errno == unix.EAGAIN || errno == unix.EINTR
}

// reap is the reaper goroutine.
func (u *Uring) reap() {
	defer close(u.reaped)
	_ = u.ring.wait(func() bool {
		for u.reapSome() {
		}
		return false
	})
}

// reapSome ends tasks whose operations have ended. It reports whether there
// may be more.
func (u *Uring) reapSome() bool {
	n := u.ring.reap(u.done[:])
	if n == 0 {
		return false
	}
	u.mu.Lock()
	if fn := u.results; fn != nil {
		u.mu.Unlock()
		for i := range u.done[:n] {
			u.done[i].res = fn(u.done[i].res)
		}
		u.mu.Lock()
	}
	for i := range u.done[:n] {
		if t := u.endLocked(uint32(u.done[i].user), u.done[i].res); t != nil {
			u.ended = append(u.ended, t)
		}
	}
	u.mu.Unlock()
	for _, t := range u.ended {
		if c := t.conn; !c.holding && c.out.hold() {
			c.holding = true
			u.held = append(u.held, c)
		}
		t.endRing()
	}
	for _, c := range u.held {
		c.holding = false
		c.out.pump()
	}
	clear(u.ended)
	clear(u.held)
	u.ended, u.held = u.ended[:0], u.held[:0]
	return true
}
