package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"sync"

	"github.com/nbd-export/nbd-export/bench"
)

// A load beside another one is a program of its own, as two guests are: within one
// program Go's scheduler has the small load wait while the large one copies, and the
// p99 of the small one is 1 to 4 ms, with any server, where two programs have 0.15.
// It is this program, started with loadArg and a bench.Config in JSON. It ends by the
// time that has: nbdkit 1.32 aborts if a client goes away amid replies.

const loadArg = "load"

// loadSays is what such a program writes, first that its load is under way, and at
// last what it has measured.
type loadSays struct {
	Begun  bool          `json:"begun,omitempty"`
	Result *bench.Result `json:"result,omitempty"`
}

// runLoad is that program.
func runLoad(args []string, out io.Writer) error {
	var c bench.Config
	if err := configure(args, &c); err != nil {
		return err
	}
	say := json.NewEncoder(out)
	var begun sync.Once
	c.Progress = func(p bench.Progress) {
		if p.Ops > 0 {
			begun.Do(func() { _ = say.Encode(loadSays{Begun: true}) })
		}
	}
	res, err := bench.Run(context.Background(), c)
	if err != nil {
		return err
	}
	res.URI = "" // says nothing elsewhere
	return say.Encode(loadSays{Result: &res})
}

// otherClient is a running load.
type otherClient struct {
	cmd  *exec.Cmd
	says *json.Decoder
	said tail // on standard error
}

// startLoad runs file, which is this program, with a load, and returns when that is
// under way. It is killed with ctx. If this fails nothing is left running. It is to be
// called on the main thread.
func startLoad(ctx context.Context, file string, c bench.Config) (*otherClient, error) {
	o := &otherClient{}
	var err error
	if o.cmd, err = ownProgram(ctx, file, loadArg, c, &o.said); err != nil {
		return nil, err
	}
	out, err := o.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := o.cmd.Start(); err != nil {
		return nil, err
	}
	o.says = json.NewDecoder(out)
	var first loadSays
	if err := o.says.Decode(&first); err == nil && first.Begun {
		return o, nil
	}
	_, err = o.result()
	if first.Result != nil {
		err = errors.New("another client's load ended before it was under way")
	}
	return nil, err
}

// result waits for the load's end and returns what it has measured.
func (o *otherClient) result() (*bench.Result, error) {
	var last loadSays
	err := o.says.Decode(&last)
	if werr := o.cmd.Wait(); werr != nil {
		return nil, fmt.Errorf("another client's load: %w: %s", werr, o.said.String())
	}
	if err == nil && last.Result == nil {
		err = errors.New("no result")
	}
	if err != nil {
		return nil, fmt.Errorf("another client's load: %w", err)
	}
	return last.Result, nil
}
