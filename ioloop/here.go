package ioloop

import "runtime"

// A client that has one request under way gains nothing by its read being taken
// to the ring or to a worker, and loses two or three wake-ups. Its receiving
// goroutine reads by itself, and waits for the device: nothing else is to be
// received, and nothing to be sent.
//
// 4 KiB O_DIRECT reads at depth 1, virtual disk, two cores, four runs by turns, by
// the ring and so: 6.1k to 11.1k operations/s at 38 to 74 us of processor time, and
// 8.2k to 10.1k at 37 to 53. The disk itself gives fio 11.9k.

// singleAt is how many requests must have come one by one: what a client asks
// while its read waits here waits with it.
const singleAt = 32

// startRead is start for a read that is to wait for a device.
func (c *conn) startRead(t *task) {
	if c.r < c.w || c.peeker == nil || c.busy() {
		c.single = 0
	} else if c.single++; c.single > singleAt && c.e.mayRead() {
		c.readHere(t)
		return
	}
	c.start(t)
}

// busy reports whether there is a task whose I/O has not ended.
func (c *conn) busy() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.first != nil
}

// mayRead keeps the threads that wait for devices within what workers may be. Each also
// keeps one of Go's places to run in (GOMAXPROCS) for as long as its read takes, so where
// there is a ring that waits without one, half of the processors at most may have such a
// thread. Reads as above of 4, 8 and 16 connections, two cores, without that limit and so:
// 18k, 21k and 20k operations/s, p99 0.5, 1.3 and 3.4 ms, and 20k, 37k and 56k, p99 0.5,
// 0.5 and 0.8, at half the processor time.
func (e *Engine) mayRead() bool {
	limit := e.sched.limit
	if e.ring != nil {
		limit = max(1, runtime.NumCPU()/2)
	}
	if int(e.reading.Add(1)) <= limit {
		return true
	}
	e.reading.Add(-1)
	return false
}

// readHere runs a read in the receiving goroutine. mayRead has let it.
func (c *conn) readHere(t *task) {
	c.flush()
	c.swallow()
	c.list(t)
	err := t.fetch(false)
	c.e.reading.Add(-1)
	if c.spin != nil {
		c.spin.device = true
	}
	if c.peeker.pending() > 0 {
		c.single = 0 // it had more to ask
	}
	t.conclude(err)
}
