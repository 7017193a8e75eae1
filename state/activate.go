package state

import (
	"context"
	"fmt"
)

// ActivateOptions refine Activate.
type ActivateOptions struct {
	// IfUnchanged refuses if an image is not as this process
	// left it when it last gave it away.
	IfUnchanged bool
}

// Activate makes this process the owner of all images of ms, or of none.
// Active images stay as they are; an activation under way is joined. It
// returns an *OrderError where a state forbids it, and otherwise what Acquire,
// Load or Claim said; then every image is inactive as before and holds nothing. When
// ctx ends the order is given up, which cancels the activation, as Inactivate says,
// until the last lock is about to be taken.
//
// Pipeline, for the whole group step by step: lock all (in key order) -> load
// all -> claim all -> publish all (from here on active) -> retire the old views.
func Activate(ctx context.Context, opt ActivateOptions, ms ...*Machine) error {
	op, err := begin(ctx, OrderActivate, StepLock, ms)
	if op == nil {
		return err
	}
	acquired := 0
	bad, err := op.each(func(m *Machine) error {
		if !op.wanted(m == op.machines[len(op.machines)-1]) {
			return context.Cause(op.ctx)
		}
		if err := m.img.Acquire(); err != nil {
			return err
		}
		acquired++
		return nil
	})
	if err == nil {
		op.step(StepLoad)
		bad, err = op.each(func(m *Machine) error { return m.img.Load(opt.IfUnchanged) })
	}
	if err == nil {
		op.step(StepClaim)
		bad, err = op.each(func(m *Machine) (err error) {
			m.claimed, err = m.img.Claim(m.Status().Epoch)
			return err
		})
	}
	if err != nil {
		err = fmt.Errorf("cannot activate image %s: %w", bad.name, err)
		for _, m := range op.machines[:acquired] {
			m.img.Withdraw()
		}
		for _, m := range op.machines {
			m.apply(ActivateFailed, err)
		}
		return op.finish(err)
	}

	// Nothing can refuse any more: all views first, then all gates, so that a
	// group has one owner before its first write runs.
	op.step(StepPublish)
	for _, m := range op.machines {
		m.img.PublishActive()
		m.owned = true
	}
	for _, m := range op.machines {
		m.apply(Published, nil)
	}
	op.step(StepRetire)
	for _, m := range op.machines {
		m.synchronize()
		m.img.Retire()
		m.startWatch()
	}
	return op.finish(nil)
}
