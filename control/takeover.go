package control

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

const (
	// backOffFirst and backOffMost bound the time between two attempts, which
	// doubles from one to the next. Each is taken from half to one and a half
	// times that at random, or two that race would go on doing so.
	backOffFirst = 10 * time.Millisecond
	backOffMost  = time.Second
	// orderLimit is how long a peer that has been asked may take: what it has
	// written must get to its disk.
	orderLimit = 30 * time.Second
	// proofLimit is how long the proof of one image may take: a network file
	// system may show an old owner record for lagLimit.
	proofLimit = 2 * lagLimit
)

// TakeoverConfig is how an exporter gets and gives away an image without
// anybody's order.
type TakeoverConfig struct {
	// Peers are the control sockets, as for Dial, of the exporters that may
	// own the image. With none it is only given away, when a peer asks.
	Peers []string
	// MinHold is how long the image is kept at least once it is active,
	// however soon a peer asks for it.
	MinHold time.Duration
	// Log gets a line for each image taken or given; nil means none.
	Log *zap.Logger
}

// Takeover gets one image when a client writes to it while it is inactive, and
// gives it to peers that ask. Cooperation makes it quick, and the locks make it
// safe: an image is activated like by any other order. Its methods may be
// called concurrently.
type Takeover struct {
	cfg    TakeoverConfig
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	me     asker
	wg     sync.WaitGroup

	// Set by Serve, which comes before all but Want.
	registry *Registry
	target   *Target

	mu      sync.Mutex // a leaf
	closed  bool
	phase   phase
	again   bool // a write was held since the last attempt began
	yielded bool // to a peer that asked, since the last attempt began
}

// phase is where a takeover stands, which decides what a racing peer is told.
type phase uint8

const (
	idle       phase = iota
	asking           // peers are being asked, or the next attempt is waited for
	activating       // none has the image: it is being activated
)

// asker tells racing exporters apart; the lower one goes first. Containers may
// share a host's name and each have a process 1: then ID, a random word, decides.
type asker struct {
	Host string
	PID  int
	ID   string
}

func (a asker) before(b asker) bool {
	return cmp.Or(strings.Compare(a.Host, b.Host), cmp.Compare(a.PID, b.PID), strings.Compare(a.ID, b.ID)) < 0
}

func (a asker) String() string { return fmt.Sprintf("pid %d on %s", a.PID, a.Host) }

// NewTakeover makes one that has no image yet.
func NewTakeover(cfg TakeoverConfig) *Takeover {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	t := &Takeover{cfg: cfg, me: asker{PID: os.Getpid(), ID: rand.Text()}}
	t.me.Host, _ = os.Hostname() // without a name the pid decides
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// Serve says which image it is for. It becomes part of target, which is to be
// added to r.
func (t *Takeover) Serve(r *Registry, target *Target) {
	t.registry, t.target = r, target
	target.Takeover = t
}

// Want is told that a client's write waits for the image: state.Options.Wanted.
func (t *Takeover) Want() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || len(t.cfg.Peers) == 0 {
		return
	}
	t.again = true
	if t.phase == idle {
		t.phase = asking
		t.wg.Go(t.run)
	}
}

// Close ends a takeover under way, and waits for it. No other begins.
func (t *Takeover) Close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.cancel()
	t.wg.Wait()
}

// run takes the image over, unless no write waits for it any more.
func (t *Takeover) run() {
	began, attempts, told := time.Now(), 0, ""
	var how string
	var err error
	pause := backOffFirst
	for {
		t.begin()
		if !t.held() {
			break // its time is over
		}
		attempts++
		if how, err = t.attempt(); err == nil {
			break
		}
		var l *laterError
		if errors.As(err, &l) {
			t.cfg.Log.Debug("a peer lets the image be taken over later", zap.String("image", t.name()), zap.Error(err))
		} else if text := err.Error(); text != told && t.ctx.Err() == nil {
			t.cfg.Log.Warn("the image cannot be taken over yet", zap.String("image", t.name()), zap.Error(err))
			told = text
		}
		wait := pause/2 + mrand.N(pause)
		pause = min(2*pause, backOffMost)
		if l != nil && l.wait > 0 {
			// Not all of it: the peer may end, or be told to let go.
			wait = min(l.wait, backOffMost) + mrand.N(backOffFirst)
		}
		if !t.sleep(wait) {
			break
		}
	}
	fields := []zap.Field{
		zap.String("image", t.name()), zap.String("reason", "a client wrote"),
		zap.Int("attempts", attempts), zap.Duration("duration", round(time.Since(began))),
	}
	switch {
	case how != "":
		t.cfg.Log.Info("image taken over", append(fields, zap.String("peer", how))...)
	case err != nil && t.ctx.Err() == nil:
		t.cfg.Log.Error("image not taken over, and no write waits for it any more", append(fields, zap.Error(err))...)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.phase = idle
	if t.again && !t.closed { // a write came after the last attempt
		t.phase = asking
		t.wg.Go(t.run)
	}
}

func (t *Takeover) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.phase, t.again, t.yielded = asking, false, false
}

// sleep waits before another attempt. It reports whether there may be one.
func (t *Takeover) sleep(d time.Duration) bool {
	t.mu.Lock()
	t.phase = asking
	t.mu.Unlock()
	select {
	case <-time.After(d):
		return true
	case <-t.ctx.Done():
		return false
	}
}

func (t *Takeover) held() bool { return t.target.Stats == nil || t.target.Stats().Held > 0 }

func (t *Takeover) name() string { return t.target.Image.Info().Path }

// laterError is a peer's answer that it may be asked again.
type laterError struct {
	peer, why string
	wait      time.Duration // 0: as long as usual
}

func (e *laterError) Error() string { return fmt.Sprintf("%s: not now: %s", e.peer, e.why) }

// attempt has the peers give the image away, and activates it. how is what
// they said; "" if it was active anyway.
func (t *Takeover) attempt() (how string, err error) {
	switch s := t.target.Machine.Status(); s.State {
	case state.Active:
		return "", nil
	case state.Inactive, state.Activating:
	default:
		return "", fmt.Errorf("the image is %s", s.State)
	}
	// All are found before one is asked: what it lets go nobody would own if
	// another kept it from being activated.
	peers, err := t.reach()
	defer func() {
		for _, p := range peers {
			p.close()
		}
	}()
	if err != nil {
		return "", err
	}
	granted := false
	var said []string
	for _, p := range peers {
		what, given, err := t.ask(p)
		if err != nil {
			return "", err
		}
		granted = granted || given
		said = append(said, what)
	}
	t.mu.Lock()
	yielded := t.yielded
	if !yielded || granted {
		t.phase = activating
	}
	t.mu.Unlock()
	if yielded && !granted {
		return "", &laterError{peer: "another exporter", why: "it takes the image over itself and goes first"}
	}
	// What a peer gave away is taken even if no write waits any more: nobody
	// would own it otherwise.
	if !granted && !t.held() {
		return "", errors.New(strings.Join(said, "; "))
	}
	if t.ctx.Err() != nil {
		return "", context.Cause(t.ctx)
	}
	if err := t.registry.Activate(t.ctx, state.ActivateOptions{}, t.target.Node); err != nil {
		return "", fmt.Errorf("%s; %w", strings.Join(said, "; "), err)
	}
	return strings.Join(said, "; "), nil
}

// reachedPeer is a peer that can be asked for the image, which it has as node,
// or one that need not be, as said says.
type reachedPeer struct {
	name, node string
	client     *Client // nil if it need not be asked
	said       string
}

func (p *reachedPeer) close() {
	if p.client != nil {
		_ = p.client.Close()
	}
}

// reach finds all peers, at once: one that does not answer must leave time to
// try without it. An error means that the image is not to be activated, whatever
// the others say. The caller closes what is returned, in either case.
func (t *Takeover) reach() ([]*reachedPeer, error) {
	peers := make([]*reachedPeer, len(t.cfg.Peers))
	errs := make([]error, len(peers))
	var wg sync.WaitGroup
	for i, name := range t.cfg.Peers {
		peers[i] = &reachedPeer{name: name}
		wg.Go(func() { errs[i] = t.find(peers[i]) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return peers, err
		}
	}
	return peers, nil
}

// find connects to a peer, and has it proven that it has the image.
func (t *Takeover) find(p *reachedPeer) error {
	ctx, cancel := context.WithTimeout(t.ctx, max(t.target.Machine.HoldFor()/2, 500*time.Millisecond))
	defer cancel()
	c, err := Dial(ctx, p.name)
	local := !strings.HasPrefix(p.name, execPrefix) // what such a command lacks says nothing
	if local && (errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED)) {
		return t.gone(p)
	}
	if err != nil {
		p.said, err = t.silent(p.name, false, err)
		return err
	}
	ctx, cancel = context.WithTimeout(t.ctx, proofLimit)
	defer cancel()
	pairs, err := SameImages(ctx, t.registry, c, false, t.target.Node)
	if err != nil {
		_ = c.Close()
		p.said, err = t.silent(p.name, true, err)
		return err
	}
	p.client, p.node = c, pairs[0].B.Node
	if why := pairs[0].A.Unusable; why != "" {
		return fmt.Errorf("it could not be owned here: %s", why)
	}
	return nil
}

// ask has a peer give the image away. It reports, and says, whether the peer
// has, or need not; the locks are the guard then. An error means that it is not
// to be activated.
func (t *Takeover) ask(p *reachedPeer) (what string, given bool, err error) {
	if p.client == nil {
		return p.said, false, nil
	}
	ctx, cancel := context.WithTimeout(t.ctx, orderLimit)
	defer cancel()
	a, err := p.client.requestTakeover(ctx, p.node, t.me)
	switch {
	case err != nil:
		return "", false, fmt.Errorf("%s: %w", p.name, err)
	case !a.Granted:
		return "", false, &laterError{p.name, a.Reason, time.Duration(a.RetrySeconds * float64(time.Second))}
	}
	if !a.Owned {
		return p.name + " does not own it", false, nil
	}
	return p.name + " gave it away", true, nil
}

// silent is the answer for a peer that may own the image and does not say,
// because of cause. Where the locks reach it they tell. Elsewhere only the
// record can, and of a peer that lives not even that: there may be two records.
func (t *Takeover) silent(peer string, lives bool, cause error) (said string, err error) {
	cause = fmt.Errorf("%s does not give it away: %w", peer, cause)
	if t.target.Locks != nil && t.target.Locks().Scope == "cluster" || !lives && t.letGoElsewhere() {
		return cause.Error(), nil
	}
	return "", fmt.Errorf("%w; the locks do not reach every host, so it is not activated without the peer's word", cause)
}

// gone is what is made of a peer on whose socket nobody listens: the locks tell
// whether it lives all the same. Without any, only the record does.
func (t *Takeover) gone(p *reachedPeer) error {
	p.said = p.name + " is gone"
	if t.target.Locks == nil || t.target.Locks().Scope != "off" {
		return nil
	}
	if r := t.lastOwner(); r != nil && !r.Clean && r.Process() != backend.ProcessEnded {
		return fmt.Errorf("%s, but the owner record names %s, which has not let go, and no locks keep two owners apart; if it has ended, give the order to activate", p.said, r.Owner(time.Now()))
	}
	return nil
}

// letGoElsewhere reports whether the owner record says that a process of
// another host had the image last, and let go in order. One that names this
// host may be one that other hosts do not see, and write their own.
func (t *Takeover) letGoElsewhere() bool {
	r := t.lastOwner()
	return r != nil && r.Clean && t.me.Host != "" && r.Host != t.me.Host
}

// lastOwner is what the owner record says; nil if there is none, or none is kept.
func (t *Takeover) lastOwner() *backend.OwnerRecord {
	if t.target.Record == nil || t.target.Record().Path == "" {
		return nil
	}
	seen, err := backend.Who(t.name(), t.target.Record().Path)
	if err != nil {
		return nil
	}
	return seen.Owner
}
