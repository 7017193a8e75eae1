package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/nbd-export/nbd-export/state"
)

// Signals turns Unix signals into orders: SIGUSR1 activates all images,
// SIGUSR2 inactivates them, the first SIGTERM, SIGINT or SIGQUIT asks for a
// stop in order and the second one exits at once, SIGHUP opens a log file anew.
type Signals struct {
	exit   func(status int)                     // os.Exit, but for tests
	after  func(time.Duration) <-chan time.Time // time.After, but for tests
	ch     chan os.Signal
	closed chan struct{} // by Close
	done   chan struct{} // the loop has ended
	stop   chan struct{} // closed by the first signal that asks for a stop
	wg     sync.WaitGroup
	slots  map[os.Signal]chan struct{} // holds one for each order under way

	mu       sync.Mutex // a leaf
	registry *Registry  // nil until Ready
	log      *zap.Logger
	pending  os.Signal // the last order before Ready
	hangup   bool      // before it was known what to do about it
	reopen   func()    // what SIGHUP does, nil until Hangup
}

const (
	// mostOrders of a kind under way at once. They all wait for the same
	// transition; another would be one more to wait.
	mostOrders = 100
	// sameStop is how soon after the first SIGTERM a second one does not stop
	// the process yet: timeout(1) sends two for one, and so do terminals to a
	// process whose parent passes signals on.
	sameStop = 100 * time.Millisecond
)

// CatchSignals starts catching. Call it before anything else: a signal that
// comes earlier is lost, or kills the process.
func CatchSignals() *Signals {
	s := newSignals(os.Exit, time.After)
	s.catch()
	return s
}

func newSignals(exit func(int), after func(time.Duration) <-chan time.Time) *Signals {
	return &Signals{
		exit:   exit,
		after:  after,
		ch:     make(chan os.Signal, 64), // the loop does not wait, so it stays short
		closed: make(chan struct{}),
		done:   make(chan struct{}),
		stop:   make(chan struct{}),
		slots: map[os.Signal]chan struct{}{
			syscall.SIGUSR1: make(chan struct{}, mostOrders),
			syscall.SIGUSR2: make(chan struct{}, mostOrders),
			syscall.SIGHUP:  make(chan struct{}, mostOrders),
		},
	}
}

func (s *Signals) catch() {
	// A log whose reader is gone must not end the server.
	signal.Ignore(syscall.SIGPIPE)
	signal.Notify(s.ch, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP)
	go s.loop()
}

// Stop is closed by the first signal that asks for a stop.
func (s *Signals) Stop() <-chan struct{} { return s.stop }

// Hangup says what SIGHUP does from now on: it opens the file of log anew. Without
// one, nil, it does nothing.
func (s *Signals) Hangup(file *LogFile, log *zap.Logger) {
	log = sampled(log)
	reopen := func() {
		log.Info("SIGHUP ignored, as there is no --log-file; use SIGTERM to stop, SIGUSR1 to activate, SIGUSR2 to inactivate")
	}
	if file != nil {
		reopen = func() {
			if err := file.Reopen(); err != nil {
				log.Error("the log goes on in the file that is open", zap.Error(err))
				return
			}
			log.Info("SIGHUP: log file opened anew")
		}
	}
	s.mu.Lock()
	s.reopen = reopen
	hangup := s.hangup
	s.mu.Unlock()
	if hangup {
		s.hangUp()
	}
}

// hangUp does what SIGHUP asks for, on a goroutine of its own: to open a file may
// take its time.
func (s *Signals) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reopen == nil {
		s.hangup = true
		return
	}
	select {
	case s.slots[syscall.SIGHUP] <- struct{}{}:
	default:
		return
	}
	reopen := s.reopen
	go func() { // which a stop does not wait for
		reopen()
		<-s.slots[syscall.SIGHUP]
	}()
}

// sampled keeps a storm of signals from flooding the log.
func sampled(log *zap.Logger) *zap.Logger {
	return log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, time.Second, 10, 1000)
	}))
}

// Ready says that r can take orders from now on. Of those that came earlier
// the last one counts.
func (s *Signals) Ready(r *Registry, log *zap.Logger) {
	s.mu.Lock()
	s.registry, s.log = r, sampled(log)
	pending := s.pending
	s.mu.Unlock()
	if pending != nil {
		s.order(pending)
	}
}

// Close ends catching, as far as that is possible while others catch signals
// too, and waits for the orders under way.
func (s *Signals) Close() {
	signal.Stop(s.ch)
	close(s.closed)
	<-s.done
	s.wg.Wait()
}

func (s *Signals) loop() {
	defer close(s.done)
	var first <-chan time.Time // some time after the first SIGTERM
	for {
		var sig os.Signal
		select {
		case sig = <-s.ch:
		case <-s.closed:
			return
		}
		switch sig {
		case syscall.SIGUSR1, syscall.SIGUSR2:
			s.order(sig)
		case syscall.SIGHUP:
			s.hangUp()
		default:
			if first == nil {
				first = s.after(sameStop)
				close(s.stop)
				continue
			}
			select {
			case <-first:
			case <-s.closed:
			}
			select {
			case <-s.closed: // the stop was quicker
				return
			default:
			}
			s.lastWords(sig)
			s.exit(1)
		}
	}
}

// lastWords says what exiting at once may lose.
func (s *Signals) lastWords(sig os.Signal) {
	const text = "stopped at once by a second signal"
	s.mu.Lock()
	registry, log := s.registry, s.log
	s.mu.Unlock()
	if registry == nil {
		_, _ = fmt.Fprintln(os.Stderr, "nbd-export: "+text)
		return
	}
	var owned []string
	for _, t := range registry.Targets() {
		if !t.readOnly() && t.Machine.Status().State.Owns() {
			owned = append(owned, t.Image.Info().Path)
		}
	}
	defer func() { _ = log.Sync() }()
	if len(owned) == 0 {
		log.Warn(text, zap.Stringer("signal", sig))
		return
	}
	log.Error(text+": writes acknowledged since the last flush may be lost",
		zap.Stringer("signal", sig), zap.Strings("images", owned))
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
	select {
	case s.slots[sig] <- struct{}{}:
	default:
		return
	}
	r, log := s.registry, s.log
	s.wg.Go(func() {
		defer func() { <-s.slots[sig] }()
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
