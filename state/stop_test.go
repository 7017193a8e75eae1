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
