package state

import (
	"context"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// crowd runs f in n goroutines, on more threads than there are processors, so
// that they are interrupted between any two instructions, until the function
// it returns is called.
func crowd(n int, f func()) (end func()) {
	procs := runtime.GOMAXPROCS(runtime.NumCPU() + n)
	var over atomic.Bool
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for !over.Load() {
				f()
			}
		})
	}
	return func() {
		over.Store(true)
		wg.Wait()
		runtime.GOMAXPROCS(procs)
	}
}

// TestGateKeepsWritersOut: whatever is admitted, on lanes that come and go,
// is out when drain returns, and nobody comes in until the gate opens.
func TestGateKeepsWritersOut(t *testing.T) {
	m := NewMachine(newFake("a", 1, nil), Options{})
	g := m.gate
	g.set(modeOpen, nil)
	var admitted, bad atomic.Int64
	var closed atomic.Bool
	end := crowd(8, func() {
		l := m.Lane(nil, nil)
		defer l.Close()
		n := int64(0)
		for range 5000 {
			if l.Enter(Mutate) != Admitted {
				continue
			}
			n++
			if closed.Load() {
				bad.Add(1)
			}
			l.Leave()
		}
		admitted.Add(n)
	})
	defer end()
	const phase = 2 * time.Millisecond // so that who was interrupted goes on
	for start := time.Now(); time.Since(start) < time.Second && bad.Load() == 0; {
		g.set(modeHeld, nil)
		g.drain(m.slow)
		closed.Store(true)
		for since := time.Now(); time.Since(since) < phase; {
			runtime.Gosched()
		}
		closed.Store(false)
		g.set(modeOpen, nil)
		for since := time.Now(); time.Since(since) < phase; {
			runtime.Gosched()
		}
	}
	if bad.Load() != 0 {
		t.Error("a request was admitted through a closed gate, or drained over")
	}
	if admitted.Load() == 0 {
		t.Error("nothing was admitted")
	}
}

// TestSynchronizeWaitsForReaders: after synchronize nobody uses the view that
// was replaced before it, while reads never wait.
func TestSynchronizeWaitsForReaders(t *testing.T) {
	type numbered struct {
		n      uint32
		closed atomic.Bool
	}
	m := NewMachine(newFake("a", 1, nil), Options{})
	var current atomic.Pointer[numbered]
	current.Store(new(numbered))
	var over atomic.Uint32 // synchronize has returned for this view
	var reads, closed, uncounted atomic.Int64
	end := crowd(16, func() {
		l := m.Lane(nil, nil)
		defer l.Close()
		for range 2000 {
			g := l.EnterRead()
			v := current.Load()
			if v.n%2 != g && over.Load() >= v.n {
				// Nobody will wait for this read before closing v.
				uncounted.Add(1)
			}
			if v.closed.Load() {
				closed.Add(1)
			}
			reads.Add(1)
			l.LeaveRead(g)
		}
	})
	defer end()
	start := time.Now()
	for n := uint32(1); time.Since(start) < time.Second && closed.Load()+uncounted.Load() == 0; n++ {
		seen := reads.Load()
		old := current.Swap(&numbered{n: n})
		m.gate.synchronize(m.slow)
		over.Store(n)
		old.closed.Store(true)
		for since := time.Now(); reads.Load() == seen || time.Since(since) < 5*time.Millisecond; {
			runtime.Gosched()
		}
	}
	if closed.Load()+uncounted.Load() != 0 {
		t.Errorf("reads of a closed view: %d, reads nobody waits for: %d", closed.Load(), uncounted.Load())
	}
}

// process is one server with two images, as another process has them too.
type process struct {
	t    *testing.T
	ms   []*Machine
	imgs []*fakeImage
	over atomic.Bool

	mu       sync.Mutex
	acked    map[*disk]map[int]bool
	refused  map[*disk]map[int]bool
	outcomes map[string]int
}

func newProcess(t *testing.T, name string, disks []*disk) *process {
	p := &process{t: t, outcomes: make(map[string]int)}
	p.acked, p.refused = make(map[*disk]map[int]bool), make(map[*disk]map[int]bool)
	for i, d := range disks {
		f := newFake(name+string(rune('0'+i)), uint64(i), nil)
		f.disk = d
		p.acked[d], p.refused[d] = make(map[int]bool), make(map[int]bool)
		p.imgs = append(p.imgs, f)
		p.ms = append(p.ms, NewMachine(f, Options{Watch: 200 * time.Microsecond}))
	}
	return p
}

// broadcast wakes everybody who took wait before wake.
type broadcast struct {
	mu sync.Mutex
	c  chan struct{}
}

func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c == nil {
		b.c = make(chan struct{})
	}
	return b.c
}

func (b *broadcast) wake() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c != nil {
		close(b.c)
		b.c = nil
	}
}

var nextID atomic.Int64

// connection sends requests at depth 3 until the process stops: every write
// that is admitted is acknowledged, every one that has to wait is woken.
func (p *process) connection(seed uint64) {
	for n := uint64(0); !p.over.Load(); n++ {
		i := int(seed+n) % len(p.ms)
		m, img := p.ms[i], p.imgs[i]
		var b broadcast
		l := m.Lane(b.wake, func() (string, time.Time) { return "WRITE", time.Now() })
		var users sync.WaitGroup
		for w := range uint64(3) {
			users.Go(func() {
				rnd := rand.New(rand.NewPCG(seed+n, w))
				for range 30 {
					if rnd.IntN(3) == 0 {
						g := l.EnterRead()
						if !l.Stopping() {
							img.read()
						}
						l.LeaveRead(g)
						continue
					}
					c := Class(rnd.IntN(int(numClasses)))
					id := int(nextID.Add(1))
					for {
						woken := b.wait()
						v := l.Enter(c)
						if v == Wait {
							<-woken
							continue
						}
						if v == Admitted {
							img.request(c, id)
							if c == Flush && rnd.IntN(100) == 0 {
								l.Fault(errSync)
							}
							l.Leave()
						} else if v == Refused && l.Refusal() == nil {
							p.t.Error("refused without an error")
						}
						if c == Mutate {
							p.mu.Lock()
							if v == Admitted {
								p.acked[img.disk][id] = true
							} else {
								p.refused[img.disk][id] = true
							}
							p.mu.Unlock()
						}
						break
					}
				}
			})
		}
		users.Wait()
		l.Close()
	}
}

// took reports whether the process took images often enough for the test to
// mean something.
func (p *process) took() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.outcomes["activate"] >= 10
}

// orders gives n orders at random, with failures at random, and goes on until
// over.
func (p *process) orders(n int, seed uint64, over func() bool) {
	rnd := rand.New(rand.NewPCG(seed, 7))
	methods := []string{"Settle", "Unsettle", "Acquire", "Load", "Claim", "Release", "SyncAhead", "Abandon", "Check"}
	errs := []error{errIO, errIO, errSync, errFence}
	ctx := context.Background()
	count := func(what string, err error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if err != nil {
			what += "!"
		}
		p.outcomes[what]++
	}
	for i := 0; i < n || !over(); i++ {
		ms := []*Machine{p.ms[0], p.ms[1], p.ms[0]}
		rnd.Shuffle(len(ms), func(i, j int) { ms[i], ms[j] = ms[j], ms[i] })
		ms = ms[:1+rnd.IntN(len(ms))]
		if rnd.IntN(6) == 0 {
			p.imgs[rnd.IntN(2)].failNext(methods[rnd.IntN(len(methods))], errs[rnd.IntN(len(errs))])
		}
		switch rnd.IntN(12) {
		case 0, 1, 2, 3:
			count("activate", Activate(ctx, ActivateOptions{}, ms...))
		case 4, 5, 6:
			count("inactivate", Inactivate(ctx, ms...))
		case 7:
			c, cancel := context.WithCancel(ctx)
			go cancel()
			count("inactivate with cancel", Inactivate(c, ms...))
		case 8:
			ms[0].Cancel()
		case 9:
			if rnd.IntN(4) == 0 {
				ms[0].Fence(errFence)
			}
		default:
			for _, m := range p.ms { // one by one, as one may not be failed
				if s := m.Status().State; s == FailedIO || s == FailedFenced {
					count("abandon", Abandon(ctx, m))
				}
			}
		}
		runtime.Gosched()
	}
}

// TestTwoProcesses has two processes with the same two images take them from
// each other, with requests, orders, failures, faults and fences all at once.
// The fakes panic when anything of either touches an image in a way that its
// state does not allow; at the end every acknowledged write is durable or was
// given up aloud, and no refused one is there.
func TestTwoProcesses(t *testing.T) {
	n := 3000
	if testing.Short() {
		n = 300
	}
	disks := []*disk{newDisk(), newDisk()}
	ps := []*process{newProcess(t, "p", disks), newProcess(t, "q", disks)}
	var orders, connections sync.WaitGroup
	for i, p := range ps {
		for c := range 4 {
			connections.Go(func() { p.connection(uint64(100*i + c)) })
		}
		for o := range 2 {
			orders.Go(func() {
				p.orders(n, uint64(10*i+o), func() bool { return ps[0].took() && ps[1].took() })
			})
		}
	}
	orders.Wait()
	var stops sync.WaitGroup
	for _, p := range ps {
		stops.Go(func() { _ = Stop(p.ms...) }) // wakes what is parked
	}
	stops.Wait()
	for _, p := range ps {
		p.over.Store(true)
	}
	connections.Wait()

	for i, d := range disks {
		if d.owner.Load() != nil {
			t.Error("a lock is left behind")
		}
		lost := make(map[int]bool)
		for _, p := range ps {
			for _, id := range p.imgs[i].lost {
				lost[id] = true
			}
			if len(p.imgs[i].dirty) != 0 {
				t.Error("writes left unsynced")
			}
		}
		acked := 0
		for _, p := range ps {
			for id := range p.acked[d] {
				acked++
				if !d.data[id] && !lost[id] {
					t.Fatalf("acknowledged write %d is lost", id)
				}
			}
			for id := range p.refused[d] {
				if d.data[id] || lost[id] {
					t.Fatalf("refused write %d was carried out", id)
				}
			}
		}
		t.Logf("image %d: %d writes acknowledged, %d given up", i, acked, len(lost))
		if acked == 0 {
			t.Error("no write was acknowledged")
		}
	}
	for _, p := range ps {
		t.Log(p.outcomes)
	}
}

// TestGroupsDoNotDeadlock gives overlapping groups in all orders, of machines
// whose keys are equal.
func TestGroupsDoNotDeadlock(t *testing.T) {
	r := newRig(t, Options{}, "a", "b", "c", "d")
	for _, f := range r.imgs {
		f.ino = 7
	}
	var wg sync.WaitGroup
	for seed := range uint64(6) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, 1))
			for range 300 {
				perm := rnd.Perm(len(r.ms))[:1+rnd.IntN(len(r.ms))]
				if rnd.IntN(2) == 0 {
					_ = r.activate(perm...)
				} else {
					_ = r.inactivate(perm...)
				}
				for _, m := range r.ms {
					m.Status()
				}
			}
		})
	}
	wg.Wait()
	noError(t, r.inactivate())
	noError(t, r.activate())
}
