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
// or write failed, and what may be lost. Settle may fail with an error that has
// a Durable() bool method returning true: then nothing is lost, and what failed
// is no longer needed, so it is observed and not returned.
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
		if err = m.img.Settle(); durable(err) {
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
	if e := m.img.Close(); e != nil {
		err = joinErrors(err, fmt.Errorf("image %s: %w", m.name, e))
	}
	m.owned = false
	m.apply(OrderStop, joinErrors(err, observed))
	return op.finish(err)
}

// durable reports whether err says that everything is on disk all the same.
func durable(err error) bool {
	var d interface{ Durable() bool }
	return failure(err) == InactivateFailed && errors.As(err, &d) && d.Durable()
}
