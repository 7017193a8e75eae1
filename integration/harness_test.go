package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	kib = 1 << 10
	mib = 1 << 20

	// startTimeout bounds what ought to take milliseconds on an idle machine.
	startTimeout = 20 * time.Second
	// toolTimeout bounds one run of a peer's tool.
	toolTimeout = 2 * time.Minute
)

// need fails the test unless tool is installed, naming the Debian package
// that has it.
func need(t testing.TB, tool, debianPackage string) {
	t.Helper()
	if _, err := lookPath(tool); err != nil {
		t.Fatalf("%s is missing: install the Debian package %s", tool, debianPackage)
	}
}

// systemPath comes first, since Debian's Python modules belong to Debian's
// Python.
var systemPath = "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin:" + os.Getenv("PATH")

func lookPath(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, dir := range filepath.SplitList(systemPath) {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", exec.ErrNotFound
}

// program is the binary under test.
func program(t testing.TB) string {
	t.Helper()
	p := os.Getenv("NBD_EXPORT")
	if p == "" {
		p = "../bin/nbd-export"
	}
	p, err := filepath.Abs(p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%v: build it with 'make build', or name it in NBD_EXPORT", err)
	}
	return p
}

func command(ctx context.Context, argv ...string) *exec.Cmd {
	name := argv[0]
	if p, err := lookPath(name); err == nil {
		name = p
	}
	cmd := exec.CommandContext(ctx, name, argv[1:]...)
	cmd.Env = append(os.Environ(), "PATH="+systemPath, "LC_ALL=C.UTF-8")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	return cmd
}

// result is what a finished command left.
type result struct {
	stdout, stderr string
	code           int
}

// tryRun runs a command to its end, however it ends.
func tryRun(t testing.TB, argv ...string) result {
	t.Helper()
	return tryRunInput(t, "", argv...)
}

func tryRunInput(t testing.TB, stdin string, argv ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
	defer cancel()
	cmd := command(ctx, argv...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", strings.Join(argv, " "), err)
	}
	if ctx.Err() != nil {
		t.Fatalf("%s: still running after %v\nstdout: %s\nstderr: %s",
			strings.Join(argv, " "), toolTimeout, &stdout, &stderr)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// run runs a command that must succeed and returns its standard output.
func run(t testing.TB, argv ...string) string {
	t.Helper()
	r := tryRun(t, argv...)
	if r.code != 0 {
		t.Fatalf("%s: exit status %d\nstdout: %s\nstderr: %s",
			strings.Join(argv, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// cli runs a verb of the program under test to its end.
func cli(t testing.TB, args ...string) result {
	t.Helper()
	return tryRun(t, append([]string{program(t)}, args...)...)
}

// logBuffer collects a process's output and wakes who waits for a line.
type logBuffer struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	changed chan struct{}
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// lines returns the complete lines so far.
func (l *logBuffer) lines() []string {
	s := l.String()
	i := strings.LastIndexByte(s, '\n')
	if i < 0 {
		return nil
	}
	return strings.Split(s[:i], "\n")
}

// wait returns the first line after the first skip ones for which match holds.
func (l *logBuffer) wait(t testing.TB, skip int, what string, match func(string) bool) string {
	t.Helper()
	timeout := time.After(startTimeout)
	for {
		l.mu.Lock()
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed := l.changed
		l.mu.Unlock()
		lines := l.lines()
		for i := skip; i < len(lines); i++ {
			if match(lines[i]) {
				return lines[i]
			}
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("no log line: %s", what)
		}
	}
}

// process is a long-running child. It ends with its test.
type process struct {
	t      testing.TB
	name   string
	pid    int
	cmd    *exec.Cmd
	log    *logBuffer
	exited chan struct{}
	ended  bool // the test knows that it has ended, or has made it end
	quiet  bool // what it said is of no interest to a test that fails
}

// spawn starts a process; prepare may change the command before.
func spawn(t testing.TB, name string, prepare func(*exec.Cmd), argv ...string) *process {
	t.Helper()
	p := &process{t: t, name: name, log: new(logBuffer), exited: make(chan struct{})}
	p.cmd = command(context.Background(), argv...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if prepare != nil {
		prepare(p.cmd)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	p.pid = p.cmd.Process.Pid
	go func() {
		p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.exited
		if t.Failed() && !p.quiet {
			t.Logf("%s (pid %d, %v) said:\n%s", p.name, p.pid, p.cmd.ProcessState, p.log)
		}
	})
	return p
}

func (p *process) alive() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

func (p *process) signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("%s: signal %v: %v", p.name, sig, err)
	}
}

// wait returns the exit status, or 128+n for a death by signal n.
func (p *process) wait(timeout time.Duration) int {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(timeout):
		p.t.Fatalf("%s: still running after %v", p.name, timeout)
	}
	p.ended = true
	ws := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// stop ends the process in order and requires exit status 0.
func (p *process) stop() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	if code := p.wait(startTimeout); code != 0 {
		p.t.Errorf("%s: exit status %d after SIGTERM, want 0", p.name, code)
	}
}

// kill ends the process by SIGKILL.
func (p *process) kill() {
	p.t.Helper()
	p.signal(syscall.SIGKILL)
	p.wait(startTimeout)
}

// waitFor polls until ok holds, at most for timeout.
func waitFor(t testing.TB, timeout time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for pause := 200 * time.Microsecond; !ok(); pause = min(2*pause, 5*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", timeout, what)
		}
		time.Sleep(pause)
	}
}

// shortDir is a temporary directory whose paths fit into a socket address.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "nbdx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// tmpfsDir is a temporary directory in memory.
func tmpfsDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nbdx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// places are the kinds of file system the images of a test live on.
var places = map[string]func(testing.TB) string{
	"disk":  func(t testing.TB) string { return t.TempDir() },
	"tmpfs": tmpfsDir,
}

// everyPlace runs a test with images on disk and on tmpfs.
func everyPlace(t *testing.T, f func(t *testing.T, dir string)) {
	for _, name := range []string{"disk", "tmpfs"} {
		t.Run(name, func(t *testing.T) { f(t, places[name](t)) })
	}
}

// sparseImage makes an image of only a hole.
func sparseImage(t testing.TB, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "disk.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

// randomBytes are the same for the same seed.
func randomBytes(seed, n int64) []byte {
	b := make([]byte, n)
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	rand.NewChaCha8(key).Read(b)
	return b
}

// randomImage makes an image full of data.
func randomImage(t testing.TB, dir string, seed, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(path, randomBytes(seed, size), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// patchyImage makes an image with data and holes in turn, each run a multiple
// of 64 KiB, beginning with data and ending with a hole.
func patchyImage(t testing.TB, dir string, size int64) string {
	t.Helper()
	path := sparseImage(t, dir, size)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i, off := int64(1), int64(0); off+2*i*64*kib <= size; i++ {
		if _, err := f.WriteAt(randomBytes(i, i*64*kib), off); err != nil {
			t.Fatal(err)
		}
		off += 2 * i * 64 * kib
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return path
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// fileAt reads n bytes of a file.
func fileAt(t testing.TB, path string, off, n int64) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := io.ReadFull(io.NewSectionReader(f, off, n), b); err != nil {
		t.Fatal(err)
	}
	return b
}

// snapshot is all that an inactive exporter must not change of an image.
type snapshot struct {
	sha256       string
	size, blocks int64
	mtime, ctime time.Time
	inode        uint64
}

func snap(t testing.TB, path string) snapshot {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return snapshot{
		sha256: fmt.Sprintf("%x", h.Sum(nil)), size: st.Size, blocks: st.Blocks,
		mtime: time.Unix(st.Mtim.Unix()), ctime: time.Unix(st.Ctim.Unix()), inode: st.Ino,
	}
}

// sameSnap requires that the image is what it was.
func sameSnap(t testing.TB, path string, before snapshot) {
	t.Helper()
	if after := snap(t, path); after != before {
		t.Errorf("the image changed:\nbefore %+v\nafter  %+v", before, after)
	}
}

func sum(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// sameBytes compares without printing megabytes.
func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Errorf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Errorf("%s: first difference at byte %d: %#x, want %#x", what, i, got[i], want[i])
			return
		}
	}
}

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
	return lockedBytes(string(readFile(t, "/proc/locks")), identify(t, path))
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

func waitReady(p *process, pidFile string) {
	p.t.Helper()
	waitFor(p.t, startTimeout, p.name+" accepts connections", func() bool {
		if !p.alive() {
			p.ended = true
			p.t.Fatalf("%s ended at start: %v\n%s", p.name, p.cmd.ProcessState, p.log)
		}
		return saysReady(p, pidFile)
	})
}

// saysReady tells whether the pid file is there, and not left from another
// process.
func saysReady(p *process, pidFile string) bool {
	b, err := os.ReadFile(pidFile)
	return err == nil && string(b) == strconv.Itoa(p.pid)+"\n"
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

// qmpConn is a client of the control socket, written against the protocol's
// text and not against the server.
type qmpConn struct {
	net.Conn
	t   testing.TB
	dec *json.Decoder
}

type qmpError struct{ Class, Desc string }

func (e *qmpError) Error() string { return e.Class + ": " + e.Desc }

type qmpReply struct {
	Return json.RawMessage `json:"return"`
	Err    *qmpError       `json:"error"`
	ID     json.RawMessage `json:"id"`
	Event  string          `json:"event"`
	QMP    json.RawMessage `json:"QMP"`
}

func dialQMP(t testing.TB, path string) *qmpConn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &qmpConn{Conn: c, t: t, dec: json.NewDecoder(c)}
}

// openQMP is for processes that may die at any time: nothing fails the test.
// Only try and Close may be called.
func openQMP(path string) (*qmpConn, error) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	q := &qmpConn{Conn: c, dec: json.NewDecoder(c)}
	if _, err = q.tryNext(); err == nil {
		_, err = q.try("qmp_capabilities", nil)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return q, nil
}

// try sends a command and waits for its reply; an error of the command is a
// *qmpError, others are of the connection.
func (q *qmpConn) try(cmd string, args any) (json.RawMessage, error) {
	m := map[string]any{"execute": cmd}
	if args != nil {
		m["arguments"] = args
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if _, err := q.Write(append(b, '\n')); err != nil {
		return nil, err
	}
	r, err := q.tryNext()
	switch {
	case err != nil:
		return nil, err
	case r.Err != nil:
		return nil, r.Err
	}
	return r.Return, nil
}

func (q *qmpConn) tryNext() (qmpReply, error) {
	for {
		var r qmpReply
		q.SetReadDeadline(time.Now().Add(startTimeout))
		if err := q.dec.Decode(&r); err != nil || r.Event == "" {
			return r, err
		}
	}
}

// next returns the next message that is no event.
func (q *qmpConn) next() qmpReply {
	q.t.Helper()
	r, err := q.tryNext()
	if err != nil {
		q.t.Fatalf("control socket: %v", err)
	}
	return r
}

func (q *qmpConn) greeting() qmpReply {
	q.t.Helper()
	r := q.next()
	if r.QMP == nil {
		q.t.Fatalf("control socket: no greeting but %+v", r)
	}
	return r
}

func (q *qmpConn) send(text string) {
	q.t.Helper()
	if _, err := io.WriteString(q, text); err != nil {
		q.t.Fatalf("control socket: %v", err)
	}
}

// execute sends a command and waits for its reply.
func (q *qmpConn) execute(cmd string, args any) (json.RawMessage, error) {
	q.t.Helper()
	ret, err := q.try(cmd, args)
	var no *qmpError
	if err != nil && !errors.As(err, &no) {
		q.t.Fatalf("control socket: %v", err)
	}
	return ret, err
}

// must is execute for a command that has to succeed.
func (q *qmpConn) must(cmd string, args any) json.RawMessage {
	q.t.Helper()
	ret, err := q.execute(cmd, args)
	if err != nil {
		q.t.Fatalf("%s %v: %v", cmd, args, err)
	}
	return ret
}

// active reports what query-named-block-nodes says of the only image.
func (q *qmpConn) active() bool {
	q.t.Helper()
	var nodes []struct {
		Active bool `json:"active"`
	}
	if err := json.Unmarshal(q.must("query-named-block-nodes", nil), &nodes); err != nil || len(nodes) == 0 {
		q.t.Fatalf("query-named-block-nodes: %d nodes, %v", len(nodes), err)
	}
	for _, n := range nodes {
		if n.Active != nodes[0].Active {
			q.t.Fatal("query-named-block-nodes: some nodes are active, some not")
		}
	}
	return nodes[0].Active
}

// target is any NBD server that the peers' tests talk to.
type target struct {
	*process
	kind   string
	image  string
	socket string
	uri    string
}

// targetOptions are what every kind of target can do.
type targetOptions struct {
	name, description string
	readOnly          bool
}

// everyServer runs a test of the protocol against nbd-export, and, so that the
// test itself is tested, against qemu-nbd.
func everyServer(t *testing.T, f func(t *testing.T, kind string)) {
	for _, kind := range []string{"nbd-export", "qemu-nbd"} {
		t.Run(kind, func(t *testing.T) { f(t, kind) })
	}
}

func startTarget(t testing.TB, kind, image string, o targetOptions) *target {
	t.Helper()
	tg := &target{kind: kind, image: image}
	switch kind {
	case "nbd-export":
		var flags []string
		if o.name != "" {
			flags = append(flags, "--export-name", o.name)
		}
		if o.description != "" {
			flags = append(flags, "--description", o.description)
		}
		if o.readOnly {
			flags = append(flags, "--read-only")
		}
		e := serve(t, image, flags...)
		tg.process, tg.socket = e.process, e.socket
	case "qemu-nbd":
		need(t, "qemu-nbd", "qemu-utils")
		dir := shortDir(t)
		tg.socket = filepath.Join(dir, "nbd")
		pidFile := filepath.Join(dir, "pid")
		argv := []string{"qemu-nbd", "--format=raw", "--socket=" + tg.socket, "--pid-file=" + pidFile,
			"--persistent", "--shared=0", "--discard=unmap", "--export-name=" + o.name}
		if o.description != "" {
			argv = append(argv, "--description="+o.description)
		}
		if o.readOnly {
			argv = append(argv, "--read-only")
		}
		tg.process = spawn(t, kind, nil, append(argv, image)...)
		waitReady(tg.process, pidFile)
	default:
		t.Fatalf("no server %q", kind)
	}
	tg.uri = nbdURI(o.name, tg.socket)
	return tg
}

// python runs a script with libnbd's h, the URI and helpers at hand.
func python(t testing.TB, uri, script string) string {
	t.Helper()
	need(t, "nbdsh", "python3-libnbd")
	r := tryRunInput(t, pythonPrelude+script, "nbdsh", "-c", fmt.Sprintf("uri = %q", uri), "-c", "-")
	if r.code != 0 {
		t.Fatalf("nbdsh: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

const pythonPrelude = `
import errno, nbd

def connect(*contexts):
    """A connection that sends what it is told, and keeps what the server says."""
    h = nbd.NBD()
    for c in contexts:
        h.add_meta_context(c)
    h.server_says = []
    h.set_debug(True)
    h.set_debug_callback(lambda where, msg: h.server_says.append(msg))
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri)
    h.set_strict_mode(0)
    return h

def fails(want, f, *args, **kw):
    """f must fail with the errno named want."""
    try:
        f(*args, **kw)
    except nbd.Error as e:
        assert e.errno == want, "%s%r: %s, want %s" % (f.__name__, args, e, want)
        return
    assert False, "%s%r succeeded, want %s" % (f.__name__, args, want)
`

// serveQSD starts QEMU's storage daemon as an exporter that speaks the same
// control protocol, to test the tests of that.
func serveQSD(t testing.TB, image string, inactive bool) *daemon {
	t.Helper()
	return serveQSDFormat(t, image, "raw", inactive)
}

func serveQSDFormat(t testing.TB, image, format string, inactive bool) *daemon {
	t.Helper()
	need(t, "qemu-storage-daemon", "qemu-system-common")
	dir := shortDir(t)
	e := &daemon{image: image, socket: filepath.Join(dir, "nbd"),
		control: filepath.Join(dir, "ctl"), pidFile: filepath.Join(dir, "pid")}
	active := "on"
	if inactive {
		active = "off"
	}
	e.process = spawn(t, "qemu-storage-daemon", nil, "qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=file0,discard=unmap,active="+active+",filename="+image,
		"--blockdev", "driver="+format+",node-name=disk0,discard=unmap,file=file0,active="+active,
		"--nbd-server", "addr.type=unix,max-connections=0,addr.path="+e.socket,
		"--export", "type=nbd,id=export0,node-name=disk0,name=,writable=on,allow-inactive=on",
		"--chardev", "socket,id=control,server=on,wait=off,path="+e.control, "--monitor", "chardev=control",
		"--pidfile", e.pidFile)
	waitReady(e.process, e.pidFile)
	return e
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
