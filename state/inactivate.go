package state

import (
	"context"
	"fmt"
)

// Inactivate hands back all images of ms, or none: afterwards this process
// can write none of them, everything acknowledged is durable and the locks
// are free. Inactive images stay as they are; an inactivation under way is
// joined. When ctx ends the order is given up. Until the gate closes an inactivation
// that no order wants any more is cancelled; one that others have joined goes on, with
// all its images, and who began it waits for its end. Who joined waits no longer then.
//
// If a write fails, or it is cancelled, the group stays active. If a sync
// fails, that image becomes FailedIO (the kernel reports lost writes only
// once), if it turns out that another process took it, FailedFenced; the
// others stay active.
//
// Pipeline, for the whole group step by step: sync ahead, writes still served
// -> close the gates -> drain -> settle all; from here on it cannot fail ->
// publish the read-only views -> release locks -> inactive.
func Inactivate(ctx context.Context, ms ...*Machine) error {
	op, err := begin(ctx, OrderInactivate, StepSyncAhead, ms)
	if op == nil {
		return err
	}
	settled := 0
	at := StepSyncAhead
	bad, err := op.syncAhead()
	if op.ctx.Err() != nil && failure(err) == InactivateFailed {
		err = nil // interrupted; advance says by what
	}
	if err != nil {
		op.unpace()
	}
	for _, s := range []Step{StepCloseGate, StepDrain, StepSettle, StepRelease} {
		if err != nil {
			break
		}
		at = s
		bad, err = op.advance(s)
		if s == StepCloseGate {
			op.unpace() // who waited finds the gate closed, or goes on
		}
		if err != nil {
			break
		}
		switch s {
		case StepDrain:
			for _, m := range op.machines {
				m.drain()
			}
		case StepSettle:
			bad, err = op.each(func(m *Machine) error {
				if err := m.img.Settle(); err != nil {
					return err
				}
				settled++
				return nil
			})
		case StepRelease:
			op.release()
		}
	}
	if err != nil {
		err = op.rollBack(bad, settled, at, err)
	}
	return op.finish(err)
}

// advance takes an inactivation to step s, all machines or none: a fault of
// one ends it for the group, and until the gates close so does op.ctx (then
// bad is nil). Once it has reached StepRelease nothing ends it.
func (op *operation) advance(s Step) (bad *Machine, err error) {
	lockAll(op.machines)
	for _, m := range op.machines {
		if m.mu.state != Inactivating {
			bad, err = m, m.mu.cause
			break
		}
	}
	if err == nil && s == StepCloseGate && !op.wanted(true) {
		err = context.Cause(op.ctx)
	}
	if err == nil {
		for _, m := range op.machines {
			m.setStepLocked(s) // may hold requests, wakes none
		}
	}
	unlockAll(op.machines)
	if err == nil {
		op.hooks(s)
	}
	return bad, err
}

// rollBack takes a failed inactivation back: bad (nil if cancelled) failed
// with err, the first settled machines have to be unsettled.
func (op *operation) rollBack(bad *Machine, settled int, at Step, err error) error {
	if bad == nil {
		err = fmt.Errorf("inactivation cancelled, everything stays active: %w", err)
	} else {
		if ev := failure(err); ev != InactivateFailed {
			bad.fault(ev, err)
		}
		then := "it stays active"
		if s := bad.Status().State; s != Inactivating {
			then = fmt.Sprintf("it is now %s: only inactivate --abandon, or ending the process, leaves that state", s)
		}
		err = fmt.Errorf("cannot inactivate image %s: %s: %w; %s", bad.name, at, err, then)
	}
	cause := err
	for i, m := range op.machines {
		if i < settled && m.in(Inactivating) {
			if e := m.img.Unsettle(); e != nil {
				// It could not be made ready for writes again.
				e = fmt.Errorf("cannot take back the inactivation of image %s: %w", m.name, e)
				ev := SyncFailed
				if failure(e) == Fenced {
					ev = Fenced
				}
				m.fault(ev, e)
				err = joinErrors(err, e)
			}
		}
		m.apply(InactivateFailed, cause) // unless it has failed
	}
	for _, m := range op.machines {
		if m.in(FailedFenced) {
			sub := &operation{machines: []*Machine{m}}
			sub.step(StepAbandon)
			_ = m.letGo() // as in Fence
		}
	}
	return err
}

// release is the part after which another process may own the images. What
// fails here is observed, but no failure of the order: the images are
// released all the same, and a caller that took it for one might roll back.
func (op *operation) release() {
	for _, m := range op.machines {
		m.img.PublishInactive()
	}
	errs := make([]error, len(op.machines))
	for i, m := range op.machines {
		m.endWatch()
		m.synchronize()
		errs[i] = m.img.Release()
		m.owned = false
	}
	for i, m := range op.machines {
		m.apply(Released, errs[i])
	}
}

// Abandon gives up failed images: caches are dropped, locks released, and
// what was not durable may be lost, which each client hears of by its next FLUSH.
// Inactive images stay as they are. An error
// says what went wrong; the images are given up all the same.
func Abandon(ctx context.Context, ms ...*Machine) error {
	op, err := begin(ctx, OrderAbandon, StepAbandon, ms)
	if op == nil {
		return err
	}
	for _, m := range op.machines {
		e := m.letGo()
		m.apply(OrderAbandon, e)
		if e != nil {
			err = joinErrors(err, fmt.Errorf("image %s was given up, but not in order: %w", m.name, e))
		}
	}
	return op.finish(err)
}

// letGo makes a failed image inactive without making anything durable, unless
// that was done when it was fenced. The machine is at StepAbandon, so nothing
// but reads is admitted, and nothing once it is drained.
func (m *Machine) letGo() error {
	m.drain()
	if !m.owned {
		return nil
	}
	m.gate.drop()
	err := m.img.Abandon()
	m.img.PublishInactive()
	m.endWatch()
	m.synchronize()
	m.owned = false
	return joinErrors(err, m.img.Release())
}
