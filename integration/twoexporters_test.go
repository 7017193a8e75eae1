package integration

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

const (
	soakConns      = 4  // to each exporter
	soakDepth      = 32 // requests in flight on each
	soakStripe     = 24 // sectors that one worker of each side writes
	soakWorkers    = soakConns * soakDepth
	soakSectors    = soakWorkers * soakStripe
	soakMaxSectors = 4 // of one request
	soakRound      = 10 * time.Second
)

// TestTwoExporters has two exporters serve one image to writers on both sides
// while ownership is thrown back and forth, and then judges what every client
// saw. NBD_EXPORT_SOAK sets for how long (default 60s), NBD_EXPORT_SEED repeats
// the random choices of a run.
func TestTwoExporters(t *testing.T) {
	runSoak(t, tmpfsDir(t), soakTime(t, 60*time.Second))
}

// TestTwoExportersOnDisk does the same for a shorter time where a handover has
// to wait for a disk, with and without the page cache in between.
func TestTwoExportersOnDisk(t *testing.T) {
	for _, cache := range []string{"writeback", "none"} {
		t.Run(cache, func(t *testing.T) {
			runSoak(t, diskDir(t), soakTime(t, 60*time.Second)/6, "--cache", cache)
		})
	}
}

func soakTime(t *testing.T, d time.Duration) time.Duration {
	if s := os.Getenv("NBD_EXPORT_SOAK"); s != "" {
		var err error
		if d, err = time.ParseDuration(s); err != nil {
			t.Fatalf("NBD_EXPORT_SOAK: %v", err)
		}
	} else if testing.Short() {
		d = 6 * time.Second
	}
	return d
}

// soakSeed is of a run's random choices.
func soakSeed(t *testing.T) uint64 {
	seed := rand.Uint64()
	if s := os.Getenv("NBD_EXPORT_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("NBD_EXPORT_SEED: %v", err)
		}
	}
	t.Logf("NBD_EXPORT_SEED=%d", seed)
	return seed
}

func runSoak(t *testing.T, dir string, duration time.Duration, flags ...string) {
	soakImage(t, sparseImage(t, dir, soakSectors*sectorSize), "raw", duration, flags...)
}

// soakImage is runSoak of an image that reads as zeros.
func soakImage(t *testing.T, image, format string, duration time.Duration, flags ...string) {
	seed := soakSeed(t)
	flags = append([]string{"-f", format}, flags...)
	s := &soak{t: t, seed: seed, image: image, format: format, start: time.Now(), held: make([]uint64, soakSectors)}
	s.sides = [2]*daemon{serve(t, image, flags...), serve(t, image, append(slices.Clone(flags), "--inactive")...)}
	for ; duration > 0 && !t.Failed(); duration -= soakRound {
		s.round(min(soakRound, duration))
	}
	for extra := 0; extra < extraRounds && !s.enough() && !t.Failed(); extra++ {
		s.round(soakRound)
	}
	t.Logf("%d writes acknowledged, %d refused, %d unknown, %d reads, %d mixed reads; %d transitions, writes changed sides at least %d times, %d activations refused; %d samples of who is active",
		s.acked.Load(), s.refused.Load(), s.unknown.Load(), s.reads.Load(), s.mixed.Load(),
		s.transitions.Load(), s.alternations.Load(), s.lockRefusals.Load(), s.samples.Load())
	if !s.enough() {
		t.Error("too little happened to prove anything")
	}
	for _, e := range s.sides {
		e.stop()
	}
	content := s.content()
	for i, id := range s.held {
		if now := readSector(content[i*sectorSize:(i+1)*sectorSize], i); now != id {
			t.Errorf("sector %d changed to %d after the last owner let go of it with %d", i, now, id)
		}
	}
}

type soak struct {
	t     *testing.T
	seed  uint64
	image string
	// format of the image. Only of a raw one an inactive exporter reads what is
	// there now; what it reads of another is not judged.
	format string
	start  time.Time
	sides  [2]*daemon

	rounds uint64
	held   []uint64 // what each sector holds between rounds
	late   []event  // unknown writes of the last round: they may still come

	ids, acked, refused, unknown, reads, mixed atomic.Uint64
	transitions, lockRefusals, samples         atomic.Uint64
	alternations, odd                          atomic.Uint64
}

// extraRounds are run at most while too little has happened: on a disk that
// others use, an accident may take as long as a round.
const extraRounds = 12

// enough happened to prove something.
func (s *soak) enough() bool {
	return s.acked.Load() >= 1000 && s.refused.Load() >= 100 && s.reads.Load() >= 100 && s.alternations.Load() >= 5 && s.samples.Load() >= 10
}

// content is what a guest finds in the image, which nobody owns.
func (s *soak) content() []byte {
	if s.format == "raw" {
		return readFile(s.t, s.image)
	}
	return qcow2Content(s.t, s.image)
}

func (s *soak) now() int64 { return int64(time.Since(s.start)) }

func (s *soak) rand(who uint64) *rand.Rand {
	return rand.New(rand.NewPCG(s.seed, s.rounds<<32|who))
}

// round runs everything for a while, lets it come to rest with both sides
// inactive, and judges.
func (s *soak) round(d time.Duration) {
	t := s.t
	s.rounds++
	roundStart := s.now()
	activations := -s.epochs()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	var writers, others sync.WaitGroup
	histories := make([][]event, 2*soakWorkers)
	for side := range 2 {
		for c := range soakConns {
			conn := &soakConn{s: s, uri: s.sides[side].uri(), rnd: s.rand(uint64(1000 + 10*side + c))}
			if err := conn.dial(); err != nil {
				t.Fatal(err)
			}
			var workers sync.WaitGroup
			for w := range soakDepth {
				n := c*soakDepth + w
				rnd := s.rand(uint64(2000 + 1000*side + n))
				workers.Go(func() {
					conn.work(ctx, &histories[side*soakWorkers+n], rnd, n, int16(side*soakWorkers+n))
				})
			}
			others.Go(func() { conn.breakNowAndThen(ctx) })
			writers.Go(func() { workers.Wait(); conn.close() })
		}
	}
	others.Go(func() { s.sample(ctx) })
	s.flip(ctx, s.rand(1))
	writers.Wait()
	others.Wait()
	for _, e := range s.sides {
		q := e.qmp()
		q.must("blockdev-set-active", map[string]any{"active": false})
		q.Close()
	}
	wantLocks(t, s.image, nil)
	activations += s.epochs()
	if n := alternations(slices.Concat(histories...), func(e event) int { return int(e.Client) / soakWorkers }); n > activations {
		t.Errorf("acknowledged writes changed sides %d times, with %d activations: there were two owners at once", n, activations)
	} else {
		s.alternations.Add(uint64(n))
	}

	// The image as it is now is the last read of every sector.
	bySector := make([][]event, soakSectors)
	for _, h := range append(histories, s.late) {
		for _, e := range h {
			bySector[e.Sector] = append(bySector[e.Sector], e)
		}
	}
	s.late = nil
	content := s.content()
	at := s.now()
	failures := make(chan string, soakSectors)
	next := make(chan int)
	var judges sync.WaitGroup
	for range 2 {
		judges.Go(func() {
			for i := range next {
				id := readSector(content[i*sectorSize:(i+1)*sectorSize], i)
				events := append(bySector[i], event{Sector: int32(i), Kind: read, ID: id, From: at, To: at + 1, Client: -1})
				if why := checkSector(events, s.held[i], nil); why != "" {
					failures <- fmt.Sprintf("sector %d, which held %d: %s\n%s", i, s.held[i], why, explain(events))
				}
				s.held[i] = id
			}
		})
	}
	for i := range soakSectors {
		next <- i
	}
	close(next)
	judges.Wait()
	close(failures)
	n := 0
	for f := range failures {
		if n++; n <= 5 {
			t.Error(f)
		}
	}
	if n > 5 {
		t.Errorf("and %d sectors more", n-5)
	}
	for _, h := range histories {
		for _, e := range h {
			if e.Outcome == unknown {
				e.From = at + 2
				s.late = append(s.late, e)
			}
		}
	}
	t.Logf("round %d: %v, judged in %v", s.rounds, time.Duration(at-roundStart), time.Duration(s.now()-at))
}

// epochs is the epoch of the last owner: how often either side was activated.
func (s *soak) epochs() (n int) {
	for _, e := range s.sides {
		n = max(n, int(e.status().Epoch))
	}
	return n
}

// soakConn is a connection that is dialled anew when it breaks.
type soakConn struct {
	s   *soak
	uri string
	rnd *rand.Rand
	mu  sync.RWMutex
	c   *client.Conn
}

func (c *soakConn) dial() error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	conn, err := client.Dial(ctx, c.uri, client.Options{})
	if err != nil {
		return fmt.Errorf("%s: %w", c.uri, err)
	}
	c.mu.Lock()
	c.c = conn
	c.mu.Unlock()
	return nil
}

func (c *soakConn) conn() *client.Conn {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.c
}

func (c *soakConn) close() { c.conn().Close() }

// breakNowAndThen ends the connection as a dying client does and dials anew.
func (c *soakConn) breakNowAndThen(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second + time.Duration(c.rnd.IntN(8000))*time.Millisecond):
		}
		c.conn().Abort()
		if err := c.dial(); err != nil {
			c.s.t.Error(err)
			return
		}
	}
}

// work is one of the requests that a connection has in flight. It writes its
// own stripe of the image, so that on one side no two writes overlap; the
// worker of the other side with the same number writes the same stripe.
func (c *soakConn) work(ctx context.Context, history *[]event, rnd *rand.Rand, n int, name int16) {
	s := c.s
	buf := make([]byte, soakMaxSectors*sectorSize)
	for ctx.Err() == nil {
		count := 1 + rnd.IntN(soakMaxSectors)
		first := n*soakStripe + rnd.IntN(soakStripe-count+1)
		b := buf[:count*sectorSize]
		conn := c.conn()
		switch p := rnd.IntN(100); {
		case p < 15:
			from := s.now()
			_, err := conn.ReadAt(b, int64(first)*sectorSize)
			to := s.now()
			if !s.expected(err, false) {
				return
			}
			if err != nil {
				time.Sleep(time.Millisecond) // until the connection is back
				continue
			}
			for i := range count {
				id := readSector(b[i*sectorSize:(i+1)*sectorSize], first+i)
				if id == torn {
					s.mixed.Add(1)
				}
				if s.format == "raw" {
					*history = append(*history, event{Sector: int32(first + i), Kind: read, ID: id, From: from, To: to, Client: name})
				}
			}
			s.reads.Add(1)
		case p < 17:
			if !s.expected(conn.Flush(), false) {
				return
			}
		default:
			id := s.ids.Add(1)
			for i := range count {
				fillSector(b[i*sectorSize:(i+1)*sectorSize], first+i, id)
			}
			e := event{ID: id, From: s.now(), Client: name}
			_, err := conn.WriteAt(b, int64(first)*sectorSize, p < 18)
			e.To = s.now()
			if !s.expected(err, true) {
				return
			}
			var no *client.Error
			switch {
			case err == nil:
				s.acked.Add(1)
			case errors.As(err, &no):
				e.Outcome = refused
				s.refused.Add(1)
			default:
				e.Outcome = unknown
				e.To = math.MaxInt64 // at any time from then on
				s.unknown.Add(1)
			}
			for i := range count {
				e.Sector = int32(first + i)
				*history = append(*history, e)
			}
			if err != nil {
				time.Sleep(time.Duration(1+rnd.IntN(4)) * time.Millisecond)
			}
		}
	}
}

// expected says whether an error is one that may happen to a client here: a
// refusal for lack of ownership if it was a write, or its own connection's
// end.
func (s *soak) expected(err error, write bool) bool {
	var no *client.Error
	switch {
	case err == nil:
		return true
	case errors.As(err, &no):
		if write && no.Errno == syscall.EPERM && strings.HasPrefix(no.Text, inactiveText) {
			return true
		}
	case errors.Is(err, client.ErrClosed):
		return true
	}
	if s.odd.Add(1) <= 5 {
		s.t.Errorf("at %v a client got: %v", time.Since(s.start), err)
	}
	return false
}

// flip throws ownership about until ctx ends.
func (s *soak) flip(ctx context.Context, rnd *rand.Rand) {
	t := s.t
	control := [2]*qmpConn{s.sides[0].qmp(), s.sides[1].qmp()}
	defer control[0].Close()
	defer control[1].Close()
	order := func(side int, active, signal bool) {
		e, q := s.sides[side], control[side]
		if signal {
			sig := syscall.SIGUSR2
			if active {
				sig = syscall.SIGUSR1
			}
			n := len(e.log.lines())
			e.signal(sig)
			// Done when the state is there, or when it said why not.
			waitFor(t, startTimeout, fmt.Sprintf("side %d: a signal for active=%v is obeyed or refused", side, active), func() bool {
				if q.active() == active {
					return true
				}
				return active && strings.Contains(strings.ReplaceAll(strings.Join(e.log.lines()[n:], "\n"), `\`, ""), "lock")
			})
		} else if _, err := q.execute("blockdev-set-active", map[string]any{"active": active}); err != nil {
			// A signal that asked for the state a side was in already may take
			// effect later, and then the opposite order is told to wait.
			busy := strings.Contains(err.Error(), "try again when that is done")
			locked := active && strings.Contains(err.Error(), "Failed to get ")
			if !busy && !locked {
				t.Errorf("side %d: active=%v: %v", side, active, err)
			}
			if locked {
				s.lockRefusals.Add(1)
			}
			return
		}
		s.transitions.Add(1)
	}
	for ctx.Err() == nil && !t.Failed() {
		signal := rnd.IntN(2) == 0
		owner := rnd.IntN(2)
		for side := range 2 {
			if control[side].active() {
				owner = side
			}
		}
		other := 1 - owner
		switch p := rnd.IntN(100); {
		case p < 60: // hand over
			order(owner, false, signal)
			time.Sleep(time.Duration(rnd.IntN(3)) * time.Millisecond)
			order(other, true, rnd.IntN(2) == 0)
		case p < 70: // the other wants it while it has an owner
			order(owner, true, false)
			order(other, true, false)
		case p < 80: // nobody owns it, then both want it
			order(owner, false, signal)
			time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
			var wg sync.WaitGroup
			wg.Go(func() { order(owner, true, false) })
			wg.Go(func() { order(other, true, false) })
			wg.Wait()
		case p < 90: // away and back
			order(owner, false, signal)
			order(owner, true, !signal)
		case p < 95: // a bunch of signals
			for range 1 + rnd.IntN(10) {
				s.sides[rnd.IntN(2)].signal([]syscall.Signal{syscall.SIGUSR1, syscall.SIGUSR2}[rnd.IntN(2)])
			}
		default: // one side is not running for a while
			e := s.sides[rnd.IntN(2)]
			e.signal(syscall.SIGSTOP)
			time.Sleep(time.Duration(rnd.IntN(20)) * time.Millisecond)
			e.signal(syscall.SIGCONT)
		}
		time.Sleep(time.Duration(rnd.IntN(100)) * time.Millisecond)
	}
}

// sample looks at both sides all the time. An epoch is one ownership: a side
// that is active in the same epoch before and after a look elsewhere was so
// in between.
func (s *soak) sample(ctx context.Context) {
	control := [2]*qmpConn{s.sides[0].qmp(), s.sides[1].qmp()}
	defer control[0].Close()
	defer control[1].Close()
	for ctx.Err() == nil && !s.t.Failed() {
		for side := range 2 {
			before := control[side].status()
			other := control[1-side].status()
			locks := processLocks(s.t, s.sides[side].pid, s.image)
			writable := writableHolds(s.t, s.sides[side].pid, s.image)
			after := control[side].status()
			if before.State != after.State || before.Epoch != after.Epoch || !before.Since.Equal(after.Since) {
				continue
			}
			s.samples.Add(1)
			switch before.State {
			case "active":
				if other.State == "active" {
					s.t.Errorf("both sides are active: %+v and %+v", before, other)
				}
				if !slices.Equal(locks, activeLocks) {
					s.t.Errorf("an active side holds %v", locks)
				}
			case "inactive":
				if len(locks) != 0 || len(writable) != 0 {
					s.t.Errorf("an inactive side holds %v and %v", locks, writable)
				}
			}
		}
		time.Sleep(2 * time.Millisecond)
	}
}
