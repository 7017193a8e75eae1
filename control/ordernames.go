package control

import (
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
	mu      sync.Mutex // a leaf
	running []string
	void    []string // the oldest first
}

// begin is called before an order is carried out, end after it. It refuses one
// that was taken back. "" is an order without a name.
func (o *orders) begin(name string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if name == "" {
		return nil
	}
	if slices.Contains(o.void, name) {
		return generic("The order was taken back by who gave it (x-cancel)")
	}
	o.running = append(o.running, name)
	return nil
}

func (o *orders) end(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if i := slices.Index(o.running, name); i >= 0 {
		o.running = slices.Delete(o.running, i, i+1)
	}
}

// takeBack sees to it that the order begins no more, and reports whether it
// is under way.
func (o *orders) takeBack(name string) (running bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !slices.Contains(o.void, name) {
		if len(o.void) == mostVoid {
			o.void = slices.Delete(o.void, 0, 1)
		}
		o.void = append(o.void, name)
	}
	return slices.Contains(o.running, name)
}
