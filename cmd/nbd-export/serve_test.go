package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/control"
)

// child is nbd-export as a process of its own.
type child struct {
	*exec.Cmd
	log    chan logLine // closed at the end
	others []string     // lines of stderr that are no log, after the end
}

type logLine struct {
	Level, Msg, From, To, On, Signal string
	Error                            string
	Epoch                            uint64
	Duration                         float64
}

func start(t *testing.T, args ...string) *child {
	t.Helper()
	c := &child{Cmd: exec.Command(os.Args[0], args...), log: make(chan logLine, 1000)}
	c.Env = append(os.Environ(), "NBD_EXPORT_TEST_MAIN=1")
	stderr, err := c.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.log)
		for in := bufio.NewScanner(stderr); in.Scan(); {
			var l logLine
			if json.Unmarshal(in.Bytes(), &l) != nil {
				c.others = append(c.others, in.Text())
				continue
			}
			c.log <- l
		}
	}()
	t.Cleanup(func() { _ = c.Process.Kill() })
	return c
}

// serveChild starts a server of img and waits until it is ready.
func serveChild(t *testing.T, img, name string, args ...string) *child {
	t.Helper()
	dir := filepath.Dir(img)
	c := start(t, append([]string{
		"serve", "-f", "raw", "-k", filepath.Join(dir, name+".sock"), "--control", filepath.Join(dir, name+".ctl"),
		"--log-format", "json", img,
	}, args...)...)
	c.expect(t, "listening")
	return c
}

// expect waits for a line that contains msg.
func (c *child) expect(t *testing.T, msg string) logLine {
	t.Helper()
	for l := range c.log {
		if strings.Contains(l.Msg, msg) {
			return l
		}
	}
	t.Fatalf("the process ended before it logged %q: %s", msg, c.others)
	return logLine{}
}

func (c *child) signal(t *testing.T, sig os.Signal) {
	t.Helper()
	if err := c.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// end waits for the process and returns its exit status and last words.
func (c *child) end(t *testing.T) (int, string) {
	t.Helper()
	for range c.log {
	}
	err := c.Wait()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		t.Fatal(err)
	}
	return c.ProcessState.ExitCode(), strings.Join(c.others, "\n")
}

func newImage(t *testing.T) string {
	t.Helper()
	img := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(img, bytes.Repeat([]byte("x"), 10000), 0o600); err != nil {
		t.Fatal(err)
	}
	return img
}

func command(t *testing.T, want int, args ...string) string {
	t.Helper()
	root := newRootCommand(nil)
	var out, errOut bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&errOut)
	if status := run(root, args); status != want {
		t.Errorf("%q: exit %d: %s", args, status, errOut.String())
	}
	return out.String() + errOut.String()
}

func stateOf(t *testing.T, ctl string) control.ImageStatus {
	t.Helper()
	var s control.Status
	if err := json.Unmarshal([]byte(command(t, 0, "status", "--json", "--control", ctl)), &s); err != nil || len(s.Images) != 1 {
		t.Fatalf("%v, status %+v", err, s)
	}
	return s.Images[0]
}

// Two servers of one image: one owner, handed over by signals and orders.
func TestServe(t *testing.T) {
	img := newImage(t)
	dir := filepath.Dir(img)
	actl, bctl, pid := filepath.Join(dir, "a.ctl"), filepath.Join(dir, "b.ctl"), filepath.Join(dir, "a.pid")
	a := serveChild(t, img, "a", "--pid-file", pid, "-p", "0")
	b := serveChild(t, img, "b", "--inactive")

	c, err := control.Dial(context.Background(), actl)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	// The pid file comes just before the line that the test has seen.
	if text, err := os.ReadFile(pid); err != nil || string(text) != strconv.Itoa(a.Process.Pid)+"\n" {
		t.Errorf("pid file %q, %v", text, err)
	}
	if l := a.expect(t, "listening"); !strings.HasPrefix(l.On, "tcp:127.0.0.1:") {
		t.Errorf("listens on %s", l.On)
	}
	if s := stateOf(t, actl); s.State != "active" || s.Epoch != 1 || s.Locks.Held != "100,101,103,201,203" || s.Size != 10000 {
		t.Errorf("status %+v", s)
	}
	if s := stateOf(t, bctl); s.State != "inactive" || s.Locks.Held != "none" {
		t.Errorf("status %+v", s)
	}
	if out := command(t, 1, "activate", "--control", bctl); !strings.Contains(out, `Failed to get "write" lock`) {
		t.Errorf("second owner: %s", out)
	}
	b.expect(t, "activation failed")

	if out := command(t, 0, "inactivate", "--control", actl); out != "" {
		t.Errorf("output %q", out)
	}
	if l := a.expect(t, "image is inactive"); l.From != "inactivating" || l.To != "inactive" || l.Epoch != 1 || l.Duration <= 0 {
		t.Errorf("log line %+v", l)
	}
	b.signal(t, syscall.SIGUSR1)
	b.expect(t, "image is active")
	a.signal(t, syscall.SIGUSR1)
	if l := a.expect(t, "activation failed"); l.Level != "error" || !strings.Contains(l.Error, `Failed to get "write" lock`) {
		t.Errorf("log line %+v", l)
	}
	if s := stateOf(t, actl); !strings.Contains(s.LastError, `Failed to get "write" lock`) {
		t.Errorf("status %+v", s)
	}
	if out := command(t, 0, "status", "--control", bctl); !strings.Contains(out, "\nstate        active\n") {
		t.Errorf("status %s", out)
	}
	b.signal(t, syscall.SIGUSR2)
	b.expect(t, "image is inactive")
	command(t, 0, "activate", "--if-unchanged", "--control", actl)

	b.signal(t, syscall.SIGHUP)
	b.expect(t, "SIGHUP ignored")
	if err := c.Quit(context.Background()); err != nil {
		t.Error(err)
	}
	if status, words := a.end(t); status != 0 || words != "" {
		t.Errorf("exit %d: %s", status, words)
	}
	b.signal(t, syscall.SIGINT)
	if status, words := b.end(t); status != 0 || words != "" {
		t.Errorf("exit %d: %s", status, words)
	}
	if left, _ := os.ReadDir(dir); len(left) != 2 || left[1].Name() != "disk.img.owner" {
		t.Errorf("left behind: %v", left)
	}
}

// A start that fails says why in one line, leaves nothing and exits with 1.
func TestServeRefused(t *testing.T) {
	img := newImage(t)
	dir := filepath.Dir(img)
	owner := serveChild(t, img, "a")
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = busy.Close() }()
	port := busy.Addr().String()[strings.LastIndex(busy.Addr().String(), ":")+1:]
	k := filepath.Join(dir, "x.sock")
	before, _ := os.ReadDir(dir)
	image, err := os.Stat(img)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		want string
		args []string
	}{
		{`Failed to get "write" lock`, []string{"-k", k, img}},
		{"no such file", []string{"-k", k, filepath.Join(dir, "none")}},
		{"directory", []string{"-k", k, dir}},
		{"another server is listening there", []string{"-k", filepath.Join(dir, "a.sock"), "--inactive", img}},
		{"another server is listening there", []string{"-k", k, "--control", filepath.Join(dir, "a.ctl"), "--inactive", img}},
		{"not a socket", []string{"-k", img, "--inactive", img}},
		{"choose a shorter one", []string{"-k", dir + strings.Repeat("x", 200), "--inactive", img}},
		{"the port is in use", []string{"-k", k, "-p", port, "--inactive", img}},
		{"it is the log file (--log-file), and what is written there would end up in the image", []string{"-k", k, "--log-file", img, "--inactive", img}},
		{"cannot write pid file", []string{"-k", k, "--pid-file", filepath.Join(dir, "no", "pid"), "--inactive", img}},
	} {
		p := start(t, append([]string{"serve", "-f", "raw", "--log-format", "json"}, c.args...)...)
		status, words := p.end(t)
		if status != 1 || !strings.HasPrefix(words, "nbd-export: ") || !strings.Contains(words, c.want) || strings.Contains(words, "\n") {
			t.Errorf("%q: exit %d: %s; want %s", c.args, status, words, c.want)
		}
	}
	if after, _ := os.ReadDir(dir); len(after) != len(before) {
		t.Errorf("left behind: %v", after)
	}
	if now, err := os.Stat(img); err != nil || now.Size() != image.Size() {
		t.Errorf("the image became %v, %v", now, err)
	}
	owner.signal(t, syscall.SIGTERM)
	owner.end(t)
}

// What would keep an image from being activated is told at the start.
func TestServeInactiveUnusable(t *testing.T) {
	img := newImage(t)
	if err := os.WriteFile(img+".owner", []byte("scribble"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := start(t, "serve", "-f", "raw", "-k", filepath.Join(filepath.Dir(img), "a.sock"), "--log-format", "json", "--inactive", img)
	if l := c.expect(t, "could not be activated"); l.Level != "warn" || !strings.Contains(l.Error, "this is no owner record") {
		t.Errorf("%+v", l)
	}
	c.expect(t, "listening")
	c.signal(t, syscall.SIGTERM)
	if status, words := c.end(t); status != 0 {
		t.Errorf("exit %d: %s", status, words)
	}
}

// Inactive means that nothing is changed, whatever ends the process.
func TestInactiveTouchesNothing(t *testing.T) {
	img := newImage(t)
	long := time.Now().Add(-time.Hour)
	if err := os.Chtimes(img, long, long); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(img)
	if err != nil {
		t.Fatal(err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGINT} {
		// Sockets that SIGKILL leaves are replaced.
		c := serveChild(t, img, "a", "--inactive")
		c.signal(t, sig)
		if status, _ := c.end(t); status != 0 && sig != syscall.SIGKILL {
			t.Errorf("%s: exit %d", sig, status)
		}
		after, err := os.Stat(img)
		if err != nil || after.ModTime() != before.ModTime() || after.Size() != before.Size() ||
			after.Sys().(*syscall.Stat_t).Ctim != before.Sys().(*syscall.Stat_t).Ctim {
			t.Errorf("%s: the image has changed, %v", sig, err)
		}
	}
}

// A server whose log nobody reads any more goes on.
func TestLogReaderGone(t *testing.T) {
	img := newImage(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ctl := filepath.Join(filepath.Dir(img), "ctl")
	c := exec.Command(os.Args[0], "serve", "-f", "raw", "-k", ctl+".nbd", "--control", ctl, "--log-format", "json", img)
	c.Env, c.Stderr = append(os.Environ(), "NBD_EXPORT_TEST_MAIN=1"), w
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line, "listening") {
			break
		}
	}
	_ = r.Close()
	command(t, 0, "inactivate", "--control", ctl)
	command(t, 0, "activate", "--control", ctl)
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
	_, _ = io.Copy(io.Discard, in)
}
