package ioloop

// takeInput gets the input buffer. It counts in the budget but is never waited
// for: without it a connection could not even be refused.
func (c *conn) takeInput() {
	c.in = c.e.buffers.get(inputSize)
	c.r, c.w = 0, 0
	c.e.budget.takeFloor(c.in.cost())
}

// takeReply gets a reply buffer. Each connection may have one in any case.
// Another, while the first waits for the client to take it, is only for memory
// that nobody else needs; without that, receiving pauses until there is one or
// the client has taken the first. Where there is memory to spare a connection
// with many reads under way gets a deep one, if its client takes its replies.
func (c *conn) takeReply() {
	c.filled = 0
	if c.deep > 0 && c.unsent.Load() == 0 && c.e.budget.trySpare(bufferCost(classOf(deepReply))) {
		c.reply = c.e.buffers.get(deepReply)
		return
	}
	n := bufferCost(classOf(replySize))
	for c.unsent.Load() > 0 {
		if c.held.Load()+n <= c.e.budget.share && c.e.budget.tryFloor(n) {
			c.reply = c.e.buffers.get(replySize)
			return
		}
		if !c.awaitRoom() {
			break
		}
	}
	c.e.budget.takeFloor(n)
	c.reply = c.e.buffers.get(replySize)
}

// sound notes how deep the reply buffer is that is about to be sent by
// reference. What is spliced goes by the pipe instead, see filledUp.
func (c *conn) sound() {
	if c.filled >= flushAt && !c.splices() {
		c.deep = staysDeep
	} else if c.deep > 0 {
		c.deep--
	}
}

// deepen gives an empty reply buffer back if the next should be a deep one.
func (c *conn) deepen() {
	if c.deep > 0 && c.reply.class < classOf(deepReply) {
		c.releaseBuffer(&c.reply)
	}
}

// releaseBuffers is called when there is nothing to receive and nothing to
// send: a thousand idle connections hold no memory.
func (c *conn) releaseBuffers() {
	c.releaseBuffer(&c.in)
	c.releaseBuffer(&c.reply)
	c.r, c.w, c.filled = 0, 0, 0
	c.dropPuts()
}

// releaseBuffer gives back a buffer of the floor, if there is one.
func (c *conn) releaseBuffer(b **buffer) {
	if *b != nil {
		c.e.budget.release(lease{(*b).cost(), floor})
		c.e.buffers.put(*b)
		*b = nil
	}
}

// onRest and onPayload are what a receive does that has to wait; see
// transport.recv. They are bound once, in atRest and inPayload: a bound method
// made for each receive would be an allocation.
func (c *conn) onRest() (released bool) {
	c.busyFrom = 0
	c.releaseBuffers()
	return true
}

// discharge gives memory back that was counted in held.
func (c *conn) discharge(l lease) {
	if l.of != forHeld {
		c.held.Add(-l.n)
	}
	if l.of == floor {
		c.unsent.Add(-1)
	}
	c.e.budget.release(l)
	c.signalRoom()
}

func (c *conn) signalRoom() {
	select {
	case c.room <- struct{}{}:
	default:
	}
}

// awaitRoom waits until a task ends or memory of this connection is given
// back since it was last called, or reports that the connection is broken.
// Nothing is put off.
func (c *conn) awaitRoom() bool {
	c.swallow()
	c.submit() // prepared tasks are admitted
	select {
	case <-c.room:
		return true
	case <-c.out.broken:
		return false
	}
}

// lend takes n bytes of the budget for a request, waiting if it must; then
// receiving pauses, and what was answered is sent first. small requests may
// use the reserve. The caller holds no admission and no memory of which more
// is waited for. It reports whether it got them.
func (c *conn) lend(n int64, small bool) (lease, bool) {
	for c.overShare(n) {
		c.flush()
		if !c.awaitRoom() {
			return lease{}, false
		}
	}
	w := want{n, small, &c.held}
	l, ok := c.e.budget.try(w)
	if !ok {
		c.flush()
		c.swallow()
		if l, ok = c.e.acquire(w, c); !ok {
			return lease{}, false
		}
	}
	c.held.Add(n)
	return l, true
}

// overShare reports whether n more bytes are more than the connection may hold.
func (c *conn) overShare(n int64) bool {
	held := c.held.Load()
	return held > 0 && held+n > c.e.budget.share
}

// tryLend is lend for who does without rather than wait.
func (c *conn) tryLend(n int64) (l lease, ok bool) {
	if c.overShare(n) {
		return lease{}, false
	}
	if l, ok = c.e.budget.try(want{n, n <= smallRequest, &c.held}); ok {
		c.held.Add(n)
	}
	return l, ok
}
