package ioloop

import (
	"bufio"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/internal/testfs"
	"github.com/nbd-export/nbd-export/state"
)

// raceEnabled: the race detector changes what is allocated.
var raceEnabled bool

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is when a test that waits for something gives up.
const patience = time.Minute

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// await waits until c is closed or has something.
func await[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		buf := make([]byte, 1<<20)
		t.Fatalf("waited too long for %s\n%s", what, buf[:runtime.Stack(buf, true)])
	}
	panic("unreachable")
}

// eventually yields until ok: for what is signalled to nobody.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); runtime.Gosched() {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("never came true: %s\n%s", what, buf[:runtime.Stack(buf, true)])
		}
	}
}

// background runs fn and closes what it returns when fn is done.
func background(fn func()) <-chan struct{} {
	done := make(chan struct{})
	go func() { defer close(done); fn() }()
	return done
}

func pattern(n int, seed uint64) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return b
}

// The wire format of the tests. A request is reqSize bytes: magic, op, flags,
// cookie, offset, length, payload; then the payload. A reply is made of pieces of
// repSize bytes (magic, kind, last, errno, cookie, offset, n), each with what
// its kind brings.
const (
	reqMagic = 0x71e57e57
	repMagic = 0x4e91e57e
	reqSize  = 40
	repSize  = 32
)

const (
	kindData uint8 = iota
	kindHole
	kindDone
	kindError
	kindStatus
)

type testCodec struct {
	chunked  bool
	contexts []string // nil is the allocation
}

var errGarbage = errors.New("test codec: garbage")

func appendRequest(b []byte, op Op, f Flags, cookie uint64, off, n, payload int64) []byte {
	b = binary.BigEndian.AppendUint32(b, reqMagic)
	b = append(b, byte(op), byte(f), 0, 0)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint64(b, uint64(n))
	return binary.BigEndian.AppendUint64(b, uint64(payload))
}

func (c *testCodec) Decode(b []byte, r *Request) (int, error) {
	if len(b) < 4 {
		return 0, nil
	}
	if binary.BigEndian.Uint32(b) != reqMagic {
		return 0, errGarbage
	}
	if len(b) < reqSize {
		return 0, nil
	}
	*r = Request{
		Op: Op(b[4]), Flags: Flags(b[5]),
		Offset:  int64(binary.BigEndian.Uint64(b[16:])),
		Length:  int64(binary.BigEndian.Uint64(b[24:])),
		Payload: int64(binary.BigEndian.Uint64(b[32:])),
		Tag:     [2]uint64{binary.BigEndian.Uint64(b[8:])},
	}
	if r.Op == OpReject {
		r.Err = unix.EINVAL
	}
	return reqSize, nil
}

func (c *testCodec) Chunked(r *Request) bool { return c.chunked && r.Flags&OneChunk == 0 }

func appendPiece(b []byte, kind uint8, last bool, errno uint16, r *Request, off, n int64) []byte {
	b = binary.BigEndian.AppendUint32(b, repMagic)
	l := byte(0)
	if last {
		l = 1
	}
	b = append(b, kind, l)
	b = binary.BigEndian.AppendUint16(b, errno)
	b = binary.BigEndian.AppendUint64(b, r.Tag[0])
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	return binary.BigEndian.AppendUint64(b, uint64(n))
}

func (c *testCodec) AppendData(b []byte, r *Request, off, n int64, last bool) []byte {
	return appendPiece(b, kindData, last, 0, r, off, n)
}

func (c *testCodec) AppendHole(b []byte, r *Request, off, n int64, last bool) []byte {
	return appendPiece(b, kindHole, last, 0, r, off, n)
}

func (c *testCodec) AppendDone(b []byte, r *Request) []byte {
	return appendPiece(b, kindDone, true, 0, r, 0, 0)
}

func (c *testCodec) AppendError(b []byte, r *Request, err error) []byte {
	errno := unix.EIO
	switch {
	case errors.As(err, &errno):
	case errors.Is(err, state.ErrInactive):
		errno = unix.EPERM
	case errors.Is(err, state.ErrStopping):
		errno = unix.ESHUTDOWN
	}
	text := err.Error()
	b = appendPiece(b, kindError, true, uint16(errno), r, 0, int64(len(text)))
	return append(b, text...)
}

func (c *testCodec) Contexts() []string {
	if c.contexts == nil {
		return []string{""}
	}
	return c.contexts
}

func (c *testCodec) AppendStatus(b []byte, r *Request, context int, ext []backend.Status, last bool) []byte {
	b = appendPiece(b, kindStatus, last, 0, r, int64(context), int64(len(ext)))
	for _, e := range ext {
		b = binary.BigEndian.AppendUint64(b, uint64(e.Length))
		b = binary.BigEndian.AppendUint64(b, uint64(e.Flags))
	}
	return b
}

func (c *testCodec) MaxStatus(r *Request) int {
	if r.Flags&OneExtent != 0 {
		return 1
	}
	return 64
}

// hooked is an image whose methods a test can hold up.
type hooked struct {
	backend.Image
	mu         sync.Mutex
	mapping    func(off, n int64, mode backend.Mode) error
	preparing  func(off int64, mode backend.Mode) error
	flushing   func() error
	discarding func(off, n int64) error
	caching    func(off, n int64)
	// mapped: it has tables, that a Commit leaves dirty, so that what lies
	// anywhere may move. It does not change while the image is used.
	mapped bool
	fresh  bool // what is prepared is said to be
}

func (h *hooked) Info() backend.Info {
	i := h.Image.Info()
	i.Mapped = h.mapped
	return i
}

func (h *hooked) Commit(p *backend.Plan) (durable bool) {
	h.Image.Commit(p)
	return !h.mapped
}

func (h *hooked) set(fn func(*hooked)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	fn(h)
}

func (h *hooked) Map(p *backend.Plan, off, n int64, mode backend.Mode) error {
	h.mu.Lock()
	f := h.mapping
	h.mu.Unlock()
	if f != nil {
		if err := f(off, n, mode); err != nil {
			return err
		}
	}
	err := h.Image.Map(p, off, n, mode)
	for i := range p.Extents {
		p.Extents[i].Fixed = p.Extents[i].Fixed && !h.mapped
	}
	return err
}

func (h *hooked) Prepare(p *backend.Plan, off int64, payload []byte, mode backend.Mode) error {
	h.mu.Lock()
	f := h.preparing
	h.mu.Unlock()
	if f != nil {
		if err := f(off, mode); err != nil {
			return err
		}
	}
	err := h.Image.Prepare(p, off, payload, mode)
	for i := range p.Extents {
		p.Extents[i].Fresh = h.fresh
	}
	return err
}

func (h *hooked) PrepareUnseen(p *backend.Plan, off, n int64) error {
	h.mu.Lock()
	f := h.preparing
	h.mu.Unlock()
	if f != nil {
		if err := f(off, 0); err != nil {
			return err
		}
	}
	return h.Image.(backend.Receiver).PrepareUnseen(p, off, n)
}

func (h *hooked) Cache(off, n int64) error {
	h.mu.Lock()
	f := h.caching
	h.mu.Unlock()
	if f != nil {
		f(off, n)
	}
	return h.Image.Cache(off, n)
}

func (h *hooked) Flush() error {
	h.mu.Lock()
	f := h.flushing
	h.mu.Unlock()
	if f != nil {
		if err := f(); err != nil {
			return err
		}
	}
	return h.Image.Flush()
}

func (h *hooked) Discard(off, n int64) error {
	h.mu.Lock()
	f := h.discarding
	h.mu.Unlock()
	if f != nil {
		if err := f(off, n); err != nil {
			return err
		}
	}
	return h.Image.Discard(off, n)
}

// blocker makes who calls it wait, as for a slow device.
type blocker struct {
	entered chan struct{} // gets a value for each that waits
	leave   chan struct{} // closed, all go on
}

func newBlocker() *blocker {
	return &blocker{entered: make(chan struct{}, 1<<16), leave: make(chan struct{})}
}

func (b *blocker) wait() {
	b.entered <- struct{}{}
	<-b.leave
}

// mode is wait for who may, and ErrWait for others.
func (b *blocker) mode(m backend.Mode) error {
	if m&backend.MayBlock == 0 {
		return backend.ErrWait
	}
	b.wait()
	return nil
}

// rig is an engine with one image and its machine. At the end of the test all
// is taken down, and nothing may be left.
type rig struct {
	t    testing.TB
	e    *Engine
	d    *Disk
	img  *hooked
	raw  *backend.Owned
	m    *state.Machine
	path string
	size int64

	mu      sync.Mutex
	clients []*client
}

type rigConfig struct {
	Config
	tmpfs    bool
	dir      string // instead
	size     int64  // 4 MiB
	content  []byte
	inactive bool
	onStep   func(state.Step)
	holdFor  time.Duration
	stall    time.Duration // stallLimit
	workers  int           // mostWorkers
	wanted   func()
	cache    backend.CacheMode
	mapped   bool                    // see hooked
	pacer    func(*Disk) state.Pacer // gets the disk before it is used
}

func newRig(t testing.TB, cfg rigConfig) *rig {
	t.Helper()
	dir := cfg.dir
	if dir == "" {
		dir = testfs.Disk(t)
	}
	if cfg.tmpfs {
		dir = testfs.Memory(t)
	}
	r := &rig{t: t, path: filepath.Join(dir, "disk.img"), size: cfg.size}
	if r.size == 0 {
		r.size = 4 << 20
	}
	if cfg.content != nil {
		r.size = int64(len(cfg.content))
	}
	must(t, os.WriteFile(r.path, cfg.content, 0o600))
	must(t, os.Truncate(r.path, r.size))
	raw, err := backend.Open(backend.Options{Path: r.path, Format: "raw", Cache: cfg.cache})
	if cfg.cache == backend.CacheNone && errors.Is(err, unix.EINVAL) && testfs.InMemory(t, dir) {
		t.Skip(err) // tmpfs before Linux 6.6
	}
	must(t, err)
	r.raw, r.img = raw, &hooked{Image: raw, mapped: cfg.mapped}
	r.d = NewDisk(r.img, nil)
	opt := state.Options{Hold: cfg.holdFor, Wanted: cfg.wanted, Step: func(_ string, s state.Step) {
		if cfg.onStep != nil {
			cfg.onStep(s)
		}
	}}
	if cfg.pacer != nil {
		opt.Pacer = cfg.pacer(r.d)
	}
	r.m = state.NewMachine(raw, opt)
	r.d.Machine = r.m
	// The whole suite runs on either engine. A kernel without io_uring fails it,
	// unless the portable engine is asked for.
	if cfg.Ring == nil && os.Getenv("NBD_EXPORT_ENGINE") != "portable" {
		cfg.Ring, err = OpenUring()
		must(t, err)
	}
	r.e = NewEngine(cfg.Config)
	if cfg.workers > 0 {
		r.e.sched = newScheduler(cfg.workers)
	}
	r.e.sched.stay = time.Millisecond
	r.e.stall = cmp.Or(cfg.stall, r.e.stall)
	t.Cleanup(r.teardown)
	if !cfg.inactive {
		r.activate()
	}
	return r
}

func (r *rig) activate() {
	r.t.Helper()
	must(r.t, state.Activate(context.Background(), state.ActivateOptions{}, r.m))
}

func (r *rig) inactivate() {
	r.t.Helper()
	must(r.t, state.Inactivate(context.Background(), r.m))
}

// teardown ends all clients and looks for what is left.
func (r *rig) teardown() {
	r.mu.Lock()
	clients := r.clients
	r.mu.Unlock()
	for _, c := range clients {
		c.nc.Close()
	}
	for _, c := range clients {
		await(r.t, c.served, "a connection to end")
		r.checkConn(c.conn)
	}
	if n := r.e.budget.inUse(); n != 0 || r.e.budget.used != [purposes]int64{} {
		r.t.Errorf("%d bytes of the budget were not given back: %v", n, r.e.budget.used)
	}
	if n := len(r.e.budget.waiters); n != 0 {
		r.t.Errorf("%d wait for memory", n)
	}
	s := r.d.Stats()
	if s.InFlight != 0 || s.Connections != 0 || s.Held != 0 || s.HeldBytes != 0 {
		r.t.Errorf("left: %+v", s)
	}
	eventually(r.t, "the workers leave", func() bool {
		r.e.sched.mu.Lock()
		defer r.e.sched.mu.Unlock()
		return r.e.sched.workers == 0 && r.e.sched.idle == 0 && r.e.sched.first == nil
	})
	// With patience: what a test that failed has left held up would keep both for ever.
	await(r.t, background(func() { r.e.Shutdown(context.Background()) }), "the engine to shut down")
	stopped := make(chan error, 1)
	go func() { stopped <- state.Stop(r.m) }()
	if err := await(r.t, stopped, "the image to be let go"); err != nil {
		r.t.Errorf("stop: %v", err)
	}
}

func (r *rig) checkConn(c *conn) {
	if c == nil {
		return
	}
	if n := c.tasks.Load(); n != 0 {
		r.t.Errorf("%d tasks left", n)
	}
	if n, u := c.held.Load(), c.unsent.Load(); n != 0 || u != 0 {
		r.t.Errorf("holds %d bytes, %d reply buffers", n, u)
	}
	if c.mu.first != nil || c.mu.last != nil || len(c.mu.parked) != 0 || len(c.mu.held) != 0 {
		r.t.Error("tasks left in the lists")
	}
	if c.waiters.first != nil || c.waiters.last != nil {
		r.t.Error("tasks wait for the pace")
	}
	if c.in != nil || c.reply != nil || len(c.out.queue) != 0 || c.out.sending {
		r.t.Error("buffers left")
	}
}

// connOf is the connection that the engine serves over nc; nil if it serves none.
func (r *rig) connOf(nc net.Conn) *conn {
	for _, c := range r.e.all() {
		if c.nc == nc {
			return c
		}
	}
	return nil
}

func socketpair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	must(t, err)
	var c [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c[i], err = net.FileConn(f)
		must(t, err)
		f.Close()
	}
	return c[0], c[1]
}

// sndbuf is how much a socket holds of what it sends, in bytes and with what the
// kernel needs to know of them.
func sndbuf(t testing.TB, nc net.Conn) (n int) {
	t.Helper()
	rc, err := nc.(syscall.Conn).SyscallConn()
	must(t, err)
	must(t, rc.Control(func(fd uintptr) { n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF) }))
	must(t, err)
	return n
}

func tcpPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	a, err = net.Dial("tcp", l.Addr().String())
	must(t, err)
	b, err = l.Accept()
	must(t, err)
	return a, b
}

// links are the kinds of connection that tests run over.
var links = map[string]func(testing.TB) (a, b net.Conn){
	"unix": socketpair,
	"tcp":  tcpPair,
	"pipe": func(testing.TB) (a, b net.Conn) { return net.Pipe() },
	"tls":  tlsPair,
}

var tlsConfig = sync.OnceValue(func() *tls.Config {
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		panic(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(crand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return &tls.Config{
		Certificates:       []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		InsecureSkipVerify: true,
	}
})

func tlsPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	a, b = socketpair(t)
	client, server := tls.Client(a, tlsConfig()), tls.Server(b, tlsConfig())
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	must(t, client.Handshake())
	must(t, await(t, done, "the handshake"))
	return client, server
}

// client is the other side of a served connection.
type client struct {
	r      *rig
	t      testing.TB
	nc     net.Conn
	br     *bufio.Reader
	conn   *conn
	served chan error // what Serve returned; one value, then closed
	cookie uint64
	// discard: data is counted, not kept.
	discard bool
}

func (r *rig) connect(codec *testCodec) *client { return r.connectOver(codec, socketpair) }

func (r *rig) connectOver(codec *testCodec, link func(testing.TB) (a, b net.Conn)) *client {
	return r.connectWith(codec, link, func(*conn) {})
}

// connectWith changes the connection before it is served.
func (r *rig) connectWith(codec *testCodec, link func(testing.TB) (a, b net.Conn), change func(*conn)) *client {
	r.t.Helper()
	a, b := link(r.t)
	c := &client{r: r, t: r.t, nc: a, br: bufio.NewReaderSize(a, 256<<10), served: make(chan error, 1)}
	conn := newConn(r.e, b, codec, r.d)
	change(conn)
	go func() {
		c.served <- r.e.serve(conn)
		close(c.served)
	}()
	eventually(r.t, "the connection is served", func() bool { c.conn = r.connOf(b); return c.conn != nil })
	r.mu.Lock()
	r.clients = append(r.clients, c)
	r.mu.Unlock()
	return c
}

// header is a request without its payload.
func (c *client) header(op Op, f Flags, off, n int64) (b []byte, cookie uint64) {
	c.cookie++
	payload := int64(0)
	if op == OpWrite || op == OpReject {
		payload = n
	}
	return appendRequest(nil, op, f, c.cookie, off, n, payload), c.cookie
}

func (c *client) write(b []byte) {
	c.t.Helper()
	if _, err := c.nc.Write(b); err != nil {
		c.t.Fatalf("client: send: %v", err)
	}
}

// send sends a whole request.
func (c *client) send(op Op, f Flags, off, n int64, payload []byte) uint64 {
	c.t.Helper()
	b, cookie := c.header(op, f, off, n)
	c.write(append(b, payload...))
	return cookie
}

// answer is one whole reply.
type answer struct {
	cookie uint64
	errno  unix.Errno
	text   string
	kind   uint8 // of its last piece
	data   []byte
	holes  int64 // bytes of data that came as holes
	status []backend.Status

	discarded int64
}

// receive reads one whole reply. Pieces of replies to different requests may
// not be mixed by the loop (they may on a real wire).
func (c *client) receive() (answer, error) {
	var a answer
	for first := true; ; first = false {
		var h [repSize]byte
		if _, err := io.ReadFull(c.br, h[:]); err != nil {
			return a, err
		}
		if binary.BigEndian.Uint32(h[:]) != repMagic {
			return a, fmt.Errorf("client: garbage % x", h)
		}
		cookie := binary.BigEndian.Uint64(h[8:])
		off, n := int64(binary.BigEndian.Uint64(h[16:])), int64(binary.BigEndian.Uint64(h[24:]))
		if !first && cookie != a.cookie {
			return a, fmt.Errorf("client: a piece for %d inside the reply to %d", cookie, a.cookie)
		}
		a.cookie, a.kind = cookie, h[4]
		if n < 0 || n > 64<<20 {
			return a, fmt.Errorf("client: length %d", n)
		}
		switch h[4] {
		case kindData, kindHole:
			if c.discard && h[4] == kindData {
				k, err := io.CopyN(io.Discard, c.br, n)
				if a.discarded += k; err != nil {
					return a, err
				}
				break
			}
			if off != int64(len(a.data)) {
				return a, fmt.Errorf("client: piece at %d, want %d", off, len(a.data))
			}
			p := make([]byte, n)
			if h[4] == kindHole {
				a.holes += n
			} else if _, err := io.ReadFull(c.br, p); err != nil {
				return a, err
			}
			a.data = append(a.data, p...)
		case kindDone:
		case kindError:
			p := make([]byte, n)
			if _, err := io.ReadFull(c.br, p); err != nil {
				return a, err
			}
			a.errno, a.text = unix.Errno(binary.BigEndian.Uint16(h[6:])), string(p)
		case kindStatus:
			for range n {
				var e [16]byte
				if _, err := io.ReadFull(c.br, e[:]); err != nil {
					return a, err
				}
				a.status = append(a.status, backend.Status{
					Length: int64(binary.BigEndian.Uint64(e[:])),
					Flags:  backend.StatusFlags(binary.BigEndian.Uint64(e[8:])),
				})
			}
		default:
			return a, fmt.Errorf("client: kind %d", h[4])
		}
		if h[5] == 1 {
			return a, nil
		}
	}
}

// next is receive for replies that must come.
func (c *client) next() answer {
	c.t.Helper()
	must(c.t, c.nc.SetReadDeadline(time.Now().Add(patience)))
	a, err := c.receive()
	if err != nil {
		c.t.Fatalf("client: receive: %v", err)
	}
	return a
}

// do sends a request and waits for its reply.
func (c *client) do(op Op, f Flags, off, n int64, payload []byte) answer {
	c.t.Helper()
	cookie := c.send(op, f, off, n, payload)
	a := c.next()
	if a.cookie != cookie {
		c.t.Fatalf("reply to %d, want %d", a.cookie, cookie)
	}
	return a
}

// ok is do for what must succeed.
func (c *client) ok(op Op, f Flags, off, n int64, payload []byte) answer {
	c.t.Helper()
	a := c.do(op, f, off, n, payload)
	if a.errno != 0 {
		c.t.Fatalf("%v %d+%d: %v (%s)", op, off, n, a.errno, a.text)
	}
	return a
}

// end waits for Serve and returns what it returned.
func (c *client) end() error {
	c.t.Helper()
	return await(c.t, c.served, "the connection to end")
}

// smallBuffers makes Unix sockets that are soon full. TCP is left alone: with
// next to no window the kernel loses packets and waits long before it tries
// again.
func smallBuffers(t testing.TB, ncs ...net.Conn) {
	for _, nc := range ncs {
		if nc, ok := nc.(*net.UnixConn); ok {
			must(t, nc.SetReadBuffer(1))
			must(t, nc.SetWriteBuffer(1))
		}
	}
}

// small is link with small buffers.
func small(link func(testing.TB) (a, b net.Conn)) func(testing.TB) (a, b net.Conn) {
	return func(t testing.TB) (a, b net.Conn) {
		a, b = link(t)
		smallBuffers(t, a, b)
		return a, b
	}
}
