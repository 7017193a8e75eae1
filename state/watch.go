package state

import (
	"errors"
	"time"
)

// startWatch has the owned image check itself now and then, for what no
// request would notice: locks that another process no longer respects.
func (m *Machine) startWatch() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.stopWatch = make(chan struct{})
	go m.watch(m.mu.stopWatch)
}

// endWatch is followed by synchronize, after which no Check runs.
func (m *Machine) endWatch() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.stopWatch != nil {
		close(m.mu.stopWatch)
		m.mu.stopWatch = nil
	}
}

func (m *Machine) watch(stop <-chan struct{}) {
	lane := m.Lane(nil, nil)
	defer lane.Close()
	tick := time.NewTicker(m.opt.Watch)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		if !m.check(lane, stop) {
			return
		}
	}
}

// check reports whether to go on. It counts as a read from before it looks
// whether it is to stop until what it found is noted, so that after endWatch
// and synchronize it neither runs nor reports.
func (m *Machine) check(lane *Lane, stop <-chan struct{}) bool {
	g := lane.EnterRead()
	select {
	case <-stop:
		lane.LeaveRead(g)
		return false
	default:
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

// fenced reports whether err says that another process may own the image;
// such errors have a Fenced method.
func fenced(err error) bool {
	var f interface{ Fenced() bool }
	return errors.As(err, &f) && f.Fenced()
}
