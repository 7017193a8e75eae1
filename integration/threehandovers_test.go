package integration

import (
	"context"
	"fmt"
	"os/exec"
	"syscall"
	"time"
)

// habits are the flags by which exporters get and give the image without
// orders, or nothing.
func (s *trio) habits(w *site) []string {
	var flags []string
	p := s.rnd.IntN(100)
	if p < 40 && s.onDemand {
		flags = append(flags, "--inactive-writes", fmt.Sprintf("hold=%dms", 1+s.rnd.IntN(500)))
	}
	if p < s.takeovers {
		for i := range trioSites - 1 {
			flags = append(flags, "--takeover", s.sites[(w.index+1+i)%trioSites].control())
		}
		flags = append(flags, "--takeover-min-hold", fmt.Sprintf("%dms", s.rnd.IntN(300)))
		if s.rnd.IntN(2) == 0 {
			flags = append(flags, "--takeover-back")
		}
	}
	return flags
}

// hand is a handover by the program's verb.
func (s *trio) hand(ctx context.Context, from, to *exporter) *exec.Cmd {
	return command(ctx, program(s.t), "handover", "--from", from.site.control(), "--to", to.site.control(), "--timeout", "5s")
}

// handed runs a handover to its end, whatever that is: it may meet takeovers,
// signals that are still on their way, and the dead.
func (s *trio) handed(from, to *exporter) {
	began := s.now()
	err := s.runVerb(func(ctx context.Context) *exec.Cmd { return s.hand(ctx, from, to) })
	if err == nil {
		s.granted(to, began)
		s.did.handovers.Add(1)
	}
}

func (s *trio) handover() {
	from := s.owner()
	s.handed(from, s.other(from))
}

func (s *trio) crossedHandovers() {
	from := s.owner()
	a, b := s.other(from), s.other(from)
	together(func() { s.handed(from, a) }, func() { s.handed(from, b) }, func() { s.handed(a, from) })
}

// killedHandover kills the command, and runs it again.
func (s *trio) killedHandover() {
	from := s.owner()
	to := s.other(from)
	sig := []syscall.Signal{syscall.SIGKILL, syscall.SIGINT}[s.rnd.IntN(2)]
	cmd := s.hand(context.Background(), from, to)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.pause(60)
	_ = cmd.Process.Signal(sig) // it may have ended
	_ = cmd.Wait()
	s.handed(from, to)
}

// frozenHandover stops one side of a handover for a while.
func (s *trio) frozenHandover() {
	from := s.owner()
	to := s.other(from)
	e := []*exporter{from, to}[s.rnd.IntN(2)]
	delay := time.Duration(s.rnd.IntN(60)) * time.Millisecond
	together(func() { s.handed(from, to) }, func() {
		time.Sleep(delay)
		e.signal(syscall.SIGSTOP)
		s.pause(100)
		e.signal(syscall.SIGCONT)
	})
}

// handoverToTheDead kills one side of a handover, and tries again when it is
// there again.
func (s *trio) handoverToTheDead() {
	from := s.owner()
	to := s.other(from)
	victim := []*exporter{from, to}[s.rnd.IntN(2)]
	delay := time.Duration(s.rnd.IntN(60)) * time.Millisecond
	together(func() { s.handed(from, to) }, func() {
		time.Sleep(delay)
		victim.slay()
	})
	victim.wait(startTimeout)
	victim.site.launch(s.rnd.IntN(3) == 0)
	s.handed(from.site.exporter(), to.site.exporter())
}
