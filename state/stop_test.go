package state

import (
	"errors"
	"testing"
)

// durableError is a failure after which nothing is lost.
type durableError struct{ *testError }

func (durableError) Durable() bool { return true }

// TestStopDurable settles an image in a stop with errors after which all is on
// disk, or not.
func TestStopDurable(t *testing.T) {
	const lost = "image a: writes acknowledged since the last flush may be lost: "
	onDisk := durableError{&testError{text: "all is on disk, too many open files"}}
	lying := durableError{&testError{text: "fdatasync: input/output error", sync: true}}
	for _, c := range []struct {
		settle, close error
		want          string
	}{
		{onDisk, nil, "ok"},
		{onDisk, errIO, "image a: no space left on device"},
		{nil, onDisk, "ok"},
		{onDisk, onDisk, "ok"},
		{nil, errors.Join(onDisk), "ok"},
		{nil, errors.Join(onDisk, errIO), "image a: all is on disk, too many open files\nno space left on device"},
		{lying, nil, lost + "fdatasync: input/output error"},
		{errIO, nil, lost + "no space left on device"},
	} {
		r := prepare(t, Options{}, Active)
		if c.settle != nil {
			r.imgs[0].failNext("Settle", c.settle)
		}
		if c.close != nil {
			r.imgs[0].failNext("Close", c.close)
		}
		r.forget()
		err := Stop(r.ms[0])
		check(t, "error", errText(err), c.want)
		check(t, "calls", r.trace.take(), "a.Settle a.Close")
		check(t, "state", r.ms[0].Status().State.String(), "closed")
		if e := r.ms[0].Status().LastError; e == nil {
			t.Error("what failed is not told at all")
		}
	}
}

// What a stop could not write is tried again as long as it is said so, and only
// where that can be of use.
func TestStopTriesAgain(t *testing.T) {
	const lost = "image a: writes acknowledged since the last flush may be lost: "
	for _, c := range []struct {
		fails int   // times that Settle fails, with err
		err   error // of Settle
		want  string
		asked int
		calls string
	}{
		{2, errIO, "ok", 2, "a.Settle a.Settle a.Settle a.Close"},
		{5, errIO, lost + "no space left on device", 3, "a.Settle a.Settle a.Settle a.Close"},
		{1, &testError{text: "fdatasync: input/output error", sync: true}, lost + "fdatasync: input/output error", 0, "a.Settle a.Close"},
		{1, durableError{&testError{text: "all is on disk"}}, "ok", 0, "a.Settle a.Close"},
	} {
		asked := 0
		r := prepare(t, Options{Unwritten: func(image string, err error) bool {
			check(t, "image", image, "a")
			check(t, "cause", errText(err), errText(c.err))
			asked++
			return asked < 3
		}}, Active)
		for range c.fails {
			r.imgs[0].failNext("Settle", c.err)
		}
		r.forget()
		check(t, "error", errText(Stop(r.ms[0])), c.want)
		check(t, "calls", r.trace.take(), c.calls)
		check(t, "state", r.ms[0].Status().State.String(), "closed")
		if asked != c.asked {
			t.Errorf("asked %d times, want %d", asked, c.asked)
		}
	}
}
