package ioloop

import (
	"testing"
	"testing/synctest"
	"time"
)

// A client that has left is waited for as long as it takes its replies, slowly as
// that may be, and not much longer.
func TestFarewell(t *testing.T) {
	const rounds = 20
	synctest.Test(t, func(t *testing.T) {
		f := newFakeSocket(0)
		c := newOut(f)
		c.out.enqueue(segment{b: contents[:(rounds+1)*leastMove], task: c.charged()})
		ended := background(c.out.farewell)
		for i := range rounds {
			time.Sleep(goodbye - goodbyeLook)
			select {
			case <-ended:
				t.Fatalf("it is waited for no more after %d of %d bytes", i*leastMove, (rounds+1)*leastMove)
			default:
			}
			f.allow(leastMove)
			synctest.Wait()
		}
		before := time.Now()
		<-ended
		if waited := time.Since(before); waited < goodbye || waited > goodbye+goodbyeLook {
			t.Errorf("waited for %v of a client that takes nothing", waited)
		}
		c.out.fail(errGone)
		checkOut(t, c)
	})
	synctest.Test(t, func(t *testing.T) { // there is nothing to wait for
		c := newOut(newFakeSocket(0))
		before := time.Now()
		c.out.farewell()
		if time.Now() != before {
			t.Error("it waits with nothing to send")
		}
	})
}
