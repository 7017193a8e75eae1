package ioloop

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func newTestScheduler(workers int, run func(*task)) *scheduler {
	s := newScheduler(workers)
	s.run = run
	return s
}

func (s *scheduler) state() (workers, idle int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.workers, s.idle
}

// Connections take turns, and each one's tasks keep their order.
func TestSchedulerTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leave := make(chan struct{})
		var ran []*task
		s := newTestScheduler(1, func(t *task) {
			<-leave
			ran = append(ran, t)
		})
		busy, quiet, other := new(conn), new(conn), new(conn)
		s.submit(&task{conn: busy}) // keeps the worker
		synctest.Wait()
		for i := range 1000 {
			s.submit(&task{conn: busy, req: Request{Offset: int64(i)}})
		}
		s.submit(&task{conn: quiet})
		for i := range 2 {
			s.submit(&task{conn: other, req: Request{Offset: int64(i)}})
		}
		close(leave)
		synctest.Wait()
		if len(ran) != 1004 {
			t.Fatalf("%d tasks ran", len(ran))
		}
		want := []*conn{busy, quiet, other, busy, other, busy, busy, busy}
		for i, c := range want {
			if ran[i].conn != c {
				t.Fatalf("task %d is of the wrong connection", i)
			}
		}
		next := map[*conn]int64{}
		for i, r := range ran[1:] {
			if r.req.Offset != next[r.conn] {
				t.Fatalf("task %d: out of order", i)
			}
			next[r.conn]++
		}
		time.Sleep(2 * workerIdle) // of the bubble
		synctest.Wait()
		if w, i := s.state(); w != 0 || i != 0 {
			t.Fatalf("%d workers, %d idle", w, i)
		}
	})
}

// No more workers than the limit, each waiting one is used again before a new
// one comes, and they leave when there is nothing to do.
func TestSchedulerWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, most atomic.Int64
		leave := make(chan struct{})
		s := newTestScheduler(8, func(*task) {
			most.Store(max(most.Load(), running.Add(1)))
			<-leave
			running.Add(-1)
		})
		c, d := new(conn), new(conn)
		for range 100 {
			s.submit(&task{conn: c})
			s.submit(&task{conn: d})
		}
		synctest.Wait()
		if n := running.Load(); n != 8 {
			t.Fatalf("%d run at once", n)
		}
		close(leave)
		synctest.Wait()
		if w, i := s.state(); w != 8 || i != 8 || most.Load() != 8 {
			t.Fatalf("%d workers, %d idle, %d at once", w, i, most.Load())
		}
		time.Sleep(workerIdle / 2)
		for range 3 {
			s.submit(&task{conn: c})
		}
		synctest.Wait()
		time.Sleep(workerIdle * 3 / 4)
		synctest.Wait()
		if w, i := s.state(); w != i || w == 0 || w > 3 {
			t.Fatalf("%d workers, %d idle; those used a moment ago stay", w, i)
		}
		time.Sleep(workerIdle)
		synctest.Wait()
		if w, i := s.state(); w != 0 || i != 0 {
			t.Fatalf("%d workers, %d idle", w, i)
		}
	})
}

// One connection never gets all workers, what it has left over runs as its
// tasks end, and others pass it.
func TestSchedulerShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow, quick := new(conn), new(conn)
		leave := make(chan struct{})
		var stuck, ran atomic.Int64
		s := newTestScheduler(8, func(t *task) {
			if t.conn == slow {
				stuck.Add(1)
				<-leave
			}
			ran.Add(1)
		})
		for range 100 {
			s.submit(&task{conn: slow})
		}
		synctest.Wait()
		if n := stuck.Load(); n != 6 {
			t.Fatalf("%d tasks of one connection have a worker", n)
		}
		for range 50 {
			s.submit(&task{conn: quick})
		}
		synctest.Wait()
		if n := ran.Load(); n != 50 {
			t.Fatalf("%d tasks of the other connection ran", n)
		}
		leave <- struct{}{} // one makes room for one
		synctest.Wait()
		if n := stuck.Load(); n != 7 {
			t.Fatalf("%d tasks have run or run", n)
		}
		time.Sleep(2 * workerIdle)
		synctest.Wait()
		if w, i := s.state(); w != 6 || i != 0 {
			t.Fatalf("%d workers, %d idle", w, i)
		}
		close(leave)
		synctest.Wait()
		if n := ran.Load(); n != 150 {
			t.Fatalf("%d tasks ran", n)
		}
		if slow.turn.running != 0 || quick.turn.running != 0 {
			t.Fatal("tasks are thought to run")
		}
		time.Sleep(2 * workerIdle)
		synctest.Wait()
		if w, i := s.state(); w != 0 || i != 0 || newScheduler(1).share != 1 {
			t.Fatalf("%d workers, %d idle", w, i)
		}
	})
}

// Tasks that come just when workers leave are not forgotten.
func TestSchedulerNoLostWakeup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ran atomic.Int64
		s := newTestScheduler(4, func(*task) { ran.Add(1) })
		s.share = 2
		conns := []*conn{new(conn), new(conn), new(conn)}
		for i := range 2000 {
			n := 1 + i%5
			for k := range n {
				go s.submit(&task{conn: conns[k%3]})
			}
			if i%2 == 0 {
				synctest.Wait()
			}
			time.Sleep(workerIdle) // exactly when the timers end
			before := ran.Load()
			for range n {
				go s.submit(&task{conn: conns[0]})
			}
			synctest.Wait()
			if got := ran.Load() - before; got < int64(n) {
				t.Fatalf("round %d: %d of %d tasks ran", i, got, n)
			}
			if len(s.wake) != 0 {
				t.Fatalf("round %d: %d tokens left", i, len(s.wake))
			}
		}
		time.Sleep(2 * workerIdle)
	})
}

// The same with real time and real parallelism.
func TestSchedulerStress(t *testing.T) {
	var ran atomic.Int64
	s := newTestScheduler(3, func(t *task) { ran.Add(1) })
	s.stay, s.share = time.Microsecond, 2
	const senders, each = 8, 3000
	var wg sync.WaitGroup
	for seed := range uint64(senders) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, 0))
			c := new(conn)
			for range each {
				s.submit(&task{conn: c})
				for end := time.Now().Add(time.Duration(rnd.IntN(3000))); time.Now().Before(end); {
				}
			}
		})
	}
	wg.Wait()
	eventually(t, "all tasks run", func() bool { return ran.Load() == senders*each })
	eventually(t, "the workers leave", func() bool { w, i := s.state(); return w == 0 && i == 0 })
	if len(s.wake) != 0 {
		t.Fatal("tokens left")
	}
}
