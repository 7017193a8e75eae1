package state

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// several is held while one goroutine locks more than one machine, so that no
// order among them is needed.
var several sync.Mutex

// operation is a transition of a group of machines.
type operation struct {
	machines []*Machine // that move, in the order of Image.Key
	done     chan struct{}
	err      error // valid when done is closed
	// ctx ends, until the operation is firm, when no order wants it any more, by
	// Cancel, or when one of its images fails.
	ctx    context.Context
	cancel context.CancelCauseFunc
	began  time.Time

	mu sync.Mutex // a leaf, but for the locks of contexts
	// orders want it: the one that began it and those that have joined it, each as
	// long as its context has not ended.
	orders []context.Context
	// firm: it goes on, whoever gives up.
	firm bool
	// unwatch ends watching the context of the order that began it, which waits for the
	// end whatever comes. Of the goroutine that runs it.
	unwatch func() bool
}

// newOperation is one that the order with this context wants.
func newOperation(order context.Context) *operation {
	op := &operation{done: make(chan struct{}), began: time.Now(), orders: []context.Context{order}}
	op.ctx, op.cancel = context.WithCancelCause(context.Background())
	return op
}

// wanted reports whether op goes on, which may end ctx. With firm it will from then
// on, if it does now.
func (op *operation) wanted(firm bool) bool {
	op.mu.Lock()
	defer op.mu.Unlock()
	if op.firm {
		return true
	}
	if !slices.ContainsFunc(op.orders, func(order context.Context) bool { return order.Err() == nil }) {
		op.cancel(context.Cause(op.orders[0]))
	}
	if op.ctx.Err() != nil {
		return false
	}
	op.firm = firm
	return true
}

// join makes op one that order wants too. It reports false if it was given up before,
// and is about to end.
func (op *operation) join(order context.Context) bool {
	op.mu.Lock()
	defer op.mu.Unlock()
	if op.ctx.Err() != nil && !op.firm {
		return false
	}
	op.orders = append(op.orders, order)
	return true
}

// begin starts the transition that order asks of ms, all or none, with the step
// first. It returns no operation and no error if there is nothing to do, after
// waiting for the same transition where one is under way. The order is given up
// when ctx ends.
func begin(ctx context.Context, order Event, first Step, ms []*Machine) (*operation, error) {
	ms = distinct(ms)
	for len(ms) > 0 {
		op := newOperation(ctx)
		started, joined, busy, err := op.tryBegin(ctx, order, first, ms)
		if started {
			op.unwatch = context.AfterFunc(ctx, func() { op.wanted(false) })
			// Only now: no other operation calls the images' methods.
			slices.SortFunc(op.machines, byKey)
			op.hooks(first)
			return op, nil
		}
		op.cancel(nil)
		if err != nil {
			return nil, err
		}
		if len(joined)+len(busy) == 0 {
			return nil, nil
		}
		if err := await(ctx, joined, busy); err != nil {
			return nil, fmt.Errorf("cannot %s: gave up waiting for the transition under way: %w", order, err)
		}
		for _, o := range joined {
			if o.err != nil {
				return nil, o.err
			}
			// These have got what they were asked for, even if another order
			// has moved them on since.
			ms = slices.DeleteFunc(ms, func(m *Machine) bool { return slices.Contains(o.machines, m) })
		}
	}
	return nil, nil
}

// await waits for operations that order, whose context is ctx, has joined, and for
// others. If it is given up before they have ended it says why. What no order wants
// then has ended too, as for who began it: its images are as they were.
func await(ctx context.Context, joined, busy []*operation) error {
	for _, o := range slices.Concat(joined, busy) {
		select {
		case <-o.done:
			continue
		case <-ctx.Done():
		}
		for _, o := range slices.DeleteFunc(joined, func(o *operation) bool { return o.wanted(false) }) {
			<-o.done
		}
		return context.Cause(ctx)
	}
	return nil
}

// tryBegin looks at all machines at once and either starts op on those that
// have to move, or says why not: operations that were joined, others to wait for, or
// an order that is refused.
func (op *operation) tryBegin(ctx context.Context, order Event, first Step, ms []*Machine) (started bool, joined, busy []*operation, err error) {
	lockAll(ms)
	for _, m := range ms {
		c := table[m.mu.state][order]
		other := m.mu.op
		switch {
		case m.mu.stopping || m.mu.state == Closed:
			err = &OrderError{Image: m.name, Order: order, State: m.mu.state, Cause: ErrStopping}
		case c.kind == moves && order == OrderInactivate && m.mu.pins > 0:
			err = &OrderError{Image: m.name, Order: order, State: m.mu.state, Cause: ErrPinned}
		case c.kind == refused:
			err = &OrderError{Image: m.name, Order: order, State: m.mu.state, Step: m.mu.step, Cause: m.mu.cause}
		case c.kind == joins:
			if !slices.Contains(joined, other) {
				joined = append(joined, other)
			}
		case c.kind == moves && other != nil:
			// An activation that is published but has not retired its old
			// view yet, or a failed image's end.
			if !slices.Contains(busy, other) {
				busy = append(busy, other)
			}
		case c.kind == moves:
			op.machines = append(op.machines, m)
		}
		if err != nil {
			break
		}
	}
	if err != nil || len(joined)+len(busy) > 0 || len(op.machines) == 0 {
		if err == nil {
			joined = slices.DeleteFunc(joined, func(o *operation) bool {
				ended := !o.join(ctx)
				if ended {
					busy = append(busy, o) // who gave it up is not this order
				}
				return ended
			})
		}
		unlockAll(ms)
		return false, joined, busy, err
	}
	var wake []func()
	for _, m := range op.machines {
		m.mu.op = op
		m.mu.step, m.mu.stepSince = first, op.began
		if order != OrderAbandon {
			_, w := m.applyLocked(order, nil)
			wake = append(wake, w...)
		}
		wake = append(wake, m.setGateLocked()...)
	}
	unlockAll(ms)
	wakeAll(wake)
	return true, nil, nil, nil
}

func distinct(ms []*Machine) []*Machine {
	seen := make(map[*Machine]bool, len(ms))
	var out []*Machine
	for _, m := range ms {
		if !seen[m] {
			seen[m] = true
			out = append(out, m)
		}
	}
	return out
}

func lockAll(ms []*Machine) {
	several.Lock()
	defer several.Unlock()
	for _, m := range ms {
		m.mu.Lock()
	}
}

func unlockAll(ms []*Machine) {
	for _, m := range ms {
		m.mu.Unlock()
	}
}

func byKey(a, b *Machine) int {
	ad, ai := a.img.Key()
	bd, bi := b.img.Key()
	return cmp.Or(cmp.Compare(ad, bd), cmp.Compare(ai, bi))
}

// finish ends op and returns its error.
func (op *operation) finish(err error) error {
	if op.unwatch != nil {
		op.unwatch()
	}
	op.cancel(nil)
	op.err = err
	for _, m := range op.machines {
		m.mu.Lock()
		m.mu.op, m.mu.step, m.mu.stepSince, m.mu.past = nil, "", time.Time{}, nil
		wake := m.setGateLocked()
		m.mu.Unlock()
		wakeAll(wake)
	}
	close(op.done)
	return err
}

// step takes every machine of the group to s.
func (op *operation) step(s Step) {
	var wake []func()
	lockAll(op.machines)
	for _, m := range op.machines {
		wake = append(wake, m.setStepLocked(s)...)
	}
	unlockAll(op.machines)
	wakeAll(wake)
	op.hooks(s)
}

// hooks calls Options.Step.
func (op *operation) hooks(s Step) {
	for _, m := range op.machines {
		if m.opt.Step != nil {
			m.opt.Step(m.name, s)
		}
	}
}

// each runs f on every machine in order until one fails.
func (op *operation) each(f func(*Machine) error) (*Machine, error) {
	for _, m := range op.machines {
		if err := f(m); err != nil {
			return m, err
		}
	}
	return nil, nil
}
