package qcow2

import (
	"sync/atomic"
	"unsafe"
)

// pins tell when nobody uses what a table named earlier. Who maps a range
// enters before it reads the table and leaves when the I/O has ended; a
// cluster that was dropped from its table may be used for something else once
// all who had entered by then have left. That is sleepable RCU: entering costs
// two additions on a cache line that few share, and nobody ever waits.
//
// An epoch ends when all who entered in the one before it have left. So what
// was dropped in epoch e is unused when epoch e+2 has begun.
type pins struct {
	epoch  atomic.Uint64
	shards [pinShards]pinShard
}

const pinShards = 16

type pinShard struct {
	in [2]atomic.Int64 // by parity of the epoch in which they entered
	_  [112]byte       // a pair of cache lines, which are fetched together
}

// pin is one user; the zero value is none.
type pin struct {
	shard, parity uint8
	in            bool
}

// enter lets a user in. at is anything that differs between users that run at
// the same time; it spreads them over the shards.
func (p *pins) enter(at unsafe.Pointer) pin {
	s := uint8((uint64(uintptr(at)) * 0x9e3779b97f4a7c15) >> 60)
	for {
		e := p.epoch.Load()
		in := &p.shards[s].in[e&1]
		in.Add(1)
		if p.epoch.Load() == e {
			return pin{s, uint8(e & 1), true}
		}
		// The epoch may already count on nobody coming.
		in.Add(-1)
	}
}

func (p *pins) leave(x *pin) {
	if x.in {
		p.shards[x.shard].in[x.parity].Add(-1)
		x.in = false
	}
}

// now is the epoch, for over.
func (p *pins) now() uint64 { return p.epoch.Load() }

// over reports whether all who entered up to epoch e have left.
func (p *pins) over(e uint64) bool { return p.epoch.Load() >= e+2 }

// advance begins the next epoch if everybody of the last one has left. Only one
// goroutine at a time may call it.
func (p *pins) advance() bool {
	e := p.epoch.Load()
	for i := range p.shards {
		if p.shards[i].in[(e+1)&1].Load() != 0 {
			return false
		}
	}
	p.epoch.Store(e + 1)
	return true
}
