package state

import (
	"sync"
	"time"
)

// watch has an owned image check itself now and then, for what no request would
// notice: locks that another process no longer respects. Between two looks it
// is a timer, not a goroutine: a process may own a thousand images.
type watch struct {
	m    *Machine
	lane *Lane

	mu      sync.Mutex  // a leaf
	timer   *time.Timer // nil before it has begun
	stopped bool
}

func (m *Machine) startWatch() {
	w := &watch{m: m, lane: m.Lane(nil, nil)}
	m.mu.Lock()
	m.mu.watch = w
	m.mu.Unlock()
	if m.opt.Later != nil {
		m.opt.Later(w.begin)
	} else {
		w.begin()
	}
}

func (w *watch) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.stopped {
		w.timer = time.AfterFunc(w.m.opt.Watch, w.tick)
	}
}

// endWatch is followed by synchronize, after which no Check runs.
func (m *Machine) endWatch() {
	m.mu.Lock()
	w := m.mu.watch
	m.mu.watch = nil
	m.mu.Unlock()
	if w == nil {
		return
	}
	w.mu.Lock()
	w.stopped = true
	idle := w.timer == nil || w.timer.Stop()
	w.mu.Unlock()
	if idle {
		w.lane.Close() // otherwise tick does
	}
}

func (w *watch) tick() {
	goOn := w.m.check(w.lane, w)
	w.mu.Lock()
	if goOn = goOn && !w.stopped; goOn {
		w.timer.Reset(w.m.opt.Watch)
	}
	w.mu.Unlock()
	if !goOn {
		w.lane.Close()
	}
}

func (w *watch) isStopped() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stopped
}

// check reports whether to go on. It counts as a read from before it looks
// whether it is to stop until what it found is noted, so that after endWatch
// and synchronize it neither runs nor reports.
func (m *Machine) check(lane *Lane, w *watch) bool {
	g := lane.EnterRead()
	if w.isStopped() {
		lane.LeaveRead(g)
		return false
	}
	err := m.img.Check()
	switch failure(err) {
	case SyncFailed:
		m.fault(SyncFailed, err)
	case Fenced:
		changed := m.fault(Fenced, err)
		lane.LeaveRead(g)
		if changed {
			m.letGoFenced() // waits for transitions, which may wait for this read
		}
		return !changed
	}
	lane.LeaveRead(g)
	return true
}
