package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// daemon is a running "nbd-export serve".
type daemon struct {
	*process
	image   string
	socket  string // NBD
	control string
	pidFile string
	name    string // of the export
	hooks   *hooks // of the program that has them, otherwise nil
}

// serve starts an exporter of a raw image on Unix sockets and returns once it
// accepts connections. More flags of the command line may be given. When the
// test ends the exporter must be alive, unless the test made it end, and stop
// in order.
func serve(t testing.TB, image string, flags ...string) *daemon {
	t.Helper()
	return servePrepared(t, image, nil, flags...)
}

func servePrepared(t testing.TB, image string, prepare func(*exec.Cmd), flags ...string) *daemon {
	t.Helper()
	e := newDaemon(t, image, prepare, flags...)
	e.ready()
	return e
}

// newDaemon starts an exporter without waiting for it.
func newDaemon(t testing.TB, image string, prepare func(*exec.Cmd), flags ...string) *daemon {
	t.Helper()
	return newDaemonIn(t, shortDir(t), image, prepare, flags...)
}

// newDaemonIn is newDaemon with the sockets and the pid file in dir, where they
// may be left from a process that has ended.
func newDaemonIn(t testing.TB, dir, image string, prepare func(*exec.Cmd), flags ...string) *daemon {
	t.Helper()
	e := &daemon{
		image: image, socket: filepath.Join(dir, "nbd"),
		control: filepath.Join(dir, "ctl"), pidFile: filepath.Join(dir, "pid"),
	}
	argv := []string{program(t), "serve", "--socket", e.socket, "--control", e.control, "--pid-file", e.pidFile}
	if !slices.Contains(flags, "-f") && !slices.Contains(flags, "--format") {
		argv = append(argv, "--format", "raw")
	}
	if engine := os.Getenv("NBD_EXPORT_ENGINE"); engine != "" && !slices.Contains(flags, "--engine") {
		argv = append(argv, "--engine", engine)
	}
	for i, f := range flags[:max(len(flags)-1, 0)] {
		if f == "-x" || f == "--export-name" {
			e.name = flags[i+1]
		}
	}
	argv = append(append(argv, flags...), image)
	e.process = spawn(t, "nbd-export", prepare, argv...)
	t.Cleanup(func() {
		if e.ended {
			return
		}
		if !e.alive() {
			t.Errorf("the exporter of %s died: %v", e.image, e.cmd.ProcessState)
			return
		}
		e.stop()
	})
	return e
}

// ready waits until the exporter accepts connections.
func (e *daemon) ready() {
	e.t.Helper()
	waitReady(e.process, e.pidFile)
}

func (e *daemon) uri() string { return nbdURI(e.name, e.socket) }

func nbdURI(name, socket string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", name, socket)
}

// qmp opens the control socket and negotiates.
func (e *daemon) qmp() *qmpConn {
	e.t.Helper()
	q := dialQMP(e.t, e.control)
	q.greeting()
	q.must("qmp_capabilities", nil)
	return q
}

// activate and inactivate change the state over the control socket.
func (e *daemon) activate() {
	e.t.Helper()
	q := e.qmp()
	defer q.Close()
	q.must("blockdev-set-active", map[string]any{"active": true})
}

func (e *daemon) inactivate() {
	e.t.Helper()
	q := e.qmp()
	defer q.Close()
	q.must("blockdev-set-active", map[string]any{"active": false})
}

// waitActive waits for a state that a signal asked for.
func (e *daemon) waitActive(want bool) {
	e.t.Helper()
	q := e.qmp()
	defer q.Close()
	waitFor(e.t, startTimeout, fmt.Sprintf("active is %v", want), func() bool { return q.active() == want })
}

// pidString is what the pid file says, which must be the process.
func (e *daemon) pidString() string {
	e.t.Helper()
	s := strings.TrimSpace(string(readFile(e.t, e.pidFile)))
	if s != strconv.Itoa(e.pid) {
		e.t.Errorf("the pid file says %q, the process is %d", s, e.pid)
	}
	return s
}
