package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// A log that was moved away goes on in a new file once SIGHUP has come, and where
// that cannot be made it goes on where it was.
func TestLogFileIsRotated(t *testing.T) {
	dir := shortDir(t)
	image, log, pidFile := sparseImage(t, dir, mib), filepath.Join(dir, "log"), filepath.Join(dir, "pid")
	r := cli(t, "serve", "--fork", "-f", "raw", "-k", filepath.Join(dir, "nbd"), "--log-file", log, "--pid-file", pidFile, image)
	wantOutput(t, r, "")
	if r.stderr != "" {
		t.Errorf("it logs to stderr, too:\n%s", r.stderr)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(readFile(t, pidFile))))
	if err != nil {
		t.Fatal(err)
	}
	gone := func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH || zombie(pid) }
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
	signal := func(sig syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	says := func(file, want string) {
		t.Helper()
		waitFor(t, startTimeout, file+" says "+want, func() bool {
			b, err := os.ReadFile(file)
			return err == nil && strings.Contains(string(b), want)
		})
	}
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	says(log, "image is active")
	rename(log, log+".1")
	signal(syscall.SIGUSR2)
	says(log+".1", "image is inactive") // the file is the same wherever it is
	signal(syscall.SIGHUP)
	says(log, "log file opened anew")
	if st, err := os.Stat(log); err != nil || st.Mode().Perm()&0o007 != 0 {
		t.Errorf("the new file: %v, %v", st, err)
	}
	// What no logger writes goes there too.
	if at, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/fd/2"); err != nil || at != log {
		t.Errorf("stderr is %s, %v", at, err)
	}

	rename(log, log+".2")
	if err := os.Mkdir(log, 0o700); err != nil {
		t.Fatal(err)
	}
	signal(syscall.SIGHUP)
	says(log+".2", "cannot write log file "+log+": is a directory")
	if err := os.Remove(log); err != nil {
		t.Fatal(err)
	}
	signal(syscall.SIGHUP)
	says(log, "log file opened anew")
	signal(syscall.SIGTERM)
	waitFor(t, startTimeout, "the server ends", gone)
	says(log, "stopping")
	if text := string(readFile(t, log+".1")); strings.Contains(text, "stopping") || strings.Contains(text, "anew") {
		t.Errorf("the old file goes on:\n%s", text)
	}

	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path, want string
		status     int
	}{
		{"", "--log-file needs a path", 2}, {dir, "is a directory", 1}, {fifo, "nobody reads it", 1}, {filepath.Join(dir, "no", "log"), "no such file or directory", 1},
	} {
		wantFailure(t, cli(t, "serve", "-f", "raw", "-k", filepath.Join(dir, "nbd"), "--log-file", c.path, image), c.status, c.want)
	}
}
