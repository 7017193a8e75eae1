package ioloop

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

// readSizes are around every limit that decides how a read is answered.
var readSizes = []int64{1, 512, 4096, 5000, 32 << 10, 32<<10 + 1, 64 << 10, 256 << 10, 256<<10 + 1, 1 << 20}

// pageHook sees, and changes, what is sent by reference.
type pageHook struct {
	pageSender
	mu    sync.Mutex
	calls int
	// before may answer in place of the socket.
	before     func(segs [][]byte) (n int, err error, done bool)
	beforeFile func()
	files      preference
	splices    preference
	pipe       *pipe // of the last splicePages
}

type preference int

const (
	asItIs preference = iota
	never
	always
)

func (h *pageHook) sendPages(segs [][]byte, long bool) (int, error) {
	if n, err, done := h.answer(segs, nil); done {
		return n, err
	}
	return h.pageSender.sendPages(segs, long)
}

func (h *pageHook) splicePages(p *pipe, segs [][]byte, long bool) (int, error) {
	if n, err, done := h.answer(segs, p); done {
		return n, err
	}
	return h.pageSender.splicePages(p, segs, long)
}

// answer notes a send of pages, by p if that is not nil, and answers it if before does.
func (h *pageHook) answer(segs [][]byte, p *pipe) (n int, err error, done bool) {
	h.mu.Lock()
	h.calls++
	if p != nil {
		h.pipe = p
	}
	before := h.before
	h.mu.Unlock()
	if before == nil {
		return 0, nil, false
	}
	return before(segs)
}

func (h *pageHook) prefersSplice(n int64, inTurns bool) bool {
	switch h.splices {
	case never:
		return false
	case always:
		return true
	}
	return h.pageSender.prefersSplice(n, inTurns)
}

func (h *pageHook) sendFile(head []byte, fd int, off, n int64, long bool) (int, error) {
	h.mu.Lock()
	h.calls++
	before := h.beforeFile
	h.mu.Unlock()
	if before != nil {
		before()
	}
	return h.pageSender.sendFile(head, fd, off, n, long)
}

func (h *pageHook) fileWay(n int64, more bool) fileWay {
	switch h.files {
	case never:
		return notAsFile
	case always:
		return asFile
	}
	return h.pageSender.fileWay(n, more)
}

func (h *pageHook) takesFiles(n int64) bool { return h.files != never && h.pageSender.takesFiles(n) }

// sendOnly sends pages as the hook was asked to.
func (h *pageHook) sendOnly(pages []byte) (int, error) {
	if h.pipe != nil {
		return h.pageSender.splicePages(h.pipe, [][]byte{nil, pages}, false)
	}
	return h.pageSender.sendPages([][]byte{pages}, false)
}

func (h *pageHook) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls
}

func (h *pageHook) install(c *conn) { h.pageSender, c.out.pages = c.out.pages, h }

func onPages(t *testing.T, fn func(t *testing.T, tmpfs bool, link func(testing.TB) (a, b net.Conn), codec *testCodec)) {
	for _, tmpfs := range []bool{true, false} {
		for _, name := range []string{"unix", "tcp"} {
			for _, chunked := range []bool{false, true} {
				t.Run(fmt.Sprintf("tmpfs=%v/%s/chunked=%v", tmpfs, name, chunked), func(t *testing.T) {
					fn(t, tmpfs, links[name], &testCodec{chunked: chunked})
				})
			}
		}
	}
}

// What is in the page cache is sent by reference, whatever its size and place,
// alone or with others, by sockets that take all of it or little.
func TestReadByReference(t *testing.T) {
	onPages(t, func(t *testing.T, tmpfs bool, link func(testing.TB) (a, b net.Conn), codec *testCodec) {
		want := pattern(3<<20+777, 1)
		r := newRig(t, rigConfig{tmpfs: tmpfs, content: want})
		defer testfs.KeepCached(t, r.path)()
		for i, how := range []struct {
			files, splices preference
			small          bool
		}{
			{asItIs, asItIs, false}, {never, never, false}, {never, never, true},
			{never, always, false}, {never, always, true}, {always, never, false}, {always, never, true},
		} {
			link := link
			if how.small {
				link = small(link)
			}
			h := pageHook{files: how.files, splices: how.splices}
			c := r.connectWith(codec, link, h.install)
			rnd := rand.New(rand.NewPCG(1, 1))
			var missed []int64
			for _, n := range readSizes {
				await(t, c.conn.out.flushed(), "the writer of the last reply")
				before := h.count()
				off := rnd.Int64N(int64(len(want)) - n + 1)
				if a := c.ok(OpRead, 0, off, n, nil); !bytes.Equal(a.data, want[off:off+n]) {
					t.Fatalf("%d+%d: other bytes", off, n)
				}
				if h.count() != before+1 {
					missed = append(missed, n)
				}
			}
			if len(missed) > 0 {
				t.Errorf("connection %d: reads of %d bytes were not by reference", i, missed)
			}
			for range 20 {
				ask := map[uint64][2]int64{}
				var wire []byte
				for range 1 + rnd.IntN(60) {
					n := min(readSizes[rnd.IntN(len(readSizes))], 64<<10)
					off := rnd.Int64N(int64(len(want)) - n + 1)
					b, cookie := c.header(OpRead, 0, off, n)
					wire, ask[cookie] = append(wire, b...), [2]int64{off, n}
				}
				sent := background(func() { c.write(wire) })
				for len(ask) > 0 {
					a := c.next()
					q, ok := ask[a.cookie]
					if !ok || a.errno != 0 || !bytes.Equal(a.data, want[q[0]:q[0]+q[1]]) {
						t.Fatalf("%v: %v, or other bytes", q, a.errno)
					}
					delete(ask, a.cookie)
				}
				await(t, sent, "the requests to be sent")
			}
		}
		if s := r.d.Stats(); s.Errors != 0 || s.BytesRead == 0 {
			t.Errorf("%+v", s)
		}
	})
}

// TLS encrypts what it sends, which would touch the pages.
func TestStreamsGetNoReferences(t *testing.T) {
	for name, link := range links {
		a, b := link(t)
		_, can := newTransport(b).(pageSender)
		if want := name == "unix" || name == "tcp"; can != want {
			t.Errorf("%s: %v", name, can)
		}
		a.Close()
		b.Close()
	}
}

// A file that becomes shorter while it is served gives EIO for what is gone,
// for reads of any size, and the rest stays readable.
func TestTruncatedUnderneath(t *testing.T) {
	onPages(t, func(t *testing.T, tmpfs bool, link func(testing.TB) (a, b net.Conn), codec *testCodec) {
		const size = 4 << 20
		want := pattern(size, 1)
		for _, end := range []int64{2<<20 + 1000, 2 << 20} {
			r := newRig(t, rigConfig{tmpfs: tmpfs, content: want})
			c := r.connectOver(codec, link)
			for _, n := range readSizes { // all of it has been mapped and seen
				c.ok(OpRead, 0, size-n, n, nil)
				c.ok(OpRead, 0, 0, n, nil)
			}
			before := r.d.Stats()
			must(t, os.Truncate(r.path, end))
			failed := uint64(0)
			for _, n := range readSizes {
				for _, off := range []int64{size - n, end, end - n/2, end - n + 1} {
					a := c.do(OpRead, 0, off, n, nil)
					if off+n > end && a.errno != unix.EIO || off+n <= end && a.errno != 0 {
						t.Fatalf("%d+%d of %d: %v (%s)", off, n, end, a.errno, a.text)
					}
					if a.errno != 0 {
						failed++
					}
				}
				if a := c.ok(OpRead, 0, end-n, n, nil); !bytes.Equal(a.data, want[end-n:end]) {
					t.Fatalf("%d before the end: other bytes", n)
				}
			}
			// Good ones and bad ones in one batch.
			var wire []byte
			for i := range int64(40) {
				b, _ := c.header(OpRead, 0, i*100<<10, 4096)
				wire = append(wire, b...)
			}
			first := c.cookie - 39
			c.write(wire)
			for range 40 {
				a := c.next()
				off := int64(a.cookie-first) * 100 << 10
				switch {
				case off+4096 > end:
					failed++
					if a.errno != unix.EIO {
						t.Errorf("at %d: %v", off, a.errno)
					}
				case a.errno != 0 || !bytes.Equal(a.data, want[off:off+4096]):
					t.Errorf("at %d: %v, or other bytes", off, a.errno)
				}
			}
			if s := r.d.Stats(); s.Errors-before.Errors != failed {
				t.Errorf("%d errors counted, want %d", s.Errors-before.Errors, failed)
			}
		}
	})
}

// Pages that go while they are being sent: where no byte of the reply has been
// sent it becomes an error, otherwise the connection ends; others on it, and
// the process, go on.
func TestTruncatedInTheAct(t *testing.T) {
	for _, n := range []int64{4096, 32 << 10, 64 << 10, 1 << 20} {
		for i, begun := range []int{0, 1, repSize, repSize + 1, 0} {
			splices := never
			if i == 4 {
				splices = always
			}
			t.Run(fmt.Sprintf("%d/begun=%d/splice=%v", n, begun, splices == always), func(t *testing.T) {
				r := newRig(t, rigConfig{tmpfs: true, content: pattern(4<<20, 1)})
				h := pageHook{splices: splices}
				c := r.connectWith(&testCodec{}, socketpair, h.install)
				c.ok(OpRead, 0, 0, n, nil)
				await(t, c.conn.out.flushed(), "the writer of the first reply")
				h.mu.Lock()
				h.before = func(segs [][]byte) (int, error, bool) {
					must(t, os.Truncate(r.path, 0))
					if begun == 0 {
						n, err := h.sendOnly(segs[1])
						if n != 0 || err != errFault {
							t.Errorf("%d, %v, want a fault", n, err)
						}
						return 0, errFault, true
					}
					part := segs[0]
					if begun > len(part) {
						part = append(part[:len(part):len(part)], 0)
					}
					n, err := h.pageSender.sendPages([][]byte{part[:begun]}, false)
					return n, err, true
				}
				h.mu.Unlock()
				if begun == 0 {
					if a := c.do(OpRead, 0, 0, n, nil); a.errno != unix.EIO {
						t.Fatal(a.errno)
					}
				} else {
					c.send(OpRead, 0, 0, n, nil)
					if err := c.end(); !errors.Is(err, unix.EIO) {
						t.Fatal(err)
					}
				}
				s := r.d.Stats()
				if s.Reads != 1 || s.BytesRead != uint64(n) {
					t.Errorf("%d reads of %d bytes, want the first", s.Reads, s.BytesRead)
				}
				other := r.connect(&testCodec{})
				if a := other.do(OpRead, 0, 0, 100, nil); a.errno != unix.EIO {
					t.Errorf("another connection: %v", a.errno)
				}
			})
		}
	}
}

// A file that ends while it is sent ends the connection: the header is out.
func TestTruncatedWhileSendingFile(t *testing.T) {
	for _, end := range []int64{0, 1000, 128 << 10} {
		r := newRig(t, rigConfig{tmpfs: true, content: pattern(1<<20, 1)})
		h := pageHook{files: always, beforeFile: func() { must(t, os.Truncate(r.path, end)) }}
		c := r.connectWith(&testCodec{}, socketpair, h.install)
		c.send(OpRead, 0, 0, 256<<10, nil)
		if err := c.end(); !errors.Is(err, unix.EIO) {
			t.Errorf("end %d: %v", end, err)
		}
		if s := r.d.Stats(); s.Reads != 0 || s.BytesRead != 0 {
			t.Errorf("%+v", s)
		}
	}
}

// Files are sent where that is worth it: on Unix sockets with room, which they
// are given, to clients that have something to do.
func TestFileWay(t *testing.T) {
	a, b := socketpair(t)
	defer a.Close()
	before := sndbuf(t, b)
	s := newTransport(b).(*socket)
	if s.fileWay(fileMin-1, true) != notAsFile || sndbuf(t, b) != before {
		t.Error("small replies are sent by file, or have changed the socket")
	}
	if s.fileWay(fileMin, false) != notAsFile {
		t.Error("a client that waits is sent files")
	}
	room := s.room.Load()
	if n := sndbuf(t, b); n < before || int64(n) != room {
		t.Errorf("room for %d bytes, %d before; taken for %d", n, before, room)
	}
	if room < 4*fileMin {
		t.Fatalf("room for %d bytes: net.core.wmem_max is below what Linux begins with", room)
	}
	s.leastRoom = room
	if !s.takesFiles(room/4) || s.fileWay(room/4, true) != asFile {
		t.Error("there is room for four of these")
	}
	if s.leastRoom++; s.takesFiles(room / 4) {
		t.Error("a small socket is waited for")
	}
	s.leastRoom = 0
	if s.takesFiles(room/4+1) || s.fileWay(room/4+1, true) != notAsFile {
		t.Error("there is no room for four of these")
	}
	if _, err := s.trySend([][]byte{{1}}); err != nil || s.fileWay(fileMin, false) != asFile {
		t.Errorf("not to a client that has something to take (%v)", err)
	}
	for sent := int64(0); s.fileWay(room/4, true) == asFile; sent += fileMin {
		if n, err := s.trySend([][]byte{make([]byte, fileMin)}); n != fileMin || err != nil || sent > room {
			t.Fatalf("after %d bytes: %d (%v)", sent, n, err)
		}
	}
	if way := s.fileWay(room/4, true); way != whenItFits {
		t.Errorf("%v where there is room for less than what is to be sent", way)
	}
	waited, client := make(chan error, 1), a
	go func() { waited <- s.waitToFit(room / 4) }()
	go func() { _, _ = io.Copy(io.Discard, client) }()
	must(t, await(t, waited, "room"))
	if way := s.fileWay(room/4, true); way == whenItFits {
		t.Error("there is no room after waiting for it")
	}
	must(t, s.close())

	a, b = tcpPair(t)
	defer a.Close()
	before = sndbuf(t, b)
	s = newTransport(b).(*socket)
	if s.fileWay(1<<20, true) != notAsFile || s.takesFiles(1<<20) || sndbuf(t, b) != before {
		t.Error("TCP is treated the same way")
	}
	must(t, s.close())
}

// Only where files are sent sockets get room for them: it is memory that nobody counts.
func TestRoomForFiles(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	c := r.connect(&testCodec{})
	room := &c.conn.t.(*socket).room
	c.ok(OpRead, 0, 0, 1<<20, nil)
	if n := room.Load(); n != 0 {
		t.Errorf("room for %d bytes, to a client that reads a hole", n)
	}
	must(t, os.WriteFile(r.path, pattern(4<<20, 1), 0o600))
	c.ok(OpRead, 0, 0, 1<<20, nil)
	if room.Load() == 0 {
		t.Error("no room for files")
	}
}

// Holes are not read through the map: on tmpfs that would fill them.
func TestHolesStayHoles(t *testing.T) {
	for _, chunked := range []bool{false, true} {
		const size = 4 << 20
		r := newRig(t, rigConfig{tmpfs: true, size: size})
		f, err := os.OpenFile(r.path, os.O_RDWR, 0)
		must(t, err)
		defer f.Close()
		for i := range int64(16) {
			_, err := f.WriteAt(pattern(20<<10, uint64(i)), i*256<<10+12<<10)
			must(t, err)
		}
		blocks := func() int64 {
			var st unix.Stat_t
			must(t, unix.Fstat(int(f.Fd()), &st))
			return st.Blocks
		}
		want, before := r.content(), blocks()
		c := r.connect(&testCodec{chunked: chunked})
		for _, n := range readSizes {
			step := max(n, 4096) + 1234
			for off := int64(0); off+n <= size; off += step {
				if a := c.ok(OpRead, 0, off, n, nil); !bytes.Equal(a.data, want[off:off+n]) {
					t.Fatalf("%d+%d: other bytes", off, n)
				}
			}
			if after := blocks(); after != before {
				t.Fatalf("chunked %v, reads of %d: %d blocks, %d before", chunked, n, after, before)
			}
		}
	}
}

// A client that takes no replies holds up nothing: what its socket does not
// take is read before the admission ends, and counts.
func TestSlowReaderOfPages(t *testing.T) {
	for i, n := range []int64{4096, 32 << 10, 200 << 10, 1 << 20, 200 << 10, 1 << 20, 4096, 32 << 10, 200 << 10, 1 << 20} {
		files, splices := never, never
		if i > 5 {
			splices = always
		} else if i > 3 {
			files = always
		}
		t.Run(fmt.Sprintf("%d/file=%v/splice=%v", n, files == always, splices == always), func(t *testing.T) {
			want := pattern(4<<20, 1)
			r := newRig(t, rigConfig{tmpfs: true, content: want, Config: Config{Memory: 64 << 20}})
			h := pageHook{files: files, splices: splices}
			c := r.connectWith(&testCodec{}, small(socketpair), h.install)
			const count = 24
			for i := range int64(count) {
				c.send(OpRead, 0, i*4096, n, nil)
			}
			eventually(t, "the socket is full", func() bool { return c.conn.out.owes.since.Load() != 0 })
			r.inactivate()
			if used, limit := r.e.Memory(); used > limit {
				t.Errorf("%d bytes of %d in use", used, limit)
			}
			r.activate()
			for range count {
				a := c.next()
				off := int64(a.cookie-1) * 4096
				if a.errno != 0 || !bytes.Equal(a.data, want[off:off+n]) {
					t.Fatalf("at %d: %v, or other bytes", off, a.errno)
				}
			}
			if h.count() == 0 {
				t.Error("nothing was sent by reference")
			}
		})
	}
}

// A connection with many reads under way gets a deep reply buffer, which sends
// them all at once, while memory is to spare.
func TestDeepReplies(t *testing.T) {
	const count = 50 // more than one of the usual buffers holds
	want := pattern(count*4096, 1)
	r := newRig(t, rigConfig{tmpfs: true, content: want})
	h := pageHook{splices: never}
	c := r.connectWith(&testCodec{}, socketpair, h.install)
	batch := func() (sends int) {
		before := h.count()
		var wire []byte
		first := c.cookie + 1
		for i := range int64(count) {
			b, _ := c.header(OpRead, 0, i*4096, 4096)
			wire = append(wire, b...)
		}
		c.write(wire)
		for range count {
			a := c.next()
			off := int64(a.cookie-first) * 4096
			if a.errno != 0 || !bytes.Equal(a.data, want[off:off+4096]) {
				t.Fatalf("at %d: %v, or other bytes", off, a.errno)
			}
		}
		return h.count() - before
	}
	if n := batch(); n == 1 {
		t.Error("the first batch went out in one piece already")
	}
	eventually(t, "a batch goes out at once", func() bool { return batch() == 1 })
	b := r.e.budget
	spare := b.most[general] / 4
	b.takeFloor(spare)
	eventually(t, "memory is scarce, and batches go out in pieces", func() bool { return batch() > 1 })
	b.release(lease{spare, floor})
	eventually(t, "a batch goes out at once again", func() bool { return batch() == 1 })
}
