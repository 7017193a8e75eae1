package control

import (
	"bufio"
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/export"
)

// farewell is how long Close lets clients take their last answer.
const farewell = time.Second

// Config of a Server.
type Config struct {
	Registry *Registry
	// NBD serves the exports, and Open opens the image of a node that
	// blockdev-add makes: inactive, and with all of the Target that is not
	// about nodes and exports. Without them, what needs them is refused.
	NBD  *NBD
	Open func(backend.Options) (*Target, error)
	// Version is our own version, without a name.
	Version string
	// Quit is told, once, that a client wants the process to stop. It must
	// not wait for the Server.
	Quit func()
	// Log gets the orders of clients at debug level, and what goes wrong
	// between orders; nil means none.
	Log *zap.Logger
}

// Server answers control clients. Its methods may be called concurrently.
type Server struct {
	cfg     Config
	started time.Time
	quit    sync.Once
	orders  orders

	credentials credentials
	mu          sync.Mutex // a leaf
	closing     bool
	listeners   map[net.Listener]struct{}
	clients     map[net.Conn]struct{}
	listening   map[*outbox]struct{} // clients that get events
	wg          sync.WaitGroup       // of clients; Add under mu
}

// NewServer makes a server that listens nowhere yet.
func NewServer(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.Quit == nil {
		cfg.Quit = func() {}
	}
	return &Server{
		cfg: cfg, started: time.Now(),
		listeners: make(map[net.Listener]struct{}), clients: make(map[net.Conn]struct{}),
		listening: make(map[*outbox]struct{}),
	}
}

// Listen opens a control socket at path, for its owner only: who may connect
// may take the disk away.
func Listen(path string) (net.Listener, error) { return export.ListenUnixMode(path, 0o600) }

// Serve answers the clients of l until Close, when it returns nil, or until l
// fails. It closes l.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return l.Close()
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
		_ = l.Close()
	}()
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			s.mu.Lock()
			if s.closing {
				s.mu.Unlock()
				_ = nc.Close()
				return nil
			}
			s.clients[nc] = struct{}{}
			s.wg.Go(func() { s.serve(nc) })
			s.mu.Unlock()
		case s.isClosing():
			return nil
		case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ECONNABORTED),
			errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.ENOMEM):
			// These pass; an order is worth the wait.
			s.cfg.Log.Warn("cannot accept a control client, trying again", zap.Error(err))
			time.Sleep(100 * time.Millisecond)
		default:
			return err
		}
	}
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

// Close ends all clients, those in the middle of a command after its answer,
// and waits for them. A client that does not take its answer is cut off.
func (s *Server) Close() {
	s.mu.Lock()
	s.closing = true
	for l := range s.listeners {
		_ = l.Close()
	}
	for nc := range s.clients {
		_ = nc.SetReadDeadline(time.Unix(1, 0))
		_ = nc.SetWriteDeadline(time.Now().Add(farewell))
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *Server) status() Status {
	st := Status{
		Version: s.cfg.Version, PID: os.Getpid(), Since: s.started,
		Stopping: s.cfg.Registry.isStopping(), Images: []ImageStatus{},
	}
	for _, t := range s.cfg.Registry.Targets() {
		st.Images = append(st.Images, t.Status())
	}
	return st
}

// session is one control client. It belongs to one goroutine.
type session struct {
	server     *Server
	in         decoder
	out        *outbox
	line       []byte // of the last answer
	negotiated bool
}

// greeting is the first line of a session.
type greeting struct {
	QMP struct {
		Version      version  `json:"version"`
		Capabilities []string `json:"capabilities"`
	} `json:"QMP"`
}

// answer is the reply to a command. ID is nil if the client gave none.
type answer struct {
	Return any    `json:"return,omitempty"`
	Error  *Error `json:"error,omitempty"`
	ID     *any   `json:"id,omitempty"`
}

func (s *Server) serve(nc net.Conn) {
	c := &session{server: s, in: decoder{r: bufio.NewReader(nc)}, out: &outbox{nc: nc}}
	defer func() {
		s.mu.Lock()
		delete(s.clients, nc)
		delete(s.listening, c.out)
		s.mu.Unlock()
		c.out.close()
		_ = nc.Close()
	}()
	var hello greeting
	hello.QMP.Version, hello.QMP.Capabilities = c.version(), []string{}
	if !c.send(hello) {
		return
	}
	for {
		v, err := c.in.next()
		if bad, ok := errors.AsType[*inputError](err); ok {
			if !c.send(answer{Error: generic("%s", bad.text)}) || bad == errTooLarge {
				return
			}
			continue
		}
		if err != nil {
			return // the client left, or Close
		}
		deaf := !c.negotiated
		a, last := c.execute(v)
		sent := c.send(a)
		if deaf && c.negotiated { // events come after the answer that allows them
			s.mu.Lock()
			s.listening[c.out] = struct{}{}
			s.mu.Unlock()
		}
		if last {
			s.quit.Do(s.cfg.Quit)
		}
		if !sent || last {
			return
		}
	}
}

// send reports whether the client can still be talked to.
func (c *session) send(v any) bool {
	if a, ok := v.(answer); ok && a.Error == nil && a.Return == (struct{}{}) {
		c.line = appendDone(c.line[:0], a.ID)
	} else {
		c.line = appendLine(c.line[:0], v)
	}
	return c.out.send(c.line)
}

// appendDone is appendLine of an answer that says no more than that the command
// was carried out. At a handover encoding/json takes 5 us for that.
func appendDone(dst []byte, id *any) []byte {
	dst = append(dst, `{"return": {}`...)
	if id != nil {
		dst = appendSpaced(append(dst, `, "id": `...), appendJSON(nil, *id))
	}
	return append(dst, "}\r\n"...)
}

// execute runs one request. last says that the session ends with its answer.
func (c *session) execute(v any) (a answer, last bool) {
	request, ok := v.(*object)
	if !ok {
		return answer{Error: generic("QMP input must be a JSON object")}, false
	}
	if id, ok := request.values["id"]; ok {
		a.ID = &id
	}
	cmd, given, err := c.resolve(request)
	if err != nil {
		a.Error = asError(err)
		return a, false
	}
	checked, err := cmd.check("", given)
	if err == nil {
		a.Return, err = cmd.run(c, checked)
	}
	if err != nil {
		a.Return, a.Error = nil, asError(err) // never both
		return a, false
	}
	if a.Return == nil {
		a.Return = struct{}{}
	}
	return a, cmd.last
}

// resolve finds the command of a request and its arguments.
func (c *session) resolve(request *object) (*command, *object, error) {
	var name string
	var given *object
	var ok bool
	for _, member := range request.names {
		v := request.values[member]
		switch member {
		case "execute":
			if name, ok = v.(string); !ok {
				return nil, nil, generic("QMP input member 'execute' must be a string")
			}
		case "arguments":
			if given, ok = v.(*object); !ok {
				return nil, nil, generic("QMP input member 'arguments' must be an object")
			}
		case "id":
		default:
			return nil, nil, generic("QMP input member '%s' is unexpected", member)
		}
	}
	if _, ok := request.values["execute"]; !ok {
		return nil, nil, generic("QMP input lacks member 'execute'")
	}
	cmd := findCommand(name)
	switch {
	case !c.negotiated && name != negotiate:
		return nil, nil, &Error{CommandNotFound, "Expecting capabilities negotiation with '" + negotiate + "'"}
	case cmd == nil:
		return nil, nil, &Error{CommandNotFound, "The command " + name + " has not been found"}
	}
	return cmd, given, nil
}
