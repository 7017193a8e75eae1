package control

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

func TestMain(m *testing.M) {
	helperMain() // does not return in a helper
	goleak.VerifyTestMain(m)
}

// fakeImage is an image without storage. Its hooks run in the methods named
// like them; nil does nothing.
type fakeImage struct {
	backend.Image // nil: nothing here moves data
	info          backend.Info
	ino           uint64

	acquire, settle, unsettle, release func() error
	syncAhead                          func(context.Context) error
}

func call(f func() error) error {
	if f == nil {
		return nil
	}
	return f()
}

func (f *fakeImage) Info() backend.Info               { return f.info }
func (f *fakeImage) Size() int64                      { return 1 << 20 }
func (f *fakeImage) Key() (uint64, uint64)            { return 1, f.ino }
func (f *fakeImage) Name() string                     { return f.info.Path }
func (f *fakeImage) Settle() error                    { return call(f.settle) }
func (f *fakeImage) Unsettle() error                  { return call(f.unsettle) }
func (f *fakeImage) PublishInactive()                 {}
func (f *fakeImage) Release() error                   { return call(f.release) }
func (f *fakeImage) Acquire() error                   { return call(f.acquire) }
func (f *fakeImage) Load(ifUnchanged bool) error      { return nil }
func (f *fakeImage) Claim(own uint64) (uint64, error) { return own + 1, nil }
func (f *fakeImage) PublishActive()                   {}
func (f *fakeImage) Withdraw()                        {}
func (f *fakeImage) Retire()                          {}
func (f *fakeImage) Check() error                     { return nil }
func (f *fakeImage) Abandon() error                   { return nil }
func (f *fakeImage) Close() error                     { return nil }
func (f *fakeImage) SyncAhead(ctx context.Context) error {
	if f.syncAhead == nil {
		return nil
	}
	return f.syncAhead(ctx)
}

// lost is an error of a failed sync.
type lost struct{}

func (lost) Error() string    { return "input/output error" }
func (lost) SyncFailed() bool { return true }

// bed is a registry with images image0, image1 and so on.
type bed struct {
	*Registry
	images []*fakeImage
}

func newBed(t testing.TB, n int) *bed {
	t.Helper()
	b := &bed{Registry: &Registry{}}
	for i := range n {
		b.add(t, &fakeImage{ino: uint64(i), info: backend.Info{Path: "/srv/" + string(rune('a'+i)) + ".img", Format: "raw"}}, i)
	}
	t.Cleanup(func() { _ = state.Stop(machines(b.Targets())...) })
	return b
}

func (b *bed) add(t testing.TB, img *fakeImage, i int) {
	t.Helper()
	d := string(rune('0' + i))
	err := b.Add(&Target{
		Node: "image" + d, Image: img, Machine: state.NewMachine(img, state.Options{Watch: time.Hour}),
		Export: Export{ID: "export" + d, Name: "disk" + d, Writable: true},
		Stats:  func() ioloop.Stats { return ioloop.Stats{Connections: 2, Reads: 3} },
		Locks:  func() Locks { return Locks{Held: "none", Scope: "cluster"} },
		Record: func() Record { return Record{Path: "/srv/a.img.owner"} },
	})
	if err != nil {
		t.Fatal(err)
	}
	b.images = append(b.images, img)
}

func (b *bed) state(i int) state.State { return b.Targets()[i].Machine.Status().State }

func (b *bed) want(t testing.TB, states ...state.State) {
	t.Helper()
	for i, s := range states {
		if got := b.state(i); got != s {
			t.Errorf("image%d is %s, want %s", i, got, s)
		}
	}
}

// listen serves b on a socket until the test ends.
func (b *bed) listen(t testing.TB, cfg Config) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "ctl")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Registry, cfg.Version = b.Registry, "test"
	s := NewServer(cfg)
	done := make(chan error)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Error("the socket is still there")
		}
	})
	return path
}

func dial(t testing.TB, path string) *Client {
	t.Helper()
	c, err := Dial(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// converse sends input to a server of b, ends the stream and returns all that
// comes back.
func (b *bed) converse(t testing.TB, cfg Config, input string) string {
	t.Helper()
	cfg.Registry, cfg.Version = b.Registry, "test"
	s := NewServer(cfg)
	ours, theirs := pair(t)
	done := make(chan struct{})
	s.mu.Lock()
	s.clients[theirs] = struct{}{}
	s.mu.Unlock()
	go func() { defer close(done); s.serve(theirs) }()
	go func() {
		_, _ = io.WriteString(ours, input)
		_ = ours.(*net.UnixConn).CloseWrite()
	}()
	out, err := io.ReadAll(ours)
	if err != nil {
		t.Fatal(err)
	}
	<-done
	_ = ours.Close()
	return string(out)
}

// pair is a connected pair of Unix sockets.
func pair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := make([]net.Conn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		if conns[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
	}
	return conns[0], conns[1]
}
