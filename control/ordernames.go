package control

import (
	"context"
	"errors"
	"slices"
	"sync"
)

const (
	// mostVoid is how many orders are remembered that were taken back.
	mostVoid = 1000
	// maxOrderName is the longest name of an order, in bytes.
	maxOrderName = 64
)

// orders knows the orders that clients have given a name. A client that gets
// no answer, because its connection broke, cannot know whether its order is
// still on the way; on a new connection it takes the order back, and knows
// then that it is under way, has ended, or will never be carried out. The zero
// value is ready.
type orders struct {
	mu      sync.Mutex // a leaf, but for the locks of contexts
	running []*namedOrder
	void    []string // the oldest first
}

// namedOrder is an order under way. ctx ends when it is to be given up.
type namedOrder struct {
	name   string
	ctx    context.Context
	giveUp context.CancelCauseFunc
}

// errTakenBack is why an order is given up.
var errTakenBack = errors.New("it was taken back by who gave it (x-cancel)")

// begin is called before an order is carried out, end after it. It refuses one
// that was taken back. "" is an order without a name.
func (o *orders) begin(name string) (*namedOrder, error) {
	n := &namedOrder{name, context.Background(), func(error) {}}
	if name == "" {
		return n, nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if slices.Contains(o.void, name) {
		return nil, generic("The order was taken back by who gave it (x-cancel)")
	}
	n.ctx, n.giveUp = context.WithCancelCause(n.ctx)
	o.running = append(o.running, n)
	return n, nil
}

func (o *orders) end(n *namedOrder) {
	n.giveUp(nil)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.running = slices.DeleteFunc(o.running, func(r *namedOrder) bool { return r == n })
}

// takeBack sees to it that the order begins no more, and reports whether it
// is under way. Then, with giveUp, its context ends.
func (o *orders) takeBack(name string, giveUp bool) (running bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !slices.Contains(o.void, name) {
		if len(o.void) == mostVoid {
			o.void = slices.Delete(o.void, 0, 1)
		}
		o.void = append(o.void, name)
	}
	for _, n := range o.running {
		if n.name == name {
			running = true
			if giveUp {
				n.giveUp(errTakenBack)
			}
		}
	}
	return running
}
