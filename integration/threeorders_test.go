package integration

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// action is something that an orchestrator, or a bad day, does to exporters.
type action struct {
	name   string
	weight int
	run    func(*trio)
	times  int
}

func (s *trio) allActions() []*action {
	return []*action{
		{name: "hand over", weight: 20, run: (*trio).handOver},
		{name: "want what has an owner", weight: 6, run: (*trio).wantOwned},
		{name: "race for what has none", weight: 8, run: (*trio).race},
		{name: "race with the one that lets go", weight: 8, run: (*trio).raceHandover},
		{name: "opposite orders at once", weight: 6, run: (*trio).opposites},
		{name: "nobody for a while", weight: 6, run: (*trio).nobody},
		{name: "kill the owner", weight: 6, run: (*trio).killOwner},
		{name: "kill at an order", weight: 8, run: (*trio).killAtOrder},
		{name: "stop and go on", weight: 6, run: (*trio).freeze},
		{name: "stop and kill", weight: 4, run: (*trio).freezeAndKill},
		{name: "restart in order", weight: 6, run: (*trio).restart},
		{name: "handover", weight: 14, run: (*trio).handover},
		{name: "two handovers at once", weight: 6, run: (*trio).crossedHandovers},
		{name: "handover that is killed", weight: 8, run: (*trio).killedHandover},
		{name: "handover from or to one that is stopped for a while", weight: 6, run: (*trio).frozenHandover},
		{name: "handover from or to one that is killed", weight: 8, run: (*trio).handoverToTheDead},
		{name: "leave it to takeovers", weight: 8, run: (*trio).wait},
	}
}

// orchestrate does one action after the other until ctx ends.
func (s *trio) orchestrate(ctx context.Context) {
	sum := 0
	for _, a := range s.actions {
		sum += a.weight
	}
	for ctx.Err() == nil && !s.t.Failed() {
		p := s.rnd.IntN(sum)
		for _, a := range s.actions {
			if p -= a.weight; p < 0 {
				a.run(s)
				a.times++
				break
			}
		}
		s.pause(60)
	}
}

// pause waits up to ms milliseconds, often hardly at all.
func (s *trio) pause(ms int) {
	time.Sleep(time.Duration(s.rnd.IntN(1+s.rnd.IntN(1+ms*1000))) * time.Microsecond)
}

// means are how an order may be given.
type means int

const (
	byQMP means = iota
	bySignal
	byVerb
	numMeans
)

func (s *trio) anyMeans() means { return means(s.rnd.IntN(int(numMeans))) }

// order makes an exporter active or inactive and returns when that is done or
// refused; a signal is only sent.
func (s *trio) order(e *exporter, active bool, by means) {
	var err error
	began := s.now()
	switch by {
	case bySignal:
		sig := syscall.SIGUSR2
		if active {
			sig = syscall.SIGUSR1
		}
		_ = e.cmd.Process.Signal(sig) // it may have ended
		return
	case byVerb:
		verb := "inactivate"
		if active {
			verb = "activate"
		}
		err = s.verb(verb, "--control", e.control)
	default:
		var q *qmpConn
		if q, err = openQMP(e.control); err == nil {
			_, err = q.try("blockdev-set-active", map[string]any{"active": active})
			q.Close()
		}
	}
	switch {
	case err == nil:
		s.did.orders.Add(1)
		if active {
			s.granted(e, began)
		}
	case e.ending.Load() || isBusy(err.Error()) || active && isLockRefusal(err.Error()):
		s.did.ordersRefused.Add(1)
	default:
		s.t.Errorf("process %d, active=%v: %v", e.via, active, err)
	}
}

// verb runs a verb of the program; the error is what it says.
func (s *trio) verb(args ...string) error {
	return s.runVerb(func(ctx context.Context) *exec.Cmd {
		return command(ctx, append([]string{program(s.t)}, args...)...)
	})
}

// runVerb runs a verb that succeeds, or ends with 1 and says why.
func (s *trio) runVerb(verb func(context.Context) *exec.Cmd) error {
	ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
	defer cancel()
	cmd := verb(ctx)
	b, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	out := strings.TrimSpace(string(b))
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 1 || out == "" || strings.Contains(out, "goroutine ") {
		s.t.Errorf("%v: %v, and says %q", cmd.Args[1:], err, out)
	}
	return errors.New(out)
}

func isLockRefusal(s string) bool { return strings.Contains(s, "Failed to get ") }

// isBusy tells whether an order was refused because of another one.
func isBusy(s string) bool { return strings.Contains(s, "try again when that is done") }

// owner returns the exporter that said last that it owns the image, or any.
func (s *trio) owner() *exporter {
	s.mu.Lock()
	defer s.mu.Unlock()
	var owner *exporter
	var at int64 = -1
	for _, w := range s.sites {
		e := w.exporter()
		if seen := s.rec.Lives[e.via].Seen; len(seen) > 0 {
			if last := seen[len(seen)-1]; last.owns() && last.To > at {
				owner, at = e, last.To
			}
		}
	}
	if owner == nil {
		owner = s.sites[s.rnd.IntN(trioSites)].exporter()
	}
	return owner
}

// other returns an exporter at another site.
func (s *trio) other(e *exporter) *exporter {
	return s.sites[(e.site.index+1+s.rnd.IntN(trioSites-1))%trioSites].exporter()
}

func (s *trio) any() *exporter { return s.sites[s.rnd.IntN(trioSites)].exporter() }

// together runs all at once and waits for them.
func together(fs ...func()) {
	var wg sync.WaitGroup
	for _, f := range fs {
		wg.Go(f)
	}
	wg.Wait()
}

// orderer is order with the means chosen now, to be called by a goroutine.
func (s *trio) orderer(e *exporter, active bool) func() {
	by := s.anyMeans()
	return func() { s.order(e, active, by) }
}

func (s *trio) handOver() {
	from := s.owner()
	to := s.other(from)
	s.order(from, false, s.anyMeans())
	s.pause(3)
	s.order(to, true, s.anyMeans())
}

func (s *trio) wantOwned() {
	e := s.owner()
	s.order(s.other(e), true, s.anyMeans())
	s.order(e, true, s.anyMeans()) // it is already
}

func (s *trio) race() {
	s.order(s.owner(), false, byQMP)
	s.pause(20)
	var all []func()
	for _, w := range s.sites {
		all = append(all, s.orderer(w.exporter(), true))
	}
	together(all...)
}

func (s *trio) raceHandover() {
	e := s.owner()
	all := []func(){s.orderer(e, false)}
	for range 3 {
		all = append(all, s.orderer(s.other(e), true))
	}
	together(all...)
}

func (s *trio) opposites() {
	e := s.any()
	together(s.orderer(e, true), s.orderer(e, false), s.orderer(e, true), s.orderer(s.other(e), true))
}

// nobody lets all go: while all say that they are inactive the image does not
// change.
func (s *trio) nobody() {
	for _, w := range s.sites {
		s.order(w.exporter(), false, byQMP)
	}
	before, atRest := s.atRest()
	image := readFile(s.t, s.image)
	s.pause(50)
	// Read before it is asked again: one that takes over by itself may write as
	// soon as it has answered.
	later := readFile(s.t, s.image)
	if after, same := s.atRest(); atRest && same && before == after {
		s.did.rests.Add(1)
		sameBytes(s.t, "the image while nobody owns it", later, image)
	}
	s.order(s.any(), true, byQMP)
}

// atRest tells since when each exporter has been inactive, if all are.
func (s *trio) atRest() (since [trioSites]time.Time, all bool) {
	for i, w := range s.sites {
		q, err := openQMP(w.exporter().control)
		if err != nil {
			s.t.Errorf("control socket: %v", err)
			return since, false
		}
		defer q.Close()
		b, err := q.try("x-query-status", nil)
		if err != nil {
			s.t.Errorf("status: %v", err)
			return since, false
		}
		st := decodeStatus(s.t, b)
		if st.State != "inactive" {
			return since, false
		}
		since[i] = st.Since
	}
	return since, true
}

// killOwner has another take over what the dead one left.
func (s *trio) killOwner() {
	e := s.owner()
	to := s.other(e)
	e.slay()
	s.order(to, true, byQMP) // its locks may still be there
	e.wait(startTimeout)
	s.order(to, true, s.anyMeans())
	s.pause(20)
	e.site.launch(s.rnd.IntN(3) == 0)
}

// killAtOrder kills an exporter that is about to change its state.
func (s *trio) killAtOrder() {
	e := s.owner()
	to := s.other(e)
	active := s.rnd.IntN(2) == 0
	if active {
		s.order(e, false, byQMP)
		e, to = to, e
	}
	order, then := s.orderer(e, active), s.orderer(to, true)
	delay := time.Duration(s.rnd.IntN(4000)) * time.Microsecond
	together(order, then, func() {
		time.Sleep(delay)
		e.slay()
	})
	e.wait(startTimeout)
	s.order(to, true, byQMP)
	e.site.launch(false)
}

// freeze stops the owner for a while, whose locks stay, and others want them.
func (s *trio) freeze() {
	e := s.owner()
	e.signal(syscall.SIGSTOP)
	together(s.orderer(e, s.rnd.IntN(2) == 0), s.orderer(s.other(e), true), func() {
		s.pause(30)
		e.signal(syscall.SIGCONT)
	})
}

// freezeAndKill stops the owner in the midst of things and kills it then.
func (s *trio) freezeAndKill() {
	e := s.owner()
	to := s.other(e)
	e.signal(syscall.SIGSTOP)
	together(s.orderer(to, true), func() {
		s.pause(10)
		e.slay()
	})
	s.order(to, true, byQMP)
	e.wait(startTimeout)
	s.order(to, true, s.anyMeans())
	e.site.launch(s.rnd.IntN(2) == 0)
}

// restart ends an exporter in order, and starts it again.
func (s *trio) restart() {
	e := s.any()
	e.end()
	if s.rnd.IntN(2) == 0 {
		s.order(s.other(e), true, byQMP)
	}
	e.site.launch(s.rnd.IntN(2) == 0)
}

func (s *trio) wait() { s.pause(300) }
