package integration

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// everyControl runs a test of the control protocol against nbd-export and, so
// that the test itself is tested, against QEMU's storage daemon.
func everyControl(t *testing.T, f func(t *testing.T, kind string, e *daemon)) {
	t.Run("nbd-export", func(t *testing.T) {
		f(t, "nbd-export", serve(t, sparseImage(t, tmpfsDir(t), mib), "--inactive"))
	})
	t.Run("qemu-storage-daemon", func(t *testing.T) {
		f(t, "qemu-storage-daemon", serveQSD(t, sparseImage(t, tmpfsDir(t), mib), true))
	})
}

// lineConn sees the control socket's bytes.
type lineConn struct {
	net.Conn
	t testing.TB
	r *bufio.Reader
}

func dialLines(t testing.TB, path string) *lineConn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &lineConn{c, t, bufio.NewReader(c)}
}

// line reads one message and checks its framing.
func (c *lineConn) line() map[string]any {
	c.t.Helper()
	c.SetReadDeadline(time.Now().Add(startTimeout))
	b, err := c.r.ReadBytes('\n')
	if err != nil {
		c.t.Fatalf("control socket: %v after %q", err, b)
	}
	if !bytes.HasSuffix(b, []byte("\r\n")) || bytes.Count(b, []byte("\r")) != 1 {
		c.t.Errorf("a message does not end in CRLF: %q", b)
	}
	for _, x := range b {
		if x >= 0x80 {
			c.t.Errorf("a message is not ASCII: %q", b)
			break
		}
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		c.t.Fatalf("control socket: %v in %q", err, b)
	}
	return m
}

func (c *lineConn) ask(text string) map[string]any {
	c.t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		c.t.Fatal(err)
	}
	return c.line()
}

func TestControlFraming(t *testing.T) {
	everyControl(t, func(t *testing.T, kind string, e *daemon) {
		c := dialLines(t, e.control)
		greeting, _ := c.line()["QMP"].(map[string]any)
		version, _ := greeting["version"].(map[string]any)
		numbers, _ := version["qemu"].(map[string]any)
		for _, k := range []string{"major", "minor", "micro"} {
			if _, ok := numbers[k].(float64); !ok {
				t.Errorf("greeting: version has no number %q: %v", k, greeting)
			}
		}
		if _, ok := version["package"].(string); !ok {
			t.Errorf("greeting: no package: %v", greeting)
		}
		if _, ok := greeting["capabilities"].([]any); !ok {
			t.Errorf("greeting: no list of capabilities: %v", greeting)
		}

		type m = map[string]any
		failure := func(class, desc string) m { return m{"error": m{"class": class, "desc": desc}} }
		const generic, notFound = "GenericError", "CommandNotFound"
		with := func(reply m, id any) m { reply["id"] = id; return reply }
		for _, tt := range []struct {
			send string
			want m
		}{
			{`{"execute": "query-version", "id": 1}`,
				with(failure(notFound, "Expecting capabilities negotiation with 'qmp_capabilities'"), 1.0)},
			{`{"execute": "qmp_capabilities", "id": {"a": [1, "x", null]}}`,
				m{"return": m{}, "id": m{"a": []any{1.0, "x", nil}}}},
			{`{"execute": "qmp_capabilities"}`,
				failure(notFound, "Capabilities negotiation is already complete, command ignored")},
			{`{"execute": "no-such", "id": "s"}`, with(failure(notFound, "The command no-such has not been found"), "s")},
			{`[1, 2]`, failure(generic, "QMP input must be a JSON object")},
			{`"text"`, failure(generic, "QMP input must be a JSON object")},
			{`{}`, failure(generic, "QMP input lacks member 'execute'")},
			{`{"id": 5}`, with(failure(generic, "QMP input lacks member 'execute'"), 5.0)},
			{`{"execute": 1}`, failure(generic, "QMP input member 'execute' must be a string")},
			{`{"execute": "query-version", "arguments": 1}`, failure(generic, "QMP input member 'arguments' must be an object")},
			{`{"execute": "query-version", "more": 1, "id": 3}`, with(failure(generic, "QMP input member 'more' is unexpected"), 3.0)},
			{`{"execute": "query-version", "arguments": {"more": 1}}`, failure(generic, "Parameter 'more' is unexpected")},
			{`{"execute": "blockdev-set-active"}`, failure(generic, "Parameter 'active' is missing")},
			{`{"execute": "blockdev-set-active", "arguments": {"active": 1}}`,
				failure(generic, "Invalid parameter type for 'active', expected: boolean")},
			{`{"execute": "blockdev-set-active", "arguments": {"active": true, "node-name": 5}}`,
				failure(generic, "Invalid parameter type for 'node-name', expected: string")},
			{`{"execute": "blockdev-set-active", "arguments": {"active": true, "other": 1}}`,
				failure(generic, "Parameter 'other' is unexpected")},
			{`{"execute": "blockdev-set-active", "arguments": {"active": true, "node-name": "kein Knötchen"}}`,
				failure(generic, "Failed to find node with node-name='kein Knötchen'")},
		} {
			got, _ := json.Marshal(c.ask(tt.send))
			want, _ := json.Marshal(tt.want)
			if string(got) != string(want) {
				t.Errorf("sent %s\ngot  %s\nwant %s", tt.send, got, want)
			}
		}
		// A refused command has changed nothing.
		q := func() bool {
			for _, n := range c.ask(`{"execute": "query-named-block-nodes"}`)["return"].([]any) {
				if n.(m)["active"].(bool) {
					return true
				}
			}
			return false
		}
		if q() {
			t.Error("a command with bad arguments activated the image")
		}
		// After what is no JSON the next command is understood again.
		for _, bad := range []string{`{"execute": xyz}`, "}", `{"execute": }` + "\n", "/* no comment */ 1\tx", "\"\xfe", "@ x"} {
			r, _ := c.ask(bad)["error"].(m)
			if desc, _ := r["desc"].(string); r["class"] != generic || !strings.HasPrefix(desc, "JSON parse error, ") {
				t.Errorf("sent %s, got %v", bad, r)
			}
			if r := c.ask("\n" + `{"execute": "query-version", "id": 1}`); r["return"] == nil {
				t.Errorf("after %q: %v", bad, r)
			}
		}
		// Any white space, single quotes, objects in pieces and several at once.
		if r := c.ask("\r\n\t {'execute':\n'query-version'}"); r["return"] == nil {
			t.Errorf("white space and single quotes: %v", r)
		}
		c.Write([]byte(`{"execute": "query-ve`))
		time.Sleep(20 * time.Millisecond)
		if r := c.ask(`rsion", "id": 1} {"execute": "query-version", "id": 2}{"execute":"query-version","id":3}`); r["id"] != 1.0 {
			t.Errorf("the first of three: %v", r)
		}
		for _, id := range []float64{2, 3} {
			if r := c.line(); r["id"] != id {
				t.Errorf("command %v: %v", id, r)
			}
		}
	})
}

func TestControlQueries(t *testing.T) {
	everyControl(t, func(t *testing.T, kind string, e *daemon) {
		q := e.qmp()
		var commands []struct{ Name string }
		if err := json.Unmarshal(q.must("query-commands", nil), &commands); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"qmp_capabilities", "blockdev-set-active", "query-block-exports",
			"query-named-block-nodes", "query-commands", "query-version", "quit"} {
			if !slices.ContainsFunc(commands, func(c struct{ Name string }) bool { return c.Name == name }) {
				t.Errorf("query-commands lacks %s: %v", name, commands)
			}
		}
		var nodes, exports []map[string]any
		if err := json.Unmarshal(q.must("query-named-block-nodes", nil), &nodes); err != nil {
			t.Fatal(err)
		}
		for _, k := range []string{"file", "ro", "drv", "backing_file_depth", "active", "encrypted", "detect_zeroes",
			"bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr", "image", "cache", "write_threshold", "node-name"} {
			if _, ok := nodes[0][k]; !ok {
				t.Errorf("query-named-block-nodes lacks %s", k)
			}
		}
		image, _ := nodes[0]["image"].(map[string]any)
		if image["filename"] != e.image || image["format"] != "raw" || image["virtual-size"] != 1.0*mib || nodes[0]["drv"] != "raw" {
			t.Errorf("query-named-block-nodes: %v", nodes[0])
		}
		if err := json.Unmarshal(q.must("query-block-exports", nil), &exports); err != nil {
			t.Fatal(err)
		}
		if len(exports) != 1 || exports[0]["type"] != "nbd" || exports[0]["shutting-down"] != false ||
			exports[0]["node-name"] != nodes[0]["node-name"] || exports[0]["id"] == "" {
			t.Errorf("query-block-exports: %v", exports)
		}
		// By name and without, and again: ownership is idempotent.
		for _, args := range []map[string]any{
			{"active": true, "node-name": exports[0]["node-name"]}, {"active": true}, {"active": false}, {"active": false},
			{"active": false, "node-name": exports[0]["node-name"]},
		} {
			if r := string(q.must("blockdev-set-active", args)); r != "{}" {
				t.Errorf("blockdev-set-active returned %s", r)
			}
		}
	})
}

func TestControlQuit(t *testing.T) {
	everyControl(t, func(t *testing.T, kind string, e *daemon) {
		q := e.qmp()
		if r := string(q.must("quit", nil)); r != "{}" {
			t.Errorf("quit returned %s", r)
		}
		if code := e.wait(startTimeout); code != 0 {
			t.Errorf("exit status %d after quit", code)
		}
	})
}

func TestControlSocketIsPrivate(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), mib))
	st, err := os.Stat(e.control)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Type() != os.ModeSocket || st.Mode().Perm() != 0o600 {
		t.Errorf("control socket has mode %v, want a socket of 0600", st.Mode())
	}
}

func TestControlSeveralClients(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), mib))
	var all []*qmpConn
	for range 5 {
		all = append(all, e.qmp())
	}
	silent := dialQMP(t, e.control) // connects and says nothing
	defer silent.Close()
	half := dialQMP(t, e.control) // stops in the middle of a command
	half.send(`{"execute": "qmp_cap`)
	for i := range 20 {
		q := all[i%len(all)]
		want := i%2 == 1
		q.must("blockdev-set-active", map[string]any{"active": want})
		for j, other := range all {
			if other.active() != want {
				t.Errorf("round %d: client %d sees active %v, want %v", i, j, !want, want)
			}
		}
	}
}

// While an inactivation waits for the storage, queries answer at once.
func TestControlAnswersDuringTransition(t *testing.T) {
	image := sparseImage(t, t.TempDir(), 512*mib)
	e := serve(t, image)
	q, order := e.qmp(), e.qmp()
	c := dialRaw(t, e.socket, "")
	var during int
	var took []time.Duration
	for round := 0; round < 4 && during == 0; round++ {
		for off := range uint64(16) {
			c.want(0, cmdWrite, 0, off*32*mib, 32*mib, randomBytes(int64(off)+int64(round), 32*mib))
		}
		order.send(`{"execute": "blockdev-set-active", "arguments": {"active": false}}`)
		done := make(chan qmpReply, 1)
		go func() { done <- order.next() }()
		for over := false; !over; {
			select {
			case r := <-done:
				if r.Err != nil {
					t.Fatal(r.Err)
				}
				over = true
			default:
				begin := time.Now()
				active := q.active()
				if active {
					during++
					took = append(took, time.Since(begin))
				}
			}
		}
		if q.active() {
			t.Fatal("still active after the inactivation was answered")
		}
		q.must("blockdev-set-active", map[string]any{"active": true})
	}
	t.Logf("%d queries were answered while the image was being handed over", during)
	if during == 0 {
		t.Fatal("no query fell into a transition")
	}
	// The machine may be slow to run some, but not all.
	slices.Sort(took)
	if median := took[len(took)/2]; median > 100*time.Millisecond {
		t.Errorf("queries took %v during a transition, more than 100 ms; the slowest %v", median, took[len(took)-1])
	}
}

// A socket file left by a dead server is replaced, that of a live one is not.
func TestControlSocketInUse(t *testing.T) {
	dir := tmpfsDir(t)
	first := serve(t, sparseImage(t, dir, mib))
	other := sparseImage(t, tmpfsDir(t), mib)
	r := cli(t, "serve", "-f", "raw", "-k", filepath.Join(shortDir(t), "nbd"), "--control", first.control, other)
	wantFailure(t, r, 1, first.control)
	first.qmp().must("query-version", nil) // the live one still has it

	first.kill()
	if _, err := os.Stat(first.control); err != nil {
		t.Fatalf("a killed server leaves its socket: %v", err)
	}
	second := spawn(t, "nbd-export", nil, program(t), "serve", "-f", "raw", "-k", first.socket,
		"--control", first.control, "--pid-file", first.pidFile+"2", other)
	waitReady(second, first.pidFile+"2")
	dialQMP(t, first.control).greeting()
	dialRaw(t, first.socket, "").Close()
	second.stop()
	for _, path := range []string{first.control, first.socket, first.pidFile + "2"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is left after an orderly stop", path)
		}
	}
}

// wantFailure requires an exit status and one line on standard error that
// contains what it is about.
func wantFailure(t testing.TB, r result, code int, contains ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit status %d, want %d\nstdout: %s\nstderr: %s", r.code, code, r.stdout, r.stderr)
		return
	}
	if strings.Count(r.stderr, "\n") != 1 || !strings.HasSuffix(r.stderr, "\n") {
		t.Errorf("not one line of standard error:\n%s", r.stderr)
	}
	for _, c := range contains {
		if !strings.Contains(r.stderr, c) {
			t.Errorf("standard error does not say %q: %s", c, r.stderr)
		}
	}
	if strings.Contains(r.stderr, "panic") || strings.Contains(r.stderr, "goroutine ") {
		t.Errorf("a stack trace instead of an error:\n%s", r.stderr)
	}
}
