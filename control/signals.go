package control

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/state"
)

// Signals turns Unix signals into orders: SIGUSR1 activates all images,
// SIGUSR2 inactivates them, the first SIGTERM or SIGINT asks for a stop in
// order and the second one exits at once, SIGHUP is ignored.
type Signals struct {
	exit func(status int) // os.Exit, but for tests
	ch   chan os.Signal
	done chan struct{} // the loop has ended
	stop chan struct{} // closed by the first SIGTERM or SIGINT
	wg   sync.WaitGroup

	mu       sync.Mutex // a leaf
	registry *Registry  // nil until Ready
	log      *zap.Logger
	pending  os.Signal // the last order before Ready
	hangup   bool      // before Ready
}

// CatchSignals starts catching. Call it before anything else: a signal that
// comes earlier is lost, or kills the process.
func CatchSignals() *Signals { return catchSignals(os.Exit) }

func catchSignals(exit func(int)) *Signals {
	s := &Signals{
		exit: exit,
		ch:   make(chan os.Signal, 64), // the loop never waits, so it stays short
		done: make(chan struct{}),
		stop: make(chan struct{}),
	}
	// A log whose reader is gone must not end the server.
	signal.Ignore(syscall.SIGPIPE)
	signal.Notify(s.ch, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	go s.loop()
	return s
}

// Stop is closed by the first SIGTERM or SIGINT.
func (s *Signals) Stop() <-chan struct{} { return s.stop }

// Ready says that r can take orders from now on. Of those that came earlier
// the last one counts.
func (s *Signals) Ready(r *Registry, log *zap.Logger) {
	s.mu.Lock()
	s.registry, s.log = r, log
	pending, hangup := s.pending, s.hangup
	s.mu.Unlock()
	if hangup {
		ignoreHangup(log)
	}
	if pending != nil {
		s.order(pending)
	}
}

// Close ends catching, as far as that is possible while others catch signals
// too, and waits for the orders under way.
func (s *Signals) Close() {
	signal.Stop(s.ch)
	close(s.ch)
	<-s.done
	s.wg.Wait()
}

func (s *Signals) loop() {
	defer close(s.done)
	stopping := false
	for sig := range s.ch {
		switch sig {
		case syscall.SIGUSR1, syscall.SIGUSR2:
			s.order(sig)
		case syscall.SIGHUP:
			s.mu.Lock()
			log := s.log
			s.hangup = true
			s.mu.Unlock()
			if log != nil {
				ignoreHangup(log)
			}
		default:
			if stopping {
				s.mu.Lock()
				log := s.log
				s.mu.Unlock()
				if log != nil {
					log.Error("stopped at once by a second signal, without a last flush", zap.Stringer("signal", sig))
				}
				s.exit(1)
				continue
			}
			stopping = true
			close(s.stop)
		}
	}
}

func ignoreHangup(log *zap.Logger) {
	log.Info("SIGHUP ignored; use SIGTERM to stop, SIGUSR1 to activate, SIGUSR2 to inactivate")
}

// order carries out SIGUSR1 or SIGUSR2 on a goroutine of its own, so that the
// next signal is heard during a transition: the opposite order is refused
// then, the same one joins.
func (s *Signals) order(sig os.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.registry == nil {
		s.pending = sig
		return
	}
	r, log := s.registry, s.log
	s.wg.Go(func() {
		var err error
		if sig == syscall.SIGUSR1 {
			err = r.Activate(context.Background(), state.ActivateOptions{})
		} else {
			err = r.Inactivate(context.Background(), InactivateOptions{})
		}
		// What a transition ends in is logged where it is made; what did not
		// even begin is not.
		if _, refused := errors.AsType[*state.OrderError](err); refused || errors.Is(err, errStopping) {
			log.Warn("order refused", zap.String("signal", signalName(sig)), zap.Error(err))
		}
	})
}

func signalName(sig os.Signal) string {
	if sig == syscall.SIGUSR1 {
		return "SIGUSR1"
	}
	return "SIGUSR2"
}
