package control

import (
	"bufio"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestDialFails(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(dir, "none")
	for path, want := range map[string]string{
		none:                           "no server answers at " + none + `: no such file or directory; is "nbd-export serve --control ` + none + `" running?`,
		"unix:" + dead:                 "no server answers at " + dead + ": connection refused; is ",
		file:                           "no server answers at " + file + ": connection refused; is ",
		"/" + strings.Repeat("x", 200): "invalid argument; the name of the socket is too long",
	} {
		if _, err := Dial(ctx, path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", path, err, want)
		}
	}
	over, cancel := context.WithDeadline(ctx, time.Unix(0, 0))
	defer cancel()
	if _, err := Dial(over, dead); err == nil || !strings.HasSuffix(err.Error(), "; give it more time") {
		t.Errorf("no time at all: %v", err)
	}
	if _, err := Dial(ctx, none); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the cause is lost")
	}
}

// speak is a server that says text and hears the rest.
func speak(t *testing.T, text string) (client net.Conn) {
	t.Helper()
	ours, theirs := pair(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.WriteString(theirs, text)
		_, _ = io.Copy(io.Discard, theirs)
	}()
	t.Cleanup(func() { _ = ours.Close(); <-done; _ = theirs.Close() })
	return ours
}

func TestStrangers(t *testing.T) {
	for text, want := range map[string]string{
		"NBDMAGICIHAVEOPT":           "x is no control socket: it is for NBD clients; give the path that the server has as --control",
		"SSH-2.0":                    "x is no control socket: it does not speak QMP",
		`{"hello":1}`:                "x is no control socket: it does not speak QMP",
		hello + `{"id":1}`:           "x: command qmp_capabilities: the answer has neither a result nor an error",
		hello + `{"return":[]} xyz `: "x: command qmp_capabilities: invalid character 'x'",
	} {
		if _, err := NewClient(context.Background(), speak(t, text), "x"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", text, err, want)
		}
	}
	// Who answers too late is not told by the words of a library.
	short, end := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer end()
	_, err := NewClient(short, speak(t, hello), "x")
	if !errors.Is(err, context.DeadlineExceeded) || err.Error() != "x: command qmp_capabilities: it did not answer in time" {
		t.Errorf("half a greeting: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := NewClient(ctx, speak(t, ""), "x"); !errors.Is(err, context.Canceled) {
		t.Errorf("silence: %v", err)
	}
}

// An answer without end takes no memory without end.
func TestEndlessAnswer(t *testing.T) {
	text := hello + `{"return":{},"id":1} {"return":[` + strings.Repeat("0,", 2500) + `0],"id":2} {"return":"` + strings.Repeat("x", 20000)
	c, err := NewClient(t.Context(), speak(t, text), "x")
	if err != nil {
		t.Fatal(err)
	}
	if c.stream.most != maxAnswer {
		t.Errorf("%d bytes are taken", c.stream.most)
	}
	c.stream.most = 10000
	if err := c.Execute(t.Context(), "a", nil, nil); err != nil {
		t.Error(err)
	}
	if err := c.Execute(t.Context(), "b", nil, nil); err == nil || err.Error() != "x: command b: its answer is longer than 10000 bytes" {
		t.Errorf("got %v", err)
	}
}

// A connection is of use after a context that ended just as the answer came.
func TestEndsWithAnswer(t *testing.T) {
	c := dial(t, newBed(t, 0).listen(t, Config{}))
	for range 100 {
		ctx, cancel := context.WithCancel(t.Context())
		if err := c.during(ctx, func() error { cancel(); return nil }); err != nil {
			t.Fatal(err)
		}
		if err := c.Execute(t.Context(), "query-version", nil, nil); err != nil {
			t.Fatalf("afterwards: %v", err)
		}
	}
}

// The client passes over events and late answers, and tells a server that is
// gone from one that refuses.
func TestExecute(t *testing.T) {
	ours, theirs := pair(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { _ = theirs.Close() }()
		in := bufio.NewScanner(theirs)
		say := func(s string) { _, _ = io.WriteString(theirs, s+"\r\n") }
		say(hello)
		for i, reply := range []string{
			`{"return":{},"id":1}`,
			`{"timestamp":{"seconds":1,"microseconds":2},"event":"X"} {"return":7,"id":77} {"return":{"a":5},"id":2}`,
			`{"error":{"class":"DeviceNotFound","desc":"no"},"id":3}`,
			`{"error":{"class":"GenericError","desc":"what?"}}`,
		} {
			if !in.Scan() {
				t.Errorf("no request %d", i)
			}
			say(reply)
		}
		in.Scan()
	}()
	ctx := context.Background()
	c, err := NewClient(ctx, ours, "peer")
	if err != nil {
		t.Fatal(err)
	}
	var v struct{ A int }
	if err := c.Execute(ctx, "x", nil, &v); err != nil || v.A != 5 {
		t.Errorf("got %+v, %v", v, err)
	}
	var refused *Error
	if err := c.Execute(ctx, "x", nil, nil); !errors.As(err, &refused) || refused.Class != DeviceNotFound || refused.Desc != "no" {
		t.Errorf("got %v", err)
	}
	if err := c.Execute(ctx, "x", nil, nil); err == nil || err.Error() != "what?" {
		t.Errorf("got %v", err)
	}
	want := "peer: command x: it closed the connection before it answered"
	if err := c.Execute(ctx, "x", nil, nil); err == nil || err.Error() != want {
		t.Errorf("got %v", err)
	}
	if err := c.Execute(ctx, "y", nil, nil); err == nil || err.Error() != want {
		t.Errorf("afterwards: %v", err)
	}
	if err := c.Execute(ctx, "y", make(chan int), nil); err == nil {
		t.Error("a channel was sent")
	}
	<-done
	_ = c.Close()
}

func TestSocketIsPrivate(t *testing.T) {
	path := newBed(t, 0).listen(t, Config{})
	st, err := os.Lstat(path)
	if err != nil || st.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another server is listening there") {
		t.Errorf("second server: %v", err)
	}
}

// A server that was started with a short name of its socket is reached by the whole
// path, which stands in the owner record.
func TestDialLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	l, err := net.Listen("unix", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	served := make(chan error, 1)
	go func() {
		nc, err := l.Accept()
		if err == nil {
			_, err = io.WriteString(nc, hello+`{"return":{},"id":1}`)
			_, _ = io.Copy(io.Discard, nc)
			_ = nc.Close()
		}
		served <- err
	}()
	c, err := Dial(t.Context(), filepath.Join(dir, "ctl"))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
	for name, want := range map[string]string{
		"none":                   "no server answers at " + filepath.Join(dir, "none") + ": no such file or directory; is ",
		strings.Repeat("n", 110): "the name of the socket is too long",
		"no/ctl":                 "no such file or directory",
	} {
		if _, err := Dial(t.Context(), filepath.Join(dir, name)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
