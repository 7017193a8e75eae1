package ioloop

import (
	"math"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A goroutine that yields does not keep one from the only thread that became
// ready in the netpoller. The runtime's monitor would find it too, after 10 ms:
// thousands of yields.
func TestYieldAsksTheNetpoller(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	in, out, err := os.Pipe()
	must(t, err)
	defer in.Close()
	defer out.Close()
	var seen atomic.Int32
	done := background(func() {
		b := make([]byte, 1)
		for {
			if n, _ := in.Read(b); n == 0 {
				return
			}
			seen.Add(1)
		}
	})
	var y yielder
	defer y.close()
	const bytes, most = 1000, 8
	late := 0
	for i := range int32(bytes) {
		_, err := out.Write([]byte{0})
		must(t, err)
		yields := 0
		for ; seen.Load() == i; yields++ {
			y.give()
		}
		if yields > most {
			late++
		}
	}
	// The monitor may have found one, and have been held up before it said so.
	if late > bytes/20 {
		t.Errorf("%d of %d bytes were not seen in %d yields", late, bytes, most)
	}
	out.Close()
	<-done
}

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
		rounds := r.e.yielder.rounds
		test.since()
		c.yield()
		if gave := r.e.yielder.rounds > rounds; gave != test.gives {
			t.Errorf("%s: gives way %v", test.what, gave)
		}
		if c.busyFrom == 0 || test.gives && c.busyFrom == 1 {
			t.Errorf("%s: no new turn has begun", test.what)
		}
	}
}

// However many connections give way, and at once, all come back, and they have one
// descriptor for it: those that are left serve to hand over the image.
func TestYieldTogether(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	count := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(d)
	}
	before := count()
	const conns, times = 20, 500
	var all sync.WaitGroup
	for range conns {
		a, b := net.Pipe()
		defer a.Close()
		defer b.Close()
		c := newConn(r.e, b, &testCodec{}, r.d)
		defer c.lane.Close()
		all.Go(func() {
			for range times {
				c.e.yielder.give()
			}
		})
	}
	await(t, background(all.Wait), "those that give way")
	if n := count() - before; n > 1 {
		t.Errorf("%d descriptors", n)
	}
	if n := r.e.yielder.rounds; n < times || n > conns*times {
		t.Errorf("%d rounds", n)
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
