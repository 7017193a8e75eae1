package model

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/state"
)

// The handover in the model is control.Handover itself. It is a program that
// asks and hears, so where it stands follows from what it has heard: it is run
// anew, on a clock of its own, with the answers of before, until it asks what
// has not been answered yet.

const node = "disk"

// question of a handover, asked by one of its goroutines.
type question struct {
	side    int
	request request
	reply   chan answer
}

// talk is one run of a handover.
type talk struct {
	flaw  flaw
	to    int // the destination
	asked chan struct{}

	mu    sync.Mutex
	open  []*question
	step  string // under way; what it asks after the last changes nothing any more
	steps int    // begun
	over  bool
}

// side implements control.Side.
type side struct {
	talk *talk
	i    int
}

var errCutOff = errors.New("cut off")

func (s *side) ask(r request) answer {
	q := &question{s.i, r, make(chan answer, 1)}
	s.talk.mu.Lock()
	if s.talk.over || s.talk.step == "" {
		s.talk.mu.Unlock()
		return silence
	}
	s.talk.open = append(s.talk.open, q)
	s.talk.mu.Unlock()
	s.talk.asked <- struct{}{}
	a := <-q.reply
	if a == timeUp && r >= numOrders {
		time.Sleep(timeout)
	}
	return a
}

// timeout is longer than a handover waits for anything.
const timeout = 10 * time.Second

func (s *side) Name() string   { return "AB"[s.i:][:1] }
func (s *side) Extended() bool { return true }
func (s *side) Gone() bool     { return s.ask(askGone) == done }

// Identify proves the same image; what it may find else refuses a handover that
// has not begun.
func (s *side) Identify(context.Context, string, ...string) ([]control.Identity, error) {
	return []control.Identity{{Node: node, Format: "raw", Size: 1, BootID: "b", Dev: 1, Ino: 1}}, nil
}

func (s *side) Status(context.Context) (control.Status, error) {
	a := s.ask(askStatus)
	if a < answerState {
		return control.Status{}, errCutOff
	}
	is := state.State(a - answerState)
	return control.Status{Images: []control.ImageStatus{{Node: node, Format: "raw", Size: 1, State: control.State(is.String())}}}, nil
}

func orderOf(o control.Order) request {
	switch {
	case !o.Active:
		return orderInactivate
	case o.IfUnchanged:
		return orderReactivate
	}
	return orderActivate
}

func (s *side) SetActive(ctx context.Context, o control.Order) error {
	r := orderOf(o)
	if s.talk.flaw == activatesFirst && r == orderInactivate {
		(&side{s.talk, s.talk.to}).ask(orderActivate)
	}
	switch a := s.ask(r); {
	case a == done:
		return nil
	case a == failed, r == orderActivate && s.talk.flaw == silenceIsFailure:
		return &control.Error{Desc: "refused"}
	case a == timeUp:
		<-ctx.Done()
	}
	return errCutOff
}

func (s *side) TakeBack(_ context.Context, o control.Order) (running bool, err error) {
	if s.talk.flaw == neverRecalls {
		return false, nil
	}
	switch s.ask(recall + orderOf(o)) {
	case done:
		return true, nil
	case failed:
		return false, nil
	}
	return false, errCutOff
}

var verdicts = map[control.HandoverOutcome]verdict{
	control.HandoverMoved: moved, control.HandoverAlready: already, control.HandoverRefused: refused,
	control.HandoverReturned: returned, control.HandoverUnowned: unowned, control.HandoverUnknown: unknown,
}

// resume runs a handover with the answers heard until it asks for another, and
// returns where it stands. Of two questions at once the one to side A comes
// first, and is answered until it is not asked again.
func (m *model) resume(from, to int, path []int16, heard []answer) *script {
	sc := &script{from: from, to: to, path: path, heard: heard, next: make(map[answer]int16)}
	synctest.Test(m.t, func(t *testing.T) {
		talk := &talk{flaw: m.flaw, to: to, asked: make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		result := make(chan control.HandoverReport, 1)
		go func() {
			result <- control.Handover(ctx, &side{talk, from}, &side{talk, to}, control.HandoverOptions{
				Timeout: timeout, Progress: talk.progress})
		}()
		again := -1 // the side that is sure to ask again
		for {
			select {
			case r := <-result:
				if !talk.over {
					var ok bool
					if sc.verdict, ok = verdicts[r.Outcome]; !ok {
						t.Fatalf("a handover ends as %q: %s", r.Outcome, r.Error)
					}
				}
				return
			case <-talk.asked:
			}
			for q := talk.next(again); q != nil; q = talk.next(again) {
				again = -1
				if len(heard) == 0 {
					sc.side, sc.request = q.side, q.request
					if s := talk.under(); s == "check" || s == "ask" {
						sc.loop = talk.steps
					}
					talk.end()
					cancel()
					q.reply <- silence
					continue
				}
				a := heard[0]
				if heard = heard[1:]; moving(a) && talk.under() == "check" {
					again = q.side
				}
				q.reply <- a
			}
		}
	})
	return sc
}

func (k *talk) progress(s control.HandoverStep, ended bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.step = ""; !ended {
		k.step = s.Name
		k.steps++
	}
}

// under is the step under way. Until the handover gets an answer, it stays.
func (k *talk) under() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.step
}

// next is the question to answer, nil if there is none yet.
func (k *talk) next(again int) *question {
	for {
		synctest.Wait()
		select {
		case <-k.asked:
			continue
		default:
		}
		break
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	best := -1
	for i, q := range k.open {
		if (again < 0 || q.side == again) && (best < 0 || q.side < k.open[best].side) {
			best = i
		}
	}
	if best < 0 {
		return nil
	}
	q := k.open[best]
	k.open = append(k.open[:best], k.open[best+1:]...)
	return q
}

// end lets the handover come to its end without questions.
func (k *talk) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.over = true
	for _, q := range k.open {
		q.reply <- silence
	}
	k.open = nil
}
