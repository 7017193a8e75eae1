package bench

import (
	"runtime"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

// A gap counts but for what of it the machine stood still, on whichever processor.
func TestMoving(t *testing.T) {
	const ms = int64(time.Millisecond)
	s := &stillness{}
	for _, one := range []span{{100 * ms, 110 * ms}, {105 * ms, 112 * ms}, {90 * ms, 94 * ms}, {120 * ms, 124 * ms}} {
		s.add(one)
	}
	for _, tt := range []struct {
		from, to int64 // ms
		want     time.Duration
	}{
		{0, 50, 50}, {100, 110, 0}, {99, 113, 2}, {108, 109, 0}, {92, 101, 6}, {111, 122, 8}, {80, 130, 50 - 12 - 4 - 4},
	} {
		if got := s.moving(span{tt.from * ms, tt.to * ms}); got != tt.want*time.Millisecond {
			t.Errorf("%d to %d ms: %v, want %v", tt.from, tt.to, got, tt.want*time.Millisecond)
		}
	}
	s.add(span{20000 * ms, 20004 * ms})
	if len(s.spans) != 1 {
		t.Errorf("what is long past is kept: %v", s.spans)
	}
}

// What was found while the machine stood still is told apart.
func TestReadGapMoving(t *testing.T) {
	const ms = int64(time.Millisecond)
	f := &Follower{still: &stillness{}}
	now := client.Now()
	for side := range f.heard {
		f.heard[side].Store(now)
	}
	f.gaps.add(span{now - 9*ms, now - 2*ms})
	f.gaps.add(span{now - 30*ms, now - 26*ms})
	f.still.add(span{now - 8*ms, now - 3*ms})
	if g := f.ReadGap(); g.Longest != 7*time.Millisecond || g.Moving != 4*time.Millisecond {
		t.Errorf("%+v", g)
	}
	if g := f.ReadGap(); g.Longest >= 4*time.Millisecond {
		t.Errorf("counted twice: %+v", g)
	}
}

// Who watches gives back the places to run in that this takes.
func TestWatchStill(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	s := watchStill()
	time.Sleep(5 * time.Millisecond)
	s.close()
	s.close()
	if after := runtime.GOMAXPROCS(0); after != before {
		t.Errorf("%d places to run in, %d before", after, before)
	}
}
