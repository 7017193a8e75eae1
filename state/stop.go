package state

import (
	"errors"
	"fmt"
)

// Refuse makes every request of the images, reads and parked ones included,
// and every order but Stop fail with ErrStopping from now on. What is admitted
// finishes. It waits for a transition under way, which finishes first.
func Refuse(ms ...*Machine) {
	for _, m := range ms {
		m.mu.Lock()
		m.mu.stopping = true
		m.mu.Unlock()
	}
	for _, m := range ms {
		op := m.exclusive()
		wakeAll(m.gate.set(modeStopping, ErrStopping))
		_ = op.finish(nil)
	}
}

// Stop lets the images go for good: nothing new is admitted, what is admitted
// finishes, an active image is settled, and all descriptors and locks go. An
// inactive image is not touched. The error names each image whose last sync
// or write failed, and what may be lost. Settle and Close may fail with an error that
// is Durable: then nothing is lost, and what failed is no longer needed, so it is
// observed and not returned.
func Stop(ms ...*Machine) error {
	Refuse(ms...)
	var errs error
	for _, m := range ms {
		errs = joinErrors(errs, m.stop())
	}
	return errs
}

func (m *Machine) stop() error {
	op := m.exclusive()
	if m.in(Closed) {
		return op.finish(nil)
	}
	op.step(StepStop)
	m.drain()
	var err, observed error
	if m.in(Active) {
		err = m.img.Settle()
		for m.unwritten(err) && m.in(Active) { // nobody else has what was not written
			err = m.img.Settle()
		}
		if Durable(err) {
			err, observed = nil, err
		}
	}
	m.endWatch()
	m.synchronize()
	m.mu.Lock()
	state, cause := m.mu.state, m.mu.cause
	m.mu.Unlock()
	if state == FailedIO || state == FailedFenced { // before, or meanwhile
		err = joinErrors(err, fmt.Errorf("it is %s: %w", state, cause))
	}
	if err != nil {
		err = fmt.Errorf("image %s: writes acknowledged since the last flush may be lost: %w", m.name, err)
	}
	if e := m.img.Close(); Durable(e) {
		observed = joinErrors(observed, e)
	} else if e != nil {
		err = joinErrors(err, fmt.Errorf("image %s: %w", m.name, e))
	}
	m.owned = false
	m.apply(OrderStop, joinErrors(err, observed))
	return op.finish(err)
}

// unwritten asks whether to try once more what a stop could not write.
func (m *Machine) unwritten(err error) bool {
	return err != nil && failure(err) == InactivateFailed && !Durable(err) && m.opt.Unwritten != nil && m.opt.Unwritten(m.name, err)
}

// Durable reports whether err says, with a method Durable() bool that returns true,
// that everything is on disk all the same. Of errors that were joined all have to.
func Durable(err error) bool {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			if !Durable(e) {
				return false
			}
		}
		return true
	}
	var d interface{ Durable() bool }
	return failure(err) == InactivateFailed && errors.As(err, &d) && d.Durable()
}
