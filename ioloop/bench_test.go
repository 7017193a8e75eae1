package ioloop

import (
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// batchOps is how many requests the cheap client sends at once.
const batchOps = 32

// cheap is a client that costs next to nothing: it sends one and the same
// batch of requests, and counts the bytes of the replies.
type cheap struct {
	*client
	requests []byte
	replies  []byte
}

func newCheap(r *rig, op Op, n int64) *cheap {
	c := r.connect(&testCodec{})
	k := &cheap{client: c}
	size := repSize
	if op == OpRead {
		size += int(n)
	}
	for i := range int64(batchOps) {
		b, _ := c.header(op, 0, i*37%batchOps*n, n)
		k.requests = append(k.requests, b...)
		if op == OpWrite {
			k.requests = append(k.requests, contents[:n]...)
		}
		k.replies = append(k.replies, make([]byte, size)...)
	}
	return k
}

func (k *cheap) batch() error {
	if _, err := k.nc.Write(k.requests); err != nil {
		return err
	}
	_, err := io.ReadFull(k.nc, k.replies)
	return err
}

// allocations is how many a batch takes, once the pools are full: of this process, but
// the client makes none. The collector is off, since it empties the pools.
func (k *cheap) allocations(t *testing.T) float64 {
	t.Helper()
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	// A worker that begins allocates: on a busy machine all would leave and come again
	// between two batches.
	k.r.e.sched.stay = time.Second / 2
	for range 20 {
		must(t, k.batch())
	}
	var failed error
	n := testing.AllocsPerRun(100, func() {
		if err := k.batch(); err != nil {
			failed = err
		}
	})
	must(t, failed)
	return n
}

// The fast path allocates nothing, in a batch of requests or alone.
func TestNoAllocations(t *testing.T) {
	for _, tmpfs := range []bool{true, false} {
		for _, op := range []Op{OpRead, OpWrite} {
			for _, n := range []int64{512, 4096, 32 << 10, 64 << 10, 256 << 10} {
				t.Run(fmt.Sprintf("tmpfs=%v/%v/%d", tmpfs, op, n), func(t *testing.T) {
					r := newRig(t, rigConfig{tmpfs: tmpfs, content: pattern(int(batchOps*n), 1)})
					k := newCheap(r, op, n)
					if op == OpWrite && n > 4096 {
						// A client that sends before it reads needs replies
						// that fit the socket, and these do.
						k.requests = k.requests[:len(k.requests)/batchOps]
						k.replies = k.replies[:repSize]
					} else if n > 4096 {
						k.requests, k.replies = k.requests[:reqSize], k.replies[:repSize+n]
					}
					if !tmpfs && op == OpWrite && n > 64<<10 {
						return // goes to a worker
					}
					if n := k.allocations(t); n != 0 {
						t.Errorf("%v allocations for a batch", n)
					}
					if s := r.d.Stats(); s.Errors != 0 || s.Refused != 0 || s.Reads+s.Writes == 0 {
						t.Errorf("%+v", s)
					}
				})
			}
		}
	}
}

func benchOps(b *testing.B, op Op, n int64) {
	r := newRig(b, rigConfig{tmpfs: true, content: pattern(int(batchOps*n), 1)})
	k := newCheap(r, op, n)
	must(b, k.batch())
	b.ReportAllocs()
	b.SetBytes(n)
	b.ResetTimer()
	for i := 0; i < b.N; i += batchOps {
		must(b, k.batch())
	}
}

// One operation is one request of a batch of 32 over a Unix socket, client
// included.
func BenchmarkRead4k(b *testing.B)  { benchOps(b, OpRead, 4096) }
func BenchmarkWrite4k(b *testing.B) { benchOps(b, OpWrite, 4096) }

// What asking the gate adds to the work of a 4k read or write on tmpfs, without
// any socket.
func BenchmarkGateCost(b *testing.B) {
	r := newRig(b, rigConfig{tmpfs: true, content: pattern(1<<20, 1)})
	lane := r.m.Lane(nil, nil)
	defer lane.Close()
	buf := make([]byte, 4096)
	var p backend.Plan
	read := func(off int64) {
		must(b, r.raw.Map(&p, off, 4096, 0))
		must(b, fetch(r.raw, &p, buf, true))
		r.raw.Unmap(&p)
	}
	write := func(off int64) {
		must(b, r.raw.Prepare(&p, off, buf, 0))
		_, err := p.Extents[0].File.TryWriteAt(buf, off)
		must(b, err)
		r.raw.Commit(&p)
	}
	b.Run("alone", func(b *testing.B) {
		for range b.N {
			if lane.Enter(state.Mutate) != state.Admitted {
				b.Fatal("refused")
			}
			lane.Leave()
		}
	})
	// In turns, since machines change their speed; the medians count.
	compare := func(name string, without, with func(off int64)) {
		b.Run(name, func(b *testing.B) {
			const chunk = 500
			took := [2][]time.Duration{}
			for done := 0; done < b.N || done < 2*chunk; done += 2 * chunk {
				for k, fn := range []func(int64){without, with} {
					begin := time.Now()
					for i := range int64(chunk) {
						fn(i % 256 * 4096)
					}
					took[k] = append(took[k], time.Since(begin))
				}
			}
			var median [2]float64
			for k := range took {
				slices.Sort(took[k])
				median[k] = float64(took[k][len(took[k])/2]) / chunk
			}
			b.ReportMetric(median[0], "ns/without")
			b.ReportMetric(median[1], "ns/with")
			b.ReportMetric(100*(median[1]-median[0])/median[0], "%gate")
		})
	}
	compare("read", read, func(off int64) {
		g := lane.EnterRead()
		if lane.Stopping() {
			b.Fatal("stopping")
		}
		read(off)
		lane.LeaveRead(g)
	})
	compare("write", write, func(off int64) {
		if lane.Enter(state.Mutate) != state.Admitted {
			b.Fatal("refused")
		}
		write(off)
		lane.Leave()
	})
}
