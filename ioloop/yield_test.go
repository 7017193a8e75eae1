package ioloop

import (
	"math"
	"net"
	"runtime"
	"testing"
	"time"
)

// A turn ends only where others may want the thread, and a wait begins a new one.
func TestYieldInACrowd(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	r.e.nextCount.Store(math.MaxInt64) // what busy says stays
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	c := newConn(r.e, b, &testCodec{}, r.d)
	defer c.lane.Close()
	for _, test := range []struct {
		what  string
		busy  int
		since func()
		gives bool
	}{
		{"alone", 1, func() { c.busyFrom = 1 }, false},
		{"after a wait", runtime.GOMAXPROCS(0), func() { c.onPayload() }, false},
		{"at rest before", runtime.GOMAXPROCS(0), func() { c.onRest() }, false},
		{"as many as threads", runtime.GOMAXPROCS(0), func() { c.busyFrom = 1 }, true},
	} {
		r.e.busy.Store(int32(test.busy))
		rounds := r.e.yielder.Rounds()
		test.since()
		c.yield()
		if gave := r.e.yielder.Rounds() > rounds; gave != test.gives {
			t.Errorf("%s: gives way %v", test.what, gave)
		}
		if c.busyFrom == 0 || test.gives && c.busyFrom == 1 {
			t.Errorf("%s: no new turn has begun", test.what)
		}
	}
}

// The core is offered once in a while, not by each connection at each turn.
func TestOfferCore(t *testing.T) {
	var y yielder
	for _, c := range []struct{ now, want time.Duration }{
		{10 * coreTurn, 10 * coreTurn},
		{11*coreTurn - 1, 10 * coreTurn},
		{11 * coreTurn, 11 * coreTurn},
	} {
		if y.offerCore(c.now); time.Duration(y.offer.Load()) != c.want {
			t.Errorf("at %v: offered last at %v, want %v", c.now, time.Duration(y.offer.Load()), c.want)
		}
	}
}
