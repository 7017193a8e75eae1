package integration

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The harness: programs that run to their end are here, those that go on in
// process_test.go, the exporter under test in daemon_test.go and its peers in
// peers_test.go; images and the places for them are in images_test.go and
// places_test.go, and what the kernel says of locks and descriptors in
// procfs_test.go.

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
