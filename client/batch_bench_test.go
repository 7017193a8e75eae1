package client

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/export/wire"
	"golang.org/x/sys/unix"
)

// counted sends n requests of one kind at random offsets.
type counted struct {
	left   int
	cmd    uint16
	length uint32
	data   []byte
	rng    *rand.PCG
	failed error
	done   int
}

func (c *counted) Next(op *Op, _ int64) (time.Duration, bool) {
	if c.left == 0 {
		return 0, false
	}
	c.left--
	op.Cmd, op.Offset, op.Length, op.Data = c.cmd, c.rng.Uint64()%(1<<30)&^4095, c.length, c.data
	return 0, true
}

func (c *counted) Done(op *Op, _ int64) {
	c.done++
	if err := op.Err(); err != nil {
		c.failed = err
	}
}

func processorTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkBatch measures this package's cost per operation (client-us/op)
// against a server that does nothing.
func BenchmarkBatch(b *testing.B) {
	for _, c := range []struct {
		name   string
		cmd    uint16
		length uint32
		depth  int
		opt    Options
	}{
		{"read/4k/32", wire.CmdRead, 4096, 32, Options{}},
		{"read/4k/32/simple", wire.CmdRead, 4096, 32, Options{SimpleReplies: true}},
		{"write/4k/32", wire.CmdWrite, 4096, 32, Options{}},
		{"read/4k/1", wire.CmdRead, 4096, 1, Options{}},
		{"read/64k/8", wire.CmdRead, 65536, 8, Options{}},
		{"read/64k/8/discard", wire.CmdRead, 65536, 8, Options{Discard: true}},
		{"write/64k/8", wire.CmdWrite, 65536, 8, Options{}},
		{"read/1M/4", wire.CmdRead, 1 << 20, 4, Options{}},
		{"read/1M/4/discard", wire.CmdRead, 1 << 20, 4, Options{Discard: true}},
		{"write/1M/4", wire.CmdWrite, 1 << 20, 4, Options{}},
	} {
		b.Run(c.name, func(b *testing.B) {
			uri := startNullServer(b)
			batch, err := DialBatch(b.Context(), uri, c.opt, c.depth)
			if err != nil {
				b.Fatal(err)
			}
			defer batch.Close()
			src := &counted{left: b.N, cmd: c.cmd, length: c.length, rng: rand.NewPCG(1, 2)}
			if c.cmd == wire.CmdWrite {
				src.data = make([]byte, c.length)
			}
			b.ReportAllocs()
			b.SetBytes(int64(c.length))
			b.ResetTimer()
			before := processorTime()
			if err := batch.Run(b.Context(), src, time.Time{}, false); err != nil {
				b.Fatal(err)
			}
			used := processorTime() - before
			if src.done != b.N || src.failed != nil {
				b.Fatal(fmt.Errorf("%d of %d done, %v", src.done, b.N, src.failed))
			}
			b.ReportMetric(float64(used.Microseconds())/float64(b.N), "client-us/op")
		})
	}
}
