package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// identity names a file as /proc does.
type identity struct {
	dev   string // maj:min in hexadecimal, two digits at least
	inode uint64
}

func identify(t testing.TB, path string) identity {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	major := st.Dev >> 8 & 0xfff
	minor := st.Dev&0xff | st.Dev>>12&0xfff00
	return identity{fmt.Sprintf("%02x:%02x", major, minor), st.Ino}
}

// lockedBytes expands lines as of /proc/locks ("1: OFDLCK ADVISORY READ -1
// fd:01:1234 100 101") into the bytes locked of one file, one entry for each
// holder, sorted.
func lockedBytes(text string, id identity) []int {
	var held []int
	for line := range strings.Lines(text) {
		line = strings.TrimPrefix(line, "lock:")
		f := strings.Fields(line)
		if len(f) < 8 || f[1] == "->" || f[5] != fmt.Sprintf("%s:%d", id.dev, id.inode) {
			continue
		}
		first, _ := strconv.Atoi(f[6])
		last, err := strconv.Atoi(f[7])
		if err != nil { // EOF: the whole file
			last = first
		}
		for b := first; b <= last; b++ {
			held = append(held, b)
		}
	}
	slices.Sort(held)
	return held
}

// fileLocks are the bytes locked of a file by anyone.
func fileLocks(t testing.TB, path string) []int {
	t.Helper()
	return lockedBytes(allLocks(t), identify(t, path))
}

// allLocks is /proc/locks. The kernel gives that a page at a time, and a lock of
// any process that comes or goes between two pages moves what follows: lines
// are left out, or told twice. So it is read until it is the same twice running.
func allLocks(t testing.TB) string {
	t.Helper()
	last := string(readFile(t, "/proc/locks"))
	for range 10000 {
		now := string(readFile(t, "/proc/locks"))
		if now == last {
			return now
		}
		last = now
	}
	t.Fatal("/proc/locks is never the same twice: too many programs lock files here")
	panic("unreachable")
}

// processLocks are the bytes of a file that one process holds.
func processLocks(t testing.TB, pid int, path string) []int {
	t.Helper()
	id := identify(t, path)
	infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	var held []int
	for _, info := range infos {
		b, err := os.ReadFile(info) // gone again: held nothing
		if err != nil {
			continue
		}
		var locks strings.Builder
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "lock:") {
				locks.WriteString(line)
			}
		}
		held = append(held, lockedBytes(locks.String(), id)...)
	}
	slices.Sort(held)
	return slices.Compact(held) // dups share one description
}

var (
	activeLocks   = []int{100, 101, 103, 201, 203}
	readOnlyLocks = []int{100, 201, 203}
)

func wantLocks(t testing.TB, path string, want []int) {
	t.Helper()
	if got := fileLocks(t, path); !slices.Equal(got, want) {
		t.Errorf("locked bytes of %s: %v, want %v", path, got, want)
	}
}

// writableHolds lists the descriptors and maps by which a process could write
// a file.
func writableHolds(t testing.TB, pid int, path string) []string {
	t.Helper()
	return holds(t, pid, path, true)
}

// holds lists the descriptors and maps that a process has of a file.
func holds(t testing.TB, pid int, path string, writableOnly bool) []string {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	var found []string
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil && !gone(err) {
		t.Fatal(err)
	}
	for _, fd := range fds {
		var fst syscall.Stat_t
		if syscall.Stat(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()), &fst) != nil ||
			fst.Dev != st.Dev || fst.Ino != st.Ino {
			continue
		}
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd.Name()))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(info)) {
			if value, ok := strings.CutPrefix(line, "flags:"); ok {
				flags, err := strconv.ParseUint(strings.TrimSpace(value), 8, 64)
				if err != nil {
					t.Fatal(err)
				}
				if !writableOnly || flags&syscall.O_ACCMODE != syscall.O_RDONLY {
					found = append(found, fmt.Sprintf("fd %s flags 0%o", fd.Name(), flags))
				}
			}
		}
	}
	id := identify(t, path)
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil && !gone(err) {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		if len(f) < 5 || f[3] != id.dev || f[4] != strconv.FormatUint(id.inode, 10) {
			continue
		}
		// A shared map that is read-only now may be made writable if its
		// descriptor was, so it counts by the descriptor it came from; what
		// shows here is the present protection.
		if !writableOnly || f[1][1] == 'w' {
			found = append(found, "map "+strings.TrimSpace(line))
		}
	}
	return found
}

// gone tells whether /proc gave an error because the process has ended.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}
