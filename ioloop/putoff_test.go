package ioloop

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/internal/testfs"
	"github.com/nbd-export/nbd-export/state"
)

// spy counts what is received straight into the file that it watches, and sees that it
// is claimed then.
type spy struct {
	peeker
	t      testing.TB
	f      *backend.File
	file   []byte
	placed int // bytes
}

func (s *spy) take(iov []unix.Iovec) (int, error) {
	lo := uintptr(unsafe.Pointer(unsafe.SliceData(s.file)))
	lengths := make([]int, len(iov))
	for i := range iov {
		if b := uintptr(unsafe.Pointer(iov[i].Base)); b >= lo && b < lo+uintptr(len(s.file)) {
			lengths[i] = int(iov[i].Len)
			for _, at := range []uintptr{b - lo, b - lo + uintptr(lengths[i]) - 1} {
				if c := s.f.Claim(int64(at), 1); c.Try() {
					s.t.Errorf("received at %d, which is not claimed", at)
					c.Release()
				}
			}
		}
	}
	n, err := s.peeker.take(iov)
	rest := n
	for i := range iov {
		k := min(rest, int(iov[i].Len))
		s.placed += min(k, lengths[i])
		rest -= k
	}
	return n, err
}

// driven is a connection whose receiving goroutine is the test.
type driven struct {
	*client
	c   *conn
	spy *spy
}

func (r *rig) drive(link func(testing.TB) (a, b net.Conn)) *driven {
	a, b := link(r.t)
	for _, nc := range []net.Conn{a, b} {
		if u, ok := nc.(*net.UnixConn); ok {
			must(r.t, u.SetWriteBuffer(2<<20))
		}
	}
	c := newConn(r.e, b, &testCodec{}, r.d)
	d := &driven{client: &client{r: r, t: r.t, nc: a}, c: c}
	if c.peeker != nil {
		d.spy = r.spyOn(c)
	}
	r.t.Cleanup(func() {
		c.out.fail(net.ErrClosed)
		c.releaseBuffers()
		c.lane.Close()
		a.Close()
	})
	return d
}

// spyOn counts what c receives into the image.
func (r *rig) spyOn(c *conn) *spy {
	var p backend.Plan
	must(r.t, r.raw.PrepareUnseen(&p, 0, r.size))
	f := p.Extents[0].File
	s := &spy{peeker: c.peeker, t: r.t, f: f, file: f.Place(0, r.size)}
	r.raw.Abort(&p)
	c.peeker = s
	return s
}

// batch sends writes of n bytes at each of offs at once, carries them out and
// returns their answers.
func (d *driven) batch(seed uint64, n int64, offs ...int64) (answers []answer, payload []byte) {
	d.t.Helper()
	payload = pattern(int(n), seed)
	var b []byte
	for _, off := range offs {
		h, _ := d.header(OpWrite, 0, off, n)
		b = append(append(b, h...), payload...)
	}
	d.write(b)
	eventually(d.t, "all is there", func() bool { return d.c.peeker.pending() == len(b) }) // TCP holds little
	must(d.t, d.c.nc.SetReadDeadline(time.Now().Add(patience)))
	for done := uint64(0); done < uint64(len(offs)); {
		before := d.cookies()
		must(d.t, d.c.fill())
		must(d.t, d.c.process())
		d.c.flush()
		await(d.t, d.c.tasksDone(), "what is with a worker")
		done += d.cookies() - before
	}
	var raw []byte
	for len(answers) < len(offs) {
		must(d.t, d.nc.SetReadDeadline(time.Now().Add(patience)))
		chunk := make([]byte, 64<<10)
		k, err := d.nc.Read(chunk)
		must(d.t, err)
		raw = append(raw, chunk[:k]...)
		answers = parseAnswers(raw)
	}
	return answers, payload
}

// cookies is how many writes were answered.
func (d *driven) cookies() uint64 {
	s := d.r.d.Stats()
	return s.Writes + s.Errors
}

func parseAnswers(b []byte) (all []answer) {
	c := &client{br: bufio.NewReader(bytes.NewReader(b))}
	for {
		a, err := c.receive()
		if err != nil {
			return all
		}
		all = append(all, a)
	}
}

func wantAll(t *testing.T, answers []answer, errno unix.Errno) {
	t.Helper()
	for _, a := range answers {
		if a.errno != errno {
			t.Fatalf("%v (%s), want %v", a.errno, a.text, errno)
		}
	}
}

// Payloads go from the socket to where they belong; where there is no page any
// more the client gets EIO.
func TestReceivedInPlace(t *testing.T) {
	for _, link := range []string{"unix", "tcp"} {
		for _, n := range []int64{1, 512, 4096, 5000, smallPayload, 64 << 10, 1 << 20} {
			if link == "tcp" && n > 5000 {
				continue // does not fit what the sockets hold
			}
			t.Run(fmt.Sprintf("%s/%d", link, n), func(t *testing.T) {
				r := newRig(t, rigConfig{tmpfs: true, size: 4 << 20})
				d := r.drive(links[link])
				if most := int64(sndbuf(t, d.nc)) / 2; n > most {
					t.Logf("payloads of %d bytes: the socket holds no larger ones, by net.core.wmem_max", most)
					n = most
				}
				offs := []int64{1 << 20, 0, 3 << 20}
				if n > smallPayload {
					offs = offs[:1]
				}
				check := func(seed uint64) {
					answers, payload := d.batch(seed, n, offs...)
					wantAll(t, answers, 0)
					content := r.content()
					for _, off := range offs {
						if !bytes.Equal(content[off:off+n], payload) {
							t.Fatalf("other bytes at %d", off)
						}
					}
				}
				check(1) // shows that it pays
				for seed := range uint64(3) {
					d.spy.placed = 0
					check(2 + seed)
					if want := int(n) * len(offs); d.spy.placed != want {
						t.Fatalf("%d bytes received in place, want %d", d.spy.placed, want)
					}
				}
				must(t, os.Truncate(r.path, 0))
				answers, _ := d.batch(9, n, offs...)
				wantAll(t, answers, unix.EIO)
				if st, err := os.Stat(r.path); err != nil || st.Size() != 0 {
					t.Fatalf("%v, %v: it was grown back", st, err)
				}
				must(t, os.Truncate(r.path, r.size))
				check(10)
			})
		}
	}
}

// What would find no page of the file there is written.
func TestFreshIsNotReceivedInPlace(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true, size: 4 << 20})
	d := r.drive(socketpair)
	for seed := range uint64(3) {
		r.img.fresh = seed == 1
		first, _ := d.batch(2*seed, 4096, 0) // shows whether it pays
		wantAll(t, first, 0)
		d.spy.placed = 0
		answers, payload := d.batch(2*seed+1, 4096, 8192, 1<<20)
		wantAll(t, answers, 0)
		for _, off := range []int64{8192, 1 << 20} {
			if !bytes.Equal(r.content()[off:off+4096], payload) {
				t.Errorf("other bytes at %d", off)
			}
		}
		if want := 2 * 4096; r.img.fresh && d.spy.placed != 0 || !r.img.fresh && d.spy.placed != want {
			t.Errorf("fresh %v: %d bytes received in place", r.img.fresh, d.spy.placed)
		}
	}
}

// A full file system is told to the client, and what was written stays.
func TestReceivedOnFullTmpfs(t *testing.T) {
	for _, n := range []int64{4096, 256 << 10} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mount("none", dir, "tmpfs", 0, "size=2m"); err != nil {
				t.Fatalf("this test mounts a tmpfs, as root: %v", err)
			}
			t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
			r := newRig(t, rigConfig{dir: dir, size: 8 << 20})
			d := r.drive(socketpair)
			granted := 0
			for off := int64(0); off < 4<<20; off += n {
				answers, payload := d.batch(uint64(off/n), n, off)
				switch answers[0].errno {
				case 0:
					granted++
					if got := r.content()[off : off+n]; !bytes.Equal(got, payload) {
						t.Fatalf("other bytes at %d", off)
					}
				case unix.ENOSPC:
				default:
					t.Fatalf("%+v", answers[0])
				}
			}
			if granted == 0 || granted == int(4<<20/n) || d.spy.placed == 0 {
				t.Fatalf("%d granted, %d bytes in place", granted, d.spy.placed)
			}
			must(t, os.Truncate(r.path, 0)) // room for the owner record
		})
	}
}

// What lies side by side goes in one system call; each write has its own
// answer.
func TestAdjacentWrites(t *testing.T) {
	for name, cfg := range map[string]rigConfig{"disk": {}, "tmpfs": {tmpfs: true}} {
		for _, link := range []string{"unix", "pipe"} {
			t.Run(name+"/"+link, func(t *testing.T) {
				cfg.size = 1 << 20
				r := newRig(t, cfg)
				c := r.connectOver(&testCodec{}, links[link])
				var wire, want []byte
				offs := []int64{0, 4096, 8192, 40960, 45056, 12288, 16384, 4096, 8192}
				want = make([]byte, r.size)
				for i, off := range offs {
					p := pattern(4096, uint64(i))
					h, _ := c.header(OpWrite, 0, off, 4096)
					wire = append(append(wire, h...), p...)
					if !slices.Contains(offs[i+1:], off) {
						copy(want[off:], p)
					}
				}
				// The end of the image, and past it.
				h, _ := c.header(OpWrite, 0, r.size-4096, 4096)
				wire = append(append(wire, h...), contents[:4096]...)
				copy(want[r.size-4096:], contents[:4096])
				h, past := c.header(OpWrite, 0, r.size, 4096)
				wire = append(append(wire, h...), contents[:4096]...)
				sent := background(func() { c.write(wire) })
				for range len(offs) + 2 {
					if a := c.next(); (a.errno == 0) == (a.cookie == past) {
						t.Fatalf("%+v", a)
					}
				}
				await(t, sent, "the client")
				if !bytes.Equal(r.content(), want) {
					t.Fatal("other bytes")
				}
			})
		}
	}
}

// A vector write of which the kernel takes a part is ended piece by piece.
func TestShortVector(t *testing.T) {
	const page = 4096
	memory, err := unix.Mmap(-1, 0, 4*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	must(t, err)
	defer func() { must(t, unix.Munmap(memory)) }()
	copy(memory, contents)
	must(t, unix.Mprotect(memory[2*page:3*page], unix.PROT_NONE))
	r := newRig(t, rigConfig{size: 1 << 20})
	g := new(puts)
	run := make([]putOff, 4)
	for i := range run {
		w := &run[i]
		w.payload = memory[i*page:][:page]
		must(t, r.raw.PrepareUnseen(&w.plan, int64(i*page), page))
	}
	g.storeRun(run)
	for i, w := range run {
		if (w.err != nil) != (i == 2) {
			t.Errorf("write %d: %v", i, w.err)
		}
		r.raw.Abort(&w.plan)
	}
	got := r.content()
	if !bytes.Equal(got[:2*page], contents[:2*page]) || !bytes.Equal(got[3*page:4*page], contents[3*page:4*page]) {
		t.Error("other bytes")
	}
}

// While the image is inactive this process has no writable map of it, and what
// was put off has ended before.
func TestNoPlaceWhileInactive(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true, size: 1 << 20})
	mapped := func() bool {
		b, err := os.ReadFile("/proc/self/maps")
		must(t, err)
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 5 && f[5] == r.path && strings.Contains(f[1], "w") {
				return true
			}
		}
		return false
	}
	if mapped() {
		t.Error("a map before anything is written")
	}
	c := r.connect(&testCodec{})
	stop := make(chan struct{})
	writing := background(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			var b []byte
			for i := range int64(8) {
				h, _ := c.header(OpWrite, 0, i*8192, 4096)
				b = append(append(b, h...), contents[:4096]...)
			}
			c.write(b)
			for range 8 {
				if a := c.next(); a.errno != 0 && a.errno != unix.EPERM {
					t.Errorf("%+v", a)
				}
			}
		}
	})
	for range 20 {
		for !mapped() { // as soon as something is written
			runtime.Gosched()
		}
		r.inactivate()
		if mapped() {
			t.Error("a writable map while it is inactive")
		}
		r.activate()
	}
	close(stop)
	await(t, writing, "the client")
	if s := r.m.Status().State; s != state.Active {
		t.Error(s)
	}
}

// A client that dies in the middle of what was only looked at.
func TestVanishWhileLookedAt(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true, size: 1 << 20})
	c := r.connect(&testCodec{})
	for range 3 {
		c.ok(OpWrite, 0, 0, 4096, contents[:4096])
	}
	h, _ := c.header(OpWrite, 0, 0, 4096)
	c.write(append(h, contents[:100]...))
	c.nc.Close()
	if err := c.end(); err == nil || err == io.EOF {
		t.Fatalf("%v: it died inside a payload", err)
	}
}

// The answers to writes that were put off may fill the reply buffer that they
// take, with long errors: what comes behind them finds room all the same.
func TestAnswersOfPutOffFillReply(t *testing.T) {
	dir := testfs.Memory(t)
	for range 5 { // errors name the image
		dir = filepath.Join(dir, strings.Repeat("d", 200))
	}
	must(t, os.MkdirAll(dir, 0o700))
	r := newRig(t, rigConfig{dir: dir, content: pattern(1<<20, 1)})
	d := r.drive(socketpair)
	for seed := range uint64(2) { // shows that it pays to receive in place
		answers, _ := d.batch(seed, 512, 1<<10, 3<<10)
		wantAll(t, answers, 0)
	}
	d.c.releaseBuffers() // it was at rest
	must(t, os.Truncate(r.path, 512<<10))
	var wire []byte
	const writes = 55
	for i := range int64(writes) {
		h, _ := d.header(OpWrite, 0, 600<<10+i*1024, 512)
		wire = append(append(wire, h...), contents[:512]...)
	}
	h, _ := d.header(OpRead, 0, 0, inlineRead)
	wire = append(wire, h...)
	d.write(wire)
	eventually(t, "all is there", func() bool { return d.c.peeker.pending() == len(wire) })
	var answers []answer
	read := background(func() {
		br := bufio.NewReader(d.nc)
		for range writes + 1 {
			a, err := (&client{br: br}).receive()
			if err != nil {
				t.Error(err)
				return
			}
			answers = append(answers, a)
		}
	})
	must(t, d.c.fill())
	must(t, d.c.process())
	d.c.flush()
	await(t, read, "the replies")
	for i, a := range answers {
		if i < writes && a.errno != unix.EIO || i == writes && !bytes.Equal(a.data, r.content()[:inlineRead]) {
			t.Fatalf("%d: %v, %d bytes", i, a.errno, len(a.data))
		}
	}
}
