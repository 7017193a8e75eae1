package state

import (
	"testing"
	"time"
)

func benchMachine(b *testing.B) *Machine {
	r := newRig(b, Options{Watch: time.Hour}, "a")
	if err := r.activate(); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.ResetTimer()
	return r.ms[0]
}

// A connection each, as connections run: the lanes share no cache line.
func BenchmarkEnterLeave(b *testing.B) {
	m := benchMachine(b)
	b.RunParallel(func(pb *testing.PB) {
		l := m.Lane(nil, nil)
		defer l.Close()
		for pb.Next() {
			if l.Enter(Mutate) != Admitted {
				b.Error("not admitted")
			}
			l.Leave()
		}
	})
}

func BenchmarkEnterLeaveRead(b *testing.B) {
	m := benchMachine(b)
	b.RunParallel(func(pb *testing.PB) {
		l := m.Lane(nil, nil)
		defer l.Close()
		for pb.Next() {
			g := l.EnterRead()
			if l.Stopping() {
				b.Error("refused")
			}
			l.LeaveRead(g)
		}
	})
}

// One connection's workers share its lane.
func BenchmarkSharedLane(b *testing.B) {
	m := benchMachine(b)
	l := m.Lane(nil, nil)
	defer l.Close()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			l.LeaveRead(l.EnterRead())
		}
	})
}

// BenchmarkHandover is what the machine itself adds to a pair of orders.
func BenchmarkHandover(b *testing.B) {
	r := newRig(b, Options{}, "a")
	b.ReportAllocs()
	for b.Loop() {
		if r.activate() != nil || r.inactivate() != nil {
			b.Fatal("refused")
		}
		r.forget()
	}
}

// BenchmarkHandoverGroup does the same with a thousand images.
func BenchmarkHandoverGroup(b *testing.B) {
	r := newRig(b, Options{Watch: time.Hour}, make([]string, 1000)...)
	for b.Loop() {
		if r.activate() != nil || r.inactivate() != nil {
			b.Fatal("refused")
		}
		r.forget()
	}
}

// TestFastPathDoesNotAllocate keeps the benchmarks' 0 allocs/op.
func TestFastPathDoesNotAllocate(t *testing.T) {
	r := newRig(t, Options{}, "a")
	noError(t, r.activate())
	l := r.lanes[0]
	if n := testing.AllocsPerRun(1000, func() {
		l.Enter(Mutate)
		l.Leave()
		l.LeaveRead(l.EnterRead())
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
