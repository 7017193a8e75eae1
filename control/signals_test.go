package control

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/nbd-export/nbd-export/state"
)

// journal is a log whose messages, with their errors, can be waited for.
func journal() (*zap.Logger, <-chan string) {
	lines := make(chan string, 100)
	return zap.New(&recorder{lines: lines, LevelEnabler: zap.DebugLevel}), lines
}

type recorder struct {
	zapcore.LevelEnabler
	lines chan<- string
}

func (r *recorder) With([]zap.Field) zapcore.Core { return r }
func (r *recorder) Sync() error                   { return nil }
func (r *recorder) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	return c.AddCore(e, r)
}

func (r *recorder) Write(e zapcore.Entry, fields []zap.Field) error {
	line := e.Message
	for _, f := range fields {
		if err, ok := f.Interface.(error); ok {
			line += ": " + err.Error()
		}
	}
	r.lines <- line
	return nil
}

func expect(t *testing.T, lines <-chan string, want string) {
	t.Helper()
	if got := <-lines; !strings.Contains(got, want) {
		t.Errorf("log says %q, want %q", got, want)
	}
}

func kill(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(os.Getpid(), sig); err != nil {
		t.Fatal(err)
	}
}

func TestSignals(t *testing.T) {
	exits := make(chan int, 1)
	s := newSignals(func(status int) { exits <- status }, time.After)
	s.catch()
	defer s.Close()
	b := newBed(t, 2)
	log, lines := journal()
	for _, target := range b.Targets() {
		// One line for each transition is what serve logs too.
		target.Machine = state.NewMachine(target.Image.(state.Image), Observe(state.Options{}, log))
	}
	settling, settle := make(chan struct{}), make(chan struct{})
	b.images[0].settle = func() error { close(settling); <-settle; return nil }

	// Before the server is ready nothing is lost, and the last order counts.
	kill(t, syscall.SIGHUP)
	kill(t, syscall.SIGUSR2)
	waitFor(s, func() bool { return s.pending == syscall.SIGUSR2 })
	kill(t, syscall.SIGUSR1)
	waitFor(s, func() bool { return s.pending == syscall.SIGUSR1 && s.hangup })
	s.Hangup(nil, log)
	expect(t, lines, "SIGHUP ignored, as there is no --log-file")
	s.Ready(b.Registry, log)
	expect(t, lines, "image is active")
	expect(t, lines, "image is active")

	// During a transition the opposite order is refused, the same one joins.
	kill(t, syscall.SIGUSR2)
	<-settling
	kill(t, syscall.SIGUSR1)
	expect(t, lines, "order refused: cannot activate image /srv/a.img: it is inactivating (step settle)")
	kill(t, syscall.SIGUSR2)
	kill(t, syscall.SIGHUP)
	expect(t, lines, "SIGHUP ignored")
	for range 10 * mostOrders { // a storm takes no more than so many goroutines
		s.order(syscall.SIGUSR2)
	}
	if n := len(s.slots[syscall.SIGUSR2]); n != mostOrders {
		t.Errorf("%d orders under way", n)
	}
	kill(t, syscall.SIGUSR1)
	expect(t, lines, "order refused: cannot activate image")
	close(settle)
	expect(t, lines, "image is inactive")
	expect(t, lines, "image is inactive")
	waitFor(s, func() bool { return len(s.slots[syscall.SIGUSR1])+len(s.slots[syscall.SIGUSR2]) == 0 }) // the storm is over

	kill(t, syscall.SIGTERM)
	<-s.Stop()
	select {
	case <-exits:
		t.Error("the first SIGTERM exits")
	default:
	}
	b.Registry.stop()
	kill(t, syscall.SIGUSR1)
	expect(t, lines, "order refused: the server is shutting down")
	kill(t, syscall.SIGINT)
	expect(t, lines, "stopped at once by a second signal")
	if status := <-exits; status != 1 {
		t.Errorf("exit status %d", status)
	}
}

// Two signals for one stop are one: the second gives it a moment.
func TestStopSentTwice(t *testing.T) {
	never := func(time.Duration) <-chan time.Time { return make(chan time.Time) }
	s := newSignals(func(int) { t.Error("the process ends without having stopped") }, never)
	s.catch()
	kill(t, syscall.SIGTERM)
	<-s.Stop()
	s.ch <- syscall.SIGQUIT
	waitFor(s, func() bool { return len(s.ch) == 0 })
	s.Close()
}

// A second signal that is looked at only when the stop has ended changes nothing
// of that, however long ago it came.
func TestStopSentTwiceAndStopped(t *testing.T) {
	passed := make(chan time.Time)
	close(passed)
	for range 100 { // what is ready at once is taken in any order
		s := newSignals(func(int) { t.Error("a process that has stopped in order says that it did not") },
			func(time.Duration) <-chan time.Time { return passed })
		s.ch <- syscall.SIGTERM
		s.ch <- syscall.SIGTERM
		close(s.closed)
		s.loop()
	}
}

// waitFor spins until what a signal changes has changed.
func waitFor(s *Signals, ok func() bool) {
	for {
		s.mu.Lock()
		done := ok()
		s.mu.Unlock()
		if done {
			return
		}
	}
}

// A failed transition is logged once, by the machine that made it.
func TestSignalFails(t *testing.T) {
	s := newSignals(func(int) {}, time.After)
	s.catch()
	b := newBed(t, 1)
	log, lines := journal()
	b.Targets()[0].Machine = state.NewMachine(b.images[0], Observe(state.Options{}, log))
	b.images[0].acquire = func() error { return syscall.EBUSY }
	s.Ready(b.Registry, log)
	kill(t, syscall.SIGUSR1)
	expect(t, lines, "activation failed, the image stays inactive")
	s.Close()
	select {
	case l := <-lines:
		t.Errorf("and then %q", l)
	default:
	}
}
