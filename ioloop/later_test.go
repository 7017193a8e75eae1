package ioloop

import (
	"bytes"
	"context"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// laterRig is a client that has asked for more than its socket holds, and takes
// nothing: some of its reads wait for their turn.
func laterRig(t *testing.T, h *pageHook) (r *rig, c *client, want []byte) {
	want = pattern(4<<20, 1)
	r = newRig(t, rigConfig{tmpfs: true, content: want, Config: Config{Memory: 64 << 20}})
	c = r.connectWith(&testCodec{}, socketpair, h.install)
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

const (
	laterSize  = fileMin
	laterReads = 128 // twice what a socket holds
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
	r, c, want := laterRig(t, &h)
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
	r, c, _ := laterRig(t, &h)
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
	r, c, want := laterRig(t, &h)
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

// A client that goes away takes its waiting reads along; what they held is checked
// by the rig.
func TestLaterClientGone(t *testing.T) {
	var h pageHook
	r, c, _ := laterRig(t, &h)
	must(t, c.nc.Close())
	await(t, c.conn.done, "the connection to end")
	if s := r.d.Stats(); s.InFlight != 0 {
		t.Errorf("%+v", s)
	}
}

// An engine that shuts down answers them.
func TestLaterShutdown(t *testing.T) {
	var h pageHook
	r, c, want := laterRig(t, &h)
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
