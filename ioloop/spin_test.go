package ioloop

import (
	"testing"
	"time"
)

// timed is a spinner with a clock that moves as the test says.
type timed struct {
	spinner
	now time.Duration
}

func newTimed() *timed {
	s := &timed{now: 1}
	s.may = func() bool { return true }
	s.spinner.clock = func() time.Duration { return s.now }
	return s
}

// wait waits for d, looking every step, and returns how long it spun.
func (s *timed) wait(d, step time.Duration) (spun time.Duration) {
	begin := s.now
	for s.again() {
		if s.now-begin >= d {
			break
		}
		s.now += step
	}
	spun = s.now - begin
	s.now = max(s.now, begin+d)
	s.got()
	s.now++
	return spun
}

func TestSpinner(t *testing.T) {
	const quick, step = 10 * time.Microsecond, time.Microsecond
	s := newTimed()
	earn := func() {
		t.Helper()
		for range spinMost {
			s.wait(quick, step)
		}
		if s.budget != spinMost {
			t.Fatalf("budget %d", s.budget)
		}
	}
	for range spinAt {
		if d := s.wait(quick, step); d != 0 {
			t.Fatalf("%v of spinning before it is earned", d)
		}
	}
	if d := s.wait(quick, step); d != quick {
		t.Fatalf("%v of spinning, want %v", d, quick)
	}
	// Waits that are too long: each is spun on for the limit, and a few of them
	// end it.
	earn()
	misses := 0
	for s.budget >= spinAt {
		if d := s.wait(time.Millisecond, step); d < spinLimit || d > spinLimit+2*step {
			t.Fatalf("%v of spinning, want %v", d, spinLimit)
		}
		misses++
	}
	if misses > 3 {
		t.Errorf("%d misses", misses)
	}
	for range 100 {
		if d := s.wait(time.Millisecond, step); d != 0 {
			t.Fatalf("%v of spinning without a budget", d)
		}
	}
	if s.budget != 0 {
		t.Errorf("budget %d", s.budget)
	}
	// Somebody else needs the core.
	earn()
	if d := s.wait(quick*4, spinGap+1); d != spinGap+1 || s.budget >= spinMost {
		t.Errorf("%v of spinning, budget %d", d, s.budget)
	}
	// It is asked each time.
	earn()
	s.may = func() bool { return false }
	if d := s.wait(quick, step); d != 0 {
		t.Errorf("%v of spinning although it may not", d)
	}
	var never spinner
	if never.again() {
		t.Error("a spinner that may never")
	}
	never.got()
}

// Only one busy connection is alone, however many are idle.
func TestAlone(t *testing.T) {
	r := newRig(t, rigConfig{tmpfs: true})
	clients := []*client{r.connect(&testCodec{}), r.connectOver(&testCodec{}, tlsPair), r.connect(&testCodec{})}
	count := func(busy ...int) bool {
		for _, i := range busy {
			clients[i].ok(OpRead, 0, 0, 512, nil)
		}
		r.e.nextCount.Store(0)
		return r.e.alone()
	}
	count()
	for _, test := range []struct {
		busy []int
		want bool
	}{
		{nil, true}, {[]int{0}, true}, {[]int{0, 1}, false}, {[]int{2}, true}, {[]int{0, 1, 2}, false}, {nil, true},
	} {
		if got := count(test.busy...); got != test.want {
			t.Errorf("busy %v: alone %v", test.busy, got)
		}
	}
	c := clients[0].conn
	if !c.maySpin() {
		t.Error("not even this one may spin")
	}
	c.tasks.Add(1)
	if c.maySpin() {
		t.Error("a connection that waits for a device spins")
	}
	c.tasks.Add(-1)
}

// There is no spinning after a request that has waited for a device, and again after
// one that has not.
func TestSpinNotAfterDevice(t *testing.T) {
	s := newTimed()
	s.budget = spinMost
	for range 3 {
		s.device = true
		if d := s.wait(spinLimit/2, time.Microsecond); d != 0 {
			t.Fatalf("spun for %v", d)
		}
		if d := s.wait(spinLimit/2, time.Microsecond); d == 0 {
			t.Fatal("did not spin")
		}
	}
}
