// Package memfile is a host file in memory for tests of package qcow2. It
// records what changes it, can fail what it is asked, and makes what a crash
// may leave of it.
package memfile

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Op is a kind of call that changes a file or makes changes durable.
type Op uint8

const (
	Write Op = iota
	Resize
	Punch
	Zero
	Sync
)

// Event is a call that has succeeded.
type Event struct {
	Op      Op
	Off, N  int64 // Resize: N is the new length
	Data    []byte
	Durable bool  // a write that survives, whatever else does not
	At      int64 // of File.Clock, if there is one
}

// File is a qcow2.File.
type File struct {
	path string

	mu     sync.Mutex
	b      []byte
	from   []byte // contents when recording began
	events []Event
	record bool
	length atomic.Int64

	// Fail is asked before each call; what it returns is the call's error. It
	// runs under the file's lock. Set it while nothing uses the file.
	Fail func(op Op, off, n int64) error
	// FailRead is the same for reads.
	FailRead func(off, n int64) error
	// Clock counts the events of files that share it, so that it is known which
	// came first. Set it before Record.
	Clock *atomic.Int64
	// AfterSync is called, without the lock, when a sync has succeeded.
	AfterSync func()

	syncErr error // sticky
}

// New makes a file of contents b, which it owns from then on.
func New(path string, b []byte) *File {
	f := &File{path: path, b: b}
	f.length.Store(int64(len(b)))
	return f
}

// Record begins to keep events.
func (f *File) Record() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.from, f.events, f.record = append([]byte(nil), f.b...), nil, true
}

// Events are those since Record, and From the contents then. They are not to be
// changed.
func (f *File) Events() (from []byte, events []Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.from, append([]Event(nil), f.events...)
}

// Bytes is a copy of the contents.
func (f *File) Bytes() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]byte(nil), f.b...)
}

func (f *File) fail(op string, err error) error {
	return &fs.PathError{Op: op, Path: f.path, Err: err}
}

// do runs a change under the lock.
func (f *File) do(name string, e Event, change func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.Fail != nil {
		if err := f.Fail(e.Op, e.Off, e.N); err != nil {
			if e.Op == Sync && f.syncErr == nil {
				f.syncErr = err
			}
			return f.fail(name, err)
		}
	}
	change()
	if f.record {
		if f.Clock != nil {
			e.At = f.Clock.Add(1)
		}
		f.events = append(f.events, e)
	}
	return nil
}

func (f *File) Path() string { return f.path }

// Length takes no lock, as that of a host file.
func (f *File) Length() int64 { return f.length.Load() }

func (f *File) ReadAt(p []byte, off int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.FailRead != nil {
		if err := f.FailRead(off, int64(len(p))); err != nil {
			return f.fail("read", err)
		}
	}
	if off < 0 || off > int64(len(f.b))-int64(len(p)) {
		return f.fail("read", fmt.Errorf("%d+%d is past the end: %w", off, len(p), unix.EIO))
	}
	copy(p, f.b[off:])
	return nil
}

func (f *File) inside(name string, off, n int64) error {
	if length := f.Length(); off < 0 || n < 0 || off > length-n {
		return f.fail(name, fmt.Errorf("%d+%d is past the end at %d: %w", off, n, length, unix.EIO))
	}
	return nil
}

func (f *File) WriteAt(p []byte, off int64, durable bool) error {
	if err := f.inside("write", off, int64(len(p))); err != nil {
		return err
	}
	if err := f.failed(); err != nil && durable {
		return err
	}
	// What else there is to sync is not, as with RWF_DSYNC.
	e := Event{Op: Write, Off: off, N: int64(len(p)), Data: append([]byte(nil), p...), Durable: durable}
	return f.do("write", e, func() { copy(f.b[off:], p) })
}

// failed is the error of a sync that failed before.
func (f *File) failed() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.syncErr != nil {
		return f.fail("sync", f.syncErr)
	}
	return nil
}

func (f *File) Resize(n int64) error {
	return f.do("truncate", Event{Op: Resize, N: n}, func() {
		f.b = resized(f.b, n)
		f.length.Store(n)
	})
}

func resized(b []byte, n int64) []byte {
	if n <= int64(len(b)) {
		return b[:n:n]
	}
	return append(b, make([]byte, n-int64(len(b)))...)
}

func (f *File) Punch(off, n int64) error {
	if err := f.inside("punch", off, n); err != nil {
		return err
	}
	return f.do("punch", Event{Op: Punch, Off: off, N: n}, func() { clear(f.b[off : off+n]) })
}

// Preallocate writes zeros, or does nothing.
func (f *File) Preallocate(off, n int64, write bool) error {
	if !write {
		return f.inside("preallocate", off, n)
	}
	return f.WriteAt(make([]byte, n), off, false)
}

func (f *File) ZeroAt(off, n int64) error {
	if err := f.inside("zero", off, n); err != nil {
		return err
	}
	return f.do("zero", Event{Op: Zero, Off: off, N: n}, func() { clear(f.b[off : off+n]) })
}

func (f *File) Sync() error {
	if err := f.failed(); err != nil {
		return err
	}
	err := f.do("sync", Event{Op: Sync}, func() {})
	if err == nil && f.AfterSync != nil {
		f.AfterSync()
	}
	return err
}

// Crash is what the disk may hold if the power fails after the first n of
// events: all that was synced by then, and of the rest any part, in sectors of
// 512 bytes, chosen by rng. With a nil rng it is all of the rest: what the
// next process sees if only this one dies.
func Crash(from []byte, events []Event, n int, rng *rand.Rand) []byte {
	b := append([]byte(nil), from...)
	synced := 0
	for i := n - 1; i >= 0; i-- {
		if events[i].Op == Sync {
			synced = i
			break
		}
	}
	for i, e := range events[:n] {
		lucky := i < synced || e.Durable || rng == nil
		switch {
		case e.Op == Sync:
		case e.Op == Resize:
			// Journalled, so whole or not at all; and the file is at least as
			// long as what was written to it needs.
			if lucky || e.N > int64(len(b)) || rng.IntN(2) == 0 {
				b = resized(b, e.N)
			}
		case lucky:
			apply(b, e, 0, e.N)
		case rng.IntN(3) == 0: // nothing
		case rng.IntN(2) == 0:
			apply(b, e, 0, e.N)
		default:
			for at := int64(0); at < e.N; {
				end := min(e.N, (e.Off+at+512)&^511-e.Off)
				if rng.IntN(2) == 0 {
					apply(b, e, at, end)
				}
				at = end
			}
		}
	}
	return b
}

// apply does bytes lo..hi of a change.
func apply(b []byte, e Event, lo, hi int64) {
	from, to := min(e.Off+lo, int64(len(b))), min(e.Off+hi, int64(len(b)))
	if from >= to {
		return
	}
	if e.Op == Write {
		copy(b[from:to], e.Data[lo:])
		return
	}
	clear(b[from:to])
}
