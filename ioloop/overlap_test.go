package ioloop

import (
	"bytes"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/nbd-export/nbd-export/backend"
)

// Requests of several connections that change the same bytes at once leave every
// sector as one of them made it, however each is carried out: the kernel keeps
// writes of one file apart, but not what is received in place. Without claims some
// round in a hundred leaves a mixture.
func TestOverlappingChanges(t *testing.T) {
	const (
		sector = 512
		size   = 8 << 20
		batch  = 40 // writes in a row, most of which are received in place
		each   = 4096
	)
	for name, tt := range map[string]struct {
		op     Op // of the whole image, while others write
		rounds int
	}{"write": {OpWrite, 100}, "zero": {OpZero, 300}, "discard": {OpDiscard, 300}} {
		t.Run(name, func(t *testing.T) {
			if raceEnabled {
				tt.rounds /= 10
			}
			r := newRig(t, rigConfig{tmpfs: true, size: size})
			var spies [2]*spy
			var others [2]*client
			for i := range others {
				others[i] = r.connectWith(&testCodec{}, socketpair, func(c *conn) { spies[i] = r.spyOn(c) })
			}
			one := r.connect(&testCodec{})
			var ids atomic.Uint32
			fill := func(b []byte) {
				b[0] = byte(1 + ids.Add(1)%255)
				for n := 1; n < len(b); n *= 2 {
					copy(b[n:], b[:n])
				}
			}
			buf := make([]byte, size)
			for round := range tt.rounds {
				var over atomic.Bool
				var done []<-chan struct{}
				for _, c := range others {
					done = append(done, background(func() {
						for payload := make([]byte, each); !over.Load(); {
							var b []byte
							for i := range int64(batch) {
								h, _ := c.header(OpWrite, 0, i*each, each)
								fill(payload)
								b = append(append(b, h...), payload...)
							}
							c.write(b)
							for range batch {
								if a := c.next(); a.errno != 0 {
									t.Errorf("%v", a.errno)
								}
							}
						}
					}))
				}
				if tt.op == OpWrite {
					fill(buf)
					one.ok(OpWrite, 0, 0, size, buf)
				} else {
					one.ok(tt.op, 0, 0, size, nil)
				}
				over.Store(true)
				for i := range done {
					await(t, done[i], fmt.Sprintf("connection %d", i))
				}
				content := r.content()
				for off := 0; off < size; off += sector {
					if s := content[off : off+sector]; !bytes.Equal(s[1:], s[:sector-1]) {
						t.Fatalf("round %d: the sector at %d is a mixture: it begins with %d and ends with %d", round, off, s[0], s[sector-1])
					}
				}
			}
			for i, c := range others {
				must(t, c.nc.Close())
				await(t, c.served, "its end")
				if spies[i].placed == 0 {
					t.Error("nothing was received in place")
				}
			}
		})
	}
}

// What somebody else is receiving into its place is not received there, and is
// written when the other is done.
func TestClaimedIsNotReceivedInPlace(t *testing.T) {
	for _, n := range []int64{4096, smallPayload + 4096} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			r := newRig(t, rigConfig{tmpfs: true, size: 4 << 20})
			d := r.drive(socketpair)
			first, _ := d.batch(1, n, 0) // shows that it pays
			wantAll(t, first, 0)
			before := r.content()
			var p backend.Plan
			must(t, r.raw.PrepareUnseen(&p, 0, r.size))
			defer r.raw.Abort(&p)
			c := p.Extents[0].File.Claim(1<<20, 1)
			if !c.Try() {
				t.Fatal("claimed by nobody, and not to be had")
			}
			d.spy.placed = 0
			var payload []byte
			done := background(func() {
				var answers []answer
				answers, payload = d.batch(2, n, 1<<20)
				wantAll(t, answers, 0)
			})
			eventually(t, "the write waits", func() bool {
				b := make([]byte, 1<<20)
				return bytes.Contains(b[:runtime.Stack(b, true)], []byte(").unclaimed("))
			})
			if !bytes.Equal(r.content(), before) {
				t.Error("written while it was claimed")
			}
			c.Release()
			await(t, done, "the write")
			if got := r.content()[1<<20:][:n]; !bytes.Equal(got, payload) || d.spy.placed != 0 {
				t.Errorf("other bytes, or %d of them received in place", d.spy.placed)
			}
		})
	}
}
