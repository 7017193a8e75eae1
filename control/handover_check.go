package control

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"
)

// settlePause is between two looks at a side that is in a transition.
const settlePause = 10 * time.Millisecond

// errSameProcess is why nothing can be handed over, however often it is tried.
var errSameProcess = errors.New("the source and the destination are the same process; name another one with --to")

// check looks at both sides and plans what has to be done. It changes nothing
// but the nonce in the owner records.
func (h *handover) check() error {
	var from, to Status
	err := h.step("check", "both sides", func(ctx context.Context) error {
		ctx, cancel := interruptible(ctx, h.opt.Interrupt)
		defer cancel()
		return both(
			func() (err error) { from, err = settled(ctx, h.from); return sideError("source", err) },
			func() (err error) { to, err = settled(ctx, h.to); return sideError("destination", err) })
	})
	if err == nil && from.PID != 0 && from.PID == to.PID && from.Since.Equal(to.Since) {
		err = errSameProcess
	}
	if err == nil {
		err = h.step("compare", "the images of both", func(ctx context.Context) (err error) {
			ctx, cancel := interruptible(ctx, h.opt.Interrupt)
			defer cancel()
			h.pairs, err = SameImages(ctx, prover{h.from, "source"}, prover{h.to, "destination"}, h.opt.AssumeSameImage, h.opt.Nodes...)
			for range 3 {
				if err != nil {
					return err
				}
				if err = h.plan(&from, &to); !errors.Is(err, errTwoOwners) {
					return err
				}
				// Asked at once, one may have answered before another handover
				// and one after it.
				if from, err = h.from.Status(ctx); err == nil {
					to, err = h.to.Status(ctx)
				}
			}
			return h.plan(&from, &to)
		})
	}
	if err != nil && h.interrupted() {
		return errInterrupted
	}
	if _, notAsked := errors.AsType[unasked](err); err != nil && !notAsked && !errors.Is(err, errBusy) && !errors.Is(err, context.DeadlineExceeded) {
		err = finding{err}
	}
	return err
}

// finding is what the images are like, which forbids a handover.
type finding struct{ error }

func (f finding) Unwrap() error { return f.error }

// errBusy is what may be otherwise in a moment.
var errBusy = errors.New("try again")

// lasts reports whether what err says stays so, as far as is known, until somebody
// does something about it: a side has said no, or is not there, or the images are
// not fit. What was not answered, or not in time, may be answered the next time.
func lasts(err error) bool {
	_, found := errors.AsType[finding](err)
	if found || answered(err) {
		return true
	}
	for _, errno := range [...]syscall.Errno{syscall.ENOENT, syscall.ENOTDIR, syscall.ECONNREFUSED, syscall.EACCES, syscall.EPERM, syscall.EINVAL} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return errors.Is(err, errStranger)
}

// interruptible is ctx until interrupt asks to stop where that is safe.
func interruptible(ctx context.Context, interrupt <-chan struct{}) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		select {
		case <-interrupt:
			cancel(errInterrupted)
		case <-done:
		}
	}()
	return ctx, func() { close(done); cancel(nil) }
}

// both runs a and b at once.
func both(a, b func() error) error {
	var wg sync.WaitGroup
	var errs [2]error
	wg.Go(func() { errs[0] = a() })
	wg.Go(func() { errs[1] = b() })
	wg.Wait()
	switch {
	case errs[0] == nil:
		return errs[1]
	case errs[1] == nil:
		return errs[0]
	}
	return fmt.Errorf("%w; %w", errs[0], errs[1])
}

// prover is a side that says in its errors which it is.
type prover struct {
	Side
	role string
}

func (p prover) Identify(ctx context.Context, nonce string, nodes ...string) ([]Identity, error) {
	list, err := p.Side.Identify(ctx, nonce, nodes...)
	return list, sideError(p.role, err)
}

func sideError(role string, err error) error {
	if err == nil {
		return nil
	}
	if answered(err) {
		return fmt.Errorf("the %s answers: %w", role, err)
	}
	return unasked{fmt.Errorf("the %s cannot be asked: %w", role, err)}
}

// unasked is why a side has not answered a question.
type unasked struct{ error }

func (u unasked) Unwrap() error { return u.error }

// settled is a side's status once no transition is under way there, or as it
// is when ctx is about to end: another handover may be at work, or a command
// that was killed has left an order behind.
func settled(ctx context.Context, s Side) (Status, error) {
	var patience <-chan time.Time
	if until, ok := ctx.Deadline(); ok {
		patience = time.After(time.Until(until) / 2)
	}
	for {
		now, err := s.Status(ctx)
		if err != nil {
			return now, err
		}
		moving := false
		for _, i := range now.Images {
			moving = moving || i.State.moving()
		}
		if !moving {
			return now, nil
		}
		select {
		case <-time.After(settlePause):
		case <-patience:
			return now, nil // what it concerns is refused below
		case <-ctx.Done():
			return now, context.Cause(ctx)
		}
	}
}

var errTwoOwners = errors.New("both sides say that they own")

// plan fills give and take, or says why nothing can be done.
func (h *handover) plan(from, to *Status) error {
	h.give, h.take, h.report.Images = nil, nil, nil
	for i := range h.pairs {
		p := &h.pairs[i]
		a, b := from.image(p.A.Node), to.image(p.B.Node)
		if a == nil || b == nil {
			return errors.New("images were removed meanwhile")
		}
		h.report.Images = append(h.report.Images, HandoverImage{
			From: a.Node, To: b.Node, Image: a.Image, Format: p.A.Format, Size: p.A.Size, Proof: p.Proof,
		})
		switch {
		case a.State == stateActive && b.State == stateActive:
			return fmt.Errorf("%w %s; inactivate it at the one that should not", errTwoOwners, a.Image)
		case a.State == stateActive && b.State == stateInactive:
			h.give, h.take = append(h.give, a.Node), append(h.take, b.Node)
		case a.State == stateInactive && b.State == stateInactive:
			h.take = append(h.take, b.Node)
		case a.State == stateInactive && b.State == stateActive: // as it should be
			continue
		default:
			err := fmt.Errorf("%s is %s at the source and %s at the destination%s%s", a.Image, a.State, b.State,
				failedText(h.from, a), failedText(h.to, b))
			if a.State.moving() || b.State.moving() {
				err = fmt.Errorf("%w: %w", err, errBusy)
			}
			return err
		}
		switch {
		case p.B.Unusable != "":
			return fmt.Errorf("the destination could not own %s: %s", b.Image, p.B.Unusable)
		case b.ReadOnly && !a.ReadOnly:
			return fmt.Errorf("the destination serves %s read-only and the source does not; restart it without --read-only", b.Image)
		}
	}
	return errors.Join(plainGroup(h.from, from, h.give), plainGroup(h.to, to, h.take))
}

// failedText is what there is to say, and to do, about an image that failed; ""
// if it has not.
func failedText(s Side, i *ImageStatus) string {
	if !i.State.failed() {
		return ""
	}
	cause := ""
	if i.Cause != "" {
		cause = ": " + i.Cause
	}
	return fmt.Sprintf("%s; give it up with nbd-export inactivate --abandon --control %s%s, although writes may be lost, or end that server",
		cause, quote(s.Name()), nodeFlags([]string{i.Node}))
}

// plainGroup refuses what QEMU's daemon cannot do: it moves one node, or all.
func plainGroup(s Side, now *Status, nodes []string) error {
	if s.Extended() || len(nodes) <= 1 || len(nodes) == len(now.Images) {
		return nil
	}
	return fmt.Errorf("QEMU's storage daemon at %s moves one node or all of them, not %d of %d; name one with --node, or none",
		s.Name(), len(nodes), len(now.Images))
}
