package integration

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// libnbd's tools start a server for themselves, on a socket that they have
// already.
func TestServerOfAClient(t *testing.T) {
	need(t, "nbdinfo", "libnbd-bin")
	image := sparseImage(t, t.TempDir(), 3*mib)
	serve := []string{"[", program(t), "serve", "-f", "raw", image, "]"}
	if size := strings.TrimSpace(run(t, append([]string{"nbdinfo", "--size", "--"}, serve...)...)); size != fmt.Sprint(3*mib) {
		t.Errorf("nbdinfo sees %s bytes", size)
	}
	copied := filepath.Join(t.TempDir(), "copy")
	run(t, append(append([]string{"nbdcopy", "--"}, serve...), copied)...)
	if st, err := os.Stat(copied); err != nil || st.Size() != 3*mib {
		t.Errorf("nbdcopy made %v, %v", st, err)
	}
	// The server stops in order when its client ends it.
	wantOutput(t, cli(t, "who", image), "let go in order")
}

// passed starts the program with listening sockets as a service manager does,
// and environment variables of the test's.
func passed(t *testing.T, names string, listeners []*net.UnixListener, env []string, flags ...string) *process {
	t.Helper()
	// The process id stands in the environment, and only a shell knows it.
	argv := append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, program(t)}, flags...)
	return spawn(t, "nbd-export", func(cmd *exec.Cmd) {
		cmd.Env = append(append(cmd.Env, env...), fmt.Sprintf("LISTEN_FDS=%d", len(listeners)), "LISTEN_FDNAMES="+names)
		for _, l := range listeners {
			l.SetUnlinkOnClose(false)
			f, err := l.File()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		}
	}, argv...)
}

func listenAt(t *testing.T, path string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// As a unit of systemd with Type=notify, sockets for clients and one for orders.
func TestServiceManager(t *testing.T) {
	need(t, "nbdinfo", "libnbd-bin")
	dir := shortDir(t)
	image, nbd1, nbd2, ctl := sparseImage(t, dir, mib), filepath.Join(dir, "n1"), filepath.Join(dir, "n2"), filepath.Join(dir, "ctl")
	sockets := []*net.UnixListener{listenAt(t, nbd1), listenAt(t, ctl), listenAt(t, nbd2)}
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "notify")})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	told := func(want string) {
		t.Helper()
		b := make([]byte, 100)
		if n, err := notify.Read(b); err != nil || string(b[:n]) != want {
			t.Fatalf("the service manager was told %q, %v; want %q", b[:n], err, want)
		}
	}
	p := passed(t, "disk:control:disk", sockets, []string{"NOTIFY_SOCKET=" + filepath.Join(dir, "notify")}, "serve", "-f", "raw", image)
	told("READY=1")
	for _, socket := range []string{nbd1, nbd2} {
		run(t, "nbdinfo", "--size", nbdURI("", socket))
	}
	var who struct{ Record struct{ Control string } }
	if err := json.Unmarshal([]byte(cli(t, "who", "--json", image).stdout), &who); err != nil || who.Record.Control != ctl {
		t.Errorf("the owner record names control socket %q, %v", who.Record.Control, err)
	}
	wantOutput(t, cli(t, "inactivate", "--control", ctl), "")
	wantOutput(t, cli(t, "status", "--control", ctl), "inactive")
	p.stop()

	told("STOPPING=1")
	for _, socket := range []string{nbd1, nbd2, ctl} {
		if _, err := os.Lstat(socket); err != nil {
			t.Errorf("the service manager's socket is gone: %v", err)
		}
	}
	if strings.Contains(p.log.String(), "tcp:") {
		t.Errorf("it listened elsewhere too:\n%s", p.log)
	}
}

func TestServiceManagerWrongUse(t *testing.T) {
	dir := shortDir(t)
	image, sockets := sparseImage(t, dir, mib), []*net.UnixListener{listenAt(t, filepath.Join(dir, "a"))}
	for _, c := range []struct {
		names, want string
		flags       []string
	}{
		{"disk", "--socket", []string{"serve", "-f", "raw", "-k", filepath.Join(dir, "b"), image}},
		{"disk", "--port", []string{"serve", "-f", "raw", "-p", "0", image}},
		{"control", "--control", []string{"serve", "-f", "raw", "--control", filepath.Join(dir, "b"), image}},
		{"disk", "--control", []string{"daemon"}}, // it has none
	} {
		p := passed(t, c.names, sockets, nil, c.flags...)
		if code, said := p.wait(startTimeout), p.log.String(); code != 2 || !strings.Contains(said, c.want) {
			t.Errorf("%q: exit status %d, %s", c.flags, code, said)
		}
	}
}

// wantOutput fails the test unless a command did well and said want.
func wantOutput(t testing.TB, r result, want string) {
	t.Helper()
	if r.code != 0 || !strings.Contains(r.stdout, want) {
		t.Errorf("exit status %d, want %q in:\n%s%s", r.code, want, r.stdout, r.stderr)
	}
}
