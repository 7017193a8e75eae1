package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/state"
)

const (
	hello   = `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": "nbd-export test"}, "capabilities": []}}`
	caps    = `{"execute":"qmp_capabilities"}`
	empty   = `{"return": {}}`
	queryV  = `{"execute":"query-version"}`
	answerV = `{"return": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": "nbd-export test"}}`
)

func failure(desc string) string {
	return `{"error": {"class": "GenericError", "desc": "` + desc + `"}}`
}

func notFound(desc string) string {
	return `{"error": {"class": "CommandNotFound", "desc": "` + desc + `"}}`
}

// Texts and the number of answers are those of qemu-storage-daemon 10.0.
func TestDialogues(t *testing.T) {
	must := notFound(`Expecting capabilities negotiation with 'qmp_capabilities'`)
	object := failure(`QMP input must be a JSON object`)
	active := func(args string) string { return `{"execute":"blockdev-set-active","arguments":` + args + `}` }
	for _, c := range []struct {
		name, in string
		want     []string // after the greeting
	}{
		{"silent", "", nil},
		{"before negotiation", queryV + `{"execute":"nope"}`, []string{must, must}},
		{"negotiation", caps + caps + `{"execute":"nope"}`, []string{
			empty, notFound(`Capabilities negotiation is already complete, command ignored`),
			notFound(`The command nope has not been found`),
		}},
		{"capabilities", `{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}` +
			`{"execute":"qmp_capabilities","arguments":{"enable":["foo"]}}` +
			`{"execute":"qmp_capabilities","arguments":{"enable":[1]}}` +
			`{"execute":"qmp_capabilities","arguments":{"enable":1}}` +
			`{"execute":"qmp_capabilities","arguments":{"x":[]}}` +
			queryV + `{"execute":"qmp_capabilities","arguments":{"enable":[]},"id":"x"}` + queryV +
			`{"execute":"qmp_capabilities","arguments":{"x":[]}}`, []string{
			failure(`Capability oob not available`),
			failure(`Parameter 'enable[0]' does not accept value 'foo'`),
			failure(`Invalid parameter type for 'enable[0]', expected: string`),
			failure(`Invalid parameter type for 'enable', expected: array`),
			failure(`Parameter 'x' is unexpected`),
			must, `{"return": {}, "id": "x"}`, answerV, failure(`Parameter 'x' is unexpected`),
		}},
		{"no objects", caps + `[1] 3 "x" null true `, []string{empty, object, object, object, object, object}},
		{"members", caps + `{"execute":1} {"execute":"query-version","x":1} {} {"execute":"query-version","arguments":3}
			{"arguments":3} {"exec-oob":"query-version"} {"execute":"query-version","arguments":null}
			{"execute":"query-version","arguments":[]} {"execute":"query-version","arguments":{}}
			{"execute":"query-version","arguments":{"x":1}}`, []string{
			empty,
			failure(`QMP input member 'execute' must be a string`),
			failure(`QMP input member 'x' is unexpected`),
			failure(`QMP input lacks member 'execute'`),
			failure(`QMP input member 'arguments' must be an object`),
			failure(`QMP input member 'arguments' must be an object`),
			failure(`QMP input member 'exec-oob' is unexpected`),
			failure(`QMP input member 'arguments' must be an object`),
			failure(`QMP input member 'arguments' must be an object`),
			answerV,
			failure(`Parameter 'x' is unexpected`),
		}},
		{"id", caps + `{"id":3} {"id":3,"execute":"nope"} {"execute":"x-cancel","id":null}
			{"execute":"x-cancel","id":{"b":1,"a":[1,2.5,-3,12345678901234567890,null,true,{}]}}
			{'execute':'x-cancel','id':'it\'s é \u00e9 😀 \ud83d\ude00 a\u0000b / \/ <>& \b\f\n\r\t\\ "'}`, []string{
			empty,
			`{"error": {"class": "GenericError", "desc": "QMP input lacks member 'execute'"}, "id": 3}`,
			`{"error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}, "id": 3}`,
			`{"return": {"cancelled": []}, "id": null}`,
			`{"return": {"cancelled": []}, "id": {"b": 1, "a": [1, 2.5, -3, 12345678901234567890, null, true, {}]}}`,
			`{"return": {"cancelled": []}, "id": "it's \u00E9 \u00E9 \uD83D\uDE00 \uD83D\uDE00 a\u0000b / / <>& \b\f\n\r\t\\ \""}`,
		}},
		{"keywords", caps + `foo ` + queryV + `{"a":tru}` + `nul `, []string{
			empty, failure(`JSON parse error, invalid keyword 'foo'`), answerV,
			failure(`JSON parse error, invalid keyword 'tru'`), failure(`JSON parse error, invalid keyword 'nul'`),
		}},
		{"brackets", caps + `}` + queryV + `{"execute" "x"} ` + queryV + `{"execute":"query-version",} [1,} [1 2] {"a":} {"a":1 "b"}` + queryV, []string{
			empty, failure(`JSON parse error, expecting value`), answerV,
			failure(`JSON parse error, missing : in object pair`), answerV,
			failure(`JSON parse error, expecting value`),
			failure(`JSON parse error, expecting value`), failure(`JSON parse error, expected separator in list`),
			failure(`JSON parse error, expecting value`), failure(`JSON parse error, expected separator in dict`), answerV,
		}},
		{"keys", caps + `{1:2} {"execute":"a","execute":"b"}`, []string{
			empty, failure(`JSON parse error, key is not a string in object`), failure(`JSON parse error, duplicate key`),
		}},
		{"stray", caps + "@ " + queryV + "%d " + queryV + "01 / \xff" + queryV + "\"abc\n\" " + queryV + "-x 1.} 1e+ 3 1.5e5 ", []string{
			empty, failure(`JSON parse error, stray '@'`), answerV, failure(`JSON parse error, stray '%'`), answerV,
			failure(`JSON parse error, stray '01'`),
			failure(`JSON parse error, stray '\uFFFD'`), answerV,
			failure(`JSON parse error, stray '\"abc\n'`), answerV,
			failure(`JSON parse error, stray '-x'`), failure(`JSON parse error, expecting value`),
			failure(`JSON parse error, stray '1e+ '`),
		}},
		{"comments", caps + "/* no \t such */ thing\n" + queryV + "@\xfe" + queryV, []string{
			empty, failure(`JSON parse error, stray '/'`), answerV,
			failure(`JSON parse error, stray '@'`), failure(`JSON parse error, stray '\uFFFD'`), answerV,
		}},
		{"strings", caps + `"\x"` + queryV + `"\ud800" "\ud800\u0041" "\u12" "don't" "` + "\xe9" + `" "\u12G4"` + "\"\xc0\" \"\xfd\" \"a\xfe", []string{
			empty, failure(`JSON parse error, invalid escape sequence in string`), answerV,
			failure(`JSON parse error, \\ud800 is not a valid Unicode character`),
			failure(`JSON parse error, \\ud800 is not a valid Unicode character`),
			failure(`JSON parse error, \\u12 is not a valid Unicode character`),
			object, failure(`JSON parse error, invalid UTF-8 sequence in string`),
			failure(`JSON parse error, \\u12G4 is not a valid Unicode character`),
			failure(`JSON parse error, invalid UTF-8 sequence in string`),
			failure(`JSON parse error, invalid UTF-8 sequence in string`),
			failure(`JSON parse error, stray '\"a\uFFFD'`),
		}},
		{"cut off", caps + `{"execute":"query-version"`, []string{empty}},
		{"nesting", caps + strings.Repeat("[", 1025) + " " + queryV, []string{
			empty, failure(`JSON nesting depth limit exceeded`), answerV,
		}},
		{"too large", caps + `{"a":"` + strings.Repeat("x", maxMessage) + `"}` + queryV, []string{
			empty, failure(`JSON token size limit exceeded`),
		}},
		{"too many tokens", caps + "[" + strings.Repeat("1,", maxTokens/2) + "1]" + queryV, []string{
			empty, failure(`JSON token size limit exceeded`),
		}},
		{"space is not counted", caps + strings.Repeat(" \t\r\n", maxMessage/2) + queryV, []string{empty, answerV}},
		{
			"arguments", caps + active(`{}`) + active(`{"active":"x"}`) + active(`{"active":true,"foo":1}`) + active(`{"active":1,"foo":1}`) +
				active(`{"foo":1}`) + active(`{"node-name":3}`) + active(`{"node-name":null,"active":true}`) + active(`{"node-name":"x","active":true}`) +
				active(`{"active":true,"x-node-names":["image0",2]}`) + active(`{"active":true,"x-node-names":["image0","nope"]}`) +
				active(`{"active":true,"x-node-names":[]}`) + active(`{"active":true,"x-abandon":true}`) + active(`{"active":false,"x-if-unchanged":true}`) +
				`{"execute":"query-named-block-nodes","arguments":{"flat":1}}`,
			[]string{
				empty, failure(`Parameter 'active' is missing`), failure(`Invalid parameter type for 'active', expected: boolean`),
				failure(`Parameter 'foo' is unexpected`), failure(`Invalid parameter type for 'active', expected: boolean`),
				failure(`Parameter 'active' is missing`), failure(`Invalid parameter type for 'node-name', expected: string`),
				failure(`Invalid parameter type for 'node-name', expected: string`), failure(`Failed to find node with node-name='x'`),
				failure(`Invalid parameter type for 'x-node-names[1]', expected: string`), failure(`Failed to find node with node-name='nope'`),
				failure(`Parameter 'x-node-names' names no node; leave it out to mean all`),
				failure(`Parameter 'x-abandon' needs 'active' false`),
				failure(`Parameter 'x-if-unchanged' needs 'active' true`),
				failure(`Invalid parameter type for 'flat', expected: boolean`),
			},
		},
		{"quit", caps + `{"execute":"quit","id":9}` + queryV, []string{empty, `{"return": {}, "id": 9}`}},
		{"commands", caps + `{"execute":"query-commands"}`, []string{empty, `{"return": [{"name": "qmp_capabilities"}, {"name": "query-version"}, ` +
			`{"name": "query-commands"}, {"name": "object-add"}, {"name": "object-del"}, {"name": "nbd-server-start"}, {"name": "nbd-server-stop"}, {"name": "blockdev-add"}, {"name": "blockdev-del"}, ` +
			`{"name": "block-export-add"}, {"name": "block-export-del"}, {"name": "query-block-exports"}, {"name": "query-named-block-nodes"}, ` +
			`{"name": "blockdev-set-active"}, {"name": "block_resize"}, {"name": "quit"}, {"name": "x-query-status"}, {"name": "x-identify"}, {"name": "x-takeover"}, {"name": "x-cancel"}]}`}},
		{"exports", caps + `{"execute":"query-block-exports"}`, []string{empty, `{"return": [` +
			`{"node-name": "image0", "shutting-down": false, "type": "nbd", "id": "export0"}, ` +
			`{"node-name": "image1", "shutting-down": false, "type": "nbd", "id": "export1"}]}`}},
		{"nodes", caps + active(`{"node-name":"image1","active":true}`) + `{"execute":"query-named-block-nodes","arguments":{"flat":true}}`, []string{
			empty, empty, `{"return": [` + strings.Join([]string{
				node("image0", "a", "raw", false), node("image0-file", "a", "file", false),
				node("image1", "b", "raw", true), node("image1-file", "b", "file", true),
			}, ", ") + `]}`,
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, 2)
			got := b.converse(t, Config{}, c.in)
			want := strings.Join(append([]string{hello}, c.want...), "\r\n") + "\r\n"
			if got != want {
				t.Errorf("got\n%s\nwant\n%s", strings.ReplaceAll(got, "\r\n", "\n"), strings.ReplaceAll(want, "\r\n", "\n"))
			}
			if c.name != "nodes" {
				b.want(t, state.Inactive, state.Inactive)
			}
		})
	}
}

func node(name, img, drv string, active bool) string {
	return fmt.Sprintf(`{"node-name": "%s", "file": "/srv/%s.img", "ro": false, "drv": "%s", "backing_file_depth": 0, "active": %t, `+
		`"encrypted": false, "detect_zeroes": "off", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0, `+
		`"image": {"filename": "/srv/%s.img", "format": "%s", "virtual-size": 1048576, "dirty-flag": false}, `+
		`"cache": {"writeback": true, "direct": false, "no-flush": false}, "write_threshold": 0}`, name, img, drv, active, img, drv)
}

// One byte at a time must give what all at once gives.
func TestDribble(t *testing.T) {
	b := newBed(t, 1)
	input := caps + "@x\xff 1.x " + queryV + `"a` + "\n" + `" foo {"execute" 1}` + queryV
	want := b.converse(t, Config{}, input)
	s := NewServer(Config{Registry: b.Registry, Version: "test"})
	ours, theirs := net.Pipe() // has no buffer
	done := make(chan struct{})
	go func() { defer close(done); s.serve(theirs) }()
	got := make(chan string)
	go func() {
		var lines strings.Builder
		in := bufio.NewReader(ours)
		for strings.Count(lines.String(), "\n") < strings.Count(want, "\n") {
			l, err := in.ReadString('\n')
			lines.WriteString(l)
			if err != nil {
				break
			}
		}
		got <- lines.String()
	}()
	for i := range len(input) {
		if _, err := io.WriteString(ours, input[i:i+1]); err != nil {
			t.Fatal(err)
		}
	}
	if g := <-got; g != want {
		t.Errorf("got\n%s\nwant\n%s", g, want)
	}
	_ = ours.Close()
	<-done
}

func TestOwnership(t *testing.T) {
	ctx := context.Background()
	b := newBed(t, 3)
	c := dial(t, "unix:"+b.listen(t, Config{}))

	check := func(err error, want string, states ...state.State) {
		t.Helper()
		switch {
		case want == "" && err != nil:
			t.Fatal(err)
		case want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)):
			t.Fatalf("got error %v, want %s", err, want)
		}
		b.want(t, states...)
	}
	on, off := state.Active, state.Inactive
	check(c.SetActive(ctx, true), "", on, on, on)
	check(c.SetActive(ctx, true), "", on, on, on)
	check(c.SetActive(ctx, false, "image1"), "", on, off, on)
	check(c.SetActive(ctx, false, "image0-file"), "Node has active parent node (inactivate 'image0' instead of 'image0-file')", on, off, on)
	check(c.SetActive(ctx, false, "image1-file"), "", on, off, on)
	check(c.SetActive(ctx, false, "image2-file", "image2"), "", on, off, off)
	check(c.SetActive(ctx, true, "image2-file"), "", on, off, off) // the file node alone
	check(c.SetActive(ctx, true, "image2"), "", on, off, on)
	check(c.SetActive(ctx, false, ""), "Failed to find node with node-name=''", on, off, on)

	b.images[1].acquire = func() error { return errors.New(`Failed to get "write" lock`) }
	check(c.SetActive(ctx, true, "image1", "image0"), `cannot activate image /srv/b.img: Failed to get "write" lock`, on, off, on)
	check(c.SetActive(ctx, false), "", off, off, off)
	check(c.SetActive(ctx, true), `cannot activate image /srv/b.img: Failed to get "write" lock`, off, off, off)
	check(c.SetActive(ctx, true, "image0", "image2"), "", on, off, on)

	b.images[0].settle = func() error { return errors.New("no space left on device") }
	check(c.SetActive(ctx, false), "Failed to inactivate all nodes: cannot inactivate image /srv/a.img: settle: no space left on device", on, off, on)
	check(c.SetActive(ctx, false, "image0"), "Failed to inactivate node: cannot inactivate image /srv/a.img: settle: no space left on device", on, off, on)

	b.images[0].settle = func() error { return lost{} }
	check(c.SetActive(ctx, false, "image0", "image2"),
		"Failed to inactivate node: cannot inactivate image /srv/a.img: settle: input/output error", state.FailedIO, off, on)
	check(c.SetActive(ctx, false), "Failed to inactivate all nodes: cannot inactivate image /srv/a.img: it is failed(io): ", state.FailedIO, off, on)
	check(c.setActive(ctx, setActive{Abandon: true}, nil), "", off, off, off)

	s, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	i := s.Images[0]
	if len(s.Images) != 3 || i.Node != "image0" || i.Image != "/srv/a.img" || i.State != "inactive" || i.Epoch != 2 ||
		i.Size != 1<<20 || i.Connections != 2 || i.Reads != 3 || i.Export.Name != "disk0" || i.Locks.Scope != "cluster" || i.Record.Path != "/srv/a.img.owner" {
		t.Errorf("status is %+v", i)
	}
}

func TestIfUnchanged(t *testing.T) {
	b := newBed(t, 0)
	b.Registry = &Registry{}
	img := &modified{fakeImage{ino: 1}}
	img.info.Path = "/srv/m.img"
	m := state.NewMachine(img, state.Options{})
	t.Cleanup(func() { _ = state.Stop(m) })
	if err := b.Add(&Target{Node: "image0", Image: img, Machine: m}); err != nil {
		t.Fatal(err)
	}
	c := dial(t, b.listen(t, Config{}))
	err := c.setActive(context.Background(), setActive{Active: true, IfUnchanged: true}, nil)
	if err == nil || !strings.Contains(err.Error(), "image was modified while inactive") {
		t.Errorf("got %v", err)
	}
	if err := c.SetActive(context.Background(), true); err != nil {
		t.Error(err)
	}
}

// modified is an image that somebody else has written to.
type modified struct{ fakeImage }

func (*modified) Load(ifUnchanged bool) error {
	if ifUnchanged {
		return errors.New("image was modified while inactive")
	}
	return nil
}

// While a transition hangs in its storage, other clients get answers: the
// state and step, a refusal of the opposite order; and the same order joins.
func TestQueriesDuringTransition(t *testing.T) {
	ctx := context.Background()
	b := newBed(t, 1)
	path := b.listen(t, Config{})
	a, q := dial(t, path), dial(t, path)
	if err := a.SetActive(ctx, true); err != nil {
		t.Fatal(err)
	}
	entered, leave := make(chan struct{}), make(chan struct{})
	b.images[0].settle = func() error { close(entered); <-leave; return nil }
	done := make(chan error, 2)
	go func() { done <- a.SetActive(ctx, false) }()
	<-entered
	s, err := q.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if i := s.Images[0]; i.State != "inactivating" || !i.State.Active() || i.Step != "settle" || i.StepSeconds <= 0 {
		t.Errorf("status is %+v", i)
	}
	want := "cannot activate image /srv/a.img: it is inactivating (step settle); try again when that is done"
	if err := q.SetActive(ctx, true); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if c, err := q.Cancel(ctx); err != nil || len(c) != 0 {
		t.Errorf("cancelled %v, %v behind the gate", c, err)
	}
	for _, cmd := range []string{"query-block-exports", "query-named-block-nodes", "query-commands", "query-version"} {
		if err := q.Execute(ctx, cmd, nil, nil); err != nil {
			t.Errorf("%s: %v", cmd, err)
		}
	}
	go func() { done <- q.SetActive(ctx, false) }()
	close(leave)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	b.want(t, state.Inactive)
}

func TestCancel(t *testing.T) {
	ctx := context.Background()
	b := newBed(t, 1)
	path := b.listen(t, Config{})
	a, q := dial(t, path), dial(t, path)
	if err := a.SetActive(ctx, true); err != nil {
		t.Fatal(err)
	}
	entered := make(chan struct{})
	b.images[0].syncAhead = func(ctx context.Context) error { close(entered); <-ctx.Done(); return ctx.Err() }
	done := make(chan error)
	go func() { done <- a.SetActive(ctx, false, "image0") }()
	<-entered
	if c, err := q.Cancel(ctx, "image0"); err != nil || len(c) != 1 || c[0] != "image0" {
		t.Errorf("cancelled %v, %v", c, err)
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), "context canceled") {
		t.Errorf("got %v", err)
	}
	b.want(t, state.Active)
	if _, err := q.Cancel(ctx, "nope"); err == nil {
		t.Error("cancelled a node that is not there")
	}
}

// An order is carried out although its client leaves.
func TestClientLeaves(t *testing.T) {
	b := newBed(t, 1)
	entered, leave, left := make(chan struct{}), make(chan struct{}), make(chan struct{})
	b.images[0].acquire = func() error { close(entered); <-leave; return nil }
	c := dial(t, b.listen(t, Config{}))
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(left)
		if err := c.SetActive(ctx, true); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		if err := c.SetActive(context.Background(), true); err == nil {
			t.Error("a client whose stream is out of step goes on")
		}
		_ = c.Close()
	}()
	<-entered
	cancel()
	<-left
	close(leave)
	// It joins the order of the client that left.
	if err := b.Activate(context.Background(), state.ActivateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.want(t, state.Active)
}

func TestManyClients(t *testing.T) {
	ctx := context.Background()
	b := newBed(t, 4)
	path := b.listen(t, Config{})
	var wg sync.WaitGroup
	for n := range 24 {
		wg.Go(func() {
			c, err := Dial(ctx, path)
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = c.Close() }()
			for i := range 40 {
				nodes := []string{fmt.Sprintf("image%d", (n+i)%4), fmt.Sprintf("image%d-file", i%4)}[:1+i%2]
				if n%3 == 0 {
					nodes = nil
				}
				err := c.SetActive(ctx, (n+i)%2 == 0, nodes...)
				if _, refused := errors.AsType[*Error](err); err != nil && !refused {
					t.Error(err)
				}
				s, err := c.Status(ctx)
				if err != nil || len(s.Images) != 4 {
					t.Errorf("status: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

func TestQuitOnce(t *testing.T) {
	quit := make(chan struct{}) // closing it twice would panic
	b := newBed(t, 1)
	path := b.listen(t, Config{Quit: func() { close(quit) }})
	for range 3 {
		if err := dial(t, path).Quit(context.Background()); err != nil {
			t.Error(err)
		}
	}
	<-quit
}

// A client that sends and never reads holds up nobody, not even Close.
func TestDeafClient(t *testing.T) {
	b := newBed(t, 1)
	path := b.listen(t, Config{})
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	full := make(chan struct{})
	go func() {
		defer close(full)
		many := []byte(caps + strings.Repeat(`{"execute":"query-commands"}`, 1000))
		for {
			_ = nc.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := nc.Write(many); err != nil {
				return
			}
		}
	}()
	<-full
	if _, err := dial(t, path).Status(context.Background()); err != nil {
		t.Error(err)
	}
}

// script is a connection whose peer says input and hears everything.
type script struct {
	net.Conn
	input  *strings.Reader
	output strings.Builder
}

func (s *script) Read(p []byte) (int, error)  { return s.input.Read(p) }
func (s *script) Write(p []byte) (int, error) { return s.output.Write(p) }
func (s *script) Close() error                { return nil }

func (s *script) SetWriteDeadline(time.Time) error { return nil }

func FuzzQMP(f *testing.F) {
	for _, s := range []string{
		queryV, `{'execute':'blockdev-set-active','arguments':{'active':true,'node-name':'image0'}}`,
		`{"execute":"x-query-status","id":[1.5e3,{"a":null}]}`, `{"execute":"x-cancel","arguments":{"x-node-names":["image0"]}}`,
		"\"\\ud83d\\ude00\\u12\" 01 -1.5e+7 tru }{ [1,2 {\"a\":1,\"a\":2} \xff@", strings.Repeat("[", 1030), `{"execute":"quit"} {}`,
		`{"execute":"blockdev-set-active","arguments":{"active":false,"x-abandon":true,"x-node-names":["image0-file","image0"]}}`,
		`{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":1}}}}`,
		`{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"a","file":{"driver":"file","filename":"b","cache":{"direct":true}}}}`,
		`{"execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"image0","bitmaps":["a",{"node":"b","name":"c"}]}}`,
		`{"execute":"blockdev-del","arguments":{"node-name":"image0"}} {"execute":"block-export-del","arguments":{"id":"export0","mode":"hard"}}`,
		`{"execute":"block_resize","arguments":{"node-name":"image0","size":1}} {"execute":"nbd-server-stop"}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, input string) {
		b := &bed{Registry: &Registry{}}
		b.add(t, &fakeImage{}, 0)
		defer func() { _ = state.Stop(machines(b.Targets())...) }()
		s := NewServer(Config{Registry: b.Registry, Version: "test"})
		nc := &script{input: strings.NewReader(caps + input)}
		s.serve(nc)
		out := nc.output.String()
		if !strings.HasPrefix(out, hello+"\r\n"+empty+"\r\n") || !strings.HasSuffix(out, "\r\n") {
			t.Fatalf("answered %q", out)
		}
		for _, line := range strings.Split(strings.TrimSuffix(out, "\r\n"), "\r\n")[1:] {
			var v map[string]any
			if err := json.Unmarshal([]byte(line), &v); err != nil {
				t.Fatalf("%v in %q", err, line)
			}
			if v["event"] == nil && (v["return"] == nil) == (v["error"] == nil) {
				t.Fatalf("neither fish nor flesh: %q", line)
			}
			for _, c := range []byte(line) {
				if c < ' ' || c > '~' {
					t.Fatalf("not printable ASCII: %q", line)
				}
			}
		}
	})
}

// The usual answer is what the general way makes of it.
func TestAppendDone(t *testing.T) {
	for _, id := range []any{nil, number("17"), "a, b: é\\", []any{number("1"), "x"}, &object{[]string{"k"}, map[string]any{"k": true}}} {
		a := answer{Return: struct{}{}}
		if id != nil {
			a.ID = &id
		}
		if got, want := string(appendDone(nil, a.ID)), string(appendLine(nil, a)); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
