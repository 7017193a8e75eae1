package export

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"maps"
	"math"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/ioloop"
)

const (
	// defaultHandshakeTimeout is how long a whole handshake may take.
	defaultHandshakeTimeout = 10 * time.Second
	// shutdownGrace is how long a handshake may go on being told ERR_SHUTDOWN.
	shutdownGrace = time.Second
)

// ErrServerClosed is what Serve returns after Shutdown or Close.
var ErrServerClosed = errors.New("server closed")

// Mover serves the transmission phase of connections; *ioloop.Engine is one.
type Mover interface {
	// Serve moves the requests of one connection until it ends, and closes
	// nc. Closing nc from elsewhere must end it.
	Serve(nc net.Conn, c ioloop.Codec, d *ioloop.Disk) error
	// Shutdown ends all connections in order: what they have asked is answered. It
	// returns when all are closed, or with ctx. Serve takes no more.
	Shutdown(ctx context.Context)
}

// Server accepts clients on any number of listeners, negotiates with them,
// and hands them to a Mover. Set the fields before the first use and do not
// change them; Exports and Mover are required. The methods may be called by
// any goroutine.
type Server struct {
	Exports *Exports
	Mover   Mover
	// Log gets one line for each client that comes, leaves or misbehaves;
	// equal lines are sampled. Nil logs nothing.
	Log *zap.Logger
	// Shared is the most connections at once, those in the handshake
	// included; 0 means as many as the process may have descriptors for, less
	// what a handover and its orders need. Beyond it a connection is closed at
	// once. With 1 clients are not told that they may open more.
	Shared int
	// TLS, if not nil, is required of every client; see NewTLS.
	TLS *tls.Config
	// HandshakeTimeout bounds a handshake as a whole; 0 means 10 s, less none.
	HandshakeTimeout time.Duration

	once sync.Once
	most int           // connections at once
	log  *zap.Logger   // of clients; sampled
	stop chan struct{} // closed by stopping

	wg        sync.WaitGroup // accept loops and connections; Add under mu
	mu        sync.Mutex     // a leaf but for Exports.mu
	stopping  bool
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	gone      map[*Export]chan struct{} // who waits for the last connection
	accepted  uint64                    // connections so far
}

func (s *Server) init() {
	s.once.Do(func() {
		log := s.Log
		if log == nil {
			log = zap.NewNop()
		}
		s.log = log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core {
			return zapcore.NewSamplerWithOptions(c, time.Second, 10, 100)
		}))
		s.most = mostConnections()
		if s.Shared > 0 {
			s.most = min(s.most, s.Shared)
		}
		s.stop = make(chan struct{})
		s.listeners = make(map[net.Listener]struct{})
		s.conns = make(map[*conn]struct{})
		s.gone = make(map[*Export]chan struct{})
	})
}

// mostConnections leaves a quarter of the descriptors that the process may
// have: clients that took them all would keep the image from being handed over.
func mostConnections() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur > math.MaxInt32 {
		return math.MaxInt32
	}
	n := int(limit.Cur)
	return max(n-max(n/4, 32), 1)
}

// Own has Refuse close l from now on, as it does once Serve has it: for who
// calls Serve on a goroutine of its own, which may get to run only after the
// server was stopped. Until then l would still take connections, and its
// address.
func (s *Server) Own(l net.Listener) {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		_ = l.Close()
		return
	}
	s.listeners[l] = struct{}{}
}

// Serve accepts connections of l until the server is shut down, which closes
// l and makes it return ErrServerClosed, or until l fails for good. It may be
// called for several listeners at once.
func (s *Server) Serve(l net.Listener) error {
	s.init()
	s.mu.Lock()
	if s.stopping {
		s.mu.Unlock()
		_ = l.Close()
		return ErrServerClosed
	}
	s.wg.Add(1)
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer s.wg.Done()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()

	var pause time.Duration
	for {
		nc, err := l.Accept()
		if err == nil {
			pause = 0
			s.admit(nc)
			continue
		}
		if s.isStopping() {
			return ErrServerClosed
		}
		if !passing(err) {
			return err
		}
		// Out of descriptors or memory: waiting helps, giving up does not.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		s.log.Warn("cannot accept a connection, trying again", zap.Error(err))
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-s.stop:
			timer.Stop()
		}
	}
}

// passing reports whether an error of Accept is likely to go away.
func passing(err error) bool {
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return false
	}
	switch errno {
	case syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
		syscall.ECONNABORTED, syscall.EINTR, syscall.EAGAIN, syscall.EPERM, syscall.EPROTO:
		return true
	}
	return false
}

// admit starts serving nc, or closes it.
func (s *Server) admit(nc net.Conn) {
	tune(nc)
	c := &conn{srv: s, nc: nc, remote: remoteName(nc), since: time.Now()}
	s.mu.Lock()
	if s.stopping || len(s.conns) >= s.most {
		stopping := s.stopping
		s.mu.Unlock()
		_ = nc.Close()
		if !stopping {
			why := "as many as --shared allows are open"
			if s.most != s.Shared {
				why = "the descriptors that are left are for handovers; raise the limit on open files (ulimit -n)"
			}
			s.log.Warn("connection refused: "+why, zap.String("client", c.remote), zap.Int("limit", s.most))
		}
		return
	}
	s.accepted++
	c.number = s.accepted
	s.conns[c] = struct{}{}
	if timeout := s.handshakeTimeout(); timeout > 0 {
		c.deadline = c.since.Add(timeout)
		_ = nc.SetDeadline(c.deadline)
	}
	s.wg.Go(c.run)
	s.mu.Unlock()
}

func (s *Server) handshakeTimeout() time.Duration {
	if s.HandshakeTimeout == 0 {
		return defaultHandshakeTimeout
	}
	return s.HandshakeTimeout
}

func (s *Server) isStopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}

// ConnInfo is a connection as status shows it.
type ConnInfo struct {
	Client string // address, or "unix" with the process id
	// Export is the name of the export, meaningful if Transmission is true.
	Export       string
	Transmission bool // false during the handshake
	Since        time.Time
}

// Connections lists the open connections, the oldest first. It never waits
// for a client.
func (s *Server) Connections() []ConnInfo {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	conns := slices.SortedFunc(maps.Keys(s.conns), func(a, b *conn) int { return cmp.Compare(a.number, b.number) })
	list := make([]ConnInfo, 0, len(conns))
	for _, c := range conns {
		info := ConnInfo{Client: c.remote, Since: c.since}
		if c.export != nil {
			info.Export, info.Transmission = c.export.Name, true
		}
		list = append(list, info)
	}
	return list
}

// Disconnect closes all connections to e at once and returns how many there
// were. After Exports.Remove no new one comes.
func (s *Server) Disconnect(e *Export) int {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for c := range s.conns {
		if c.export == e {
			_ = c.nc.Close()
			n++
		}
	}
	return n
}

// Refuse closes the listeners, and tells unfinished handshakes ERR_SHUTDOWN,
// for at most a second. Connections beyond the handshake go on.
func (s *Server) Refuse() {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return
	}
	s.stopping = true
	close(s.stop)
	for l := range s.listeners {
		_ = l.Close()
	}
	for c := range s.conns {
		if c.export == nil {
			c.hurry()
		}
	}
}

// Shutdown is Refuse, and connections end when what they have sent is
// answered. When ctx ends before all of that, the rest is closed without, and
// the error is ctx's; goroutines may then still be waiting for storage. The Mover
// is shut down, so it is for the end of the process; Close leaves it alone.
//
// The machines of the exports should be stopped first: then requests that are
// parked get their ESHUTDOWN instead of keeping their connection.
func (s *Server) Shutdown(ctx context.Context) error {
	s.Refuse()
	s.Mover.Shutdown(ctx)
	// Whoever the Mover did not know yet gets to see the end of its input.
	s.mu.Lock()
	for c := range s.conns {
		if c.export != nil {
			c.endInput()
		}
	}
	s.mu.Unlock()

	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		s.closeAll()
		return ctx.Err()
	}
}

// Close stops at once: it closes the listeners and all connections, and waits
// for their goroutines.
func (s *Server) Close() error {
	s.Refuse()
	s.closeAll()
	s.wg.Wait()
	return nil
}

func (s *Server) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.nc.Close()
	}
}
