package control

import (
	"testing"
	"time"
)

// What storage does not finish is told, without a transition that waits for it.
func TestStatusTellsOfSlowRequests(t *testing.T) {
	b := newBed(t, 1)
	target := b.Targets()[0]
	for _, c := range []struct {
		age  time.Duration
		want bool
	}{{0, false}, {time.Hour, true}} {
		what := ""
		if c.age > 0 {
			what = "write of 4096 bytes at 0"
		}
		began := time.Now().Add(-c.age)
		l := target.Machine.Lane(nil, func() (string, time.Time) { return what, began })
		slow := target.Status().Slow
		if (slow != nil) != c.want || slow != nil && (slow.Request != what || slow.Seconds < c.age.Seconds()) {
			t.Errorf("after %v: %+v", c.age, slow)
		}
		l.Close()
	}
}
