package bench

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// usage is what a process used during a load.
type usage struct {
	known bool
	time  time.Duration // of its processors
	rss   int64         // resident at the end, bytes
}

// meter measures another process. It prefers the scheduler's nanoseconds of
// every thread; threads that ended meanwhile are only in the process's total,
// which counts in ticks of 10 ms.
type meter struct {
	pid     int
	threads map[string]int64 // ns at the beginning, by thread
	ticks   int64            // of the process at the beginning
}

// newMeter is for process pid; 0 measures nothing.
func newMeter(pid int) *meter { return &meter{pid: pid} }

func (m *meter) begin() (err error) {
	if m.pid == 0 {
		return nil
	}
	if m.ticks, err = m.total(); err != nil {
		return fmt.Errorf("processor time of process %d: %w", m.pid, err)
	}
	m.threads = m.perThread()
	return nil
}

func (m *meter) end() (usage, error) {
	if m.pid == 0 {
		return usage{}, nil
	}
	threads := m.perThread()
	ticks, err := m.total()
	if err != nil {
		return usage{}, fmt.Errorf("processor time of process %d: it has ended: %w", m.pid, err)
	}
	var ns int64
	for tid, t := range threads {
		ns += t - m.threads[tid]
	}
	const tick = int64(10 * time.Millisecond)
	if all := (ticks - m.ticks) * tick; len(threads) == 0 || all > ns+2*tick {
		ns = all
	}
	return usage{known: true, time: time.Duration(ns), rss: m.rss()}, nil
}

// total is the process's user and system time in ticks, ended threads included.
func (m *meter) total() (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.pid))
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, may hold anything.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	const utime, stime = 14 - 3, 15 - 3
	if len(fields) <= stime {
		return 0, fmt.Errorf("unexpected form of /proc/%d/stat", m.pid)
	}
	u, err1 := strconv.ParseInt(fields[utime], 10, 64)
	s, err2 := strconv.ParseInt(fields[stime], 10, 64)
	if err1 != nil || err2 != nil {
		return 0, fmt.Errorf("unexpected form of /proc/%d/stat", m.pid)
	}
	return u + s, nil
}

// perThread is the time of each living thread in nanoseconds; empty where the
// kernel does not say.
func (m *meter) perThread() map[string]int64 {
	times := map[string]int64{}
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", m.pid))
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		ns, _, _ := strings.Cut(string(b), " ")
		if t, err := strconv.ParseInt(ns, 10, 64); err == nil {
			times[f] = t
		}
	}
	return times
}

// rss is the process's resident memory in bytes, 0 if not known.
func (m *meter) rss() int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", m.pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

// processorTime is this process's user and system time.
func processorTime() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
