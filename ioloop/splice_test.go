package ioloop

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
)

// roomy is link with room for many replies that nobody takes. It must not carry
// large ones: those set the room anew.
func roomy(link func(testing.TB) (a, b net.Conn)) func(testing.TB) (a, b net.Conn) {
	return func(t testing.TB) (a, b net.Conn) {
		a, b = link(t)
		rc, err := b.(syscall.Conn).SyscallConn()
		must(t, err)
		must(t, rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 64<<20) }))
		must(t, err)
		return a, b
	}
}

// What is spliced stays part of the file, which a write that comes before the client
// takes the reply shows; what may become another block's, as in a qcow2 image, is
// copied, and small reads are, with all that goes out with them.
func TestSpliceOrCopy(t *testing.T) {
	const size = 1 << 20
	for _, c := range []struct {
		name    string
		mapped  bool
		reads   []int64
		spliced bool
		writes  bool // a write comes with them
		alone   bool // no other connection is busy
	}{
		{"eight of 4k", false, []int64{4096, 4096, 4096, 4096, 4096, 4096, 4096, 4096}, true, false, false},
		{"four of 4k", false, []int64{4096, 4096, 4096, 4096}, true, false, false},
		{"three of 4k", false, []int64{4096, 4096, 4096}, false, false, false},
		{"one of 16k", false, []int64{16 << 10}, true, false, false},
		{"eight of 4k, alone", false, []int64{4096, 4096, 4096, 4096, 4096, 4096, 4096, 4096}, true, false, true},
		{"three of 16k, alone", false, []int64{16 << 10, 16 << 10, 16 << 10}, false, false, true},
		{"one of 128k, alone", false, []int64{128 << 10}, true, false, true},
		{"one of 128k", false, []int64{128 << 10}, true, false, false},
		{"with a small one", false, []int64{16 << 10, 512}, false, false, false},
		{"with a write", false, []int64{4096, 4096, 4096, 4096}, false, true, false},
		{"mapped", true, []int64{4096, 4096, 4096, 4096, 16 << 10}, false, false, false},
		{"one of 128k, mapped", true, []int64{128 << 10}, false, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			old := pattern(size, 1)
			r := newRig(t, rigConfig{tmpfs: true, content: old, mapped: c.mapped})
			if !c.alone {
				r.crowded()
			}
			cl := r.connectOver(&testCodec{}, roomy(socketpair))
			cl.ok(OpRead, 0, 0, size, nil) // all of it has been seen
			before := r.d.Stats().Reads
			var wire []byte
			for i, n := range c.reads {
				b, _ := cl.header(OpRead, 0, int64(i)*64<<10, n)
				wire = append(wire, b...)
			}
			first := cl.cookie - uint64(len(c.reads)) + 1
			if c.writes {
				b, _ := cl.header(OpWrite, 0, size-4096, 4096)
				wire = append(append(wire, b...), old[size-4096:]...)
			}
			cl.write(wire)
			eventually(t, "the replies are in the socket", func() bool {
				return r.d.Stats().Reads == before+uint64(len(c.reads)) && isIdle(&cl.conn.out)
			})
			now := bytes.Repeat([]byte{0xa5}, size)
			f, err := os.OpenFile(r.path, os.O_WRONLY, 0)
			must(t, err)
			defer f.Close()
			_, err = f.WriteAt(now, 0)
			must(t, err)
			for range c.reads {
				a := cl.next()
				i := int64(a.cookie - first)
				if i == int64(len(c.reads)) { // the write
					a = cl.next()
					i = int64(a.cookie - first)
				}
				want := old
				if c.spliced {
					want = now
				}
				if off, n := i*64<<10, c.reads[i]; a.errno != 0 || !bytes.Equal(a.data, want[off:off+n]) {
					t.Errorf("read %d of %d: %v, or not what was expected to be in the socket", i, n, a.errno)
				}
			}
		})
	}
}

// crowded makes connections believe that others are busy.
func (r *rig) crowded() {
	r.e.busy.Store(2)
	r.e.nextCount.Store(math.MaxInt64)
}

func isIdle(o *outgoing) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !o.sending
}

// Headers that a socket has are not written again: more replies wait in sockets
// than the memory for headers holds, twice over.
func TestSplicedHeadersStay(t *testing.T) {
	const n, batch = 4096, 8
	want := pattern(1<<20, 1)
	r := newRig(t, rigConfig{tmpfs: true, content: want})
	cl := r.connectOver(&testCodec{}, roomy(socketpair))
	rounds := 2*headsSize/(batch*repSize) + 1
	first := cl.cookie + 1
	for i := range int64(rounds) {
		var wire []byte
		for k := range int64(batch) {
			b, _ := cl.header(OpRead, 0, (i*batch+k)%256*n, n)
			wire = append(wire, b...)
		}
		before := r.d.Stats().Reads
		cl.write(wire)
		eventually(t, "a batch is in the socket", func() bool { return r.d.Stats().Reads == before+batch && isIdle(&cl.conn.out) })
	}
	r.e.pipes.mu.Lock()
	if len(r.e.pipes.free) == 0 || r.e.pipes.open != len(r.e.pipes.free) {
		t.Errorf("%d pipes, %d of them free", r.e.pipes.open, len(r.e.pipes.free))
	}
	r.e.pipes.mu.Unlock()
	for i := range rounds * batch {
		a := cl.next()
		off := int64(i) % 256 * n
		if a.cookie != first+uint64(i) || a.errno != 0 || !bytes.Equal(a.data, want[off:off+n]) {
			t.Fatalf("reply %d of %d: the header of %d, %v, or other bytes", i, rounds*batch, a.cookie-first, a.errno)
		}
	}
}

// What is spliced goes out by the pipe, however many requests there are, and no
// deeper reply buffer is taken for it.
func TestSpliceByThePipe(t *testing.T) {
	for _, c := range []struct{ size, most int64 }{{4096, 8}, {16 << 10, 3}, {32 << 10, 1}} {
		t.Run(fmt.Sprint(c.size), func(t *testing.T) {
			const count = 24
			want := pattern(int(count*c.size), 1)
			r := newRig(t, rigConfig{tmpfs: true, content: want})
			r.crowded()
			h := pageHook{files: never}
			h.before = func(segs [][]byte) (int, error, bool) {
				if replies := int64(len(segs) / 2); replies != c.most {
					t.Errorf("%d replies in a send, want %d", replies, c.most)
				}
				if room := int64(cap(segs[0])); room > bufferCost(classOf(replySize)) {
					t.Errorf("a reply buffer of %d bytes", room)
				}
				return 0, nil, false
			}
			cl := r.connectWith(&testCodec{}, roomy(socketpair), h.install)
			for range 3 {
				var wire []byte
				for i := range int64(count) {
					b, _ := cl.header(OpRead, 0, i*c.size, c.size)
					wire = append(wire, b...)
				}
				cl.write(wire)
				for i := range int64(count) {
					if a := cl.next(); a.errno != 0 || !bytes.Equal(a.data, want[i*c.size:(i+1)*c.size]) {
						t.Fatalf("at %d: %v, or other bytes", i*c.size, a.errno)
					}
				}
			}
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.pipe == nil {
				t.Error("nothing was spliced")
			}
		})
	}
}

// A read of which only a part is in memory leaves nothing to be spliced.
func TestSpliceAllOrNothing(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true, content: pattern(1<<20, 1)})
	a, b := socketpair(t)
	defer a.Close()
	defer b.Close()
	c := newConn(r.e, b, &testCodec{}, r.d)
	defer c.lane.Close()
	var p backend.Plan
	must(t, r.img.Map(&p, 0, 16<<10, 0))
	defer r.img.Unmap(&p)
	dst := make([]byte, 32<<10)
	must(t, c.gather(&p, dst, 0))
	gaps, spliced := len(c.gaps), c.spliced
	if gaps != 1 || spliced.bytes != 16<<10 {
		t.Fatalf("%d gaps, %+v", gaps, spliced)
	}
	p.Extents = append(p.Extents, backend.Extent{Kind: backend.Opaque, Length: 16 << 10})
	if err := c.gather(&p, dst, 0); err != backend.ErrWait {
		t.Fatal(err)
	}
	if len(c.gaps) != gaps || c.spliced != spliced {
		t.Errorf("%d gaps, %+v, want %d, %+v", len(c.gaps), c.spliced, gaps, spliced)
	}
}

// pipeTo is a pipe and the socket to splice into, at whose other end a is.
func pipeTo(t *testing.T) (s *pipes, p *pipe, a net.Conn, sock *socket) {
	s = new(pipes)
	t.Cleanup(s.close)
	if p = s.get(); p == nil {
		t.Fatal("no pipe")
	}
	a, b := socketpair(t)
	t.Cleanup(func() { a.Close(); b.Close() })
	return s, p, a, newTransport(b).(*socket)
}

// A socket that takes only part leaves the rest in the pipe, which the next send
// must not see.
func TestPipesStartEmpty(t *testing.T) {
	s, p, a, sock := pipeTo(t)
	smallBuffers(t, a, sock.nc)
	data := pattern(256<<10, 1)
	sent, err := sock.splicePages(p, [][]byte{[]byte("head"), data}, false)
	if err != errAgain || sent == 0 || sent >= len(data) {
		t.Fatalf("%d of %d sent, %v: want part of them", sent, len(data), err)
	}
	got := make([]byte, sent)
	_, err = io.ReadFull(a, got)
	must(t, err)
	if !bytes.Equal(got, append([]byte("head"), data...)[:sent]) {
		t.Error("other bytes")
	}
	s.put(p)
	if p = s.get(); p == nil || p.held != 0 {
		t.Fatalf("the pipe was not emptied: %+v", p)
	}
	if sent, err = sock.splicePages(p, [][]byte{[]byte("next")}, false); sent != 4 || err != nil {
		t.Fatalf("%d, %v", sent, err)
	}
	s.put(p)
	_, err = io.ReadFull(a, got[:4])
	must(t, err)
	if string(got[:4]) != "next" {
		t.Errorf("%q after a send that was cut off", got[:4])
	}
}

// Headers lie across pages, and pages of the file are taken from anywhere, so that
// what one pipe takes is sooner full than was thought.
func TestSpliceAnyBytes(t *testing.T) {
	s, p, a, sock := pipeTo(t)
	data := pattern(64<<10, 1) // not written while it is referred to
	rnd := rand.New(rand.NewPCG(1, 1))
	for i := range 600 {
		var segs [][]byte
		between := 0
		for range 1 + rnd.IntN(8) {
			head := pattern(rnd.IntN(64), uint64(i)) // or none
			off := rnd.IntN(len(data) - 5000)
			segs, between = append(segs, head, data[off:off+1+rnd.IntN(5000)]), between+len(head)
		}
		if !p.room(between) {
			t.Fatal("no room for headers")
		}
		want := bytes.Join(segs, nil)
		if sent, err := sock.splicePages(p, segs, false); sent != len(want) || err != nil {
			t.Fatalf("%d of %d sent, %v", sent, len(want), err)
		}
		for k := 0; k < len(segs); k += 2 {
			clear(segs[k]) // its buffer is used again
		}
		got := make([]byte, len(want))
		_, err := io.ReadFull(a, got)
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Fatalf("send %d: other bytes", i)
		}
	}
	s.put(p)
}

// A file that becomes shorter in the act gives what it had, and then ends the
// connection: the header before what is gone is out.
func TestSpliceTruncated(t *testing.T) {
	const n, count, left = 4096, 8, 5
	want := pattern(count*n, 1)
	r := newRig(t, rigConfig{tmpfs: true, content: want})
	h := pageHook{splices: always}
	h.before = func([][]byte) (int, error, bool) {
		must(t, os.Truncate(r.path, left*n))
		return 0, nil, false
	}
	c := r.connectWith(&testCodec{}, socketpair, h.install)
	var wire []byte
	for i := range int64(count) {
		b, _ := c.header(OpRead, 0, i*n, n)
		wire = append(wire, b...)
	}
	c.write(wire)
	for i := range left {
		if a := c.next(); a.errno != 0 || !bytes.Equal(a.data, want[i*n:(i+1)*n]) {
			t.Errorf("reply %d: %v, or other bytes", i, a.errno)
		}
	}
	if err := c.end(); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	if s := r.d.Stats(); s.Reads != left {
		t.Errorf("%d reads, want %d", s.Reads, left)
	}
}

// A client that is gone is an error of the socket, not of the pages.
func TestSpliceToNobody(t *testing.T) {
	s, p, a, sock := pipeTo(t)
	a.Close()
	sent, err := sock.splicePages(p, [][]byte{[]byte("head"), pattern(4096, 1)}, false)
	if sent != 0 || !errors.Is(err, unix.EPIPE) {
		t.Errorf("%d, %v", sent, err)
	}
	s.put(p)
}

// There are no more pipes than threads that run, and none are left when the
// engine has been closed. Without one what was to be spliced is copied.
func TestPipesAreFew(t *testing.T) {
	var s pipes
	var taken []*pipe
	for {
		p := s.get()
		if p == nil {
			break
		}
		if taken = append(taken, p); len(taken) > mostPipes {
			t.Fatal("too many pipes")
		}
	}
	for _, p := range taken {
		s.put(p)
	}
	s.close()
	for _, p := range taken {
		if _, err := unix.FcntlInt(uintptr(p.r), unix.F_GETFD, 0); err == nil {
			t.Error("a pipe is left open")
		}
		if err := unix.Msync(p.heads, unix.MS_ASYNC); err != unix.ENOMEM {
			t.Errorf("a pipe's memory is left: %v", err)
		}
	}
	if s.get() != nil {
		t.Error("a pipe after close")
	}
	for _, size := range []int64{4096, 64 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			want := pattern(1<<20, 1)
			r := newRig(t, rigConfig{tmpfs: true, content: want})
			r.e.pipes.off.Store(true)
			h := pageHook{splices: always}
			c := r.connectWith(&testCodec{}, socketpair, h.install)
			for i := range int64(4) {
				if a := c.ok(OpRead, 0, i*size, size, nil); !bytes.Equal(a.data, want[i*size:(i+1)*size]) {
					t.Error("other bytes")
				}
			}
			if h.pipe != nil || h.count() == 0 {
				t.Errorf("%d sends by reference, spliced: %v", h.count(), h.pipe != nil)
			}
		})
	}
}

// Descriptors that are used up for a while stop neither the pipes there are nor
// those to come.
func TestPipesAfterALack(t *testing.T) {
	var s pipes
	defer s.close()
	p := s.get()
	if p == nil {
		t.Fatal("no pipe")
	}
	withoutDescriptors(t, func() {
		if runtime.GOMAXPROCS(0) > 1 && s.get() != nil {
			t.Fatal("a pipe without descriptors")
		}
		s.put(p)
		if s.get() != p {
			t.Error("the pipe that there is was not used")
		}
		p.held = 1 // as after a send that was cut off
		s.put(p)
		if s.get() != nil {
			t.Error("a pipe without descriptors")
		}
	})
	if s.get() != nil {
		t.Error("a pipe is tried for at once")
	}
	s.next = 0
	if p = s.get(); p == nil {
		t.Fatal("no pipe once there are descriptors")
	}
	s.put(p)
}

// withoutDescriptors runs fn while this process can open nothing.
func withoutDescriptors(t *testing.T, fn func()) {
	var old unix.Rlimit
	must(t, unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &old))
	must(t, unix.Prlimit(0, unix.RLIMIT_NOFILE, &unix.Rlimit{Max: old.Max}, nil))
	defer func() { must(t, unix.Prlimit(0, unix.RLIMIT_NOFILE, &old, nil)) }()
	fn()
}

// Where a filter of system calls hides vmsplice nothing is spliced, and a send that
// has begun to is no end of the connection.
func TestSpliceForbidden(t *testing.T) {
	if !maySplice() {
		t.Fatal("splicing is forbidden here already")
	}
	s, p, _, sock := pipeTo(t)
	defer s.put(p)
	for _, call := range []uint32{unix.SYS_VMSPLICE, unix.SYS_SPLICE} {
		await(t, background(func() {
			runtime.LockOSThread() // and never unlocked: the thread ends, and the filter with it
			if err := refuse(call); err != nil {
				t.Error(err)
				return
			}
			if maySplice() {
				t.Errorf("%d: splicing is thought to be allowed", call)
			}
			if call != unix.SYS_VMSPLICE {
				return
			}
			n, err := sock.splicePages(p, [][]byte{[]byte("head"), pattern(4096, 1)}, false)
			if n != 0 || err != errFault {
				t.Errorf("%d, %v, want a fault", n, err)
			}
		}), "the thread without splicing")
	}
}

// refuse has the system call fail with EPERM in this thread.
func refuse(call uint32) error {
	const load, equal, answer = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	const allow, refuse = 0x7fff0000, 0x00050000 // SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
	filter := []unix.SockFilter{
		{Code: load, K: 0}, // the number of the system call
		{Code: equal, K: call, Jf: 1},
		{Code: answer, K: refuse | uint32(unix.EPERM)},
		{Code: answer, K: allow},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0)
}
