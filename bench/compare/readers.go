package main

import (
	"context"
	"errors"
	"io"

	"github.com/nbd-export/nbd-export/bench"
)

// Who reads beside handovers is a program of its own: amid writes as fast as they go
// the reads waited for Go's scheduler, and longer beside the server that took more
// writes. See asked.

const readsArg = "reads"

// gapSaid is what such a program answers.
type gapSaid struct {
	bench.ReadGap
	Error string `json:"error,omitempty"` // why it reads no more
}

// runReads is that program: given a bench.FollowConfig without writes, it answers each
// question with a gapSaid.
func runReads(args []string, in io.Reader, out io.Writer) error {
	var c bench.FollowConfig
	if err := configure(args, &c); err != nil {
		return err
	}
	load, err := bench.Follow(context.Background(), c)
	if err != nil {
		return err
	}
	defer func() { _ = load.Close() }()
	return answer(in, out, func(struct{}) any {
		g := gapSaid{ReadGap: load.ReadGap()}
		if err := load.Err(); err != nil {
			g.Error = err.Error()
		}
		return g
	})
}

// readers is a running program of reads.
type readers struct{ *asked }

// startReads is to be called on the main thread.
func startReads(ctx context.Context, file string, c bench.FollowConfig) (*readers, error) {
	a, err := startAsked(ctx, file, readsArg, c)
	if err != nil {
		return nil, err
	}
	return &readers{a}, nil
}

// gap is as Follower.ReadGap.
func (r *readers) gap() (bench.ReadGap, error) {
	var said gapSaid
	err := r.ask(struct{}{}, &said)
	if err == nil && said.Error != "" {
		err = errors.New(said.Error)
	}
	return said.ReadGap, err
}
