package ioloop

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// drainReplies receives until the end; the client then closes its side too.
func (c *client) drainReplies() (all []answer, err error) {
	for {
		a, err := c.receive()
		if err != nil {
			c.nc.Close()
			return all, err
		}
		all = append(all, a)
	}
}

// Shutdown answers what is under way, and sends it, before it closes.
func TestShutdownAnswers(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{tmpfs: true, content: contents})
			slow := newBlocker()
			r.img.set(func(h *hooked) {
				h.mapping = func(off, n int64, m backend.Mode) error {
					if n == 1<<20 {
						return slow.mode(m)
					}
					return nil
				}
			})
			idle := r.connectOver(&testCodec{}, link)
			idle.ok(OpRead, 0, 0, 100, nil)
			inside := r.connectOver(&testCodec{}, link)
			h, _ := inside.header(OpWrite, 0, 0, 1<<20)
			inside.write(append(h, 1, 2, 3))
			busy := r.connectOver(&testCodec{}, link)
			for range 4 {
				busy.send(OpRead, 0, 0, 1<<20, nil)
				await(t, slow.entered, "a worker")
			}
			done := background(func() { r.e.Shutdown(context.Background()) })
			for _, c := range []*client{idle, inside} {
				if all, err := c.drainReplies(); len(all) != 0 || err != io.EOF && !errors.Is(err, unix.ECONNRESET) {
					t.Fatal(len(all), err)
				}
				must(t, c.end())
			}
			select {
			case <-done:
				t.Fatal("shut down with requests under way")
			default:
			}
			close(slow.leave)
			all, err := busy.drainReplies()
			if len(all) != 4 || err != io.EOF {
				t.Fatal(len(all), err)
			}
			for _, a := range all {
				if !bytes.Equal(a.data, contents[:1<<20]) {
					t.Fatal("other bytes")
				}
			}
			must(t, busy.end())
			await(t, done, "shutting down")
			// Nobody new.
			a, b := link(t)
			must(t, r.e.Serve(b, &testCodec{}, r.d))
			if _, err := a.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
			a.Close()
		})
	}
}

// Replies that are on their way survive, though the client keeps on asking.
func TestShutdownUnreadRequests(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{tmpfs: true, content: contents, Config: Config{Memory: 1}})
			c := r.connectOver(&testCodec{}, link)
			sent := background(func() {
				for {
					b, _ := c.header(OpWrite, 0, 4096, 512)
					b = append(b, contents[:512]...)
					h, _ := c.header(OpRead, 0, 0, 32<<10)
					if _, err := c.nc.Write(append(b, h...)); err != nil {
						return
					}
				}
			})
			eventually(t, "the client stalls", func() bool { return c.conn.out.owes.since.Load() != 0 })
			done := background(func() { r.e.Shutdown(context.Background()) })
			eventually(t, "it shuts down", func() bool { return c.conn.stopping.Load() })
			answers := uint64(0)
			must(t, c.nc.SetReadDeadline(time.Now().Add(patience)))
			for {
				a, err := c.receive()
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal("neither replies nor an end")
				}
				if err != nil {
					break
				}
				if a.kind == kindDone {
					answers++
				}
			}
			c.nc.Close()
			await(t, sent, "the client")
			await(t, done, "shutting down")
			must(t, c.end())
			if s := r.d.Stats(); s.Writes != answers {
				t.Fatalf("%d writes ran, %d were answered", s.Writes, answers)
			}
		})
	}
}

// With the gate closed for good parked requests are refused and answered.
func TestShutdownParked(t *testing.T) {
	h := hold(state.StepLoad)
	r := newRig(t, rigConfig{inactive: true, onStep: h.step})
	c := r.connect(&testCodec{})
	h.armed.Store(true)
	active := background(r.activate)
	await(t, h.reached, "the step")
	for range 10 {
		c.send(OpWrite, 0, 0, 4096, contents[:4096])
	}
	eventually(t, "all are parked", func() bool { return c.conn.tasks.Load() == 10 })
	done := background(func() { r.e.Shutdown(context.Background()) })
	eventually(t, "it shuts down", func() bool { return c.conn.stopping.Load() })
	close(h.goOn) // the transition is finished first
	await(t, active, "activation")
	all, err := c.drainReplies()
	if len(all) != 10 || err != io.EOF {
		t.Fatal(len(all), err)
	}
	await(t, done, "shutting down")
}

// At the end of its time Shutdown waits for nobody: not for clients, not for
// the gate, not for storage.
func TestShutdownDeadline(t *testing.T) {
	for name, link := range links {
		t.Run(name, func(t *testing.T) {
			h := hold(state.StepLoad)
			r := newRig(t, rigConfig{inactive: true, onStep: h.step, size: 16 << 20, Config: Config{Memory: 12 << 20}})
			slow := newBlocker()
			r.img.set(func(h *hooked) {
				h.mapping = func(off, n int64, m backend.Mode) error {
					if off == 1 {
						return slow.mode(m)
					}
					return nil
				}
			})
			h.armed.Store(true)
			active := background(r.activate)
			await(t, h.reached, "the step")
			parked := r.connectOver(&testCodec{}, link)
			parked.send(OpWrite, 0, 0, 4096, contents[:4096])
			eventually(t, "a request is parked", func() bool { return parked.conn.tasks.Load() == 1 })
			stuck := r.connectOver(&testCodec{}, link)
			stuck.send(OpRead, 0, 1, 4096, nil)
			await(t, slow.entered, "a worker")
			unread := r.connectOver(&testCodec{}, link)
			unread.send(OpRead, 0, 0, 8<<20, nil)
			eventually(t, "a client does not read", func() bool { return unread.conn.out.owes.since.Load() != 0 })
			memory := r.connectOver(&testCodec{}, link)
			memory.send(OpRead, 0, 0, 8<<20, nil)
			eventually(t, "a request waits for memory", func() bool { return r.e.budget.waiting() == 1 })

			ctx, cancel := context.WithCancel(context.Background())
			done := background(func() { r.e.Shutdown(ctx) })
			eventually(t, "it shuts down", func() bool { return unread.conn.stopping.Load() && memory.conn.stopping.Load() })
			cancel()
			await(t, done, "shutting down")
			for _, c := range []*client{unread, memory, parked} {
				c.end()
			}
			close(slow.leave)
			stuck.end()
			close(h.goOn)
			await(t, active, "activation")
			if b, err := os.ReadFile(r.path); err != nil || !bytes.Equal(b[:4096], make([]byte, 4096)) {
				t.Fatal("a write of a client that was cut off has run", err)
			}
		})
	}
}
