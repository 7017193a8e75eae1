package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

// sharedImage is a fakeImage that several sides have, with a lock.
type sharedImage struct {
	*fakeImage
	lock   *atomic.Pointer[sharedImage]
	cannot error // what keeps this side from opening it for writing
}

var errLocked = errors.New("another process has the lock")

func (i *sharedImage) Acquire() error {
	if !i.lock.CompareAndSwap(nil, i) {
		return errLocked
	}
	return i.fakeImage.Acquire()
}

func (i *sharedImage) Release() error {
	i.lock.CompareAndSwap(i, nil)
	return i.fakeImage.Release()
}

func (i *sharedImage) Withdraw() { i.lock.CompareAndSwap(i, nil) }

func (i *sharedImage) Identify() backend.Identity {
	return backend.Identity{BootID: "boot", Dev: 1, Ino: 2, Size: i.Size(), OpenErr: i.cannot}
}

func (i *sharedImage) Note(string) (bool, error) { return false, nil }

// exporter is one side of a takeover.
type exporter struct {
	*Registry
	target *Target
	held   atomic.Int64
	scope  string
	path   string // of the control socket
	log    *observer.ObservedLogs
}

// newExporter makes a side that has the image of all that are given this lock.
func newExporter(t testing.TB, lock *atomic.Pointer[sharedImage], pid int, minHold time.Duration, peers ...string) *exporter {
	t.Helper()
	e := &exporter{Registry: &Registry{}, scope: "cluster"}
	img := &sharedImage{fakeImage: &fakeImage{info: backend.Info{Path: "/srv/a.img", Format: "raw"}}, lock: lock}
	core, logs := observer.New(zap.DebugLevel)
	e.log = logs
	tk := NewTakeover(TakeoverConfig{Peers: peers, MinHold: minHold, Log: zap.New(core)})
	tk.me.Host, tk.me.PID = "host", pid
	e.target = &Target{
		Node: "image0", Image: img,
		Machine: state.NewMachine(img, state.Options{Watch: time.Hour, Hold: 2 * time.Second, Wanted: tk.Want}),
		Stats:   func() ioloop.Stats { return ioloop.Stats{Held: e.held.Load()} },
		Locks:   func() Locks { return Locks{Scope: e.scope} },
	}
	tk.Serve(e.Registry, e.target)
	if err := e.Add(e.target); err != nil {
		t.Fatal(err)
	}
	b := &bed{Registry: e.Registry}
	e.path = b.listen(t, Config{Log: zap.New(core)})
	t.Cleanup(func() {
		tk.Close()
		_ = state.Stop(e.target.Machine)
	})
	return e
}

// write is a client's write that waits until the image is active; then it is
// not held any more.
func (e *exporter) write(t testing.TB) {
	t.Helper()
	lane := e.target.Machine.Lane(nil, nil)
	defer lane.Close()
	held := false
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Microsecond) {
		switch v := lane.Enter(state.Mutate); v {
		case state.Admitted:
			lane.Leave()
			if held {
				e.held.Add(-1)
			}
			return
		case state.Hold:
			if !held {
				held = true
				e.held.Add(1)
				lane.Want()
			}
		case state.Wait:
		default:
			t.Errorf("verdict %d", v)
			return
		}
		if time.Now().After(end) {
			t.Error("the image was never taken over")
			return
		}
	}
}

func (e *exporter) activate(t testing.TB) {
	t.Helper()
	if err := e.Activate(context.Background(), state.ActivateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (e *exporter) logged(what string) []observer.LoggedEntry {
	return e.log.FilterMessageSnippet(what).All()
}

// awaitLog waits for a line, of which all parts stand in its fields.
func (e *exporter) awaitLog(t testing.TB, what string, parts ...string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		for _, entry := range e.logged(what) {
			text := ""
			for _, f := range entry.Context {
				text += f.Key + "=" + f.String
				if err, ok := f.Interface.(error); ok {
					text += err.Error()
				}
				text += " "
			}
			ok := true
			for _, p := range parts {
				ok = ok && strings.Contains(text, p)
			}
			if ok {
				return
			}
		}
	}
	t.Fatalf("no line %q with %q in %+v", what, parts, e.log.All())
}

func TestTakeoverFromPeer(t *testing.T) {
	var lock atomic.Pointer[sharedImage]
	a := newExporter(t, &lock, 1, 0)
	b := newExporter(t, &lock, 2, 0, "unix:"+a.path)
	a.activate(t)
	b.write(t)
	b.awaitLog(t, "image taken over", "reason=a client wrote", "peer=unix:"+a.path+" gave it away")
	a.awaitLog(t, "image given to a peer")
	if s := a.target.Machine.Status().State; s != state.Inactive {
		t.Errorf("the peer is %s", s)
	}
	// Again, from one that has nothing to give.
	if err := b.Inactivate(context.Background(), InactivateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.write(t)
	b.awaitLog(t, "image taken over", a.path+" does not own it")
}

// The owner does not let go for one who could not own the image then, nor where
// another peer keeps it from being activated: nobody would own it.
func TestTakeoverInVain(t *testing.T) {
	for name, c := range map[string]struct {
		cannot error
		more   []string // peers, beside the owner
		log    string
	}{
		"cannot be opened":  {syscall.EACCES, nil, "could not be owned here: permission denied"},
		"a peer is silent":  {nil, []string{silentSocket(t)}, "not activated without the peer's word"},
		"two, and no proof": {nil, []string{silentSocket(t), newBed(t, 1).listen(t, Config{})}, "not activated without the peer's word"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var lock atomic.Pointer[sharedImage]
			a := newExporter(t, &lock, 1, 0)
			b := newExporter(t, &lock, 2, 0, append([]string{a.path}, c.more...)...)
			b.target.Image.(*sharedImage).cannot, b.scope = c.cannot, "host-local"
			a.activate(t)
			b.held.Store(1)
			b.target.Takeover.Want()
			b.awaitLog(t, "the image cannot be taken over yet", c.log)
			b.held.Store(0)
			b.awaitLog(t, "image not taken over", c.log)
			if s := a.target.Machine.Status().State; s != state.Active {
				t.Errorf("the owner is %s", s)
			}
		})
	}
}

// silentSocket accepts connections and says nothing.
func silentSocket(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "silent")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return path
}

// Silent peers are waited for at once, so that there is time left for the write.
func TestTakeoverSilentPeers(t *testing.T) {
	var lock atomic.Pointer[sharedImage]
	e := newExporter(t, &lock, 1, 0, silentSocket(t), silentSocket(t), silentSocket(t))
	e.held.Store(1)
	began := time.Now()
	e.target.Takeover.Want()
	e.awaitLog(t, "image taken over", fmt.Sprintf("does not greet; does its process, pid %d, hang", os.Getpid()))
	if hold := e.target.Machine.HoldFor(); time.Since(began) > hold {
		t.Errorf("it took longer than the %v for which a write is held", hold)
	}
}

// The image is kept for a while, however often it is asked for.
func TestTakeoverMinHold(t *testing.T) {
	var lock atomic.Pointer[sharedImage]
	const min = 200 * time.Millisecond
	a := newExporter(t, &lock, 1, min)
	b := newExporter(t, &lock, 2, 0, a.path)
	began := time.Now()
	a.activate(t)
	b.write(t)
	if d := time.Since(began); d < min {
		t.Errorf("taken over after %v", d)
	}
	b.awaitLog(t, "later", "it has been active for", "of at least 200ms")
}

// One that has to wait for long sees it when the image is free before that.
func TestTakeoverFreeEarly(t *testing.T) {
	var lock atomic.Pointer[sharedImage]
	a := newExporter(t, &lock, 1, time.Hour)
	b := newExporter(t, &lock, 2, 0, a.path)
	a.activate(t)
	done := make(chan struct{})
	go func() { defer close(done); b.write(t) }()
	b.awaitLog(t, "later", "it has been active for", "of at least 1h0m0s")
	if err := a.Inactivate(t.Context(), InactivateOptions{}); err != nil {
		t.Fatal(err)
	}
	<-done
}

// A takeover needs nobody's word where the peer is gone or the locks tell.
func TestTakeoverWithoutAnswer(t *testing.T) {
	silent := silentSocket(t)
	nobody := filepath.Join(t.TempDir(), "nobody")
	other := newBed(t, 1).listen(t, Config{}) // proves nothing
	for name, c := range map[string]struct {
		peer, scope string
		taken       bool
		log         string
	}{
		"gone":                       {nobody, "cluster", true, nobody + " is gone"},
		"gone, no locks":             {nobody, "off", true, nobody + " is gone"},
		"silent":                     {silent, "cluster", true, "accepts connections but does not greet"},
		"silent, locks reach no one": {silent, "host-local", false, "not activated without the peer's word"},
		"no proof":                   {other, "cluster", true, "cannot be proven"},
		"no proof, nor locks":        {other, "host-local", false, "not activated without the peer's word"},
		"no command":                 {"exec: ", "host-local", false, "not activated without the peer's word"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var lock atomic.Pointer[sharedImage]
			e := newExporter(t, &lock, 1, 0, c.peer)
			e.scope = c.scope
			if c.taken {
				e.write(t)
				e.awaitLog(t, "image taken over", c.log)
				return
			}
			e.held.Store(1)
			e.target.Takeover.Want()
			e.awaitLog(t, "the image cannot be taken over yet", c.log)
			e.held.Store(0) // its time is over
			e.awaitLog(t, "image not taken over", c.log)
			if s := e.target.Machine.Status().State; s != state.Inactive {
				t.Errorf("it is %s", s)
			}
		})
	}
}

// Of a peer that is silent the record tells, if it is one that both see.
func TestTakeoverRecord(t *testing.T) {
	image := filepath.Join(t.TempDir(), "a.img")
	if err := os.WriteFile(image, make([]byte, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	record := Record{Path: image + ".owner"}
	e := &exporter{scope: "host-local"}
	tk := NewTakeover(TakeoverConfig{})
	defer tk.Close()
	tk.me.Host = "here"
	img := &fakeImage{info: backend.Info{Path: image}}
	tk.target = &Target{
		Image: img, Machine: state.NewMachine(img, state.Options{}), Record: func() Record { return record }, Locks: func() Locks { return Locks{Scope: e.scope} },
	}
	for name, c := range map[string]struct {
		text  string // of the record
		lives bool
		taken bool
	}{
		"none":                     {"", false, false},
		"let go elsewhere":         {`"host":"there","clean":true`, false, true},
		"let go, and it lives":     {`"host":"there","clean":true`, true, false},
		"owned elsewhere":          {`"host":"there","clean":false`, false, false},
		"let go here":              {`"host":"here","clean":true`, false, false},
		"owned here until dead":    {`"host":"here","clean":false`, false, false},
		"owned here, and it lives": {`"host":"here","clean":false`, false, false},
	} {
		if c.text != "" {
			c.text = `{` + c.text + `,"pid":1,"boot-id":"x","since":"2026-11-23T10:00:00Z","epoch":3}`
		}
		if strings.HasPrefix(name, "owned here") { // as Process sees it
			host, _ := os.Hostname()
			c.text = strings.Replace(c.text, "here", host, 1)
		}
		if name == "owned here, and it lives" {
			boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
			if err != nil {
				t.Fatal(err)
			}
			c.text = strings.Replace(c.text, `"x"`, `"`+strings.TrimSpace(string(boot))+`"`, 1)
		}
		if err := os.WriteFile(record.Path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		said, err := tk.silent("peer", c.lives, errors.New("why"))
		if (err == nil) != c.taken || (said != "") != c.taken {
			t.Errorf("%s: %q, %v", name, said, err)
		}
		// With no locks at all it is the only guard against one whose socket is gone.
		for scope, guarded := range map[string]bool{"off": name == "owned elsewhere" || name == "owned here, and it lives", "host-local": false} {
			e.scope = scope
			p := &reachedPeer{name: image + ".ctl"}
			if err := tk.find(p); (err != nil) != guarded || err == nil && !strings.Contains(p.said, "is gone") {
				t.Errorf("%s, gone, locks %s: %q, %v", name, scope, p.said, err)
			}
		}
		e.scope = "host-local"
		if c.taken {
			record.Path = ""
			if _, err := tk.silent("peer", c.lives, errors.New("why")); err == nil {
				t.Errorf("%s: a record that is not kept tells", name)
			}
			record.Path = image + ".owner"
		}
	}
}

// A lock that another program holds is no reason to give up while a write
// waits.
func TestTakeoverWaitsForLock(t *testing.T) {
	var lock atomic.Pointer[sharedImage]
	other := &sharedImage{}
	lock.Store(other)
	a := newExporter(t, &lock, 1, 0)
	b := newExporter(t, &lock, 2, 0, a.path)
	done := make(chan struct{})
	go func() { defer close(done); b.write(t) }()
	b.awaitLog(t, "the image cannot be taken over yet", errLocked.Error())
	lock.Store(nil)
	<-done
}

// Exporters that want one image all at once get it one after the other.
func TestTakeoverRace(t *testing.T) {
	var lock atomic.Pointer[sharedImage]
	dir := t.TempDir()
	links := []string{filepath.Join(dir, "0"), filepath.Join(dir, "1"), filepath.Join(dir, "2")}
	var sides []*exporter
	for i := range links {
		peers := append(append([]string(nil), links[:i]...), links[i+1:]...)
		sides = append(sides, newExporter(t, &lock, i, time.Millisecond, peers...))
	}
	for i, e := range sides {
		if err := os.Symlink(e.path, links[i]); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	for _, e := range sides {
		go func() {
			for range 5 {
				e.write(t)
			}
			done <- struct{}{}
		}()
	}
	for range sides {
		<-done
	}
}

// So do two of one name, as containers that share a host's name can have one
// process number; and one that was told to ask itself says so.
func TestTakeoverNamesakes(t *testing.T) {
	var lock atomic.Pointer[sharedImage]
	dir := t.TempDir()
	links := []string{filepath.Join(dir, "0"), filepath.Join(dir, "1")}
	a, b := newExporter(t, &lock, 1, 0, links[1]), newExporter(t, &lock, 1, 0, links[0])
	for i, e := range []*exporter{a, b} {
		if err := os.Symlink(e.path, links[i]); err != nil {
			t.Fatal(err)
		}
	}
	// Both want it, and neither begins to activate before it was asked.
	for _, e := range []*exporter{a, b} {
		e.target.Takeover.phase = asking
	}
	var granted []string
	for i, by := range []*exporter{b, a} {
		to := []*exporter{a, b}[i]
		c := dial(t, to.path)
		answer, err := c.requestTakeover(t.Context(), "image0", by.target.Takeover.me)
		if err != nil {
			t.Fatal(err)
		}
		if answer.Granted {
			granted = append(granted, to.path)
		}
	}
	if len(granted) != 1 {
		t.Errorf("%d of two that want the image let the other go first", len(granted))
	}
	_, err := dial(t, a.path).requestTakeover(t.Context(), "image0", a.target.Takeover.me)
	if err == nil || !strings.Contains(err.Error(), "this is the exporter itself") {
		t.Errorf("asked by itself: %v", err)
	}
}

// TestTakeoverRequest is what a peer is told in each state.
func TestTakeoverRequest(t *testing.T) {
	stay, leave := func() bool { return false }, func() bool { return true }
	low, high := asker{Host: "a", PID: 9}, asker{Host: "b", PID: 1}
	me := asker{Host: "a", PID: 10}
	for _, c := range []struct {
		name    string
		state   state.State
		phase   phase
		by      asker
		gone    func() bool
		granted bool
		owned   bool
		retry   bool
		err     string
	}{
		{"inactive", state.Inactive, idle, high, stay, true, false, false, ""},
		{"inactive, wants it, goes first", state.Inactive, asking, high, stay, false, false, true, ""},
		{"inactive, wants it, goes second", state.Inactive, asking, low, stay, true, false, false, ""},
		{"inactive, about to activate", state.Inactive, activating, low, stay, false, false, false, ""},
		{"active", state.Active, idle, high, stay, true, true, false, ""},
		{"active, but the one who asks has left", state.Active, idle, high, leave, false, false, false, "has gone"},
		{"failed", state.FailedIO, idle, high, stay, false, false, false, "failed(io)"},
		{"fenced", state.FailedFenced, idle, high, stay, true, false, false, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t, 1)
				target := b.Targets()[0]
				tk := NewTakeover(TakeoverConfig{MinHold: time.Minute})
				defer tk.Close()
				tk.me, tk.phase = me, c.phase
				tk.Serve(b.Registry, target)
				if c.state != state.Inactive {
					if err := b.Activate(t.Context(), state.ActivateOptions{}); err != nil {
						t.Fatal(err)
					}
					a, err := target.giveTo(c.by, stay)
					if a.Granted || err != nil || a.RetrySeconds != 60 {
						t.Errorf("at once: %+v, %v", a, err)
					}
					time.Sleep(time.Minute)
				}
				switch c.state {
				case state.FailedIO:
					lane := target.Machine.Lane(nil, nil)
					lane.Fault(lost{})
					lane.Close()
				case state.FailedFenced:
					target.Machine.Fence(errors.New("taken"))
				}
				b.want(t, c.state)
				a, err := target.giveTo(c.by, c.gone)
				if a.Granted != c.granted || a.Owned != c.owned || (a.RetrySeconds > 0) != c.retry || (c.err == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), c.err)) {
					t.Errorf("%+v, %v", a, err)
				}
				if !a.Granted && err == nil && a.Reason == "" {
					t.Error("no reason")
				}
				if tk.yielded != (c.granted && c.state == state.Inactive) {
					t.Errorf("yielded %v", tk.yielded)
				}
			})
		})
	}
}

// A peer that leaves while writes are still served leaves the image active.
func TestTakeoverRequestCalledOff(t *testing.T) {
	b := newBed(t, 1)
	if err := b.Activate(t.Context(), state.ActivateOptions{}); err != nil {
		t.Fatal(err)
	}
	var left atomic.Bool
	b.images[0].syncAhead = func(ctx context.Context) error {
		left.Store(true)
		<-ctx.Done()
		return ctx.Err()
	}
	if a, err := b.Targets()[0].giveTo(asker{}, left.Load); a.Granted || !errors.Is(err, errAskerGone) {
		t.Errorf("%+v, %v", a, err)
	}
	b.want(t, state.Active)
}

// An order is not carried out for a peer that has hung up: nobody would own the
// image.
func TestTakeoverRequestAbandoned(t *testing.T) {
	ours, theirs := pair(t)
	defer ours.Close()
	s := &session{out: &outbox{nc: theirs}}
	defer theirs.Close()
	if s.abandoned() {
		t.Error("taken for gone")
	}
	_, _ = ours.Write([]byte("there is more to come"))
	if s.abandoned() {
		t.Error("taken for gone with input unread")
	}
	_ = ours.Close()
	if !s.abandoned() {
		t.Error("not seen to have gone")
	}
}

func TestTakeoverClose(t *testing.T) {
	var lock atomic.Pointer[sharedImage]
	lock.Store(&sharedImage{})
	e := newExporter(t, &lock, 1, 0, filepath.Join(t.TempDir(), "nobody"))
	e.held.Store(1)
	e.target.Takeover.Want()
	e.awaitLog(t, "the image cannot be taken over yet")
	e.target.Takeover.Close()
	e.target.Takeover.Want()
	e.target.Takeover.Close()
	if n := len(e.logged("image taken over")); n != 0 {
		t.Errorf("%d lines", n)
	}
}

// A write whose time is over before anything was done for it is no reason to
// take the image, nor to try for ever.
func TestTakeoverTooLate(t *testing.T) {
	var lock atomic.Pointer[sharedImage]
	e := newExporter(t, &lock, 1, 0, filepath.Join(t.TempDir(), "nobody"))
	e.target.Takeover.Want()
	e.target.Takeover.wg.Wait()
	if s := e.target.Machine.Status().State; s != state.Inactive || e.log.Len() != 0 {
		t.Errorf("it is %s, the log says %+v", s, e.log.All())
	}
}
