package ioloop

import "time"

const (
	// burst is how much unused time writers may make up for.
	burst = 10 * time.Millisecond
	// stretch is by how much a round is expected to become longer than it is.
	stretch = 4
)

// waiting are requests that have to wait before they ask the gate: they hold no
// admission and no worker. Connections take turns, so that one with a thousand
// writes does not keep another's waiting behind them. Guarded by Pace.mu.
type waiting struct {
	first, last *conn
	timer       *time.Timer   // runs resume; nil before it is needed
	allowance   int64         // bytes that may still be written in this round
	begun       time.Time     // when it began
	spread      time.Duration // the rate is allowance by this, or stretch times the round's age
	next        time.Time     // when the next request may go on
	since       time.Time     // somebody has waited since; zero if nobody does
	slowed      time.Duration // before that
}

// waiters are a connection's. Guarded by Pace.mu.
type waiters struct {
	next        *conn
	first, last *task
	gone        bool // the connection is ending: none may wait any more
}

// slows reports whether writers may have to wait at present. p may be nil.
func (p *Pace) slows() bool { return p != nil && p.on.Load() }

// pass reports whether r may ask the gate at once. If not it must become a task,
// which waits first.
func (c *conn) pass(r *Request) bool {
	p := c.pace
	if !p.slows() {
		return true
	}
	n := p.dirties(r)
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.on.Load() || n == 0 || p.mu.first == nil && p.mu.charge(n, time.Now())
}

// noteDirty counts what the finished r has left to sync.
func (c *conn) noteDirty(r *Request) {
	if c.pace != nil {
		c.disk.counts.dirtied.Add(uint64(c.pace.dirties(r)))
	}
}

// wait keeps t until it may ask the gate, if it has to; otherwise the answer is
// false. If the connection is ending it forgets t.
func (p *Pace) wait(t *task) bool {
	if t.passed || !p.slows() {
		return false
	}
	n := p.dirties(&t.req)
	p.mu.Lock()
	c := t.conn
	switch {
	case !p.on.Load() || n == 0 || p.mu.first == nil && p.mu.charge(n, time.Now()):
		t.passed = true
		p.mu.Unlock()
		return false
	case c.waiters.gone:
		p.mu.Unlock()
		t.forget()
		return true
	}
	p.mu.stats.Delayed++
	p.mu.push(t)
	p.mu.Unlock()
	p.resume()
	return true
}

// resume lets on whoever may, and sees to it that the next is let on in time.
func (p *Pace) resume() {
	var tasks []*task
	p.mu.Lock()
	w := &p.mu.waiting
	for now := time.Now(); w.first != nil; {
		n := p.dirties(&w.first.waiters.first.req)
		if w.charge(n, now) {
			tasks = append(tasks, w.pop())
			continue
		}
		if n <= w.allowance { // otherwise the next round, or the end, lets it on
			if w.timer == nil {
				w.timer = time.AfterFunc(w.next.Sub(now), p.resume)
			} else {
				w.timer.Reset(w.next.Sub(now))
			}
		}
		break
	}
	p.mu.Unlock()
	goOn(tasks)
}

// drop forgets c's waiting requests, and lets no more of them wait.
func (p *Pace) drop(c *conn) {
	if p == nil {
		return
	}
	p.mu.Lock()
	c.waiters.gone = true
	tasks := p.mu.takeOf(c)
	p.mu.Unlock()
	for _, t := range tasks {
		t.forget()
	}
	p.resume() // others may have had to wait for their turn only
}

// goOn hands tasks that need not wait any more to workers.
func goOn(tasks []*task) {
	for _, t := range tasks {
		t.conn.e.sched.submit(t)
	}
}

// charge takes n bytes off the allowance if their time has come.
func (w *waiting) charge(n int64, now time.Time) bool {
	if n > w.allowance || w.next.After(now) {
		return false
	}
	if from := now.Add(-burst); w.next.Before(from) {
		w.next = from
	}
	spread := max(w.spread, stretch*now.Sub(w.begun))
	w.next = w.next.Add(time.Duration(float64(spread) * float64(n) / float64(w.allowance)))
	w.allowance -= n
	return true
}

func (w *waiting) push(t *task) {
	c := t.conn
	if w.first == nil {
		w.since = time.Now()
	}
	t.next = nil
	if c.waiters.last == nil {
		c.waiters.first = t
		w.enqueue(c)
	} else {
		c.waiters.last.next = t
	}
	c.waiters.last = t
}

func (w *waiting) enqueue(c *conn) {
	c.waiters.next = nil
	if w.first == nil {
		w.first = c
	} else {
		w.last.waiters.next = c
	}
	w.last = c
}

// pop takes a request of the connection whose turn it is.
func (w *waiting) pop() *task {
	c := w.first
	if w.first = c.waiters.next; w.first == nil {
		w.last = nil
	}
	t := c.waiters.first
	if c.waiters.first = t.next; c.waiters.first == nil {
		c.waiters.last = nil
	} else {
		w.enqueue(c)
	}
	w.calm()
	t.next, t.passed = nil, true
	return t
}

// takeOf takes all of c's.
func (w *waiting) takeOf(c *conn) (tasks []*task) {
	var others *conn
	others, w.first, w.last = w.first, nil, nil
	for others != nil {
		o := others
		others = o.waiters.next
		if o != c {
			w.enqueue(o)
		}
	}
	tasks = c.waiters.take(nil)
	w.calm()
	return tasks
}

// take appends what waits to tasks.
func (q *waiters) take(tasks []*task) []*task {
	for t := q.first; t != nil; {
		next := t.next
		t.next, t.passed = nil, true
		tasks = append(tasks, t)
		t = next
	}
	q.first, q.last = nil, nil
	return tasks
}

// takeAll takes everybody's.
func (w *waiting) takeAll() (tasks []*task) {
	for c := w.first; c != nil; c = c.waiters.next {
		tasks = c.waiters.take(tasks)
	}
	w.first, w.last = nil, nil
	w.calm()
	if w.timer != nil {
		w.timer.Stop()
	}
	return tasks
}

// calm notes that nobody waits, if that is so.
func (w *waiting) calm() {
	if w.first == nil {
		w.slowed, w.since = w.slowedFor(), time.Time{}
	}
}

func (w *waiting) slowedFor() time.Duration {
	if w.since.IsZero() {
		return w.slowed
	}
	return w.slowed + time.Since(w.since)
}
