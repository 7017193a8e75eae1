package ioloop

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// laterRig is a client that has asked for more than its socket holds, and takes
// nothing: some of its reads wait for their turn.
func laterRig(t *testing.T, h *pageHook, codec *testCodec) (r *rig, c *client, want []byte) {
	want = pattern(4<<20, 1)
	r = newRig(t, rigConfig{tmpfs: true, content: want, Config: Config{Memory: 64 << 20}})
	c = r.connectWith(codec, socketpair, h.waits)
	var wire []byte
	for i := range int64(laterReads) {
		b, _ := c.header(OpRead, 0, laterOffset(i), laterSize)
		wire = append(wire, b...)
	}
	c.write(wire)
	eventually(t, "the socket is full", func() bool { return c.conn.out.owes.since.Load() != 0 })
	eventually(t, "all requests are taken", func() bool { return c.conn.received.Load() > 0 && inLine(c) > 0 })
	return r, c, want
}

// waits installs the hook where the system may not give sockets what it takes.
func (h *pageHook) waits(c *conn) {
	c.t.(*socket).leastRoom = 0
	h.install(c)
}

const (
	laterSize  = fileMin
	laterReads = 256 // at least twice what a socket holds, more with pages of 16 KiB
)

func laterOffset(i int64) int64 { return i * 4096 }

// inLine is how many reads wait for their turn.
func inLine(c *client) (n int) {
	o := &c.conn.out
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range o.queue {
		if o.queue[i].later {
			n++
		}
	}
	return n
}

// Reads that find the socket full are sent as pages of the file when it is their
// turn, and copied neither by a worker nor by the send.
func TestLater(t *testing.T) {
	h := pageHook{splices: never}
	r, c, want := laterRig(t, &h, &testCodec{})
	for i := range int64(laterReads) {
		a := c.next()
		if off := laterOffset(i); a.cookie != uint64(i+1) || a.errno != 0 || !bytes.Equal(a.data, want[off:off+laterSize]) {
			t.Fatalf("reply %d to %d: %v, or other bytes", i, a.cookie, a.errno)
		}
	}
	await(t, c.conn.out.flushed(), "the writer")
	if n := h.count(); n != laterReads {
		t.Errorf("%d sends by reference for %d reads", n, laterReads)
	}
	if s := r.d.Stats(); s.Reads != laterReads || s.InFlight != 0 {
		t.Errorf("%+v", s)
	}
}

// A read that waits for its turn delays no transition, and sees what was written
// meanwhile.
func TestLaterHoldsNothing(t *testing.T) {
	var h pageHook
	r, c, _ := laterRig(t, &h, &testCodec{})
	r.inactivate()
	r.activate()
	fresh := pattern(4<<20, 2)
	must(t, os.WriteFile(r.path, fresh, 0o600)) // the same file, shorter for a moment
	last := laterOffset(laterReads - 1)
	for range laterReads {
		if a := c.next(); a.cookie == laterReads && (a.errno != 0 || !bytes.Equal(a.data, fresh[last:last+laterSize])) {
			t.Fatalf("%v, or other bytes", a.errno)
		}
	}
}

// What has left the page cache, or the file, before its turn is read by a worker,
// and its error is a reply like others.
func TestLaterGone(t *testing.T) {
	var h pageHook
	r, c, want := laterRig(t, &h, &testCodec{})
	must(t, os.Truncate(r.path, 0))
	failed := 0
	for range laterReads {
		a := c.next()
		off := laterOffset(int64(a.cookie) - 1)
		switch {
		case a.errno == unix.EIO:
			failed++
		case a.errno != 0 || !bytes.Equal(a.data, want[off:off+laterSize]):
			t.Fatalf("at %d: %v, or other bytes", off, a.errno)
		}
	}
	if failed == 0 {
		t.Error("no read was still waiting")
	}
	if s := r.d.Stats(); s.Reads != uint64(laterReads-failed) || s.Errors != uint64(failed) || s.InFlight != 0 {
		t.Errorf("%d failed: %+v", failed, s)
	}
}

// A read sees what is there when it is its turn: holes, or an image that was given up
// and has to be read.
func TestLaterChanged(t *testing.T) {
	for _, how := range []struct{ chunked, punched, inactive bool }{
		{false, true, false}, {true, true, false},
		{false, false, true}, {true, false, true},
		{false, true, true}, {true, true, true},
	} {
		t.Run(fmt.Sprintf("%+v", how), func(t *testing.T) {
			var h pageHook
			r, c, want := laterRig(t, &h, &testCodec{chunked: how.chunked})
			now := bytes.Clone(want)
			if how.punched {
				other := r.connect(&testCodec{})
				for off := int64(0); off < laterOffset(laterReads); off += laterSize {
					other.ok(OpDiscard, 0, off, laterSize/2, nil)
					clear(now[off : off+laterSize/2])
				}
			}
			if how.inactive {
				r.inactivate()
			}
			holes := int64(0)
			for i := range int64(laterReads) {
				a, off := c.next(), laterOffset(i)
				if a.cookie != uint64(i+1) || a.errno != 0 {
					t.Fatalf("reply %d to %d: %v", i, a.cookie, a.errno)
				}
				// The first ones have been sent before.
				if i == laterReads-1 && !bytes.Equal(a.data, now[off:off+laterSize]) {
					t.Error("other bytes")
				}
				holes += a.holes
			}
			await(t, c.conn.out.flushed(), "the writer")
			if read := h.count() < laterReads; read != (how.inactive || how.punched && !how.chunked) {
				t.Errorf("%d were sent by reference", h.count())
			}
			if (holes > 0) != (how.chunked && how.punched) {
				t.Errorf("%d bytes of holes", holes)
			}
			if s := r.d.Stats(); s.Reads != laterReads || s.BytesRead != laterReads*laterSize || s.Errors != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// A client that has said that it sends no more gets what it has asked for.
func TestLaterAfterDisconnect(t *testing.T) {
	for name, leave := range map[string]func(*client){
		"disconnect": func(c *client) { c.send(OpDisconnect, 0, 0, 0, nil) },
		"half close": func(c *client) { must(c.t, c.nc.(*net.UnixConn).CloseWrite()) },
	} {
		t.Run(name, func(t *testing.T) {
			var h pageHook
			_, c, want := laterRig(t, &h, &testCodec{})
			leave(c)
			for i := range int64(laterReads) {
				if a, off := c.next(), laterOffset(i); a.errno != 0 || !bytes.Equal(a.data, want[off:off+laterSize]) {
					t.Fatalf("reply %d: %v, or other bytes", i, a.errno)
				}
			}
			must(t, c.end())
		})
	}
}

// A client that goes away, or is disconnected, takes its waiting reads along; what they
// held is checked by the rig.
func TestLaterBroken(t *testing.T) {
	for name, end := range map[string]func(*client){
		"gone":         func(c *client) { must(c.t, c.nc.Close()) },
		"disconnected": func(c *client) { c.conn.out.fail(errStalled) },
	} {
		t.Run(name, func(t *testing.T) {
			var h pageHook
			r, c, _ := laterRig(t, &h, &testCodec{})
			end(c)
			await(t, c.conn.done, "the connection to end")
			if s := r.d.Stats(); s.InFlight != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// An engine that shuts down answers them.
func TestLaterShutdown(t *testing.T) {
	var h pageHook
	r, c, want := laterRig(t, &h, &testCodec{})
	done := background(func() { r.e.Shutdown(context.Background()) })
	for i := range int64(laterReads) {
		a, err := c.receive()
		if off := laterOffset(i); err != nil || a.errno != 0 || !bytes.Equal(a.data, want[off:off+laterSize]) {
			t.Fatalf("reply %d: %v, %v, or other bytes", i, err, a.errno)
		}
	}
	must(t, c.nc.Close())
	await(t, done, "the engine to shut down")
}

// Who else sends replies does not make those of reads that wait: a worker, or what
// reaps the ring for all connections, would wait for a disk, or move megabytes.
func TestLaterByWriter(t *testing.T) {
	var h pageHook
	want := pattern(1<<20, 1)
	r := newRig(t, rigConfig{tmpfs: true, content: want})
	c := r.connectWith(&testCodec{}, socketpair, h.waits)
	if !c.conn.out.hold() {
		t.Fatal("there is a sender")
	}
	h.fileWay(laterSize, true) // finds the room
	c.send(OpRead, 0, 0, laterSize, nil)
	eventually(t, "the read waits", func() bool { return inLine(c) == 1 })
	disk := newBlocker()
	h.mu.Lock()
	h.beforeFile = disk.wait
	h.mu.Unlock()
	pumped := background(c.conn.out.pump)
	await(t, disk.entered, "the file is read")
	await(t, pumped, "who is not the writer")
	close(disk.leave)
	if a := c.next(); a.errno != 0 || !bytes.Equal(a.data, want[:laterSize]) {
		t.Errorf("%v, or other bytes", a.errno)
	}
}

// Reads that wait allocate nothing.
func TestLaterAllocations(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true, content: pattern(4<<20, 1)})
	k := newCheap(r, OpRead, laterSize)
	for len(k.replies) < laterReads*(repSize+laterSize) {
		k.requests, k.replies = append(k.requests, k.requests...), append(k.replies, k.replies...)
	}
	// At first nothing is taken, so that as much waits as ever may, in buffers too.
	k.write(k.requests)
	eventually(t, "all are read, or wait", func() bool { return r.d.Stats().Reads+uint64(inLine(k.client)) == laterReads })
	_, err := io.ReadFull(k.nc, k.replies)
	must(t, err)
	if n := k.allocations(t); n != 0 {
		t.Errorf("%v allocations for a batch", n)
	}
}
