// Package guest boots small Linux guests under QEMU for tests: Debian's kernel,
// a file system in memory made of busybox and a few of the host's own programs,
// and a shell script handed in by the test. It emulates the processor, so it
// needs neither KVM nor root; a boot takes a few seconds.
//
// In the guest, virtio disks are /dev/vda and so on, and the host's loopback
// address is 10.0.2.2 when Config.Network is set.
package guest

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Config says what a guest runs and what hardware it has.
type Config struct {
	// Script is run by busybox sh. Its standard output and error are the
	// guest's output, its standard input is Guest.Send, its exit status is the
	// guest's.
	Script string
	// Files are copied into the guest, by their path there.
	Files map[string][]byte
	// Args are further arguments for QEMU: -blockdev, -device, -incoming ...
	Args []string
	// Network gives the guest a network card behind user-mode networking.
	Network bool
	// MemoryMiB is 256 when zero.
	MemoryMiB int
	// Timeout ends the guest, counted from Start; 4 minutes when zero.
	Timeout time.Duration
}

// Result is what is known about a guest that has ended.
type Result struct {
	Output   string        // what the script printed
	ExitCode int           // the script's, or -1 when the guest ended without one
	Console  string        // what the kernel and QEMU printed
	Elapsed  time.Duration // from Start to the end of QEMU
}

// Guest is a running guest.
type Guest struct {
	// QMPPath is the Unix socket of QEMU's monitor. It takes one client at a
	// time; QMP connects to it.
	QMPPath string
	// PID is QEMU's.
	PID int

	t       testing.TB
	cmd     *exec.Cmd
	dir     string
	stdin   io.WriteCloser
	output  lines
	stderr  strings.Builder
	started time.Time
	elapsed time.Duration
	timeout time.Duration
	done    chan struct{}
}

var exitLine = regexp.MustCompile(`(?m)^##guest-exit=(\d+)##\n?`)

// Run boots a guest, waits for its end and returns what it said. A guest that
// ends without an exit status, or not in time, fails the test.
func Run(t testing.TB, cfg Config) Result {
	t.Helper()
	return Start(t, cfg).Wait()
}

// Start boots a guest and returns at once. The guest ends with the test.
func Start(t testing.TB, cfg Config) *Guest {
	t.Helper()
	qemu, err := lookup("qemu-system-x86_64", "qemu-system-x86")
	if err != nil {
		t.Fatal(err)
	}
	sys, err := base()
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: a test's name in the path makes it too long for a socket.
	dir, err := os.MkdirTemp("", "guest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := writeInitrd(filepath.Join(dir, "initrd"), sys.initrd, cfg); err != nil {
		t.Fatal(err)
	}

	g := &Guest{
		QMPPath: filepath.Join(dir, "qmp"), t: t, dir: dir,
		timeout: cfg.Timeout, done: make(chan struct{}),
	}
	if g.timeout == 0 {
		g.timeout = 4 * time.Minute
	}
	g.cmd = exec.Command(qemu, g.arguments(sys, cfg)...)
	// Should the test process die without its cleanups, QEMU goes with it.
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	g.cmd.Stderr = &g.stderr
	g.cmd.Stdout = &g.output
	if g.stdin, err = g.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	g.started = time.Now()
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	g.PID = g.cmd.Process.Pid
	go func() {
		_ = g.cmd.Wait() // how the script ended is what counts
		g.elapsed = time.Since(g.started)
		g.output.close()
		close(g.done)
	}()
	t.Cleanup(g.Kill)
	return g
}

func (g *Guest) arguments(sys *system, cfg Config) []string {
	memory := cfg.MemoryMiB
	if memory == 0 {
		memory = 256
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "pc", "-accel", "tcg", "-cpu", "qemu64", "-smp", "1", "-m", strconv.Itoa(memory),
		"-kernel", sys.kernel, "-initrd", filepath.Join(g.dir, "initrd"),
		"-append", "console=ttyS0 panic=-1 quiet nokaslr mitigations=off no_timer_check random.trust_cpu=on",
		"-chardev", "file,id=console,path=" + filepath.Join(g.dir, "console"),
		"-chardev", "stdio,id=script,signal=off",
		"-serial", "chardev:console", "-serial", "chardev:script",
		"-qmp", "unix:" + g.QMPPath + ",server=on,wait=off",
	}
	if cfg.Network {
		args = append(args, "-netdev", "user,id=net0,ipv6=off",
			"-device", "virtio-net-pci,netdev=net0,romfile=")
	}
	return append(args, cfg.Args...)
}

// writeInitrd puts the script and the test's files behind the common archive.
func writeInitrd(name string, common []byte, cfg Config) error {
	own := newArchive()
	own.file("/script", []byte(cfg.Script))
	for p, data := range cfg.Files {
		own.file(p, data)
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(common); err != nil {
		return err
	}
	if _, err := f.Write(own.finish()); err != nil {
		return err
	}
	return f.Close()
}

// Wait waits for the guest's end. It fails the test when the guest does not end
// in time or ends without the script's exit status.
func (g *Guest) Wait() Result {
	g.t.Helper()
	select {
	case <-g.done:
	case <-time.After(time.Until(g.started.Add(g.timeout))):
		g.Kill()
		g.t.Fatalf("guest did not end within %v\n%s", g.timeout, g.report())
	}
	r := g.result()
	if r.ExitCode < 0 {
		g.t.Fatalf("guest ended without an exit status\n%s", g.report())
	}
	return r
}

// Kill ends the guest at once, as a power failure does, and waits until QEMU
// is gone. The guest may have ended already.
func (g *Guest) Kill() {
	_ = g.cmd.Process.Kill()
	<-g.done
}

// Done is closed when QEMU has ended.
func (g *Guest) Done() <-chan struct{} { return g.done }

// Send writes a line to the script's standard input.
func (g *Guest) Send(line string) {
	g.t.Helper()
	if _, err := io.WriteString(g.stdin, line+"\n"); err != nil {
		g.t.Fatalf("send to the guest: %v\n%s", err, g.report())
	}
}

// WaitFor returns the first line of output, at or after line number from, that
// matches the expression, and the number of the line after it. It fails the
// test when the guest ends or its time is over before there is one.
func (g *Guest) WaitFor(expr string, from int) (line string, next int) {
	g.t.Helper()
	line, next, err := g.WaitWithin(time.Until(g.started.Add(g.timeout)), expr, from)
	if err != nil {
		g.t.Fatalf("%v\n%s", err, g.report())
	}
	return line, next
}

// WaitWithin is WaitFor with a time of its own, whose failure is the caller's.
func (g *Guest) WaitWithin(d time.Duration, expr string, from int) (line string, next int, err error) {
	re := regexp.MustCompile(expr)
	deadline := time.After(d)
	for {
		all, more, closed := g.output.snapshot()
		for ; from < len(all); from++ {
			if re.MatchString(all[from]) {
				return all[from], from + 1, nil
			}
		}
		if closed {
			return "", from, fmt.Errorf("guest ended before it printed %q", expr)
		}
		select {
		case <-more:
		case <-deadline:
			return "", from, fmt.Errorf("guest did not print %q within %v", expr, d)
		}
	}
}

// Lines is how many lines the script has printed so far.
func (g *Guest) Lines() int {
	all, _, _ := g.output.snapshot()
	return len(all)
}

// Output is what the script has printed so far, whole lines only.
func (g *Guest) Output() string {
	all, _, _ := g.output.snapshot()
	return strings.Join(all, "\n") + "\n"
}

// QMP connects to the guest's monitor.
func (g *Guest) QMP() *QMP {
	g.t.Helper()
	q, err := DialQMP(g.QMPPath, 10*time.Second)
	if err != nil {
		g.t.Fatalf("%v\n%s", err, g.report())
	}
	g.t.Cleanup(func() { q.Close() })
	return q
}

func (g *Guest) result() Result {
	r := Result{Output: g.Output(), ExitCode: -1, Elapsed: g.elapsed, Console: g.console()}
	if m := exitLine.FindStringSubmatch(r.Output); m != nil {
		r.ExitCode, _ = strconv.Atoi(m[1])
		r.Output = exitLine.ReplaceAllString(r.Output, "")
	}
	return r
}

// console is what the kernel printed, and QEMU's own messages once it has ended.
func (g *Guest) console() string {
	data, _ := os.ReadFile(filepath.Join(g.dir, "console"))
	select {
	case <-g.done:
		return string(data) + g.stderr.String()
	default:
		return string(data)
	}
}

func (g *Guest) report() string {
	return fmt.Sprintf("--- output of the guest:\n%s--- console of the guest:\n%s", g.Output(), g.console())
}
