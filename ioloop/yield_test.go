package ioloop

import (
	"math"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
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
	var a turns
	defer a.close()
	const bytes, most = 1000, 8
	late := 0
	for i := range int32(bytes) {
		_, err := out.Write([]byte{0})
		must(t, err)
		yields := 0
		for ; seen.Load() == i; yields++ {
			a.give()
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
	defer c.turns.close()
	for _, test := range []struct {
		what  string
		busy  int
		since func()
		gives bool
	}{
		{"alone", 1, func() { c.turns.since = 1 }, false},
		{"after a wait", runtime.GOMAXPROCS(0), func() { c.onPayload() }, false},
		{"at rest before", runtime.GOMAXPROCS(0), func() { c.onRest() }, false},
		{"as many as threads", runtime.GOMAXPROCS(0), func() { c.turns.since = 1 }, true},
	} {
		r.e.busy.Store(int32(test.busy))
		c.turns.close()
		test.since()
		c.yield()
		if gave := c.turns.event != nil; gave != test.gives {
			t.Errorf("%s: gives way %v", test.what, gave)
		}
		if c.turns.since == 0 || test.gives && c.turns.since == 1 {
			t.Errorf("%s: no new turn has begun", test.what)
		}
	}
}
