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
	w     io.Writer
	queue chan line
	lost  atomic.Int64
}

// line is a line, or Sync's request to close done.
type line struct {
	text []byte
	done chan struct{}
}

// NewLines makes the writer; its goroutine lives as long as the process.
func NewLines(w io.Writer) *Lines {
	l := &Lines{w: w, queue: make(chan line, mostLines)}
	go l.write()
	return l
}

func (l *Lines) write() {
	for next := range l.queue {
		if next.done != nil {
			close(next.done)
			continue
		}
		_, _ = l.w.Write(next.text) // a log nobody reads any more stops nothing
		if n := l.lost.Swap(0); n > 0 {
			_, _ = fmt.Fprintf(l.w, "nbd-export: %d log lines are missing here: nobody read them in time\n", n)
		}
	}
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
