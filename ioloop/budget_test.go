package ioloop

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// asking is a connection as the budget sees it.
type asking struct {
	b    *budget
	held atomic.Int64
	gone chan struct{}
}

func (b *budget) asking() *asking { return &asking{b: b, gone: make(chan struct{})} }

func (a *asking) want(n int64, small bool) want { return want{n, small, &a.held} }

func (a *asking) try(n int64, small bool) (lease, bool) {
	l, ok := a.b.try(a.want(n, small))
	if ok {
		a.held.Add(n)
	}
	return l, ok
}

// later is acquire in the background. It returns when the wish is queued.
func (a *asking) later(t *testing.T, n int64, small bool) <-chan lease {
	t.Helper()
	c := make(chan lease, 1)
	before := a.b.waiting()
	go func() {
		defer close(c)
		if l, ok := a.b.acquire(a.want(n, small), a.gone); ok {
			a.held.Add(n)
			c <- l
		}
	}()
	eventually(t, "the wish waits", func() bool { return a.b.waiting() > before })
	return c
}

func (a *asking) release(l lease) {
	a.held.Add(-l.n)
	a.b.release(l)
}

func (b *budget) waiting() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.waiters)
}

func waits(t *testing.T, c <-chan lease) {
	t.Helper()
	select {
	case l, ok := <-c:
		t.Fatalf("got %v, %v; should wait", l, ok)
	default:
	}
}

const kib, mib = int64(1 << 10), int64(1 << 20)

func TestBudgetTry(t *testing.T) {
	b := newBudget(80 * mib) // 70 general, 10 reserve
	if b.share != bufferCost(maxClass) {
		t.Fatalf("share %d", b.share)
	}
	one, two := b.asking(), b.asking()
	l1, ok := one.try(60*mib, false)
	if !ok || l1.of != general {
		t.Fatal(l1, ok)
	}
	if _, ok := two.try(11*mib, false); ok {
		t.Fatal("more than there is")
	}
	b.takeFloor(5 * mib)
	if _, ok := two.try(6*mib, false); ok {
		t.Fatal("the floor leaves less for general")
	}
	l2, ok := two.try(5*mib, false)
	if !ok || l2.of != general {
		t.Fatal(l2, ok)
	}
	// What is small finds the reserve, but only for who holds nothing.
	if _, ok := two.try(kib, true); ok {
		t.Fatal("the reserve went to a connection that holds something")
	}
	three := b.asking()
	l3, ok := three.try(kib, true)
	if !ok || l3.of != reserve {
		t.Fatal(l3, ok)
	}
	if _, ok := b.asking().try(kib, false); ok {
		t.Fatal("the reserve went to something large")
	}
	if b.tryFloor(kib) {
		t.Fatal("more floor though general is full")
	}
	if n := b.inUse(); n != 70*mib+kib {
		t.Fatal(n)
	}
	one.release(l1)
	if !b.tryFloor(kib) {
		t.Fatal("no more floor though general has room")
	}
	two.release(l2)
	three.release(l3)
	b.release(lease{5*mib + kib, floor})
	if n := b.inUse(); n != 0 {
		t.Fatal(n)
	}
}

// However small the budget and however much the floor takes, one request fits.
func TestBudgetOneAlwaysFits(t *testing.T) {
	for _, limit := range []int64{0, 1, kib, mib, 16 * mib} {
		b := newBudget(limit)
		b.takeFloor(100 * mib)
		one, two := b.asking(), b.asking()
		l, ok := one.try(32*mib, false)
		if !ok {
			t.Fatalf("budget %d: a single request does not fit", limit)
		}
		if _, ok := two.try(32*mib, false); ok {
			t.Fatalf("budget %d: two requests fit", limit)
		}
		c := two.later(t, 32*mib, false)
		one.release(l)
		two.release(await(t, c, "memory"))
		b.release(lease{100 * mib, floor})
		if n := b.inUse(); n != 0 {
			t.Fatal(n)
		}
	}
}

func TestBudgetOrder(t *testing.T) {
	b := newBudget(80 * mib)
	holder := b.asking()
	all, ok := holder.try(70*mib, false)
	if !ok {
		t.Fatal("no")
	}
	// A large one comes first, then a middling one that would fit sooner.
	big, mid := b.asking(), b.asking()
	c1 := big.later(t, 40*mib, false)
	c2 := mid.later(t, 2*mib, false)
	if _, ok := b.asking().try(2*mib, false); ok {
		t.Fatal("came before those who wait")
	}
	if b.tryFloor(1) {
		t.Fatal("more floor though somebody waits")
	}
	holder.release(lease{10 * mib, general})
	waits(t, c1)
	waits(t, c2)
	// Small ones pass by way of the reserve. Larger ones stop short of using
	// it up, which leaves it to the smaller.
	var small []lease
	for n := mib; n >= kib; n /= 4 {
		before := len(small)
		for {
			l, ok := b.asking().try(n, true)
			if !ok {
				break
			}
			if l.of != reserve {
				t.Fatal(l)
			}
			small = append(small, l)
		}
		if len(small) == before {
			t.Fatalf("larger ones keep out those of %d bytes", n)
		}
	}
	if b.used[reserve] > b.most[reserve] {
		t.Fatal("more than the reserve")
	}
	c3 := b.asking().later(t, 64*kib, true)
	waits(t, c3)
	b.release(small[0])
	l3 := await(t, c3, "the reserve")
	if l3.of != reserve {
		t.Fatal(l3)
	}
	// Enough for the large one, and not a byte less.
	holder.release(lease{30*mib - 1, general})
	waits(t, c1)
	holder.release(lease{1, general})
	l1 := await(t, c1, "memory for the large one")
	waits(t, c2)
	holder.release(lease{2 * mib, general})
	l2 := await(t, c2, "memory for the next")
	holder.release(lease{all.n - 42*mib, general})
	for _, l := range append(small[1:], l1, l2, l3) {
		b.release(l)
	}
	if n := b.inUse(); n != 0 {
		t.Fatal(n)
	}
}

// One who waits for memory in general while it holds something has no claim on
// the reserve, and does not keep others from it; it gets one as soon as it
// holds nothing.
func TestBudgetReserveIsForThePoor(t *testing.T) {
	b := newBudget(80 * mib)
	holder, rich, poor := b.asking(), b.asking(), b.asking()
	all, _ := holder.try(60*mib, false)
	has, ok := rich.try(10*mib, false)
	if !ok {
		t.Fatal("no")
	}
	c := rich.later(t, 64*kib, true)
	l, ok := poor.try(64*kib, true)
	if !ok || l.of != reserve {
		t.Fatal("kept from the reserve", l, ok)
	}
	waits(t, c)
	// It gives back what it has, and somebody else takes that.
	rich.held.Add(-has.n)
	b.mu.Lock()
	b.grantLocked()
	b.mu.Unlock()
	if got := await(t, c, "the reserve"); got.of != reserve {
		t.Fatal(got)
	}
	b.release(has)
	rich.release(lease{64 * kib, reserve})
	poor.release(l)
	holder.release(all)
	if n := b.inUse(); n != 0 {
		t.Fatal(n)
	}
}

func TestBudgetGone(t *testing.T) {
	b := newBudget(80 * mib)
	holder := b.asking()
	l, _ := holder.try(70*mib, false)
	first, second := b.asking(), b.asking()
	c1 := first.later(t, 60*mib, false)
	c2 := second.later(t, mib, false)
	holder.release(lease{10 * mib, general})
	waits(t, c2) // behind the first
	if !b.wanted(&first.held) || !b.wanted(&holder.held) {
		t.Fatal("somebody waits")
	}
	close(first.gone)
	if _, ok := <-c1; ok {
		t.Fatal("granted to who is gone")
	}
	l2 := await(t, c2, "memory, as the one before is gone")
	if b.wanted(&holder.held) {
		t.Fatal("nobody waits")
	}
	c3 := second.later(t, 70*mib, false)
	if b.wanted(&second.held) {
		t.Fatal("only it waits itself")
	}
	close(second.gone)
	<-c3
	second.release(l2)
	holder.release(lease{l.n - 10*mib, general})
	if n := b.inUse(); n != 0 {
		t.Fatal(n)
	}
}

// Many at once: all get what they want or are gone, never more is used than
// there is, and nothing is left.
func TestBudgetRandom(t *testing.T) {
	b := newBudget(4 * mib)
	var wg sync.WaitGroup
	over := make(chan int64, 1)
	for seed := range uint64(16) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, 1))
			a := b.asking()
			var has []lease
			for range 500 {
				switch n := 1 + rnd.Int64N(mib); {
				case len(has) > 0 && rnd.IntN(3) == 0:
					a.release(has[0])
					has = has[1:]
				case rnd.IntN(2) == 0:
					if l, ok := a.try(n, n <= smallRequest); ok {
						has = append(has, l)
					}
				default:
					// Who waits holds nothing, or all could wait for each other.
					for _, l := range has {
						a.release(l)
					}
					has = nil
					if rnd.IntN(4) == 0 {
						gone := make(chan struct{})
						go close(gone)
						if l, ok := b.acquire(a.want(n, n <= smallRequest), gone); ok {
							b.release(l)
						}
						continue
					}
					l, ok := b.acquire(a.want(n, n <= smallRequest), nil)
					if !ok {
						t.Error("refused")
						return
					}
					a.held.Add(n)
					has = append(has, l)
				}
				if n := b.inUse(); n > 4*mib {
					select {
					case over <- n:
					default:
					}
				}
			}
			for _, l := range has {
				a.release(l)
			}
		})
	}
	await(t, background(wg.Wait), "everybody")
	select {
	case n := <-over:
		t.Errorf("%d bytes in use", n)
	default:
	}
	if b.inUse() != 0 || b.used != [purposes]int64{} || len(b.waiters) != 0 {
		t.Error(b.used, len(b.waiters))
	}
}
