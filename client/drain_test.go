package client

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/export/wire"
)

// smallestPipe is one page: every splice is a part of what is there.
var smallestPipe = os.Getpagesize()

func setPipe(t *testing.T, d *drain, size int) {
	t.Helper()
	if _, err := unix.FcntlInt(uintptr(d.in), unix.F_SETPIPE_SZ, size); err != nil {
		t.Fatal(err)
	}
}

// scattered is a fake server's script that answers each read of an image with
// what structured replies have: data backwards, a hole of 512 bytes in the middle,
// and an error and the data before it where a read begins with a byte of 0xee.
func scattered(image []byte) func(f *fakeServer) {
	plain := memory(image)
	return func(f *fakeServer) {
		if !f.structured {
			plain(f)
			return
		}
		for {
			op, _, err := f.request()
			if err != nil || op.Cmd == wire.CmdDisc {
				return
			}
			if op.Cmd != wire.CmdRead {
				f.simple(op.cookie, 0, nil)
				continue
			}
			data, half := image[op.Offset:][:op.Length], op.Length/2
			at := func(n uint32) uint64 { return op.Offset + uint64(n) }
			if data[0] == 0xee {
				f.chunk(op.cookie, 0, wire.ReplyOffsetData, at(0), data[:half])
				f.chunk(op.cookie, 0, wire.ReplyErrorOffset, wire.EIO, uint16(3), "bad", at(half))
				f.chunk(op.cookie, 1, wire.ReplyNone)
				continue
			}
			f.chunk(op.cookie, 0, wire.ReplyOffsetData, at(half+512), data[half+512:])
			f.chunk(op.cookie, 0, wire.ReplyOffsetHole, at(half), uint32(512))
			f.chunk(op.cookie, 1, wire.ReplyOffsetData, at(0), data[:half])
		}
	}
}

// TestDiscard has payloads thrown away amid others that are wanted, and writes: if
// a byte too many or too few of them were taken, all that follows would be wrong.
func TestDiscard(t *testing.T) {
	const size = 4 << 20
	image := make([]byte, size)
	for i := range image {
		image[i] = byte(1 + i/4096%200)
	}
	image[1<<20] = 0xee
	for _, network := range []string{"unix", "tcp"} {
		for _, simple := range []bool{false, true} {
			for _, pipe := range []int{drainSize, smallestPipe} {
				name := fmt.Sprintf("%s, simple replies %v, pipe of %d", network, simple, pipe)
				t.Run(name, func(t *testing.T) {
					uri := startFake(t, fakeServer{network: network, size: size, flags: allFlags}, scattered(slices.Clone(image)))
					b := mustBatch(t, uri, Options{SimpleReplies: simple, Discard: true}, 4)
					setPipe(t, b.in.drain, pipe)
					var s script
					for round := range 5 {
						for _, length := range []uint32{2048, discardFrom - 1, discardFrom, 100_001, 1 << 20, 3 << 20} {
							off := uint64(round * 4096)
							s.ops = append(s.ops,
								Op{Cmd: wire.CmdRead, Offset: off, Length: length},
								Op{Cmd: wire.CmdFlush},
								Op{Cmd: wire.CmdRead, Offset: off + 4096, Length: 100_000, Data: make([]byte, 100_000)},
								Op{Cmd: wire.CmdWrite, Offset: 2 << 20, Length: 512, Data: image[2<<20:][:512]},
								Op{Cmd: wire.CmdRead, Offset: 1 << 20, Length: length},
							)
						}
					}
					want := len(s.ops)
					if err := b.Run(t.Context(), &s, time.Time{}, false); err != nil {
						t.Fatal(err)
					}
					if len(s.done) != want || b.in.unwanted != 0 {
						t.Fatalf("%d of %d answered, %d still to be discarded", len(s.done), want, b.in.unwanted)
					}
					for _, op := range s.done {
						switch failed := op.Errno == syscall.EIO && op.Text == "bad"; {
						case op.Cmd == wire.CmdRead && op.Offset == 1<<20 && !simple:
							if !failed {
								t.Fatalf("read of %d bytes of which half are bad: %v", op.Length, op.Err())
							}
						case op.Errno != 0:
							t.Fatalf("%d bytes at %d: %v", op.Length, op.Offset, op.Err())
						case op.Data != nil && op.Cmd == wire.CmdRead:
							expect := slices.Clone(image[op.Offset:][:op.Length])
							if !simple {
								clear(expect[op.Length/2:][:512])
							}
							if !bytes.Equal(op.Data, expect) {
								t.Fatalf("wrong bytes at %d", op.Offset)
							}
						}
					}
				})
			}
		}
	}
}

// TestDiscardCopiesHeadsOnly looks for payload in the buffer.
func TestDiscardCopiesHeadsOnly(t *testing.T) {
	image := bytes.Repeat([]byte{0xff}, 4<<20)
	for _, simple := range []bool{false, true} {
		b := mustBatch(t, startFake(t, fakeServer{size: 4 << 20, flags: allFlags}, memory(image)), Options{SimpleReplies: simple, Discard: true}, 8)
		var s script
		for i := range 100 {
			s.ops = append(s.ops, Op{Cmd: wire.CmdRead, Length: discardFrom << (i % 5)})
		}
		if err := b.Run(t.Context(), &s, time.Time{}, false); err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(b.in.buf[headsSize+longestHead:], []byte{0xff}); n > 0 {
			t.Errorf("simple replies %v: %d bytes of payload were copied", simple, n)
		}
	}
}

// TestDrain takes a payload in pieces, with nothing there in between, and notes
// when the last of it came.
func TestDrain(t *testing.T) {
	here, there := socketPair(t)
	var r receiver
	r.init()
	var err error
	if r.drain, err = openDrain(nullDevice); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.drain.close)
	setPipe(t, r.drain, smallestPipe)
	s := &stamped{book: newBook(), in: &r}
	s.ops[1] = &Op{cookie: 1, Cmd: wire.CmdRead, Length: discardFrom}
	r.unwanted = 1
	d := decoder{reqs: s, discardFrom: discardFrom}
	reply := simple(1, 0, string(make([]byte, discardFrom)))
	receive := func() int {
		t.Helper()
		n, err := r.receive(uintptr(here), &d)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	var before int64
	for i, p := range [][]byte{reply[:1000], reply[1000:5000], reply[5000 : len(reply)-10], reply[len(reply)-10:]} {
		if _, err := unix.Write(there, p); err != nil {
			t.Fatal(err)
		}
		sum := 0
		for sum < len(p) {
			before = Now()
			n := receive()
			if n == 0 || n > smallestPipe || i == 0 && sum == 0 && n != headsSize {
				t.Fatalf("piece %d: %d bytes after %d", i, n, sum)
			}
			sum += n
		}
		if sum != len(p) || len(s.at) == 0 && receive() != 0 {
			t.Fatalf("piece %d: %d of %d bytes", i, sum, len(p))
		}
	}
	if len(s.at) != 1 || s.at[0] < before || s.at[0] > Now() {
		t.Errorf("received at %v, the last piece after %d", s.at, before)
	}
}

// TestDiscardEnds loses its server in the middle of a payload.
func TestDiscardEnds(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		uri := startFake(t, fakeServer{network: network, size: 1 << 20, flags: allFlags}, func(f *fakeServer) {
			op, _, _ := f.request()
			f.put(chunk(op.cookie, 1, wire.ReplyOffsetData, op.Offset, make([]byte, op.Length))[:op.Length/2])
		})
		b := mustBatch(t, uri, Options{Discard: true}, 1)
		s := &script{ops: []Op{{Cmd: wire.CmdRead, Length: 1 << 20}}}
		if err := b.Run(t.Context(), s, time.Time{}, false); !errors.Is(err, ErrServerClosed) {
			t.Errorf("%s: %v", network, err)
		}
	}
}

// links are what the descriptors of this process lead to.
func links(t *testing.T) (all []string) {
	t.Helper()
	paths, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		if l, err := os.Readlink(p); err == nil && (l == nullDevice || strings.HasPrefix(l, "pipe:")) {
			all = append(all, l)
		}
	}
	slices.Sort(all)
	return all
}

// TestDrainCloses leaves no descriptor, with its Batch and where it cannot be opened.
func TestDrainCloses(t *testing.T) {
	before := links(t)
	b := mustBatch(t, startFake(t, fakeServer{size: 1 << 20, flags: allFlags}, memory(make([]byte, 1<<20))), Options{Discard: true}, 1)
	if n := len(links(t)) - len(before); n != 3 {
		t.Errorf("%d descriptors more, want the pipe's and %s", n, nullDevice)
	}
	_ = b.Close()
	if after := links(t); !slices.Equal(before, after) {
		t.Errorf("closed: %q, want %q", after, before)
	}
	for range 3 { // have the numbers that are free now
		other, err := os.OpenFile(nullDevice, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
	}
	before = links(t)
	_ = b.Close()
	if after := links(t); !slices.Equal(before, after) {
		t.Errorf("closed twice: %q, want %q", after, before)
	}

	if _, err := openDrain("/dev/nowhere"); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "discarding payloads: open /dev/nowhere") {
		t.Error(err)
	}
	free, err := unix.Open(nullDevice, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(free)
	var most syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &most); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &most) }()
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(free) + 1, Max: most.Max}); err != nil {
		t.Fatal(err)
	}
	_, err = openDrain(nullDevice)
	_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &most)
	if !errors.Is(err, syscall.EMFILE) || !strings.Contains(err.Error(), "discarding payloads: pipe2") {
		t.Error(err)
	}
	if after := links(t); !slices.Equal(before, after) {
		t.Errorf("not opened: %q, want %q", after, before)
	}
}
