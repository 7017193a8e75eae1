package backend

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Holder is a process of this host that has locked an image.
type Holder struct {
	PID     int
	Program string  // as the kernel calls it, at most 15 bytes
	Locks   []int64 // bytes of it, in order
}

// holdersText is "qemu-nbd (pid 812) and qemu-io (pid 813)", "" for none.
func holdersText(of []Holder) string {
	var names []string
	for _, h := range of {
		names = append(names, h.String())
	}
	return strings.Join(names, " and ")
}

// String is "qemu-nbd (pid 812)".
func (h Holder) String() string { return fmt.Sprintf("%s (pid %d)", Printable(h.Program), h.PID) }

// holders are the processes that /proc shows to have one of these lock bytes of f, or
// of a descriptor of the same file, but for f itself. Locks name nobody: what tells is
// the fdinfo of each open file, of this user's processes, or of all for root. It takes
// a few milliseconds for a thousand files, and finds nothing on other hosts.
func (f *File) holders(bytes []int64) []Holder {
	if !f.traits.coherent && !f.traits.BlockDevice {
		return nil // the kernel does not have the locks of others
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var found []Holder
	for _, p := range processes {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		if held := f.heldBy(pid, bytes); len(held) > 0 {
			name, _ := os.ReadFile("/proc/" + p.Name() + "/comm")
			found = append(found, Holder{PID: pid, Program: strings.TrimSuffix(string(name), "\n"), Locks: held})
		}
	}
	return found
}

// heldBy are those of bytes that process pid has locked.
func (f *File) heldBy(pid int, bytes []int64) (held []int64) {
	proc := fmt.Sprintf("/proc/%d/", pid)
	fds, err := os.ReadDir(proc + "fdinfo")
	if err != nil {
		return nil
	}
	for _, fd := range fds {
		if n, err := strconv.Atoi(fd.Name()); err == nil && pid == os.Getpid() && (n == f.fd || n == f.tailFd) {
			continue
		}
		info, err := os.ReadFile(proc + "fdinfo/" + fd.Name())
		if err != nil || !strings.Contains(string(info), "OFDLCK") {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(proc+"fd/"+fd.Name(), &st) != nil || inodeOf(&st) != f.id {
			continue
		}
		for _, b := range bytes {
			if listsLock(string(info), lockByte(b)) && !slices.Contains(held, b) {
				held = append(held, b)
			}
		}
	}
	slices.Sort(held)
	return held
}
