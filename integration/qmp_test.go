package integration

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/internal/testcerts"
)

// manager is a daemon without images, driven over its control socket: ours, or
// QEMU's, which scripts were written for.
type manager struct {
	*process
	t    testing.TB
	kind string
	dir  string // of its images and sockets, and its working directory
	q    *qmpConn
	// events are those received so far, as "NAME ID".
	events []string
}

var managers = []string{"nbd-export", "qemu-storage-daemon"}

// startManager starts a daemon with more flags, which both have.
func startManager(t testing.TB, kind string, flags ...string) *manager {
	t.Helper()
	return startManagerIn(t, kind, shortDir(t), flags...)
}

func startManagerIn(t testing.TB, kind, dir string, flags ...string) *manager {
	t.Helper()
	m := &manager{t: t, kind: kind, dir: dir}
	control, pidFile := filepath.Join(m.dir, "ctl"), filepath.Join(m.dir, "pid")
	argv := []string{program(t), "daemon", "--control", control, "--pid-file", pidFile}
	if kind == "qemu-storage-daemon" {
		need(t, kind, "qemu-system-common")
		argv = []string{kind, "--chardev", "socket,id=c,server=on,wait=off,path=" + control, "--monitor", "chardev=c", "--pidfile", pidFile}
	}
	argv = append(argv, flags...)
	m.process = spawn(t, kind, func(c *exec.Cmd) { c.Dir = m.dir }, argv...)
	waitReady(m.process, pidFile)
	m.q = dialQMP(t, control)
	m.q.greeting()
	m.q.must("qmp_capabilities", nil)
	return m
}

// receive returns the next message; an event is noted.
func (m *manager) receive() map[string]any {
	m.t.Helper()
	var r map[string]any
	m.q.SetReadDeadline(time.Now().Add(startTimeout))
	if err := m.q.dec.Decode(&r); err != nil {
		m.t.Fatalf("%s: control socket: %v", m.kind, err)
	}
	name, ok := r["event"].(string)
	if !ok {
		return r
	}
	data, _ := r["data"].(map[string]any)
	if stamp, ok := r["timestamp"].(map[string]any); !ok || stamp["seconds"] == nil || stamp["microseconds"] == nil || len(r) != 3 {
		m.t.Errorf("%s: event %v", m.kind, r)
	}
	m.events = append(m.events, fmt.Sprint(name, " ", data["id"]))
	return r
}

// ask sends a command, "name {arguments}", and returns its answer.
func (m *manager) ask(command string) map[string]any {
	m.t.Helper()
	name, arguments, _ := strings.Cut(command, " ")
	text := fmt.Sprintf(`{"execute":"%s"}`, name)
	if arguments != "" {
		text = fmt.Sprintf(`{"execute":"%s","arguments":%s}`, name, arguments)
	}
	m.q.send(text + "\n")
	for {
		if r := m.receive(); r["event"] == nil {
			return r
		}
	}
}

// must is ask for commands that have to succeed.
func (m *manager) must(commands ...string) {
	m.t.Helper()
	for _, c := range commands {
		if r := m.ask(c); r["error"] != nil {
			m.t.Fatalf("%s: %s: %v", m.kind, c, r["error"])
		}
	}
}

// fails is ask for a command that has to fail with a text that begins so.
func (m *manager) fails(command, desc string) {
	m.t.Helper()
	if d := errorOf(m.ask(command)); !strings.HasPrefix(d, "GenericError: "+desc) {
		m.t.Fatalf("%s: %s: %q, want %q", m.kind, command, d, desc)
	}
}

// event waits until an event has come, which may be before the answer to the
// command that caused it.
func (m *manager) event(want string) {
	m.t.Helper()
	for !slices.Contains(m.events, want) {
		if r := m.receive(); r["event"] == nil {
			m.t.Fatalf("%s: an answer nobody asked for: %v", m.kind, r)
		}
	}
}

func (m *manager) image(name string, size int64) string {
	m.t.Helper()
	path := filepath.Join(m.dir, name)
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		m.t.Fatal(err)
	}
	return path
}

// quit ends the daemon by command.
func (m *manager) quit() {
	m.t.Helper()
	m.q.send(`{"execute":"quit"}`)
	if code := m.wait(startTimeout); code != 0 {
		m.t.Errorf("%s: exit status %d", m.kind, code)
	}
}

func errorOf(r map[string]any) string {
	e, ok := r["error"].(map[string]any)
	if !ok {
		return ""
	}
	return fmt.Sprint(e["class"], ": ", e["desc"])
}

// A script for qemu-storage-daemon runs unchanged: two images, exports, I/O
// through them, ownership back and forth, removal with clients and without.
func TestStorageDaemonScript(t *testing.T) {
	for _, kind := range managers {
		t.Run(kind, func(t *testing.T) {
			m := startManager(t, kind)
			m.image("one.img", 4*mib)
			m.image("two.img", 4*mib)
			io := func(name, cmd string) result {
				t.Helper()
				return tryRun(t, "qemu-io", "-f", "raw", "-c", cmd, nbdURI(name, filepath.Join(m.dir, "nbd")))
			}
			succeeds := func(name, cmd string) {
				t.Helper()
				if r := io(name, cmd); r.code != 0 || strings.Contains(r.stdout+r.stderr, "failed") {
					t.Fatalf("qemu-io %s: %+v", cmd, r)
				}
			}
			m.must(
				`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}}}`,
				`blockdev-add {"driver":"file","node-name":"one-file","filename":"one.img"}`,
				`blockdev-add {"driver":"raw","node-name":"one","file":"one-file"}`,
				`blockdev-add {"driver":"raw","node-name":"two","active":false,"discard":"unmap",
					"file":{"driver":"file","node-name":"two-file","filename":"two.img","active":false}}`,
				`block-export-add {"type":"nbd","id":"export-one","node-name":"one","writable":true,"allow-inactive":true}`,
				`block-export-add {"type":"nbd","id":"export-two","node-name":"two","name":"second","writable":true,"allow-inactive":true,"description":"the other"}`,
			)
			succeeds("one", "write -P 1 0 64k")
			succeeds("second", "read -P 0 0 64k")
			if r := io("second", "write -P 2 0 64k"); r.code == 0 && !strings.Contains(r.stdout+r.stderr, "failed") {
				t.Errorf("written while inactive: %+v", r)
			}
			m.must(`blockdev-set-active {"node-name":"two","active":true}`)
			succeeds("second", "write -P 2 0 64k")
			m.must(`blockdev-set-active {"node-name":"one","active":false}`)
			if r := io("one", "write -P 3 0 64k"); r.code == 0 && !strings.Contains(r.stdout+r.stderr, "failed") {
				t.Errorf("written while inactive: %+v", r)
			}
			// The source of a migration lets its locks go, so others may own.
			if r := tryRun(t, "qemu-io", "-f", "raw", "-c", "write -P 4 1M 64k", filepath.Join(m.dir, "one.img")); r.code != 0 {
				t.Errorf("%+v", r)
			}
			m.must(`blockdev-set-active {"node-name":"one","active":true}`)
			succeeds("one", "read -P 4 1M 64k")
			succeeds("one", "write -P 5 0 64k")

			nc := enterExport(t, filepath.Join(m.dir, "nbd"), "one")
			m.fails(`block-export-del {"id":"export-one"}`, "export 'export-one' still in use")
			m.must(`block-export-del {"id":"export-one","mode":"hard"}`)
			m.event("BLOCK_EXPORT_DELETED export-one")
			nc.SetReadDeadline(time.Now().Add(startTimeout))
			if n, err := nc.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Errorf("the client is still connected")
			}
			m.must(`block-export-del {"id":"export-two","mode":"safe"}`)
			m.event("BLOCK_EXPORT_DELETED export-two")
			m.fails(`blockdev-del {"node-name":"two-file"}`, "Node two-file is not owned by the monitor")
			m.must(`blockdev-del {"node-name":"two"}`, `blockdev-del {"node-name":"one"}`, `blockdev-del {"node-name":"one-file"}`, `nbd-server-stop`)
			m.quit()
			for name, pattern := range map[string]byte{"one.img": 5, "two.img": 2} {
				for i, b := range fileAt(t, filepath.Join(m.dir, name), 0, 64*kib) {
					if b != pattern {
						t.Errorf("%s: byte %d is %d, not %d", name, i, b, pattern)
						break
					}
				}
			}
		})
	}
}

// A daemon can be given its first nodes and exports by flags.
func TestStorageDaemonFlags(t *testing.T) {
	for _, kind := range managers {
		t.Run(kind, func(t *testing.T) {
			dir := shortDir(t)
			if err := os.WriteFile(filepath.Join(dir, "a,b.img"), make([]byte, mib), 0o644); err != nil {
				t.Fatal(err)
			}
			m := startManagerIn(t, kind, dir,
				"--nbd-server", "addr.type=unix,max-connections=0,addr.path=nbd",
				"--blockdev", "file,node-name=file0,discard=unmap,active=off,filename=a,,b.img",
				"--blockdev", `{"driver":"raw","node-name":"disk0","discard":"unmap","file":"file0","active":false}`,
				"--export", "type=nbd,id=export0,node-name=disk0,name=,writable=on,allow-inactive=on")
			uri := nbdURI("", filepath.Join(dir, "nbd"))
			if r := tryRun(t, "qemu-io", "-f", "raw", "-c", "write 0 4k", uri); r.code == 0 && !strings.Contains(r.stdout+r.stderr, "failed") {
				t.Errorf("written while inactive: %+v", r)
			}
			m.must(`blockdev-set-active {"active":true}`)
			run(t, "qemu-io", "-f", "raw", "-c", "write 0 4k", uri)
			m.quit()
		})
	}
	t.Run("wrong", func(t *testing.T) {
		for _, c := range [][3]string{
			{"--blockdev", "file,node-name=f,filename=/none/such", "Could not open '/none/such': No such file or directory"},
			{"--blockdev", "file,node-name", "Expected '='"},
			{"--blockdev", "file,node-name=f,filename=/none,read-only=perhaps", "Parameter 'read-only' expects 'on' or 'off'"},
			{"--export", "nbd,id=e,node-name=x", "node-name='x'"},
			{"--nbd-server", "addr.type=unix", "Parameter 'addr.path' is missing"},
		} {
			wantFailure(t, cli(t, "daemon", "--control", filepath.Join(shortDir(t), "ctl"), c[0], c[1]), 1, c[2])
		}
	})
}

// An overlay goes although its backing file has gone before, whether its file node
// goes along or stays.
func TestDeleteWithoutBacking(t *testing.T) {
	for _, kind := range managers {
		t.Run(kind, func(t *testing.T) {
			m := startManager(t, kind)
			for _, file := range []string{`{"driver":"file","filename":"over.qcow2"}`, `"f"`} {
				run(t, "sh", "-ec", `cd "$1"
					qemu-img create -q -f qcow2 base.qcow2 1M
					qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 over.qcow2`, "", m.dir)
				if file == `"f"` {
					m.must(`blockdev-add {"driver":"file","node-name":"f","filename":"over.qcow2"}`)
				}
				m.must(`blockdev-add {"driver":"qcow2","node-name":"q","file":` + file + `}`)
				if err := os.Remove(filepath.Join(m.dir, "base.qcow2")); err != nil {
					t.Fatal(err)
				}
				m.must(`blockdev-del {"node-name":"q"}`)
				wantLocks(t, filepath.Join(m.dir, "over.qcow2"), nil)
			}
			m.must(`blockdev-del {"node-name":"f"}`)
			if list := m.ask("query-named-block-nodes")["return"]; len(list.([]any)) != 0 {
				t.Errorf("left: %v", list)
			}
			m.quit()
		})
	}
}

// serve is a daemon that was given an image: more come and go, and its own may.
func TestServeIsADaemon(t *testing.T) {
	e := serve(t, sparseImage(t, t.TempDir(), mib), "--export-name", "first")
	other := sparseImage(t, t.TempDir(), 2*mib)
	q := e.qmp()
	for _, c := range []struct{ cmd, args string }{
		{"blockdev-add", `{"driver":"raw","node-name":"other","file":{"driver":"file","filename":"` + other + `"}}`},
		{"block-export-add", `{"type":"nbd","id":"other","node-name":"other","writable":true}`},
	} {
		q.must(c.cmd, json.RawMessage(c.args))
	}
	for name, size := range map[string]string{"first": "1048576", "other": "2097152"} {
		if got := strings.TrimSpace(run(t, "nbdinfo", "--size", nbdURI(name, e.socket))); got != size {
			t.Errorf("%s has %s bytes, want %s", name, got, size)
		}
	}
	wantLocks(t, other, activeLocks)
	if r := cli(t, "status", "--control", e.control); !strings.Contains(r.stdout, other) || !strings.Contains(r.stdout, e.image) {
		t.Errorf("status: %+v", r)
	}
	if _, err := q.execute("nbd-server-start", json.RawMessage(`{"addr":{"type":"unix","data":{"path":"/tmp/x"}}}`)); err == nil ||
		err.Error() != "GenericError: NBD server already running" {
		t.Errorf("got %v", err)
	}
	q.must("block-export-del", json.RawMessage(`{"id":"export0"}`))
	q.must("blockdev-del", json.RawMessage(`{"node-name":"image0"}`))
	wantLocks(t, e.image, nil)
	if got := holds(t, e.pid, e.image, false); len(got) != 0 {
		t.Errorf("still open: %v", got)
	}
	if r := tryRun(t, "nbdinfo", "--size", nbdURI("first", e.socket)); r.code == 0 {
		t.Errorf("still exported: %+v", r)
	}
	run(t, "nbdinfo", "--size", nbdURI("other", e.socket))
}

// Images come and go by the dozen while another is written to.
func TestManyImages(t *testing.T) {
	const n = 50
	m := startManager(t, "nbd-export")
	m.image("busy.img", 4*mib)
	m.must(
		`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}}}`,
		`blockdev-add {"driver":"raw","node-name":"busy","file":{"driver":"file","filename":"busy.img"}}`,
		`block-export-add {"type":"nbd","id":"busy","node-name":"busy","writable":true,"allow-inactive":true}`,
	)
	socket := filepath.Join(m.dir, "nbd")
	busy := spawn(t, "qemu-img", nil, "qemu-img", "bench", "-f", "raw", "-w", "-c", "2000", "-s", "4096", "-d", "16", "--flush-interval", "100", nbdURI("busy", socket))
	for i := range n {
		m.image(fmt.Sprintf("%d.img", i), mib)
		m.must(
			fmt.Sprintf(`blockdev-add {"driver":"raw","node-name":"n%d","file":{"driver":"file","filename":"%d.img"}}`, i, i),
			fmt.Sprintf(`block-export-add {"type":"nbd","id":"e%d","node-name":"n%d","writable":true,"allow-inactive":true}`, i, i),
		)
	}
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf("n%d", i))
	}
	names, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	m.must(
		fmt.Sprintf(`blockdev-set-active {"active":false,"x-node-names":%s}`, names),
		fmt.Sprintf(`blockdev-set-active {"active":true,"x-node-names":%s}`, names),
	)
	if out := run(t, "qemu-nbd", "--list", "--socket="+socket); !strings.Contains(out, fmt.Sprintf("exports available: %d", n+1)) {
		t.Errorf("%.200s", out)
	}
	for i := range n {
		m.must(fmt.Sprintf(`block-export-del {"id":"e%d"}`, i), fmt.Sprintf(`blockdev-del {"node-name":"n%d"}`, i))
		m.event(fmt.Sprintf("BLOCK_EXPORT_DELETED e%d", i))
	}
	if code := busy.wait(toolTimeout); code != 0 {
		t.Errorf("qemu-img bench: %d\n%s", code, busy.log)
	}
	m.quit()
}

// enterExport is a client that has entered an export and says nothing more.
func enterExport(t testing.TB, socket, name string) net.Conn {
	t.Helper()
	nc, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	hello := fmt.Sprintf("\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00%c%s", rune(len(name)), name)
	if _, err := nc.Write([]byte(hello)); err != nil {
		t.Fatal(err)
	}
	nc.SetReadDeadline(time.Now().Add(startTimeout))
	for got := 0; got < 28; { // greeting and reply
		n, err := nc.Read(make([]byte, 28-got))
		if err != nil {
			t.Fatal(err)
		}
		got += n
	}
	return nc
}

// exchange is a command that both daemons are given. Where their answers are to
// differ, ours begins as told and the reason is given.
type exchange struct{ command, ours, why string }

func same(commands ...string) (list []exchange) {
	for _, c := range commands {
		list = append(list, exchange{command: c})
	}
	return list
}

func differs(why, ours, command string) []exchange { return []exchange{{command, ours, why}} }

// Both daemons, given the same commands, give the same answers: class, text and
// structure. An error may say more than QEMU's.
func TestSameAnswers(t *testing.T) {
	const (
		onePart    = "a raw node is the whole file"
		oneNode    = "one format node on a file node, exported by its upper node: what is owned is the file"
		lists      = "NBD's server texts are those of serve"
		noDetect   = "writes are not searched for zeroes"
		byteSize   = "sizes are exact, QEMU rounds them up to sectors"
		own        = "an active format node owns a raw image, as a qcow2 image in QEMU; two QEMU nodes would both write it"
		kinds      = "only nbd exports, inet and unix sockets"
		noTransfer = "no bitmaps and no qemu:allocation-depth"
	)
	long, authority := strings.Repeat("x", 4097), testcerts.New(t)
	script := slices.Concat(
		// Arguments.
		same(
			`blockdev-add {"driver":"file","filename":"a.img"}`,
			`blockdev-add {"driver":"file","node-name":"1a","filename":"a.img"}`,
			`blockdev-add {"driver":"file","node-name":"aaaaaaaaaabbbbbbbbbbccccccccccdd","filename":"a.img"}`,
			`blockdev-add {"driver":"file","node-name":"","filename":"a.img"}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"none.img"}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"dir"}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":""}`,
			`blockdev-add {"driver":"foo","node-name":"a","filename":"a.img"}`,
			`blockdev-add {"driver":"file","node-name":"a"}`,
			`blockdev-add {"node-name":"a","filename":"a.img"}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"a.img","foo":1}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"a.img","cache":{"direct":1}}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"a.img","cache":{"x":1}}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"a.img","discard":"x"}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"a.img","locking":"x"}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"a.img","active":"x"}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"a.img","aio":"native"}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"a.img","force-share":true}`,
			`blockdev-add {"driver":"host_device","node-name":"a","filename":"a.img"}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":"none"}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":3}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":null}`,
			`blockdev-add {"driver":"raw","node-name":"r"}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":{"driver":"file"}}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":{"filename":"a.img"}}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":{"driver":"file","filename":"a.img","x":1}}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":{"driver":"file","filename":"a.img","cache":{"direct":1}}}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":{"driver":"foo","filename":"a.img"}}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":{"driver":"file","node-name":"1x","filename":"a.img"}}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":{"driver":"file","node-name":"r","filename":"a.img"}}`,
			`blockdev-add {"driver":"raw","node-name":"r","file":{"driver":"file","filename":"a.img","active":false}}`,
			`blockdev-del {"node-name":"a"}`,
			`query-named-block-nodes`,
		),
		differs(noDetect, "Parameter 'detect-zeroes' is not supported", `blockdev-add {"driver":"file","node-name":"z","filename":"b.img","detect-zeroes":"on"}`),
		differs(onePart, "Parameters 'offset' and 'size' are not supported", `blockdev-add {"driver":"raw","node-name":"zz","size":512,"file":{"driver":"file","filename":"b.img"}}`),
		same(
			`blockdev-add {"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"q.qcow2"}}`,
			`query-named-block-nodes`,
			`block_resize {"node-name":"q","size":4194304}`,
			`query-named-block-nodes`,
			`blockdev-set-active {"node-name":"q","active":false}`,
			`block_resize {"node-name":"q","size":8388608}`,
			`blockdev-del {"node-name":"q"}`,
			`blockdev-add {"driver":"file","node-name":"qf","filename":"q.qcow2"}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","active":false,"l2-cache-size":1048576,"file":"qf"}`,
			`query-named-block-nodes`,
			`blockdev-del {"node-name":"q"}`,
			`blockdev-del {"node-name":"qf"}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"o.qcow2"}}`,
			`blockdev-del {"node-name":"q"}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","backing":null,"read-only":true,"file":{"driver":"file","filename":"o.qcow2"}}`,
			`blockdev-del {"node-name":"q"}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"none.qcow2"}}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"a.img"}}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","l2-cache-size":-1,"file":{"driver":"file","filename":"q.qcow2"}}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","cache-size":-8,"file":{"driver":"file","filename":"q.qcow2"}}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","refcount-cache-size":-9223372036854775808,"file":{"driver":"file","filename":"q.qcow2"}}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","backing":"","file":{"driver":"file","filename":"q.qcow2"}}`,
			`blockdev-del {"node-name":"q"}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"v2.qcow2"}}`,
			`query-named-block-nodes`,
			`blockdev-del {"node-name":"q"}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"q.qcow2","read-only":true}}`,
			`blockdev-add {"driver":"file","node-name":"qf","filename":"q.qcow2","read-only":true}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","file":"qf"}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","file":"qf","active":false}`,
			`blockdev-del {"node-name":"q"}`,
			`blockdev-add {"driver":"qcow2","node-name":"q","file":"qf","read-only":true}`,
			`blockdev-del {"node-name":"q"}`,
			`blockdev-del {"node-name":"qf"}`,
			`qmp_capabilities {"x":1}`,
			`qmp_capabilities {"enable":[1]}`,
			`qmp_capabilities`,
		),
		// What is behind an image, and beside it.
		same(
			`blockdev-add {"driver":"qcow2","node-name":"q","active":false,"file":{"driver":"file","filename":"top.qcow2","active":false}}`,
			`query-named-block-nodes`,
			`query-named-block-nodes {"flat":true}`,
			`blockdev-set-active {"active":true}`,
			`query-named-block-nodes {"flat":false}`,
			`block_resize {"node-name":"q","size":6291456}`,
			`query-named-block-nodes`,
			`blockdev-del {"node-name":"q"}`,
			`query-named-block-nodes`,
			`blockdev-add {"driver":"qcow2","node-name":"q","read-only":true,"file":{"driver":"file","filename":"top.qcow2"}}`,
			`blockdev-add {"driver":"qcow2","node-name":"r","active":false,"file":{"driver":"file","filename":"on-raw.qcow2"}}`,
			`query-named-block-nodes`,
			`blockdev-del {"node-name":"q"}`,
			`blockdev-del {"node-name":"r"}`,
		),
		// A file node, and a format node on it.
		same(
			`blockdev-add {"driver":"file","node-name":"a","filename":"a.img"}`,
			`blockdev-add {"driver":"file","node-name":"a","filename":"a.img"}`,
			`query-named-block-nodes`,
			`blockdev-add {"driver":"raw","node-name":"a","file":"a"}`,
			`blockdev-add {"driver":"raw","node-name":"ra","file":"a","active":false}`,
		),
		differs("what is inactive is not changed", "Permission 'resize' unavailable on inactive node", `block_resize {"node-name":"a","size":1048576}`),
		same(
			`query-named-block-nodes {"flat":true}`,
			`blockdev-del {"node-name":"a"}`,
			`blockdev-set-active {"node-name":"none","active":false}`,
			`blockdev-set-active {"node-name":"a","active":false}`,
			`query-named-block-nodes`,
			`blockdev-set-active {"node-name":"a","active":true}`,
			`query-named-block-nodes`,
			`blockdev-set-active {"node-name":"ra","active":true}`,
			`query-named-block-nodes`,
			`blockdev-set-active {"node-name":"a","active":false}`,
			`blockdev-set-active {"node-name":"ra","active":false}`,
			`blockdev-set-active {"node-name":"ra","active":false}`,
			`query-named-block-nodes`,
			`block_resize {"node-name":"ra","size":1048576}`,
			`blockdev-set-active {"active":true}`,
			`block_resize {"node-name":"ra","size":2097152}`,
			`query-named-block-nodes`,
			`block_resize {"node-name":"a","size":1048576}`,
			`block_resize {"node-name":"ra","size":1048576}`,
			`block_resize {"node-name":"ra","size":-1}`,
			`block_resize {"node-name":"ra","size":9223372036854775807}`,
			`block_resize {"node-name":"ra","size":9223372035781033985}`,
			`block_resize {"size":1}`,
			`block_resize {"node-name":"none","size":1}`,
			`block_resize {"device":"ra","size":1}`,
			`block_resize {"node-name":"ra","size":"1"}`,
			`block_resize {"node-name":"ra"}`,
			`query-named-block-nodes`,
		),
		// The NBD server.
		same(
			`block-export-add {"type":"nbd","id":"e","node-name":"ra"}`,
			`nbd-server-stop`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"max-connections":-1}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"max-connections":"3"}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"max-connections":1.5}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"max-connections":null}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"max-connections":18446744073709551615}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"max-connections":18446744073709551616}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"handshake-max-seconds":4294967296}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"tls-creds":"t"}`,
			`object-add {"id":"t"}`,
			`object-add {"qom-type":"tls-creds-x509","endpoint":"server","dir":"certs"}`,
			`object-add {"qom-type":"none","id":"t"}`,
			`object-add {"qom-type":"tls-creds-x509","id":"1","endpoint":"server","dir":"certs"}`,
			`object-add {"qom-type":"tls-creds-x509","id":"t","endpoint":"server"}`,
			`object-add {"qom-type":"tls-creds-x509","id":"t","endpoint":"both","dir":"certs"}`,
			`object-add {"qom-type":"tls-creds-x509","id":"t","endpoint":"server","dir":"certs","foo":1}`,
			`object-add {"qom-type":"tls-creds-x509","id":"t","endpoint":"server","dir":"certs"}`,
			`object-add {"qom-type":"tls-creds-x509","id":"t","endpoint":"server","dir":"certs"}`,
			`object-add {"qom-type":"tls-creds-x509","id":"c","dir":"certs"}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"tls-creds":"c"}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"tls-creds":"none"}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"tls-creds":"t"}`,
			`object-del {"id":"t"}`,
			`object-del {"id":"t"}`,
			`object-del`,
			`nbd-server-stop`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"tls-creds":"t"}`,
			`nbd-server-start {"addr":{"type":"unix"}}`,
			`nbd-server-start {"addr":{"type":"unix","path":"nbd"}}`,
			`nbd-server-start {"addr":{"type":"foo","data":{"path":"nbd"}}}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd","x":1}}}`,
			`nbd-server-start {"addr":{"type":"inet","data":{"host":"127.0.0.1","port":1}}}`,
			`nbd-server-start {"addr":{"type":"inet","data":{"host":"127.0.0.1"}}}`,
			`nbd-server-start {"addr":{"type":"inet","data":{"host":"127.0.0.1","port":"0","ipv4":false,"ipv6":false}}}`,
			`nbd-server-start {"addr":"unix:nbd"}`,
			`nbd-server-start`,
		),
		differs(lists, "cannot listen on TCP 127.0.0.1:0", `nbd-server-start {"addr":{"type":"inet","data":{"host":"127.0.0.1","port":"0","ipv4":false}}}`),
		differs(lists, "cannot listen on TCP 127.0.0.1:0", `nbd-server-start {"addr":{"type":"inet","data":{"host":"127.0.0.1","port":"0","ipv6":true}}}`),
		differs(lists, "cannot listen on Unix socket /none/nbd", `nbd-server-start {"addr":{"type":"unix","data":{"path":"/none/nbd"}}}`),
		differs(kinds, "Parameter 'type' does not accept value 'fd'", `nbd-server-start {"addr":{"type":"fd","data":{"str":"99"}}}`),
		same(
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}},"max-connections":0,"handshake-max-seconds":0}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}}}`,
		),
		// Exports.
		same(
			`block-export-add {"type":"nbd","id":"1e","node-name":"ra"}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"none"}`,
			`block-export-add {"type":"foo","id":"e","node-name":"ra"}`,
			`block-export-add {"type":"nbd","id":"e"}`,
			`block-export-add {"type":"nbd","node-name":"ra"}`,
			`block-export-add {"id":"e","node-name":"ra"}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"ra","foo":1}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"ra","name":"`+long+`"}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"ra","description":"`+long+`"}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"ra","bitmaps":["b"]}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"ra","bitmaps":[{"node":"ra","name":"b"}]}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"ra","bitmaps":[{"node":"none","name":"b"}]}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"ra","bitmaps":[{"node":"ra"}]}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"ra","bitmaps":[3]}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"ra","iothread":"x"}`,
		),
		differs(noTransfer, "Parameter 'allocation-depth' is not supported", `block-export-add {"type":"nbd","id":"depth","node-name":"ra","name":"depth","allocation-depth":true}`),
		differs(kinds, "Parameter 'type' does not accept value 'vhost-user-blk'", `block-export-add {"type":"vhost-user-blk","id":"e","node-name":"ra"}`),
		same(
			`block-export-add {"type":"nbd","id":"e","node-name":"ra","fixed-iothread":true}`,
			`block-export-add {"type":"nbd","id":"e","node-name":"ra"}`,
			`block-export-add {"type":"nbd","id":"f","node-name":"ra"}`,
			`block-export-add {"type":"nbd","id":"f","node-name":"ra","name":"f","writable":true,"writethrough":true}`,
			`blockdev-del {"node-name":"ra"}`,
			`blockdev-del {"node-name":"a"}`,
			`blockdev-set-active {"node-name":"ra","active":false}`,
			`blockdev-set-active {"active":false}`,
			`query-named-block-nodes`,
		),
		differs("it names who is in the way, in our terms", "Permission conflict on node 'ra': permissions 'resize' are both required by an unnamed block device (uses node 'ra' as 'root' child) and unshared by an export", `block_resize {"node-name":"ra","size":4096}`),
		same(
			`block-export-del {"id":"none"}`,
			`block-export-del {"id":"e","mode":"none"}`,
			`block-export-del {"id":"f"}`,
			`blockdev-set-active {"node-name":"ra","active":false}`,
			`block-export-add {"type":"nbd","id":"g","node-name":"ra","name":"g","allow-inactive":true,"writable":true}`,
			`query-named-block-nodes`,
			`block-export-add {"type":"nbd","id":"h","node-name":"ra","name":"h"}`,
			`query-named-block-nodes`,
			`blockdev-set-active {"node-name":"ra","active":false}`,
			`block-export-del {"id":"h","mode":"hard"}`,
			`block-export-del {"id":"e","mode":"safe"}`,
			`query-block-exports`,
			`nbd-server-stop`,
			`query-block-exports`,
			`block-export-del {"id":"g"}`,
			`blockdev-del {"node-name":"ra"}`,
			`query-named-block-nodes`,
			`blockdev-del {"node-name":"a"}`,
		),
		// Read-only, and inline.
		same(
			`nbd-server-start {"addr":{"type":"inet","data":{"host":"127.0.0.1","port":"0"}},"max-connections":1}`,
			`blockdev-add {"driver":"raw","node-name":"b","read-only":true,"cache":{"direct":false,"no-flush":false},"file":{"driver":"file","filename":"b.img","node-name":"bf"}}`,
			`query-named-block-nodes`,
			`block_resize {"node-name":"b","size":4096}`,
			`block-export-add {"type":"nbd","id":"b","node-name":"b","writable":true}`,
			`block-export-add {"type":"nbd","id":"b","node-name":"bf","writable":true}`,
			`blockdev-del {"node-name":"bf"}`,
			`blockdev-del {"node-name":"b"}`,
			`query-named-block-nodes`,
			`blockdev-add {"driver":"file","node-name":"bf","filename":"b.img","read-only":true,"auto-read-only":true,"force-share":true,"aio":"threads","drop-cache":false,"locking":"on"}`,
			`blockdev-add {"driver":"raw","node-name":"b","file":"bf"}`,
			`block-export-add {"type":"nbd","id":"b","node-name":"b","writable":true}`,
			`block-export-add {"type":"nbd","id":"b","node-name":"b"}`,
			`query-named-block-nodes`,
		),
		differs(oneNode, "Node 'bf' has format node 'b' already", `blockdev-add {"driver":"raw","node-name":"b2","file":"bf","read-only":true}`),
		differs(oneNode, "Node 'bf' is under format node 'b'", `block-export-add {"type":"nbd","id":"bf","node-name":"bf"}`),
		same(
			`blockdev-add {"driver":"file","node-name":"cf","filename":"c.img"}`,
			`blockdev-add {"driver":"raw","node-name":"ro","file":"cf","read-only":true}`,
		),
		differs(oneNode, "Node 'cf' is under format node 'ro'", `block-export-add {"type":"nbd","id":"cf","node-name":"cf","name":"cf","writable":true}`),
		same(
			`blockdev-del {"node-name":"ro"}`,
			`blockdev-del {"node-name":"cf"}`,
		),
		differs(oneNode, "Parameter 'file' of a raw node must be a file or host_device node, not raw", `blockdev-add {"driver":"raw","node-name":"b3","file":{"driver":"raw","file":{"driver":"file","filename":"b.img","read-only":true}}}`),
		// Inactive, and a second node of one image.
		same(
			`blockdev-add {"driver":"file","node-name":"c","filename":"c.img","active":false}`,
			`blockdev-add {"driver":"raw","node-name":"rc","file":"c"}`,
			`blockdev-add {"driver":"raw","node-name":"rc","file":"c","active":false}`,
			`block-export-add {"type":"nbd","id":"rc","node-name":"rc","writable":true}`,
			`block-export-del {"id":"rc"}`,
			`blockdev-add {"driver":"raw","node-name":"rc2","active":false,"file":{"driver":"file","filename":"c.img"}}`,
			`blockdev-del {"node-name":"rc2"}`,
		),
		differs(own, `cannot activate image c.img: image is owned by nbd-export on `, `blockdev-add {"driver":"raw","node-name":"rc2","file":{"driver":"file","filename":"c.img"}}`),
		differs(byteSize, "", `blockdev-add {"driver":"file","node-name":"odd","filename":"odd.img"}`),
	)
	our, qemu := startManager(t, managers[0]), startManager(t, managers[1])
	for _, m := range []*manager{our, qemu} {
		for _, name := range []string{"a.img", "b.img", "c.img"} {
			m.image(name, mib)
		}
		m.image("odd.img", 1000)
		authority.Server(filepath.Join(m.dir, "certs"))
		authority.Client(filepath.Join(m.dir, "certs"), "client")
		if err := os.Mkdir(filepath.Join(m.dir, "dir"), 0o755); err != nil {
			t.Fatal(err)
		}
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(m.dir, "q.qcow2"), "1M")
		// Whole clusters, which an owner makes of the last one otherwise.
		if err := os.Truncate(filepath.Join(m.dir, "q.qcow2"), 256<<10); err != nil {
			t.Fatal(err)
		}
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", filepath.Join(m.dir, "v2.qcow2"), "1M")
		if err := os.Truncate(filepath.Join(m.dir, "v2.qcow2"), 256<<10); err != nil {
			t.Fatal(err)
		}
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "q.qcow2", "-F", "qcow2", "-u", filepath.Join(m.dir, "o.qcow2"), "2M")
		run(t, "sh", "-ec", `cd "$1"
			qemu-img create -q -f qcow2 -o data_file=low.data,data_file_raw=on,cluster_size=4k low.qcow2 1M
			qemu-img create -q -f qcow2 -o data_file=mid.data,backing_file=low.qcow2,backing_fmt=qcow2,extended_l2=on mid.qcow2 2M
			qemu-img create -q -f qcow2 -b b.img -F raw on-raw.qcow2
			qemu-img create -q -f qcow2 -o data_file=top.data,backing_file=mid.qcow2,backing_fmt=qcow2 top.qcow2 3M
			truncate -s 256k low.qcow2 mid.qcow2 on-raw.qcow2 top.qcow2`, "", m.dir)
	}
	for _, x := range script {
		ours, theirs := our.ask(x.command), qemu.ask(x.command)
		shown := x.command
		if len(shown) > 300 {
			shown = shown[:300] + "..."
		}
		if x.why != "" {
			if got := errorOf(ours); x.ours != "" && !strings.HasPrefix(got, "GenericError: "+x.ours) {
				t.Errorf("%s: %s, want %s", shown, got, x.ours)
			}
			if x.ours != "" && strings.HasPrefix(errorOf(ours), errorOf(theirs)) && errorOf(theirs) != "" {
				t.Errorf("%s: no difference (%s) any more", shown, x.why)
			}
			if errorOf(theirs) == "" && errorOf(ours) != "" {
				undo(qemu, x.command)
			}
			our.events, qemu.events = nil, nil
			continue
		}
		if e := errorOf(theirs); e != "" {
			if !strings.HasPrefix(numbered.ReplaceAllString(errorOf(ours), "#block"), numbered.ReplaceAllString(e, "#block")) {
				t.Errorf("%s:\nours   %.300v\ntheirs %.300v", shown, ours, theirs)
			}
		} else if a, b := canonical(t, ours), canonical(t, theirs); a != b {
			t.Errorf("%s:\nours   %s\ntheirs %s", shown, a, b)
		}
		// The order in which exports go is that of nobody's making.
		slices.Sort(our.events)
		slices.Sort(qemu.events)
		if !slices.Equal(our.events, qemu.events) {
			t.Errorf("%s: events %v, theirs %v", shown, our.events, qemu.events)
		}
		our.events, qemu.events = nil, nil
	}
	our.quit()
	qemu.q.send(`{"execute":"quit"}`)
}

// undo removes again what only QEMU's daemon has added.
func undo(m *manager, command string) {
	m.t.Helper()
	name, text, _ := strings.Cut(command, " ")
	var arguments map[string]any
	if err := json.Unmarshal([]byte(text), &arguments); err != nil {
		m.t.Fatal(err)
	}
	switch name {
	case "blockdev-add":
		m.must(fmt.Sprintf(`blockdev-del {"node-name":"%s"}`, arguments["node-name"]))
	case "block-export-add":
		m.must(fmt.Sprintf(`block-export-del {"id":"%s"}`, arguments["id"]))
	}
}

var numbered = regexp.MustCompile(`#block[0-9]+`)

// canonical is an answer without what says nothing about us: the order of
// lists, the names of nodes that have none, optional members that we leave out.
func canonical(t testing.TB, answer map[string]any) string {
	t.Helper()
	if list, ok := answer["return"].([]any); ok {
		key := func(v any) string {
			m, _ := v.(map[string]any)
			return numbered.ReplaceAllString(fmt.Sprint(m["node-name"], m["id"], m["name"]), "#block") + fmt.Sprint(m["file"], m["drv"])
		}
		slices.SortFunc(list, func(a, b any) int { return strings.Compare(key(a), key(b)) })
		for _, v := range list {
			m, _ := v.(map[string]any)
			image, _ := m["image"].(map[string]any)
			for image != nil {
				delete(image, "actual-size")
				if specific, _ := image["format-specific"].(map[string]any); specific["type"] != "qcow2" {
					delete(image, "format-specific")
				}
				image, _ = image["backing-image"].(map[string]any)
			}
		}
	}
	b, err := json.Marshal(answer)
	if err != nil {
		t.Fatal(err)
	}
	return numbered.ReplaceAllString(string(b), "#block")
}
