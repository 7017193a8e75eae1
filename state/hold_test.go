package state

import (
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

// TestHoldVerdicts is the table of a machine that holds writes.
func TestHoldVerdicts(t *testing.T) {
	for _, c := range []struct {
		state    State
		readOnly bool
		gate     string // see ask
	}{
		{Inactive, false, "HRN"},
		{Inactive, true, "RRN"},
		{Activating, false, "WWW"},
		{Active, false, "AAA"},
		{Active, true, "RAN"},
		{Inactivating, false, "WWW"},
		{FailedIO, false, "RAR"},
		{FailedFenced, false, "RAR"},
		{Closed, false, "RRR"},
	} {
		t.Run(c.state.String(), func(t *testing.T) {
			r := newRig(t, Options{ReadOnly: c.readOnly, Hold: time.Second}, "a")
			defer into(t, r, c.state)()
			check(t, "gate", r.gates(), c.gate)
			if c.state == Inactive {
				check(t, "refusal of a query", r.lanes[0].Refusal().Error(), "export is inactive")
			}
		})
	}
}

// again asks as a write that came at since.
func again(l *Lane, since Arrival) (Verdict, Arrival) {
	v, since := l.EnterAgain(Mutate, since)
	if v == Admitted {
		l.Leave()
	}
	return v, since
}

func wantVerdict(t *testing.T, what string, got, want Verdict) {
	t.Helper()
	if got != want {
		t.Errorf("%s: verdict %d, want %d", what, got, want)
	}
}

// TestHeldWriteNeverOutlivesALoss: a write that waited runs in the ownership
// that began after it came, and in no other.
func TestHeldWriteNeverOutlivesALoss(t *testing.T) {
	lose := map[string]func(t *testing.T, r *rig){
		"inactivated": func(t *testing.T, r *rig) { noError(t, r.inactivate()) },
		"abandoned": func(t *testing.T, r *rig) {
			r.lanes[0].Fault(errSync)
			noError(t, r.abandon())
		},
		"fenced": func(t *testing.T, r *rig) {
			r.ms[0].Fence(errFence)
			noError(t, r.abandon())
		},
	}
	for name, lose := range lose {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Options{Hold: time.Second}, "a")
			l := r.lanes[0]
			v, first := again(l, 0)
			wantVerdict(t, "while inactive", v, Hold)

			r.imgs[0].failNext("Acquire", errBusy)
			if r.activate() == nil {
				t.Error("activated")
			}
			v, _ = again(l, first)
			wantVerdict(t, "after an activation that failed", v, Hold)

			noError(t, r.activate())
			v, _ = again(l, first)
			wantVerdict(t, "while active", v, Admitted)

			lose(t, r)
			v, _ = again(l, first)
			wantVerdict(t, "after the loss", v, Lost)
			v, second := again(l, 0)
			wantVerdict(t, "one that came later", v, Hold)

			noError(t, r.activate())
			v, _ = again(l, first)
			wantVerdict(t, "active again", v, Lost)
			v, _ = again(l, second)
			wantVerdict(t, "active again, one that came later", v, Admitted)
			noError(t, Stop(r.ms...))
			v, _ = again(l, first)
			wantVerdict(t, "after a stop", v, Refused)
			check(t, "refusal", l.Refusal().Error(), ErrStopping.Error())
		})
	}
}

// A write that came while the image was on its way out is held by no rule: the
// process owned it when the write came.
func TestWriteDuringInactivationIsLost(t *testing.T) {
	r := newRig(t, Options{Hold: time.Second}, "a")
	done := into(t, r, Inactivating)
	v, since := again(r.lanes[0], 0)
	wantVerdict(t, "while inactivating", v, Wait)
	done()
	v, _ = again(r.lanes[0], since)
	wantVerdict(t, "while inactive", v, Lost)
}

// TestLateWriter: only connections that wrote in an earlier ownership are
// refused to take the image back, and only with that option.
func TestLateWriter(t *testing.T) {
	for _, refuse := range []bool{true, false} {
		r := newRig(t, Options{Hold: time.Second, RefuseLate: refuse}, "a")
		reader, writer := r.ms[0].Lane(nil, nil), r.ms[0].Lane(nil, nil)
		defer reader.Close()
		defer writer.Close()
		noError(t, r.activate())
		v, _ := again(writer, 0)
		wantVerdict(t, "active", v, Admitted)
		reader.LeaveRead(reader.EnterRead())
		noError(t, r.inactivate())
		want := Hold
		if refuse {
			want = Late
		}
		v, _ = again(writer, 0)
		wantVerdict(t, "the writer", v, want)
		v, since := again(reader, 0)
		wantVerdict(t, "the reader", v, Hold)
		noError(t, r.activate())
		for _, l := range []*Lane{reader, writer} {
			v, _ = again(l, 0)
			wantVerdict(t, "active again", v, Admitted)
		}
		v, _ = again(reader, since)
		wantVerdict(t, "what was held", v, Admitted)
	}
	for _, err := range []error{ErrLost, ErrLate} {
		if !errors.Is(err, ErrInactive) {
			t.Errorf("%v is no ErrInactive", err)
		}
	}
}

func TestWant(t *testing.T) {
	wanted := 0
	r := newRig(t, Options{Hold: time.Second, Wanted: func() { wanted++ }}, "a")
	r.lanes[0].Want()
	newRig(t, Options{}, "b").lanes[0].Want()
	if wanted != 1 {
		t.Errorf("called %d times", wanted)
	}
}

// TestHeldWritesRace: with ownership coming and going all the while, no write
// runs that came before the last loss.
func TestHeldWritesRace(t *testing.T) {
	r := newRig(t, Options{Hold: time.Second, Watch: time.Hour}, "a")
	var released, admitted, bad atomic.Int64
	r.imgs[0].on("Release", func() error { released.Add(1); return nil })
	end := crowd(8, func() {
		l := r.ms[0].Lane(nil, nil)
		defer l.Close()
		for range 20 {
			seen := released.Load()
			v, since := l.EnterAgain(Mutate, 0)
			sure := released.Load() == seen // it came before any later loss
			for v == Hold || v == Wait {
				runtime.Gosched()
				v, _ = l.EnterAgain(Mutate, since)
			}
			switch v {
			case Admitted:
				if sure && released.Load() != seen {
					bad.Add(1)
				}
				admitted.Add(1)
				l.Leave()
			case Lost:
			default:
				bad.Add(1)
			}
		}
	})
	for start := time.Now(); time.Since(start) < time.Second/2 || admitted.Load() == 0; {
		noError(t, r.activate())
		runtime.Gosched()
		noError(t, r.inactivate())
		r.forget()
	}
	noError(t, r.activate()) // or held writes would wait for ever
	end()
	if bad.Load() != 0 {
		t.Errorf("%d writes ran after a loss, or got a verdict they must not get", bad.Load())
	}
}
