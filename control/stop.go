package control

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/state"
)

// replyTime is how long clients may take their last replies.
const replyTime = 5 * time.Second

// Front is where clients come from; *export.Server is one.
type Front interface {
	// Refuse accepts no more connections; those there are go on.
	Refuse()
	// Shutdown ends each connection when what it has asked is answered, and
	// all at the latest when ctx ends.
	Shutdown(ctx context.Context) error
}

// Stop ends the service in order. A transition under way is finished, and no
// other starts; from then on requests, parked ones too, fail with
// state.ErrStopping, and no connection is accepted; what was admitted
// finishes with its true result; active images are flushed and settled,
// inactive ones are not touched; locks go; replies that are still unsent have
// 5 s. The error names each image whose last writes may be lost.
func Stop(r *Registry, front Front, log *zap.Logger) error {
	return stop(r, front, log, replyTime)
}

func stop(r *Registry, front Front, log *zap.Logger, replies time.Duration) error {
	ts := r.stop()
	ms := machines(ts)
	log.Info("stopping")
	for _, t := range ts {
		if t.Takeover != nil {
			t.Takeover.Close()
		}
	}
	state.Refuse(ms...)
	front.Refuse()
	err := state.Stop(ms...) // clients that ask meanwhile are told that the server stops

	ctx, cancel := context.WithTimeout(context.Background(), replies)
	defer cancel()
	if front.Shutdown(ctx) != nil {
		log.Warn("clients were cut off: they did not take their replies in time", zap.Duration("limit", replies))
	}
	return err
}
