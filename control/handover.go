package control

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Side is an exporter in a handover: a *Peer. An error that is an *Error is
// the exporter's answer; after any other it is not known whether the order was
// carried out, or still will be. The methods return when ctx ends; SetActive
// and TakeBack are called concurrently.
type Side interface {
	Prover
	// Name is the control socket, as the user gave it.
	Name() string
	// Status says what the side has. It answers during transitions too.
	Status(ctx context.Context) (Status, error)
	// Extended reports whether the side has our extensions of QMP: groups,
	// IfUnchanged, TakeBack, and Identities that prove something.
	Extended() bool
	// SetActive carries an order out, and returns when that is done or failed.
	SetActive(ctx context.Context, o Order) error
	// TakeBack sees to it that the order will not begin any more if it is
	// still on its way, and ends an inactivation as long as writes are
	// served, unless others have ordered it too. It reports whether the order is
	// under way.
	TakeBack(ctx context.Context, o Order) (running bool, err error)
	// Gone reports whether it is certain that no process of the side is left.
	Gone() bool
}

// Order has one side activate or inactivate images, all or none.
type Order struct {
	Name        string // for TakeBack
	Active      bool
	IfUnchanged bool
	Abandon     bool     // with Active false: give up failed images too
	Nodes       []string // at least one, but for Give
}

// HandoverOptions refine Handover.
type HandoverOptions struct {
	// Nodes are the images of the source to hand over, none for all.
	Nodes []string
	// Timeout is how long each side may take over an order; it may take as
	// long again to find out what became of one that was not answered.
	// handoverTimeout when zero.
	Timeout time.Duration
	// AssumeSameImage goes on where it cannot be proven that both sides have
	// the same image, or disproven.
	AssumeSameImage bool
	// Interrupt asks, once closed, to stop where that is safe: before the
	// source is inactive nothing is changed, afterwards the handover is
	// finished or taken back. It may be nil.
	Interrupt <-chan struct{}
	// Progress is told of each step when it begins and when it has ended; it
	// may be nil.
	Progress func(step HandoverStep, ended bool)
}

// handoverTimeout is the usual HandoverOptions.Timeout.
const handoverTimeout = 10 * time.Second

// Handover moves the ownership of images from one side to the other, as a
// group, and says what came of it. At no point is there more than one owner:
// the source gives up first, and takes back only what the destination has
// answered it does not have, or what it cannot have because it is gone; and it
// is the locks that let it. A handover that was interrupted is finished, or
// found to be done, by the same call. ctx ends it at once, wherever it is.
//
// Pipeline: check both sides -> prove that the images are the same -> inactivate
// the source -> activate the destination -> ask both what they say now. See
// docs/handover.md for what follows each failure.
func Handover(ctx context.Context, from, to Side, opt HandoverOptions) HandoverReport {
	if opt.Timeout <= 0 {
		opt.Timeout = handoverTimeout
	}
	h := &handover{ctx: ctx, from: from, to: to, opt: opt, name: rand.Text()}
	h.report.From.Control, h.report.To.Control = from.Name(), to.Name()
	began := time.Now()
	h.run()
	h.report.Interrupted = h.interrupted()
	h.report.Milliseconds = milliseconds(time.Since(began))
	h.look()
	h.conclude()
	return h.report
}

type handover struct {
	ctx      context.Context
	from, to Side
	opt      HandoverOptions
	name     string // of its orders
	pairs    []Pair
	give     []string // nodes of from that are to be inactivated
	take     []string // nodes of to that are to be activated
	gap      time.Time
	useless  bool // to try it again
	lasts    bool // why it ended, until somebody does something about it
	report   HandoverReport
}

// errInterrupted stops a handover that has changed nothing.
var errInterrupted = errors.New("interrupted")

func (h *handover) run() {
	err := h.check()
	if err == nil && len(h.give)+len(h.take) > 0 && h.interrupted() {
		err = errInterrupted
	}
	switch {
	case errors.Is(err, errInterrupted):
		h.end(HandoverCancelled, errors.New("interrupted before anything was changed"))
		return
	case err != nil:
		h.end(HandoverRefused, err)
		return
	case len(h.give)+len(h.take) == 0:
		h.end(HandoverAlready, nil)
		return
	}
	h.gap = time.Now()
	if len(h.give) > 0 && !h.inactivate() {
		return
	}
	if h.ctx.Err() != nil {
		h.end(HandoverUnowned, errStopped)
		return
	}
	h.activate()
}

// errStopped is why a handover ended in the middle.
var errStopped = errors.New("stopped at once, as told, between inactivating the source and activating the destination")

// end notes how the handover ended.
func (h *handover) end(o HandoverOutcome, err error) {
	h.report.Outcome, h.report.Error = o, errorText(err)
	h.useless = errors.Is(err, errSameProcess)
	h.lasts = lasts(err)
}

func (h *handover) interrupted() bool { return isClosed(h.opt.Interrupt) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// step runs f with the time of one order, and reports it.
func (h *handover) step(name, what string, f func(ctx context.Context) error) error {
	s := HandoverStep{Name: name, What: what}
	if h.opt.Progress != nil {
		h.opt.Progress(s, false)
	}
	ctx, cancel := context.WithTimeoutCause(h.ctx, h.opt.Timeout, overdue(h.opt.Timeout))
	defer cancel()
	began := time.Now()
	err := f(ctx)
	s.Milliseconds, s.Error = milliseconds(time.Since(began)), errorText(err)
	h.report.Steps = append(h.report.Steps, s)
	if h.opt.Progress != nil {
		h.opt.Progress(s, true)
	}
	return err
}

// overdue is why a step ended: its time was over. It is a
// context.DeadlineExceeded.
type overdue time.Duration

func (o overdue) Error() string {
	return fmt.Sprintf("not done within %v (--timeout)", time.Duration(o))
}

func (overdue) Is(err error) bool { return err == context.DeadlineExceeded }

// inactivate has the source let go. It reports whether the handover goes on.
func (h *handover) inactivate() bool {
	o := Order{Name: h.name + "-inactivate", Nodes: h.give}
	err := h.step("inactivate", "the source", func(ctx context.Context) error {
		return h.order(ctx, o)
	})
	switch {
	case err == nil:
		return true
	case h.ctx.Err() != nil:
		h.end(HandoverUnknown, fmt.Errorf("stopped at once, as told, while the source was inactivating: %w", err))
		return false
	case answered(err):
		if h.half(h.from, o) {
			h.takeBack(fmt.Errorf("the source did not inactivate all images: %w", err))
		} else if h.interrupted() {
			h.end(HandoverCancelled, fmt.Errorf("interrupted; the source did not inactivate: %w", err))
		} else {
			h.end(HandoverRefused, fmt.Errorf("the source did not inactivate: %w", err))
		}
		return false
	}
	switch f, why := h.fate(h.from, o); f {
	case fateDone:
		return true
	case fateNot:
		h.end(HandoverRefused, fmt.Errorf("the source did not answer the order to inactivate, which was taken back: %w", err))
	case fateGone:
		// Its locks went with it. Whether it lost something it cannot tell.
		h.end(HandoverUnowned, fmt.Errorf("the source has ended while it was inactivating: %w", err))
	default:
		h.end(HandoverUnknown, fmt.Errorf("the source did not answer the order to inactivate (%w), and what became of it is not known: %w", err, why))
	}
	return false
}

// order gives the source its order; an interrupt meanwhile takes it back, if
// that is possible.
func (h *handover) order(ctx context.Context, o Order) error {
	result := make(chan error, 1)
	go func() { result <- h.from.SetActive(ctx, o) }()
	select {
	case err := <-result:
		return err
	case <-h.opt.Interrupt:
	}
	_, _ = h.from.TakeBack(ctx, o) // the answer to the order says what came of it
	return <-result
}

// activate has the destination take over, or the source take back.
func (h *handover) activate() {
	o := Order{Name: h.name + "-activate", Active: true, Nodes: h.take}
	err := h.step("activate", "the destination", func(ctx context.Context) error {
		return h.to.SetActive(ctx, o)
	})
	if err == nil {
		h.moved()
		return
	}
	if h.ctx.Err() != nil {
		h.end(HandoverUnknown, fmt.Errorf("stopped at once, as told, while the destination was activating: %w", err))
		return
	}
	f, why := h.fate(h.to, o)
	if answered(err) {
		// It did not do it. Unless it says now that it owns them all the same,
		// through somebody else, or some of them, or soon, that is that.
		switch {
		case f == fateDone:
			h.moved()
		case f == fateUnknown && h.half(h.to, o) && h.undo(o) == nil:
			h.takeBack(fmt.Errorf("the destination did not activate all images, and has let go of the others: %w", err))
		case f == fateUnknown && !errors.Is(why, errUnheard):
			h.end(HandoverUnknown, fmt.Errorf("the destination did not activate: %w; and yet %w", err, why))
		default:
			h.takeBack(fmt.Errorf("the destination did not activate: %w", err))
		}
		return
	}
	switch f {
	case fateDone:
		h.moved()
	case fateNot:
		h.takeBack(fmt.Errorf("the destination did not answer the order to activate, and is inactive: %w", err))
	case fateGone:
		h.takeBack(fmt.Errorf("the destination has ended while it was activating: %w", err))
	default:
		h.end(HandoverUnknown, fmt.Errorf("the destination did not answer the order to activate (%w), and may own the images: %w", err, why))
	}
}

// half reports whether a side that answered that an order failed has carried it
// out for some images: QEMU's daemon stops at the first that fails, and leaves
// those before it as ordered. Where that cannot be told it may be so.
func (h *handover) half(s Side, o Order) bool {
	if s.Extended() || len(o.Nodes) == 1 {
		return false
	}
	ctx, cancel := context.WithTimeout(h.ctx, fatePatience)
	defer cancel()
	now, err := s.Status(ctx)
	return err != nil || slices.ContainsFunc(o.Nodes, func(node string) bool {
		i := now.image(node)
		return i != nil && i.State.holds() == o.Active
	})
}

// undo has the destination let go of what it got by order o.
func (h *handover) undo(o Order) error {
	o.Name, o.Active = h.name+"-undo", false
	return h.step("inactivate", "the destination", func(ctx context.Context) error {
		return h.to.SetActive(ctx, o)
	})
}

func (h *handover) moved() {
	h.report.Gap = milliseconds(time.Since(h.gap))
	h.end(HandoverMoved, nil)
}

// takeBack has the source take back what it gave, because of why: the
// destination does not have it. The locks decide whether it can.
func (h *handover) takeBack(why error) {
	if len(h.give) == 0 {
		h.end(HandoverUnowned, why)
		return
	}
	o := Order{Name: h.name + "-reactivate", Active: true, IfUnchanged: h.from.Extended(), Nodes: h.give}
	err := h.step("reactivate", "the source", func(ctx context.Context) error {
		return h.from.SetActive(ctx, o)
	})
	f := fateDone
	if err != nil && !answered(err) {
		var unknown error
		if f, unknown = h.fate(h.from, o); unknown != nil {
			err = fmt.Errorf("%w; %w", err, unknown)
		}
	}
	switch {
	case err == nil || f == fateDone && !answered(err):
		h.end(HandoverReturned, fmt.Errorf("%w; the source has taken them back", why))
	case answered(err) || f == fateNot || f == fateGone:
		h.end(HandoverUnowned, fmt.Errorf("%w; nor did the source take them back: %w", why, err))
	default:
		h.end(HandoverUnknown, fmt.Errorf("%w; whether the source has taken them back is not known: %w", why, err))
	}
}

// answered reports whether err is what a side answered.
func answered(err error) bool {
	_, ok := errors.AsType[*Error](err)
	return ok
}

// fate is what became of an order that was not answered.
type fate uint8

const (
	fateUnknown fate = iota
	fateDone         // every image is as ordered
	fateNot          // none is, and the order will not be carried out any more
	fateGone         // there is nobody left to carry it out
)

const (
	// fatePatience is how long one look may take, fatePause is between two.
	fatePatience = 2 * time.Second
	fatePause    = 20 * time.Millisecond
)

// errUnheard is why a fate is unknown where the side does not answer.
var errUnheard = errors.New("it does not answer")

// fate asks a side what became of order o, until that is certain. The error
// says why it is not.
func (h *handover) fate(s Side, o Order) (f fate, why error) {
	what := "the source"
	if s == h.to {
		what = "the destination"
	}
	_ = h.step("ask", what, func(ctx context.Context) error {
		f, why = fateOf(ctx, s, o)
		return why
	})
	return f, why
}

// fateOf is fate until ctx ends.
func fateOf(ctx context.Context, s Side, o Order) (f fate, why error) {
	for pause := fatePause; ; pause = min(2*pause, 10*fatePause) {
		if s.Gone() {
			return fateGone, nil
		}
		var settled bool
		if f, settled, why = glance(ctx, s, o); settled {
			return f, why
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return f, why
		}
	}
}

// glance is one look of fateOf. It is settled if another would see the same.
func glance(ctx context.Context, s Side, o Order) (f fate, settled bool, why error) {
	ctx, cancel := context.WithTimeout(ctx, fatePatience)
	defer cancel()
	running, err := s.TakeBack(ctx, o)
	if err != nil {
		return fateUnknown, false, fmt.Errorf("%w: %w", errUnheard, err)
	}
	// Asked after the order was void: what is not so now will not become so
	// by it.
	now, err := s.Status(ctx)
	if err != nil {
		return fateUnknown, false, fmt.Errorf("%w: %w", errUnheard, err)
	}
	if running {
		at := ""
		for _, node := range o.Nodes {
			if i := now.image(node); i != nil && i.Step != "" {
				at = fmt.Sprintf(" (%s: %s for %.1fs)", i.Image, i.Step, i.StepSeconds)
				break
			}
		}
		return fateUnknown, false, errors.New("the order is still under way" + at)
	}
	done, not, moving := 0, 0, false
	for _, node := range o.Nodes {
		switch i := now.image(node); {
		case i == nil:
			not++ // it cannot own what it does not have, nor give it away
		case i.State.moving():
			moving = true
		case i.State.holds() == o.Active && !i.State.failed():
			done++
		case !i.State.failed() || !o.Active:
			not++
		}
	}
	switch {
	case done == len(o.Nodes):
		return fateDone, true, nil
	case not == len(o.Nodes):
		return fateNot, true, nil
	}
	return fateUnknown, !moving, fmt.Errorf("it is %s", now.states(o.Nodes))
}

func milliseconds(d time.Duration) float64 {
	return float64(d.Round(time.Microsecond)) / float64(time.Millisecond)
}
