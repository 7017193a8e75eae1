package main

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is where it was measured, and with what.
type machine struct {
	Kernel   string            `json:"kernel"`
	CPU      string            `json:"cpu"`
	Cores    int               `json:"cores"`
	Memory   int64             `json:"memory_bytes"`
	WmemMax  int64             `json:"wmem_max"`
	Idle     string            `json:"idle,omitempty"` // how processors idle
	DiskFS   string            `json:"disk_fs"`
	Go       string            `json:"go"`
	Versions map[string]string `json:"versions"` // by program
}

func lookAtMachine(files map[string]string, disk string) machine {
	mc := machine{
		CPU: "unknown", Cores: runtime.NumCPU(), Go: runtime.Version(), DiskFS: fileSystem(disk), Idle: idling(),
		Versions: map[string]string{},
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		mc.Kernel = unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		mc.Memory = int64(info.Totalram) * int64(info.Unit)
	}
	cpuinfo, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(cpuinfo)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			mc.CPU = strings.TrimSpace(value)
			break
		}
	}
	wmem, _ := os.ReadFile("/proc/sys/net/core/wmem_max")
	mc.WmemMax, _ = strconv.ParseInt(strings.TrimSpace(string(wmem)), 10, 64)
	for program, file := range files {
		switch program {
		case programOurs:
			mc.Versions[program] = firstLine(file, "version")
		case programQEMU, programQSD:
			mc.Versions[program] = firstLine(file, "--version")
		case programNbdkit:
			mc.Versions[program] = firstLine(file, "--version") + ", plugin " + firstLine(file, "file", "--version")
		case "fio":
			mc.Versions[program] = firstLine(file, "--version")
		}
	}
	return mc
}

// idling is how processors wait for work, which is most of what a request costs that
// is not one of many: "" if the kernel does not say.
func idling() string {
	read := func(path string) string {
		b, _ := os.ReadFile(path)
		return strings.TrimSpace(string(b))
	}
	driver := read("/sys/devices/system/cpu/cpuidle/current_driver")
	if poll := read("/sys/module/haltpoll/parameters/guest_halt_poll_ns"); poll != "" && driver == "haltpoll" {
		return driver + ", guest_halt_poll_ns " + poll
	}
	return driver
}

func firstLine(argv ...string) string {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Args[0] = filepath.Base(argv[0]) // some say their own path
	out, err := cmd.Output()
	if err != nil {
		return fmt.Sprintf("unknown (%v)", err)
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}

// fileSystem is the name of the file system of a directory.
func fileSystem(dir string) string {
	var s unix.Statfs_t
	if unix.Statfs(dir, &s) != nil {
		return "disk"
	}
	return cmp.Or(map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
		unix.TMPFS_MAGIC: "tmpfs", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
	}[s.Type], "disk")
}
