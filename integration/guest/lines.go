package guest

import (
	"strings"
	"sync"
)

// lines collects what is written to it as lines and lets readers wait for more.
type lines struct {
	mu      sync.Mutex
	partial strings.Builder
	all     []string
	more    chan struct{} // closed at the next change, made by the first waiter
	closed  bool
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range p {
		switch c {
		case '\r': // a serial line ends in CR LF until init has set its mode
		case '\n':
			l.all = append(l.all, l.partial.String())
			l.partial.Reset()
		default:
			l.partial.WriteByte(c)
		}
	}
	l.wake()
	return len(p), nil
}

// close adds a last line that had no end; nothing more is coming.
func (l *lines) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.partial.Len() > 0 {
		l.all = append(l.all, l.partial.String())
	}
	l.closed = true
	l.wake()
}

func (l *lines) wake() {
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
}

func (l *lines) snapshot() (all []string, more <-chan struct{}, closed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.more == nil {
		l.more = make(chan struct{})
	}
	return l.all[:len(l.all):len(l.all)], l.more, l.closed
}
