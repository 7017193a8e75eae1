package export

// RemoveUnused takes e away from Exports as long as no client is connected to
// it, and reports whether that was so. A client in its handshake does not count:
// it does not find the export any more.
func (s *Server) RemoveUnused(e *Export) bool {
	s.init()
	s.mu.Lock() // clients enter an export under it
	defer s.mu.Unlock()
	if s.uses(e) {
		return false
	}
	s.Exports.Remove(e.Name)
	return true
}

// Gone returns a channel that is closed when no connection to e is left. It is
// for exports that have been removed: nobody can connect to them again.
func (s *Server) Gone(e *Export) <-chan struct{} {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := s.gone[e]
	if gone == nil {
		gone = make(chan struct{})
		if !s.uses(e) {
			close(gone)
			return gone
		}
		s.gone[e] = gone
	}
	return gone
}

// uses reports whether e has a connection. Called under mu.
func (s *Server) uses(e *Export) bool {
	for c := range s.conns {
		if c.export == e {
			return true
		}
	}
	return false
}

// ended takes c, whose client is served no more, off the list.
func (s *Server) ended(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if gone := s.gone[c.export]; gone != nil && !s.uses(c.export) {
		delete(s.gone, c.export)
		close(gone)
	}
}
