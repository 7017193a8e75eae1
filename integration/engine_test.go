package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// forbidRings in the environment of the test program makes it run the program
// in its arguments, with io_uring forbidden as container runtimes do it.
const forbidRings = "NBD_EXPORT_TEST_FORBID_RINGS"

func init() {
	if os.Getenv(forbidRings) == "" {
		return
	}
	fmt.Fprintln(os.Stderr, withoutRings(os.Args[1:]))
	os.Exit(125)
}

func withoutRings(argv []string) error {
	runtime.LockOSThread()
	const load, equal, answer = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	const allow, refuse = 0x7fff0000, 0x00050000 // SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
	filter := []unix.SockFilter{
		{Code: load, K: 0}, // the number of the system call
		{Code: equal, K: unix.SYS_IO_URING_SETUP, Jf: 1},
		{Code: answer, K: refuse | uint32(unix.EPERM)},
		{Code: answer, K: allow},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, 1 /* SECCOMP_SET_MODE_FILTER */, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return errno
	}
	if err := os.Unsetenv(forbidRings); err != nil {
		return err
	}
	return syscall.Exec(argv[0], argv, os.Environ())
}

// rings counts the io_urings of e.
func (e *daemon) rings() (n int) {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", e.pid))
	for _, fd := range fds {
		if to, _ := os.Readlink(fd); strings.Contains(to, "io_uring") {
			n++
		}
	}
	return n
}

func TestEngineChoice(t *testing.T) {
	for flag, rings := range map[string]int{"auto": 1, "uring": 1, "portable": 0} {
		e := serve(t, sparseImage(t, t.TempDir(), mib), "--engine", flag)
		if n := e.rings(); n != rings {
			t.Errorf("--engine %s: %d rings, want %d", flag, n, rings)
		}
		if strings.Contains(e.log.String(), "engine") {
			t.Errorf("--engine %s says too much", flag)
		}
	}
}

// Where io_uring is forbidden auto serves all the same, and says why; uring
// does not.
func TestEngineForbidden(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	forbid := func(c *exec.Cmd) {
		c.Env = append(c.Environ(), forbidRings+"=1")
		c.Args = append([]string{self, c.Path}, c.Args[1:]...)
		c.Path = self
	}
	e := servePrepared(t, sparseImage(t, diskDir(t), mib), forbid, "--engine", "auto", "--cache", "none")
	if n := e.rings(); n != 0 {
		t.Errorf("%d rings", n)
	}
	e.log.wait(t, 0, "the engine is portable", func(l string) bool { return strings.Contains(l, "portable engine") })
	if log := e.log.String(); strings.Count(log, "portable engine") != 1 || !strings.Contains(log, "seccomp") {
		t.Errorf("it does not say once why it is portable:\n%s", log)
	}
	f := newDaemon(t, sparseImage(t, t.TempDir(), mib), forbid, "--engine", "uring")
	if code := f.wait(time.Minute); code != 1 || !strings.Contains(f.log.String(), "--engine uring: io_uring is forbidden") {
		t.Errorf("exit status %d:\n%s", code, f.log)
	}
	f.ended = true
}

// O_DIRECT is where the engines differ: mixed sizes and edges, from several
// connections, written and verified.
func TestFioVerifyDirect(t *testing.T) {
	need(t, "fio", "fio")
	for _, engine := range []string{"portable", "uring"} {
		t.Run(engine, func(t *testing.T) {
			e := serve(t, sparseImage(t, diskDir(t), 64*mib), "--cache", "none", "--engine", engine)
			for name, args := range map[string][]string{
				"blocks": {"--bs=4k", "--iodepth=64", "--fsync=256"},
				"mixed":  {"--bsrange=512-64k", "--blockalign=512", "--iodepth=32"},
			} {
				run(t, append([]string{"fio", "--ioengine=nbd", "--uri=" + e.uri(), "--thread", "--group_reporting",
					"--verify=crc32c", "--verify_fatal=1", "--randrepeat=0", "--name=" + name,
					"--numjobs=4", "--size=4M", "--offset_increment=16M", "--rw=randwrite",
					"--verify_state_save=0", "--aux-path=" + t.TempDir(), "--output=" + filepath.Join(t.TempDir(), "out")}, args...)...)
			}
		})
	}
}

// An owner that is killed with writes in the kernel leaves its locks a moment
// later than it is gone; the next one gets over that.
func TestKilledOwnerIsFollowedAtOnce(t *testing.T) {
	image := sparseImage(t, t.TempDir(), 64*mib)
	wrote := regexp.MustCompile(`"writes": *[1-9]`)
	for range 4 {
		e := serve(t, image, "--cache", "none")
		load := spawn(t, "bench", nil, program(t), "bench", "--rw", "randwrite", "--bs", "64k", "--depth", "64", "--time", "1m", e.uri())
		waitFor(t, time.Minute, "writes", func() bool {
			return wrote.MatchString(cli(t, "status", "--json", "--control", e.control).stdout)
		})
		e.kill()
		next := serve(t, image, "--cache", "none", "--inactive")
		next.activate()
		next.stop()
		load.wait(time.Minute) // it has lost its server
	}
}
