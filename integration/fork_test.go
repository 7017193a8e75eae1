package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// serve --fork returns when clients are served, also to who reads its output to
// the end, and with the reason when they are not.
func TestFork(t *testing.T) {
	need(t, "nbdinfo", "libnbd-bin")
	dir := shortDir(t)
	image, socket, pidFile := sparseImage(t, dir, mib), filepath.Join(dir, "nbd"), filepath.Join(dir, "pid")
	background := func() result {
		return cli(t, "serve", "--fork", "-f", "raw", "-k", socket, "--pid-file", pidFile, image)
	}
	stop := func() {
		t.Helper()
		pid, err := strconv.Atoi(strings.TrimSpace(string(readFile(t, pidFile))))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		waitFor(t, startTimeout, "the server ends", func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH || zombie(pid) })
	}
	r := background()
	wantOutput(t, r, "")
	if !strings.Contains(r.stderr, "listening") {
		t.Errorf("it does not say what it does:\n%s", r.stderr)
	}
	run(t, "nbdinfo", "--size", nbdURI("", socket)) // without waiting
	// It is found by its name.
	comm := readFile(t, filepath.Join("/proc", strings.TrimSpace(string(readFile(t, pidFile))), "comm"))
	if want := filepath.Base(program(t)); strings.TrimSpace(string(comm)) != want {
		t.Errorf("the process is called %s, want %s", comm, want)
	}
	wantFailure(t, cli(t, "serve", "--fork", "-f", "raw", "-k", socket+"2", image), 1, "owned by nbd-export")
	wantFailure(t, cli(t, "serve", "--fork", "-f", "raw", "-k", socket, "--inactive", image), 1, "another server is listening there")
	wantFailure(t, cli(t, "serve", "--fork"), 2, "IMAGE")
	stop()
	for _, path := range []string{socket, pidFile} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is left", path)
		}
	}
	wantOutput(t, cli(t, "who", image), "let go in order")

	// A log that is a file goes on.
	log := filepath.Join(dir, "log")
	wantOutput(t, tryRun(t, "sh", "-c", `exec "$0" "$@" 2>>`+log, program(t), "serve", "--fork", "-f", "raw", "-k", socket, "--pid-file", pidFile, image), "")
	stop()
	if text := string(readFile(t, log)); !strings.Contains(text, "image is closed") {
		t.Errorf("the log ends too early:\n%s", text)
	}
}

// zombie reports whether a process has ended and nobody has waited for it.
func zombie(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	_, rest, ok := strings.Cut(string(b), ") ")
	return err == nil && ok && strings.HasPrefix(rest, "Z")
}
