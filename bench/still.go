package bench

import (
	"runtime"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/client"
)

// A virtual machine whose processor sleeps is at times woken late by its host: on one
// that did nothing at all a real-time thread that slept 0.5 ms at a time overslept by
// 1 to 12 ms, 22 times in a minute. What is measured then is the host. So on each
// processor such a thread sleeps all the while, and what happens while one of them has
// overslept by stillFrom or more happened on a machine that stood still. Nothing that
// runs in this kernel keeps a real-time thread waiting for as long: the longest piece
// of a sync was 1.5 ms.
const (
	stillNap  = time.Millisecond
	stillFrom = 3 * time.Millisecond
	// stillKept is for how long it is known when the machine stood still.
	stillKept = 10 * time.Second
)

// span is a time on client.Now's clock.
type span struct{ from, to int64 }

// stillness knows when the machine stood still. Its methods may be called concurrently.
type stillness struct {
	places int
	group  sync.WaitGroup

	mu    sync.Mutex // a leaf
	spans []span
	ended bool
}

// watchStill begins to watch; close is to follow. Who may not have real-time threads,
// or bind them to a processor, never learns of any stillness. It is for a program that
// does little else: the threads sleep in system calls that the scheduler does not know
// of, or they would wait for it when they wake. So they get places to run in of their
// own, and garbage collection waits for them to wake.
func watchStill() *stillness {
	s := &stillness{}
	var all unix.CPUSet
	if unix.SchedGetaffinity(0, &all) != nil {
		return s
	}
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + all.Count())
	s.places = all.Count()
	for cpu := range len(all) * 64 {
		if all.IsSet(cpu) {
			s.group.Go(func() { s.watch(cpu) })
		}
	}
	return s
}

func (s *stillness) watch(cpu int) {
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	var one unix.CPUSet
	one.Set(cpu)
	realTime := struct{ priority int32 }{1}
	_, _, errno := unix.RawSyscall(unix.SYS_SCHED_SETSCHEDULER, 0, unix.SCHED_FIFO, uintptr(unsafe.Pointer(&realTime)))
	if errno != 0 || unix.SchedSetaffinity(0, &one) != nil {
		return
	}
	rest := unix.NsecToTimespec(int64(stillNap))
	for last := client.Now(); ; {
		_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&rest)), 0, 0)
		now := client.Now()
		if due := last + int64(stillNap); now-due >= int64(stillFrom) {
			s.add(span{due, now})
		}
		last = now
		if s.isEnded() {
			return
		}
	}
}

func (s *stillness) add(one span) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spans = slices.DeleteFunc(s.spans, func(old span) bool { return old.to < one.to-int64(stillKept) })
	s.spans = append(s.spans, one)
}

func (s *stillness) isEnded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended
}

// moving is how much of a time, at most stillKept ago, the machine did not stand still.
func (s *stillness) moving(t span) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	spans := slices.Clone(s.spans)
	slices.SortFunc(spans, func(a, b span) int { return int(a.from - b.from) })
	left := t.to - t.from
	for at := t.from; len(spans) > 0; spans = spans[1:] {
		one := span{max(spans[0].from, at), min(spans[0].to, t.to)}
		if one.from < one.to {
			left -= one.to - one.from
			at = one.to
		}
	}
	return time.Duration(left)
}

// close may be called twice.
func (s *stillness) close() {
	if s.isEnded() {
		return
	}
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.group.Wait()
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) - s.places)
}
