package control

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

const (
	// mostLines wait to be read before more are dropped.
	mostLines = 1000
	// lastLines is how long Sync waits for them to be read.
	lastLines = time.Second
)

// Lines writes what it is given from a goroutine of its own, so that nobody
// waits for who reads the log: a terminal that is held, or a collector that
// hangs, would hold up clients and handovers. It is a zapcore.WriteSyncer.
type Lines struct {
	w       io.Writer
	queue   chan line
	lost    atomic.Int64
	missing func(lines int64) []byte // the line that says so; set before the first one
}

// line is a line, or Sync's request to close done.
type line struct {
	text []byte
	done chan struct{}
}

// NewLines makes the writer; its goroutine lives as long as the process.
func NewLines(w io.Writer) *Lines {
	l := &Lines{w: w, queue: make(chan line, mostLines), missing: func(n int64) []byte {
		return fmt.Appendf(nil, "%d log lines are missing here\n", n)
	}}
	go l.write()
	return l
}

func (l *Lines) write() {
	failed := int64(0) // lines in a row that could not be written, as on a full disk
	for next := range l.queue {
		if next.done != nil {
			close(next.done)
			continue
		}
		if failed > 0 && l.tell(failed) {
			failed = 0
		}
		if _, err := l.w.Write(next.text); err != nil { // a log nobody reads any more stops nothing
			failed++
		}
		if n := l.lost.Swap(0); n > 0 && !l.tell(n) {
			failed += n
		}
	}
}

// tell says that so many lines are missing, and reports whether it could.
func (l *Lines) tell(missing int64) bool {
	_, err := l.w.Write(l.missing(missing))
	return err == nil
}

// Write never waits.
func (l *Lines) Write(b []byte) (int, error) {
	select {
	case l.queue <- line{text: append([]byte(nil), b...)}:
	default:
		l.lost.Add(1)
	}
	return len(b), nil
}

// Sync waits, but not for long, until everything is written.
func (l *Lines) Sync() error {
	timer := time.NewTimer(lastLines)
	defer timer.Stop()
	done := make(chan struct{})
	select {
	case l.queue <- line{done: done}:
	case <-timer.C:
		return nil
	}
	select {
	case <-done:
	case <-timer.C:
	}
	return nil
}
