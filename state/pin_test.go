package state

import (
	"context"
	"errors"
	"testing"
)

// A pinned image, and a group with one, is not inactivated; it can be given up.
func TestPin(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, Options{}, "a", "b")
	a, b := r.ms[0], r.ms[1]
	a.Pin()
	a.Pin()
	if err := Inactivate(ctx, a); err != nil {
		t.Errorf("inactive already: %v", err)
	}
	if err := Activate(ctx, ActivateOptions{}, a, b); err != nil {
		t.Fatal(err)
	}
	a.Unpin()
	for _, ms := range [][]*Machine{{a}, {b, a}} {
		err := Inactivate(ctx, ms...)
		if oe, ok := errors.AsType[*OrderError](err); !ok || oe.Image != "a" || !errors.Is(err, ErrPinned) {
			t.Errorf("got %v", err)
		}
	}
	if got := r.states(); got != "active active" {
		t.Fatalf("states %s", got)
	}
	if err := Inactivate(ctx, b); err != nil {
		t.Error(err)
	}
	a.fault(SyncFailed, errors.New("disk gone"))
	if err := Abandon(ctx, a); err != nil {
		t.Error(err)
	}
	if err := Activate(ctx, ActivateOptions{}, a); err != nil {
		t.Error(err)
	}
	a.Unpin()
	if err := Inactivate(ctx, a); err != nil {
		t.Error(err)
	}
}

// Orders wait for WhileActive, and it for them.
func TestWhileActive(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, Options{}, "a")
	a := r.ms[0]
	ran := false
	if err := a.WhileActive(func() error { ran = true; return nil }); !errors.Is(err, ErrInactive) || ran {
		t.Fatalf("inactive: %v, ran %t", err, ran)
	}
	if err := Activate(ctx, ActivateOptions{}, a); err != nil {
		t.Fatal(err)
	}
	in, out, done := make(chan struct{}), make(chan struct{}), make(chan error)
	fail := errors.New("no")
	go func() { done <- a.WhileActive(func() error { close(in); <-out; return fail }) }()
	<-in
	inactivated := make(chan error)
	go func() { inactivated <- Inactivate(ctx, a) }()
	if s := a.Status().State; s != Active {
		t.Errorf("state %s", s)
	}
	close(out)
	if err := <-done; !errors.Is(err, fail) {
		t.Error(err)
	}
	if err := <-inactivated; err != nil {
		t.Error(err)
	}
	there, goOn := r.pauseAt(StepSettle)
	if err := Activate(ctx, ActivateOptions{}, a); err != nil {
		t.Fatal(err)
	}
	go func() { inactivated <- Inactivate(ctx, a) }()
	<-there
	go func() { done <- a.WhileActive(func() error { t.Error("ran"); return nil }) }()
	goOn()
	if err := <-inactivated; err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, ErrInactive) {
		t.Error(err)
	}
}
