package ioloop

import "time"

const (
	// goodbye is how long replies are still kept for a client that has left, or is
	// sent away, and takes next to nothing of them. One that takes them gets all.
	goodbye = 5 * time.Second
	// goodbyeLook is how often it is looked whether it does.
	goodbyeLook = goodbye / 10
)

// farewell waits until all that is queued is sent, or dropped because the
// connection is broken, or for a client that has moved too little for goodbye.
func (o *outgoing) farewell() {
	sent := o.flushed()
	look := time.NewTicker(goodbyeLook)
	defer look.Stop()
	for {
		select {
		case <-sent:
			return
		case <-look.C:
		}
		if since := o.stalledSince(); since != 0 && time.Since(time.Unix(0, since)) >= goodbye {
			return
		}
	}
}
