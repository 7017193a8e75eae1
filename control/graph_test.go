package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/export"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

// graph is a server that opens fake images, by name, and serves them.
type graph struct {
	*bed
	t      *testing.T
	dir    string
	config Config

	mu     sync.Mutex
	open   map[string]int // images open now
	locked map[string]bool
	gone   map[string]bool  // cannot be opened any more
	moved  map[string]bool  // another file is there
	fails  map[string]error // to settle
	opened []backend.Options

	bitmaps map[string][]backend.Bitmap // of images
}

func newGraph(t *testing.T) *graph {
	t.Helper()
	g := &graph{bed: newBed(t, 0), t: t, dir: t.TempDir(), open: make(map[string]int), locked: make(map[string]bool), gone: make(map[string]bool), moved: make(map[string]bool), fails: make(map[string]error)}
	engine := ioloop.NewEngine(ioloop.Config{})
	n := &NBD{Mover: engine, Log: zap.NewNop()}
	t.Cleanup(func() { _ = n.Shutdown(context.Background()) })
	g.config = Config{Registry: g.Registry, NBD: n, Open: g.openImage, Version: "test"}
	return g
}

// sized is a fake image that can be resized.
type sized struct {
	fakeImage
	g     *graph
	size  int64
	owner bool // under g.mu
}

func (s *sized) Size() int64             { return s.size }
func (s *sized) Resize(size int64) error { s.size = size; return nil }
func (s *sized) Acquire() error {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	if s.g.locked[s.info.Path] {
		return fmt.Errorf(`Failed to get "write" lock on %s`, s.info.Path)
	}
	s.g.locked[s.info.Path], s.owner = true, true
	return nil
}

func (s *sized) Release() error {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	if s.owner {
		delete(s.g.locked, s.info.Path)
	}
	s.owner = false
	return nil
}

func (s *sized) Close() error {
	_ = s.Release()
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	s.g.open[s.info.Path]--
	return nil
}

func (g *graph) openImage(o backend.Options) (*Target, error) {
	if o.Path == "none" || g.gone[o.Path] || o.Format == "qcow2" && !strings.HasSuffix(o.Path, ".qcow2") {
		return nil, &fs.PathError{Op: "open image", Path: o.Path, Err: fmt.Errorf("%w; look again", unix.ENOENT)}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open[o.Path]++
	g.opened = append(g.opened, o)
	img := &sized{g: g, size: 1 << 20}
	img.info = backend.Info{Path: o.Path, Format: o.Format, ReadOnly: o.ReadOnly}
	img.settle = func() error {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.fails[o.Path]
	}
	for i, c := range []byte(o.Path) {
		img.ino += uint64(c) << (8 * (i % 8))
	}
	if g.moved[o.Path] {
		img.ino++
	}
	m := state.NewMachine(img, state.Options{ReadOnly: o.ReadOnly})
	return &Target{Image: img, Machine: m, Disk: ioloop.NewDisk(img, m), Device: o.Path == "device"}, nil
}

// talk runs commands, which are "name {arguments}", on one connection, and
// compares what comes back: "ok", the error's text, or else the answer's or the
// event's line.
func (g *graph) talk(dialogue ...string) {
	g.t.Helper()
	var in strings.Builder
	in.WriteString(caps)
	var want []string
	for _, d := range dialogue {
		if name, arguments, ok := strings.Cut(d, " {"); ok && !strings.Contains(name, " ") && !strings.HasPrefix(d, "{") {
			fmt.Fprintf(&in, `{"execute":"%s","arguments":{%s}`+"\n", name, arguments)
		} else {
			want = append(want, d)
		}
	}
	lines := strings.Split(strings.TrimSuffix(g.converse(g.t, g.config, in.String()), "\r\n"), "\r\n")[2:]
	var got []string
	for _, l := range lines {
		var a struct {
			Error *Error
			Event string
			Data  struct{ ID string }
		}
		if err := json.Unmarshal([]byte(l), &a); err != nil {
			g.t.Fatal(err)
		}
		switch {
		case a.Error != nil:
			l = a.Error.Desc
		case a.Event != "":
			l = a.Event + " " + a.Data.ID
		case l == empty:
			l = "ok"
		}
		got = append(got, l)
	}
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) || !strings.HasPrefix(got[i], want[i]) {
			g.t.Fatalf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// nodes compares the nodes with "name" or "name!", which is an active one.
func (g *graph) nodes(want string) {
	g.t.Helper()
	var got []string
	for _, t := range g.Targets() {
		format, file := t.active()
		for _, n := range t.nodes() {
			s := n.name
			if n == t.file && file || n == t.format && format {
				s += "!"
			}
			got = append(got, s)
		}
	}
	if s := strings.Join(got, " "); s != want {
		g.t.Fatalf("nodes %s, want %s", s, want)
	}
}

// owned compares the images whose locks are held, and which are open.
func (g *graph) owned(want string) {
	g.t.Helper()
	var got []string
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, name := range []string{"a", "b", "c"} {
		for range g.open[name] {
			if g.locked[name] {
				got = append(got, name+"!")
			} else {
				got = append(got, name)
			}
		}
	}
	if s := strings.Join(got, " "); s != want {
		g.t.Fatalf("images %s, want %s", s, want)
	}
}

func (g *graph) start() {
	g.t.Helper()
	g.talk(fmt.Sprintf(`nbd-server-start {"addr":{"type":"unix","data":{"path":"%s/nbd"}}}`, g.dir), "ok")
}

func TestNodes(t *testing.T) {
	g := newGraph(t)
	g.talk(
		`blockdev-add {"driver":"file","node-name":"f","filename":"a"}`, "ok",
		`blockdev-add {"driver":"file","node-name":"f","filename":"a"}`, "Duplicate nodes with node-name='f'",
		`blockdev-add {"driver":"file","node-name":"g","filename":"none"}`, "Could not open 'none': No such file or directory; look again",
		`blockdev-add {"driver":"file","node-name":"g","filename":"device"}`, "'file' driver requires 'device' to be a regular file",
		`blockdev-add {"driver":"host_device","node-name":"g","filename":"b"}`, "'host_device' driver requires 'b' to be",
	)
	g.nodes("f!") // active as QEMU calls it, which holds nothing
	g.owned("a")
	g.talk(
		`blockdev-add {"driver":"raw","node-name":"r","file":"f","active":false}`, "ok",
		`blockdev-add {"driver":"raw","node-name":"s","file":"f"}`, "Node 'f' has format node 'r' already",
		`blockdev-add {"driver":"raw","node-name":"s","file":"r"}`, "Node 'r' is no file node",
		`blockdev-del {"node-name":"f"}`, "Block device f is in use",
	)
	g.nodes("r f!")
	g.owned("a")
	g.talk(`blockdev-set-active {"node-name":"r","active":true}`, "ok")
	g.nodes("r! f!")
	g.owned("a!")
	g.talk(
		`blockdev-set-active {"node-name":"f","active":false}`, "Node has active parent node",
		`blockdev-set-active {"node-name":"r","active":false}`, "ok",
	)
	g.nodes("r f")
	g.owned("a")
	g.talk(`blockdev-set-active {"node-name":"f","active":true}`, "ok")
	g.nodes("r f!")
	g.talk(`blockdev-set-active {"active":true}`, "ok", `blockdev-del {"node-name":"r"}`, "ok")
	g.nodes("f!")
	g.owned("a")
	g.talk(
		`blockdev-set-active {"active":false}`, "ok",
		`blockdev-add {"driver":"raw","node-name":"r","file":"f"}`, "Inactive 'f' can't be a file child of active 'r'",
		`blockdev-add {"driver":"raw","node-name":"q","file":{"driver":"file","filename":"b"}}`, "ok",
		`blockdev-add {"driver":"raw","node-name":"p","file":{"driver":"file","filename":"b"}}`, `cannot activate image b: Failed to get "write" lock`,
		`blockdev-add {"driver":"qcow2","node-name":"p","file":{"driver":"file","filename":"b"}}`, "Could not open 'b': No such file",
		`blockdev-del {"node-name":"#block001"}`, "Node #block001 is not owned by the monitor",
	)
	g.nodes("f q! #block001!")
	g.owned("a b!")
	g.talk(`blockdev-del {"node-name":"q"}`, "ok", `blockdev-del {"node-name":"f"}`, "ok", `blockdev-del {"node-name":"f"}`, "Failed to find node")
	g.nodes("")
	g.owned("")
}

func TestInheritedOptions(t *testing.T) {
	g := newGraph(t)
	g.talk(
		`blockdev-add {"driver":"raw","node-name":"r","read-only":true,"force-share":true,"cache":{"direct":true},"discard":"unmap","file":{"driver":"file","filename":"a"}}`, "ok",
		`blockdev-add {"driver":"raw","node-name":"s","file":{"driver":"file","filename":"b","locking":"on","drop-cache":false,"x-owner-record":"off"}}`, "ok",
		`blockdev-add {"driver":"file","node-name":"f","filename":"c","discard":"unmap","active":false}`, "ok",
		`blockdev-add {"driver":"raw","node-name":"x","file":"f","discard":"unmap","read-only":true,"active":false}`, "ok",
	)
	want := []backend.Options{
		{Path: "a", Format: "raw", ReadOnly: true, Cache: backend.CacheNone, Locking: backend.LockingOff},
		{Path: "b", Format: "raw", Locking: backend.LockingOn, DropCache: backend.DropCacheOff, OwnerRecord: "off", IgnoreDiscard: true},
		{Path: "c", Format: "raw"},
		{Path: "c", Format: "raw", ReadOnly: true},
	}
	for i := range want {
		if got := fmt.Sprintf("%+v", g.opened[i]); got != fmt.Sprintf("%+v", want[i]) {
			t.Errorf("opened\n%s\nwant\n%+v", got, want[i])
		}
	}
}

func TestExports(t *testing.T) {
	g := newGraph(t)
	g.talk(
		`blockdev-add {"driver":"raw","node-name":"r","active":false,"file":{"driver":"file","filename":"a","active":false}}`, "ok",
		`blockdev-add {"driver":"file","node-name":"f","filename":"b"}`, "ok",
		`block-export-add {"type":"nbd","id":"e","node-name":"r"}`, "NBD server not running",
		`nbd-server-stop {}`, "NBD server not running",
	)
	g.start()
	g.talk(
		fmt.Sprintf(`nbd-server-start {"addr":{"type":"unix","data":{"path":"%s/x"}}}`, g.dir), "NBD server already running",
		`block-export-add {"type":"nbd","id":"e","node-name":"r","allow-inactive":true,"writable":true}`, "ok",
	)
	g.nodes("r #block001 f!")
	g.talk(`block-export-add {"type":"nbd","id":"f","node-name":"f","writable":true,"name":"x"}`, "ok")
	g.owned("a b!") // exported: now it has to own it
	g.talk(
		`blockdev-set-active {"node-name":"f","active":false}`, "Failed to inactivate node: Operation not permitted",
		`blockdev-set-active {"active":false}`, "Failed to inactivate all nodes: Operation not permitted",
		`block-export-add {"type":"nbd","id":"e","node-name":"r"}`, "Block export id 'e' is already in use",
		`block-export-add {"type":"nbd","id":"g","node-name":"r","name":"x"}`, "NBD server already has export named 'x'",
		`block-export-add {"type":"nbd","id":"g","node-name":"r","name":"y"}`, "ok", // activates
	)
	g.nodes("r! #block001! f!")
	g.talk(
		`blockdev-set-active {"node-name":"r","active":false}`, "ok", // nothing that it exports so writes
		`blockdev-del {"node-name":"r"}`, "Node r is in use",
		`block_resize {"node-name":"r","size":5}`, "Permission 'resize' unavailable on inactive node",
		`block_resize {"node-name":"f","size":5}`, "Permission conflict on node 'f'",
		`block-export-del {"id":"f"}`, "BLOCK_EXPORT_DELETED f", "ok",
		`block-export-del {"id":"f"}`, "Export 'f' is not found",
		`blockdev-set-active {"active":false}`, "ok",
		`query-block-exports {}`, `{"return": [{"node-name": "r", "shutting-down": false, "type": "nbd", "id": "e"}, `+
			`{"node-name": "r", "shutting-down": false, "type": "nbd", "id": "g"}]}`,
		`nbd-server-stop {}`, "BLOCK_EXPORT_DELETED e", "BLOCK_EXPORT_DELETED g", "ok",
		`query-block-exports {}`, `{"return": []}`,
		`blockdev-del {"node-name":"r"}`, "ok", `blockdev-del {"node-name":"f"}`, "ok",
	)
	g.owned("")
	g.start()
}

func TestResize(t *testing.T) {
	g := newGraph(t)
	g.talk(
		`blockdev-add {"driver":"file","node-name":"f","filename":"a"}`, "ok",
		`block_resize {"node-name":"f","size":4096}`, "ok",
		`block_resize {"size":4096}`, "Cannot find device='' nor node-name=''",
		`block_resize {"node-name":"f","size":-1}`, "Parameter 'size' expects a >0 size",
		`blockdev-add {"driver":"file","node-name":"r","filename":"b","read-only":true}`, "ok",
		`block_resize {"node-name":"r","size":4096}`, "Image is read-only",
		// The size of a disk is not that of the file that it is in.
		`blockdev-add {"driver":"qcow2","node-name":"q","file":{"driver":"file","node-name":"qf","filename":"c.qcow2"}}`, "ok",
		`block_resize {"node-name":"qf","size":4096}`, "Permission conflict on node 'qf': permissions 'resize' are both required by an unnamed block device (uses node 'qf' as 'root' child) and unshared by node 'q' (uses node 'qf' as 'file' child).",
		`block_resize {"node-name":"q","size":4096}`, "ok",
	)
	g.owned("a b")
	if size := g.Targets()[0].Image.Size(); size != 4096 {
		t.Errorf("%d bytes", size)
	}
}

// A client that is connected keeps its export, but not from a hard removal,
// whose event comes when it is gone.
func TestExportInUse(t *testing.T) {
	g := newGraph(t)
	g.start()
	path := g.listen(t, g.config)
	c, events := dial(t, path), listener(t, path)
	ctx := context.Background()
	must := func(command, arguments string) {
		t.Helper()
		if err := c.Execute(ctx, command, json.RawMessage(arguments), nil); err != nil {
			t.Fatal(err)
		}
	}
	must("blockdev-add", `{"driver":"file","node-name":"f","filename":"a"}`)
	must("block-export-add", `{"type":"nbd","id":"e","node-name":"f"}`)
	nc := enter(t, filepath.Join(g.dir, "nbd"), "f")
	err := c.Execute(ctx, "block-export-del", json.RawMessage(`{"id":"e"}`), nil)
	if err == nil || err.Error() != "export 'e' still in use" {
		t.Fatalf("got %v", err)
	}
	must("block-export-del", `{"id":"e","mode":"hard"}`)
	if e := <-events; e != "BLOCK_EXPORT_DELETED e" {
		t.Errorf("event %s", e)
	}
	if _, err := nc.Read(make([]byte, 1)); err == nil {
		t.Error("the client is still connected")
	}
	must("blockdev-del", `{"node-name":"f"}`)
	must("nbd-server-stop", `{}`)
}

// enter is an NBD client that has entered an export (EXPORT_NAME).
func enter(t *testing.T, path, name string) net.Conn {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	in := bufio.NewReader(nc)
	_, _ = in.Discard(18)
	hello := "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00" + string(rune(len(name))) + name
	if _, err := nc.Write([]byte(hello)); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Discard(10); err != nil {
		t.Fatal(err)
	}
	return nc
}

// listener hears the events of a control socket.
func listener(t *testing.T, path string) <-chan string {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	events := make(chan string, 10)
	ready := make(chan struct{})
	done := make(chan struct{})
	t.Cleanup(func() { _ = nc.Close(); <-done })
	go func() {
		defer close(done)
		for in := bufio.NewScanner(nc); in.Scan(); {
			var e struct {
				Event string
				ID    string
				Data  struct{ ID string }
			}
			_ = json.Unmarshal(in.Bytes(), &e)
			switch {
			case e.ID == "ready":
				close(ready)
			case e.Event != "":
				events <- e.Event + " " + e.Data.ID
			}
		}
	}()
	if _, err := nc.Write([]byte(caps + `{"execute":"query-version","id":"ready"}`)); err != nil {
		t.Fatal(err)
	}
	<-ready
	return events
}

// A format node goes although its file was deleted, or another is in its place:
// the file node stays what it was.
func TestFileGone(t *testing.T) {
	for _, moved := range []bool{false, true} {
		g := newGraph(t)
		g.start()
		g.talk(
			`blockdev-add {"driver":"file","node-name":"f","filename":"a"}`, "ok",
			`blockdev-add {"driver":"raw","node-name":"r","file":"f"}`, "ok",
		)
		g.gone["a"], g.moved["a"] = !moved, moved
		g.talk(
			`blockdev-del {"node-name":"r"}`, "ok",
			`blockdev-del {"node-name":"r"}`, "Failed to find node",
		)
		g.nodes("f!")
		g.owned("a")
		g.talk(
			`block-export-add {"type":"nbd","id":"e","node-name":"f","writable":true}`, "ok",
			`block-export-del {"id":"e"}`, "BLOCK_EXPORT_DELETED e", "ok",
			`blockdev-add {"driver":"raw","node-name":"r","file":"f"}`, "Could not open 'a'",
		)
		g.nodes("f!")
		g.talk(`blockdev-del {"node-name":"f"}`, "ok")
		g.nodes("")
		g.owned("")
	}
}

// A node that could not be written back stays, so that there is time to make space; one
// whose sync has failed goes, and one that has written everything.
func TestDeleteUnwritten(t *testing.T) {
	g := newGraph(t)
	add := `blockdev-add {"driver":"raw","node-name":"r","file":{"driver":"file","filename":"a"}}`
	g.talk(add, "ok")
	g.fails["a"] = unix.ENOSPC
	g.talk(`blockdev-del {"node-name":"r"}`, "cannot inactivate image a: settle: no space left on device; it stays active")
	g.owned("a!")
	delete(g.fails, "a")
	g.talk(`blockdev-del {"node-name":"r"}`, "ok")
	g.nodes("")
	g.owned("")

	g.talk(add, "ok")
	g.fails["a"] = lost{}
	g.talk(`blockdev-del {"node-name":"r"}`, "image a: writes acknowledged since the last flush may be lost: it is failed(io)")
	g.nodes("")
	g.owned("")

	g.fails["a"] = nil
	g.talk(add, "ok")
	g.fails["a"] = &backend.ViewError{Path: "a", Err: unix.ENOENT}
	g.talk(`blockdev-del {"node-name":"r"}`, "ok")
	g.nodes("")
	g.owned("")
}

// The same above a file node that stays.
func TestDeleteUnwrittenFormat(t *testing.T) {
	g := newGraph(t)
	file, format := `blockdev-add {"driver":"file","node-name":"f","filename":"a"}`, `blockdev-add {"driver":"raw","node-name":"r","file":"f"}`
	g.talk(file, "ok", format, "ok")
	g.fails["a"] = unix.ENOSPC
	g.talk(`blockdev-del {"node-name":"r"}`, "cannot inactivate image a: settle: no space left on device; it stays active")
	g.owned("a!")
	for _, gone := range []struct {
		err    error
		answer string
	}{
		{&backend.ViewError{Path: "a", Err: unix.ENOENT}, "ok"},
		{lost{}, "image a: writes acknowledged since the last flush may be lost: it is failed(io)"},
	} {
		g.fails["a"] = gone.err
		g.talk(`blockdev-del {"node-name":"r"}`, gone.answer)
		g.nodes("f!")
		g.owned("a")
		delete(g.fails, "a")
		g.talk(format, "ok")
	}
}

// An export that is removed before the server starts is not there when it does.
func TestExportGoneBeforeStart(t *testing.T) {
	g := newGraph(t)
	target, err := g.openImage(backend.Options{Path: "a"})
	if err != nil {
		t.Fatal(err)
	}
	target.Node, target.Export = "image0", Export{ID: "export0", Name: "x"}
	target.Served = &export.Export{Name: "x", Disk: target.Disk}
	if err := g.Add(target); err != nil {
		t.Fatal(err)
	}
	if err := g.config.NBD.Add(target.Served); err != nil {
		t.Fatal(err)
	}
	g.talk(`block-export-del {"id":"export0"}`, "BLOCK_EXPORT_DELETED export0", "ok")
	if e := g.config.NBD.exports.Lookup("x"); e != nil {
		t.Error("it is still there")
	}
}

// An order for all images is for those that are left, where one is removed
// while it begins.
func TestOrderWhileRemoving(t *testing.T) {
	b := newBed(t, 3)
	remove := func(i int) {
		target := b.Targets()[i]
		b.Remove(target)
		if err := target.close(); err != nil {
			t.Error(err)
		}
	}
	var seen []int
	activate := func(o order) error {
		seen = append(seen, len(o.targets)+len(o.files))
		if len(seen) == 1 {
			remove(2)
		}
		return state.Activate(context.Background(), state.ActivateOptions{}, machines(o.targets)...)
	}
	if err := b.carryOut(nil, activate); err != nil || !slices.Equal(seen, []int{3, 2}) {
		t.Errorf("%v, images %v", err, seen)
	}
	b.want(t, state.Active, state.Active)
	seen = nil
	err := b.carryOut([]string{"image1"}, func(o order) error {
		remove(1)
		return state.Inactivate(context.Background(), machines(o.targets)...)
	})
	if err == nil || err.Error() != "Failed to find node with node-name='image1'" {
		t.Errorf("got %v", err)
	}
	b.stop()
	if err := b.Activate(context.Background(), state.ActivateOptions{}); !errors.Is(err, errStopping) {
		t.Errorf("got %v", err)
	}
}

// Who does not read events is dropped, and holds up nobody.
func TestEventsUnread(t *testing.T) {
	b := newBed(t, 0)
	s := NewServer(Config{Registry: b.Registry})
	ours, theirs := net.Pipe() // has no buffer
	done := make(chan struct{})
	go func() { defer close(done); s.serve(theirs) }()
	in := bufio.NewReader(ours)
	read := func() string {
		l, err := in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	read()
	s.emit("LOST", nil) // nobody has negotiated
	if _, err := ours.Write([]byte(caps + queryV)); err != nil {
		t.Fatal(err)
	}
	read()
	read() // the answer to query-version: events come from here on
	s.emit("FIRST", nil)
	if l := read(); !strings.Contains(l, `"event": "FIRST"`) {
		t.Errorf("event %s", l)
	}
	for range mostEvents + 2 { // one is being written
		s.emit("MORE", nil)
	}
	<-done
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.listening) != 0 {
		t.Error("still listening")
	}
}

// Images are added and removed by many clients at once.
func TestGraphRace(t *testing.T) {
	g := newGraph(t)
	g.start()
	path := g.listen(t, g.config)
	var wg sync.WaitGroup
	for i := range 8 {
		c := dial(t, path)
		wg.Go(func() {
			ctx := context.Background()
			for range 20 {
				do := func(command, format string, a ...any) {
					err := c.Execute(ctx, command, json.RawMessage(fmt.Sprintf(format, a...)), nil)
					if err != nil {
						t.Errorf("%s %d: %v", command, i, err)
					}
				}
				do("blockdev-add", `{"driver":"file","node-name":"f%d","filename":"%d"}`, i, i)
				do("blockdev-add", `{"driver":"raw","node-name":"r%d","file":"f%d"}`, i, i)
				do("block-export-add", `{"type":"nbd","id":"e%d","node-name":"r%d","allow-inactive":true,"writable":true}`, i, i)
				do("blockdev-set-active", `{"node-name":"r%d","active":false}`, i)
				do("query-named-block-nodes", `{}`)
				do("x-query-status", `{}`)
				do("block-export-del", `{"id":"e%d","mode":"hard"}`, i)
				do("blockdev-del", `{"node-name":"r%d"}`, i)
				do("blockdev-del", `{"node-name":"f%d"}`, i)
			}
		})
	}
	wg.Wait()
	for name, n := range g.open {
		if n != 0 || g.locked[name] {
			t.Errorf("image %s: %d open, locked %t", name, n, g.locked[name])
		}
	}
}

var _ Front = (*NBD)(nil)

// A file node alone owns nothing, so it is no place to hand an image to.
func TestIdentifyFileNode(t *testing.T) {
	g := newGraph(t)
	want := func(text string) {
		t.Helper()
		list, err := g.Identify(t.Context(), "")
		if err != nil || len(list) != 1 || (list[0].Unusable == "") != (text == "") || !strings.Contains(list[0].Unusable, text) {
			t.Errorf("%v: %+v; want %q", err, list, text)
		}
	}
	g.talk(`blockdev-add {"driver":"file","node-name":"f","filename":"a","active":false}`, "ok")
	want("export the node, or add a format node")
	g.talk(`blockdev-add {"driver":"raw","node-name":"r","file":"f","active":false}`, "ok")
	want("")
}

func (s *sized) Bitmaps() ([]backend.Bitmap, error) { return s.g.bitmaps[s.info.Path], nil }
func (s *sized) ActiveBitmaps() ([]backend.Bitmap, error) {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	if !s.owner {
		return nil, nil
	}
	return s.Bitmaps()
}
