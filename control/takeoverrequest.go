package control

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/state"
)

// abandonedEvery is how often it is looked whether the peer still waits.
const abandonedEvery = 50 * time.Millisecond

var errAskerGone = errors.New("the one who asked has gone")

// takeoverAnswer is what x-takeover returns.
type takeoverAnswer struct {
	// Granted: the image is inactive here, and this server does not want it.
	Granted bool `json:"granted"`
	// Owned: it was active until now.
	Owned bool `json:"owned,omitempty"`
	// RetrySeconds is when to ask again if not, 0 if there is no telling, and
	// Reason why not.
	RetrySeconds float64 `json:"retry-seconds,omitempty"`
	Reason       string  `json:"reason,omitempty"`
}

func later(d time.Duration, format string, a ...any) takeoverAnswer {
	return takeoverAnswer{RetrySeconds: d.Seconds(), Reason: fmt.Sprintf(format, a...)}
}

// requestTakeover asks a server to give the image with this node to us.
func (c *Client) requestTakeover(ctx context.Context, node string, me asker) (a takeoverAnswer, err error) {
	err = c.Execute(ctx, "x-takeover", struct {
		Node string `json:"node-name"`
		Host string `json:"host"`
		PID  int    `json:"pid"`
		ID   string `json:"id"`
	}{node, me.Host, me.PID, me.ID}, &a)
	return a, err
}

// takeover is x-takeover.
func (s *session) takeover(a args) (any, error) {
	r, node := s.server.cfg.Registry, arg[string](a, "node-name")
	t, by := r.target(node), asker{arg[string](a, "host"), int(arg[int64](a, "pid")), arg[string](a, "id")}
	switch {
	case r.isStopping():
		return nil, errStopping
	case t == nil:
		return nil, noNode(node)
	case t.Takeover != nil && by == t.Takeover.me:
		return nil, generic("this is the exporter itself: --takeover needs the control socket of another")
	}
	began := time.Now()
	answer, err := t.giveTo(by, s.abandoned)
	log := s.server.cfg.Log.With(zap.String("image", t.Image.Info().Path), zap.Stringer("peer", by))
	switch {
	case err != nil:
		log.Error("image not given to a peer that asked for it", zap.Error(err))
	case !answer.Granted:
		log.Debug("image not given to a peer yet", zap.String("reason", answer.Reason))
	default:
		log.Info("image given to a peer", zap.String("reason", "its client wrote"), zap.Duration("duration", round(time.Since(began))))
	}
	return answer, err
}

// giveTo makes the image inactive for a peer, if its time has come. abandoned
// reports whether the peer has stopped waiting: then nobody would own it.
func (t *Target) giveTo(by asker, abandoned func() bool) (takeoverAnswer, error) {
	s := t.Machine.Status()
	switch s.State {
	case state.Inactive:
		if t.Takeover != nil {
			return t.Takeover.race(by), nil
		}
		return takeoverAnswer{Granted: true}, nil
	case state.FailedFenced: // holds nothing
		return takeoverAnswer{Granted: true}, nil
	case state.Activating:
		return later(0, "it is being activated"), nil
	case state.Active:
		if t.Takeover == nil {
			break
		}
		if left := t.Takeover.cfg.MinHold - time.Since(s.Since); left > 0 {
			return later(left, "it has been active for %v only, of at least %v", round(time.Since(s.Since)), t.Takeover.cfg.MinHold), nil
		}
	}
	if abandoned() {
		return takeoverAnswer{}, errAskerGone
	}
	ctx, end := context.WithCancelCause(context.Background())
	defer end(nil)
	go func() { // as long as writes are served it can be called off
		tick := time.NewTicker(abandonedEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if abandoned() {
				end(errAskerGone)
			}
		}
	}()
	if err := state.Inactivate(ctx, t.Machine); err != nil {
		return takeoverAnswer{}, err
	}
	t.setFileActive(false)
	return takeoverAnswer{Granted: true, Owned: true}, nil
}

// race answers a peer that wants the image, which is inactive here, while this
// server may want it too.
func (t *Takeover) race(by asker) takeoverAnswer {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.phase == activating:
		return later(0, "%v is activating it", t.me)
	case t.phase == asking && !by.before(t.me):
		return later(backOffFirst+rand.N(4*backOffFirst), "%v wants it too, and goes first", t.me)
	}
	t.yielded = true
	return takeoverAnswer{Granted: true}
}

// abandoned reports whether the client has hung up.
func (c *session) abandoned() bool {
	sc, ok := c.out.nc.(syscall.Conn)
	if !ok {
		return false
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	err = rc.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		gone = err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone || err != nil
}
