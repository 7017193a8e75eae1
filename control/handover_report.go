package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// HandoverOutcome is how a handover ended. The names are for scripts.
type HandoverOutcome string

const (
	// HandoverMoved: the destination owns the images now.
	HandoverMoved HandoverOutcome = "moved"
	// HandoverAlready: it did before; nothing was done.
	HandoverAlready HandoverOutcome = "already"
	// HandoverRefused: the source owns them as before, or whoever did.
	HandoverRefused HandoverOutcome = "refused"
	// HandoverCancelled is HandoverRefused because of an interrupt.
	HandoverCancelled HandoverOutcome = "cancelled"
	// HandoverReturned: the destination did not take them, the source has
	// taken them back.
	HandoverReturned HandoverOutcome = "returned"
	// HandoverUnowned: neither side owns them.
	HandoverUnowned HandoverOutcome = "unowned"
	// HandoverUnknown: a side does not answer, and may own them.
	HandoverUnknown HandoverOutcome = "unknown"
)

// Good reports whether the destination owns the images.
func (o HandoverOutcome) Good() bool { return o == HandoverMoved || o == HandoverAlready }

// HandoverReport is what a handover did, and what "handover --json" prints.
type HandoverReport struct {
	Outcome HandoverOutcome `json:"outcome"`
	// Error is what went wrong, "" if nothing did, and Next the command to
	// run then: at once if Retry is set, otherwise once the cause is gone, which it
	// will not be by itself, as far as is known. IfGone is the one instead for who
	// knows that the side which does not answer has ended for good.
	Error  string `json:"error,omitempty"`
	Next   string `json:"next,omitempty"`
	Retry  bool   `json:"retry"`
	IfGone string `json:"next-if-gone,omitempty"`
	// Interrupted: it was asked to stop, wherever it was then.
	Interrupted bool `json:"interrupted,omitempty"`
	// Milliseconds is the time from the beginning to the outcome; Gap, of
	// those, from the order to inactivate to the answer that the destination is
	// active. Writes waited for less: the source takes them while it syncs ahead.
	Milliseconds float64         `json:"ms"`
	Gap          float64         `json:"gap-ms,omitempty"`
	Steps        []HandoverStep  `json:"steps"`
	Images       []HandoverImage `json:"images"`
	// From and To are what the sides said at the end.
	From HandoverSide `json:"from"`
	To   HandoverSide `json:"to"`
}

// HandoverStep is one step of a handover.
type HandoverStep struct {
	Name         string  `json:"step"` // check, compare, inactivate, activate, ask, reactivate
	What         string  `json:"what"` // it is done to, in words
	Milliseconds float64 `json:"ms"`
	Error        string  `json:"error,omitempty"`
}

// HandoverImage is an image that is handed over.
type HandoverImage struct {
	From   string `json:"from-node"`
	To     string `json:"to-node"`
	Image  string `json:"image"` // path at the source
	Format string `json:"format"`
	Size   int64  `json:"size"`
	Proof  Proof  `json:"proof"`
}

// HandoverSide is what a side says of its images.
type HandoverSide struct {
	Control string `json:"control"`
	// State sums up the states of those in the handover, or of all if it is
	// not known which they are; "unknown" with Error if the side did not answer.
	State  string          `json:"state"`
	Error  string          `json:"error,omitempty"`
	Images []HandoverState `json:"images,omitempty"`
}

// HandoverState is an image of a HandoverSide.
type HandoverState struct {
	Node  string `json:"node-name"`
	Image string `json:"image"`
	State State  `json:"state"`
	Epoch uint64 `json:"epoch"`
}

// stateUnknown is the State of a HandoverSide that does not answer.
const stateUnknown = "unknown"

// lookPatience is how long the last question may take.
const lookPatience = 2 * time.Second

// look asks both sides what they say now.
func (h *handover) look() {
	if h.report.Steps == nil {
		h.report.Steps = []HandoverStep{}
	}
	if h.report.Images == nil {
		h.report.Images = []HandoverImage{}
	}
	var froms, tos []string
	for _, p := range h.pairs {
		froms, tos = append(froms, p.A.Node), append(tos, p.B.Node)
	}
	// It does not change what came of the handover.
	var wg sync.WaitGroup
	wg.Go(func() { askSide(h.ctx, h.from, &h.report.From, froms, h.opt.Timeout) })
	wg.Go(func() { askSide(h.ctx, h.to, &h.report.To, tos, h.opt.Timeout) })
	wg.Wait()
}

// askSide fills side with what s says now of these nodes, within patience or
// lookPatience.
func askSide(ctx context.Context, s Side, side *HandoverSide, nodes []string, patience time.Duration) {
	side.State = stateUnknown
	if ctx.Err() != nil {
		side.Error = "it was not asked"
		return
	}
	ctx, cancel := context.WithTimeout(ctx, min(lookPatience, patience))
	defer cancel()
	now, err := s.Status(ctx)
	if err != nil && ctx.Err() == nil && !s.Gone() {
		now, err = s.Status(ctx) // on a new connection
	}
	if err != nil {
		side.Error = err.Error()
		return
	}
	side.State = now.states(nodes)
	for _, i := range now.Images {
		side.Images = append(side.Images, HandoverState{Node: i.Node, Image: i.Image, State: i.State, Epoch: i.Epoch})
	}
}

// conclude says what to do next, for outcomes that ask for it.
func (h *handover) conclude() {
	r := &h.report
	if r.Outcome.Good() || h.useless {
		return
	}
	inactive := string(stateInactive)
	r.Next, r.Retry = h.command(), !h.lasts && !h.from.Gone() && !h.to.Gone()
	switch {
	case r.From.State == stateUnknown && r.To.State == inactive:
		// The source takes nothing back that it wrote, so there is nothing to
		// compare with.
		h.takeOver(h.from, "nbd-export activate", h.to, h.take, &r.To)
	case r.To.State == stateUnknown && r.From.State == inactive:
		back := "nbd-export activate"
		if !h.to.Gone() {
			back += " --if-unchanged"
		}
		h.takeOver(h.to, back, h.from, h.give, &r.From)
	}
}

// takeOver says what to run where one side does not answer: the order to the
// other, for these nodes of it, if it is certain that the silent one has ended,
// or if the user is.
func (h *handover) takeOver(silent Side, order string, other Side, nodes []string, said *HandoverSide) {
	command := order + " --control " + quote(other.Name())
	switch {
	case len(nodes) == 0 && len(h.opt.Nodes) > 0:
		return // it is not known which are meant
	case len(nodes) < len(said.Images):
		command += nodeFlags(nodes)
	}
	if silent.Gone() {
		h.report.Next, h.report.Retry = command, true
	} else {
		h.report.IfGone = command
	}
}

// command is the handover again, for a shell.
func (h *handover) command() string {
	var b strings.Builder
	fmt.Fprintf(&b, "nbd-export handover --from %s --to %s", quote(h.from.Name()), quote(h.to.Name()))
	b.WriteString(nodeFlags(h.opt.Nodes))
	if h.opt.AssumeSameImage {
		b.WriteString(" --assume-same-image")
	}
	if h.opt.Timeout > handoverTimeout { // one that was too short is not to be given again
		fmt.Fprintf(&b, " --timeout %v", h.opt.Timeout)
	}
	return b.String()
}

// nodeFlags names nodes for a shell.
func nodeFlags(nodes []string) string {
	var b strings.Builder
	for _, n := range nodes {
		b.WriteString(" --node " + quote(n))
	}
	return b.String()
}

// quote makes one word for a shell of s.
func quote(s string) string {
	plain := func(c rune) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("@%+=:,./_-", c)
	}
	if s != "" && strings.IndexFunc(s, func(c rune) bool { return !plain(c) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// Err is the failure in one line, with the states of both sides and what to
// run next; nil if the destination owns the images.
func (r *HandoverReport) Err() error {
	if r.Outcome.Good() {
		return nil
	}
	text := r.Error + "; " + r.From.text("source") + ", " + r.To.text("destination")
	switch {
	case r.Retry:
		text += "; next: " + r.Next
	case r.Next != "":
		text += "; once the cause is gone: " + r.Next
	}
	if r.IfGone != "" {
		role := "destination"
		if r.From.State == stateUnknown {
			role = "source"
		}
		text += "; or, once you know that the " + role + " has ended for good: " + r.IfGone
	}
	return errors.New(text)
}

func (s *HandoverSide) text(role string) string {
	if s.State == stateUnknown {
		return fmt.Sprintf("what the %s (%s) has is not known", role, s.Control)
	}
	return fmt.Sprintf("the %s (%s) is %s", role, s.Control, s.State)
}
