package integration

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"slices"
	"time"
)

// saw notes the answer to a question.
func (s *trio) saw(e *exporter, from int64, st status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &s.rec.Lives[e.via]
	l.Seen = append(l.Seen, sighting{From: from, To: s.now(), State: st.State, Step: st.Step, Epoch: st.Epoch})
}

// granted notes that an exporter was said to be active between from and now.
func (s *trio) granted(e *exporter, from int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rec.Granted = append(s.rec.Granted, event{Via: e.via, From: from, To: s.now()})
}

// sample looks at all exporters, and at what they hold of the image, all the
// time. An exporter in the same state since the same time before and after a
// look at its locks was so in between.
func (s *trio) sample(ctx context.Context) {
	control := map[*exporter]*qmpConn{}
	ask := func(e *exporter) (st status, ok bool) {
		q, err := control[e], error(nil)
		if q == nil {
			if q, err = openQMP(e.control); err != nil {
				return st, false
			}
			control[e] = q
		}
		from := s.now()
		b, err := q.try("x-query-status", nil)
		if err != nil {
			q.Close()
			delete(control, e)
			return st, false
		}
		st = decodeStatus(s.t, b)
		if e.site.exporter() != e {
			return st, false // it may have been the next one at this site
		}
		s.saw(e, from, st)
		return st, true
	}
	for ; ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
		for _, w := range s.sites {
			e := w.exporter()
			if !e.ready.Load() {
				continue
			}
			before, ok := ask(e)
			if !ok {
				continue
			}
			locks := processLocks(s.t, e.pid, s.image)
			writable := writableHolds(s.t, e.pid, s.image)
			after, ok := ask(e)
			if !ok || e.ending.Load() || before.State != after.State || before.Epoch != after.Epoch || !before.Since.Equal(after.Since) {
				continue
			}
			s.did.samples.Add(1)
			switch {
			case s.condemned:
			case before.State == "active" && !slices.Equal(locks, activeLocks):
				s.t.Errorf("an active exporter holds %v", locks)
			case before.State == "inactive" && (len(locks) != 0 || len(writable) != 0):
				s.t.Errorf("an inactive exporter holds %v and %v", locks, writable)
			}
		}
	}
	for _, q := range control {
		q.Close()
	}
}

// ownerRecord is the owner record of the image.
type ownerRecord struct {
	PID   int
	Epoch uint64
	Clean bool
	Since time.Time
}

// record reads the owner record, which is empty before the first owner.
func (s *trio) record() (r ownerRecord) {
	b, err := os.ReadFile(s.image + ".owner")
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.t.Errorf("owner record: %v in %q", err, b)
	}
	return r
}

// watchRecord reads the owner record all the time: epochs go up, and each is of
// one process.
func (s *trio) watchRecord(ctx context.Context) {
	var last ownerRecord
	for ; ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
		r := s.record()
		if r.Epoch == 0 {
			continue
		}
		if r.Epoch < last.Epoch {
			s.t.Errorf("the owner record went back from %+v to %+v", last, r)
		}
		if r.Epoch == last.Epoch && (r.PID != last.PID || !r.Since.Equal(last.Since) || last.Clean && !r.Clean) {
			s.t.Errorf("one epoch has two records: %+v and %+v", last, r)
		}
		if last = r; !r.Clean {
			s.mu.Lock()
			if d := (dirtyOwner{r.PID, r.Epoch}); len(s.rec.Left) == 0 || s.rec.Left[len(s.rec.Left)-1] != d {
				s.rec.Left = append(s.rec.Left, d)
			}
			s.mu.Unlock()
		}
	}
}
