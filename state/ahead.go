package state

import "context"

// Pacer decides how long an image is synced ahead, and slows its writers down
// meanwhile. The Machine knows nothing of bytes; who moves them does.
type Pacer interface {
	// Ahead runs sync, which is Image.SyncAhead, and reports whether so much
	// was written meanwhile that the group should go round again; it ends that
	// after a bounded number of rounds. images is how many move together. From
	// its first call until Done it may keep writers waiting, but never while
	// they are admitted, and no longer than until ctx ends.
	Ahead(ctx context.Context, images int, sync func(context.Context) error) (again bool, err error)
	// Done is called once the gate is closed, or the inactivation has failed.
	Done()
}

// syncAhead makes durable what there is, round by round, until no image of the
// group asks for another: each leaves only what was written since its turn in
// the last round.
func (op *operation) syncAhead() (bad *Machine, err error) {
	for again := true; again; {
		again = false
		bad, err = op.each(func(m *Machine) error {
			if !op.wanted(false) {
				return op.ctx.Err()
			}
			if m.opt.Pacer == nil {
				return m.img.SyncAhead(op.ctx)
			}
			more, err := m.opt.Pacer.Ahead(op.ctx, len(op.machines), m.img.SyncAhead)
			again = again || more
			return err
		})
		if err != nil {
			return bad, err
		}
	}
	return nil, nil
}

// unpace ends what syncAhead began.
func (op *operation) unpace() {
	for _, m := range op.machines {
		if m.opt.Pacer != nil {
			m.opt.Pacer.Done()
		}
	}
}
