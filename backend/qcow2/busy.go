package qcow2

import "sync"

// busy are the guest clusters whose entry somebody is about to change. Who
// enters several does so in ascending order, or gives all back when one is
// taken, so that nobody waits in a circle.
type busy struct {
	shards [64]struct {
		sync.Mutex // leaf
		taken      map[int64]chan struct{}
	}
}

// enter takes a cluster, if wait is set waiting until it is free.
func (b *busy) enter(cluster int64, wait bool) bool {
	s := &b.shards[cluster&63]
	for {
		s.Lock()
		done, taken := s.taken[cluster]
		if !taken {
			if s.taken == nil {
				s.taken = make(map[int64]chan struct{})
			}
			s.taken[cluster] = nil
			s.Unlock()
			return true
		}
		if !wait {
			s.Unlock()
			return false
		}
		if done == nil {
			done = make(chan struct{})
			s.taken[cluster] = done
		}
		s.Unlock()
		<-done
	}
}

func (b *busy) leave(cluster int64) {
	s := &b.shards[cluster&63]
	s.Lock()
	done := s.taken[cluster]
	delete(s.taken, cluster)
	s.Unlock()
	if done != nil {
		close(done)
	}
}
