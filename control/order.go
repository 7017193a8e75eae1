package control

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// OrderOutcome is how an order to one server ended. The names are for scripts.
type OrderOutcome string

const (
	// OrderDone: the server did as it was told.
	OrderDone OrderOutcome = "done"
	// OrderAlready: everything was as ordered; nothing was done.
	OrderAlready OrderOutcome = "already"
	// OrderRefused: the images are owned as before. What was found out meanwhile
	// stays: one whose sync failed is failed, and says so.
	OrderRefused OrderOutcome = "refused"
	// OrderPartly: it failed, and yet images have moved: QEMU's daemon leaves an order
	// half done, and others may give orders too. Server says what has become of each.
	OrderPartly OrderOutcome = "partly"
	// OrderCancelled is OrderRefused because of an interrupt.
	OrderCancelled OrderOutcome = "cancelled"
	// OrderUnknown: the server does not answer, or has ended, or is still at it.
	OrderUnknown OrderOutcome = "unknown"
)

// Good reports whether the images are as ordered.
func (o OrderOutcome) Good() bool { return o == OrderDone || o == OrderAlready }

// OrderReport is what came of an order, and what "activate --json" and "inactivate
// --json" print.
type OrderReport struct {
	Outcome OrderOutcome `json:"outcome"`
	// Error is what went wrong, "" if nothing did, and Next the command to run
	// then, "" if that would end the same way.
	Error string `json:"error,omitempty"`
	Next  string `json:"next,omitempty"`
	// Interrupted: it was asked to stop, wherever it was then.
	Interrupted bool `json:"interrupted,omitempty"`
	// Milliseconds is the time from the beginning to the outcome.
	Milliseconds float64 `json:"ms"`
	// Server is what the server said at the end.
	Server HandoverSide `json:"server"`
}

// OrderOptions refine Give.
type OrderOptions struct {
	// Timeout is how long the server may take over the order; it may take as
	// long again to find out what became of it. Without one, 0, it is waited for.
	Timeout time.Duration
	// Interrupt asks, once closed, to take the order back if that still is
	// possible. It may be nil.
	Interrupt <-chan struct{}
}

// orderPatience is how long a server may take to say what became of an order that
// has no time to be carried out in.
const orderPatience = 10 * time.Second

// errNotDone is what a server of QEMU's is not asked for.
var errNotDone = errors.New("QEMU's storage daemon cannot do that")

// Give has one server carry out o, and says what came of it. o.Nodes may be empty,
// for all images, and needs no name. An order that is not answered in time is taken
// back as one of Handover is: an inactivation that still serves writes is ended, unless
// others have ordered it too, and what has not begun never will. ctx ends it at once, wherever it is.
func Give(ctx context.Context, s Side, o Order, opt OrderOptions) OrderReport {
	o.Name = rand.Text()
	g := &giving{ctx: ctx, side: s, order: o, opt: opt, about: o.Nodes}
	g.report.Server.Control = s.Name()
	began := time.Now()
	g.run()
	g.report.Interrupted = g.interrupted()
	g.report.Milliseconds = milliseconds(time.Since(began))
	if g.report.Server.State == "" {
		askSide(ctx, s, &g.report.Server, g.about, g.patience())
	}
	return g.report
}

type giving struct {
	ctx    context.Context
	side   Side
	order  Order
	opt    OrderOptions
	about  []string // nodes that the order is about
	report OrderReport
}

func (g *giving) run() {
	now, err := g.ask()
	if err == nil {
		err = g.possible(&now)
	}
	switch {
	case g.interrupted():
		g.end(OrderCancelled, errors.New("interrupted before anything was ordered"), true)
		return
	case err != nil:
		g.end(OrderRefused, err, !lasts(err))
		return
	}
	was := g.asOrdered(&now)
	err = g.give()
	switch {
	case err == nil && was:
		g.end(OrderAlready, nil, false)
	case err == nil:
		g.end(OrderDone, nil, false)
	case answered(err):
		g.failed(&now, err)
	case g.ctx.Err() != nil:
		g.end(OrderUnknown, fmt.Errorf("stopped at once, as told, while the server at %s was at it: %w", g.side.Name(), err), true)
	default:
		g.find(err)
	}
}

// ask has the server say what it has, before it is ordered anything.
func (g *giving) ask() (Status, error) {
	ctx, cancel := g.timed()
	defer cancel()
	ctx, cancel = interruptible(ctx, g.opt.Interrupt)
	defer cancel()
	now, err := g.side.Status(ctx)
	switch {
	case err != nil:
		g.report.Server.State, g.report.Server.Error = stateUnknown, err.Error()
	case len(g.about) == 0:
		for _, i := range now.Images {
			g.about = append(g.about, i.Node)
		}
	}
	return now, err
}

// possible refuses what would be left out, or done to more than was asked for, on
// its way to QEMU's daemon.
func (g *giving) possible(now *Status) error {
	if g.side.Extended() {
		return nil
	}
	for option, on := range map[string]bool{"--if-unchanged": g.order.IfUnchanged, "--abandon": g.order.Abandon} {
		if on {
			return finding{fmt.Errorf("server at %s: %w: %s", g.side.Name(), errNotDone, option)}
		}
	}
	if err := plainGroup(g.side, now, g.order.Nodes); err != nil {
		return finding{err}
	}
	return nil
}

// asOrdered reports whether every image is as ordered.
func (g *giving) asOrdered(now *Status) bool {
	return !slices.ContainsFunc(g.about, func(node string) bool {
		i := now.image(node)
		return i == nil || !g.reached(i.State)
	})
}

// reached reports whether an image in state s is as ordered.
func (g *giving) reached(s State) bool {
	return !s.moving() && !s.failed() && s.holds() == g.order.Active
}

// failed notes how an order ended that the server has answered with err, by what its
// images are now and were before.
func (g *giving) failed(before *Status, err error) {
	server, outcome, again := &g.report.Server, OrderRefused, false
	err = fmt.Errorf("server at %s: %w", g.side.Name(), err)
	if g.interrupted() {
		outcome, again, err = OrderCancelled, true, fmt.Errorf("interrupted; %w", err)
	}
	askSide(g.ctx, g.side, server, g.about, g.patience())
	under := stateInactivating
	if g.order.Active {
		under = stateActivating
	}
	var moved, moving []string
	for _, i := range server.Images {
		was := before.image(i.Node)
		switch {
		case !slices.Contains(g.about, i.Node):
		case i.State == under:
			moving = append(moving, i.Node)
		case g.reached(i.State) && (was == nil || !g.reached(was.State)):
			moved = append(moved, i.Node)
		}
	}
	switch {
	case server.State == stateUnknown && len(g.about) > 1 && !g.side.Extended():
		outcome, again, err = OrderUnknown, true, fmt.Errorf("%w; what has become of each image is not known: %s", err, server.Error)
	case len(moving) > 0:
		outcome, again, err = OrderUnknown, true, fmt.Errorf("%w; and yet %s: %s, as another order asks", err, under, strings.Join(moving, ", "))
	case len(moved) > 0:
		outcome, again, err = OrderPartly, true, fmt.Errorf("%w; and yet these have moved: %s", err, strings.Join(moved, ", "))
	}
	g.end(outcome, err, again)
}

// give sends the order, and takes it back if there is an interrupt.
func (g *giving) give() error {
	ctx, cancel := g.timed()
	defer cancel()
	result := make(chan error, 1)
	go func() { result <- g.side.SetActive(ctx, g.order) }()
	select {
	case err := <-result:
		return err
	case <-g.opt.Interrupt:
	}
	// The answer to the order says what came of it.
	limit := time.AfterFunc(g.patience(), cancel)
	defer limit.Stop()
	back := g.order
	back.Nodes = g.about
	_, _ = g.side.TakeBack(ctx, back)
	return <-result
}

// find asks what became of the order, which was not answered because of err.
func (g *giving) find(err error) {
	ctx, cancel := context.WithTimeout(g.ctx, g.patience())
	defer cancel()
	o, at := g.order, g.side.Name()
	o.Nodes = g.about
	outcome := OrderRefused
	if g.interrupted() {
		outcome = OrderCancelled
	}
	switch f, why := fateOf(ctx, g.side, o); {
	case f == fateDone:
		g.end(OrderDone, nil, false)
	case f == fateNot:
		g.end(outcome, fmt.Errorf("the server at %s did not carry out the order, which was taken back: %w", at, err), true)
	case f == fateGone:
		g.end(OrderUnknown, fmt.Errorf("the server at %s has ended meanwhile, and its locks have gone with it: %w", at, err), false)
	default:
		g.end(OrderUnknown, fmt.Errorf("the server at %s did not answer the order (%w), and what became of it is not known: %w", at, err, why), true)
	}
}

func (g *giving) timed() (context.Context, context.CancelFunc) {
	if g.opt.Timeout <= 0 {
		return context.WithCancel(g.ctx)
	}
	return context.WithTimeoutCause(g.ctx, g.opt.Timeout, overdue(g.opt.Timeout))
}

func (g *giving) patience() time.Duration {
	if g.opt.Timeout <= 0 {
		return orderPatience
	}
	return g.opt.Timeout
}

func (g *giving) interrupted() bool { return isClosed(g.opt.Interrupt) }

// end notes how it ended; again, that the same command may end otherwise.
func (g *giving) end(o OrderOutcome, err error, again bool) {
	g.report.Outcome, g.report.Error = o, errorText(err)
	if again {
		g.report.Next = g.command()
	}
}

// command is the order again, for a shell.
func (g *giving) command() string {
	var b strings.Builder
	verb := "inactivate"
	if g.order.Active {
		verb = "activate"
	}
	fmt.Fprintf(&b, "nbd-export %s --control %s%s", verb, quote(g.side.Name()), nodeFlags(g.order.Nodes))
	if g.order.IfUnchanged {
		b.WriteString(" --if-unchanged")
	}
	if g.order.Abandon {
		b.WriteString(" --abandon")
	}
	if g.opt.Timeout > 0 {
		fmt.Fprintf(&b, " --timeout %v", g.opt.Timeout)
	}
	return b.String()
}

// Err is the failure in one line, with what is known of the server and what to run
// next; nil if the images are as ordered.
func (r *OrderReport) Err() error {
	switch {
	case r.Outcome.Good():
		return nil
	case r.Next == "":
		return errors.New(r.Error)
	case r.Server.State == stateUnknown:
		return fmt.Errorf("%s; what it has is not known; next: %s", r.Error, r.Next)
	}
	return fmt.Errorf("%s; it is %s; next: %s", r.Error, r.Server.State, r.Next)
}
