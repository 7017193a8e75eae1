package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/control"
)

// controlUsage explains CTL.
const controlUsage = "control socket `CTL` of the server: its path, or exec:COMMAND, whose standard input and output it is (required)"

// nodeFlag names the images that an order is for, which are those of where, "" for
// the one server there is.
func nodeFlag(cmd *cobra.Command, nodes *[]string, where string) {
	cmd.Flags().StringArrayVar(nodes, "node", nil, "only the image with node `NAME`"+where+", as status shows it; may be repeated")
}

// noEmptyNode refuses what a script makes of a variable that is not set: it would
// be an order for an image that is not there, or for all.
func noEmptyNode(cmd *cobra.Command, nodes []string) error {
	if slices.Contains(nodes, "") {
		return usageError{fmt.Errorf("%s: --node needs the name of a node; leave it out to mean all", cmd.Name())}
	}
	return nil
}

// orderCommand gives cmd the flags of an order to one server, and has it carry out
// order.
func orderCommand(cmd *cobra.Command, order *control.Order) {
	var ctl string
	var asJSON bool
	var opt control.OrderOptions
	f := cmd.Flags()
	f.StringVar(&ctl, "control", "", controlUsage)
	_ = cmd.MarkFlagFilename("control")
	nodeFlag(cmd, &order.Nodes, "")
	f.DurationVar(&opt.Timeout, "timeout", 0, "`TIME` that the server may take over it, and again to find out what became of it (default as long as it takes)")
	f.BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case ctl == "":
			return usageError{fmt.Errorf("%s needs --control CTL", cmd.Name())}
		case f.Changed("timeout") && opt.Timeout <= 0:
			return usageError{fmt.Errorf("%s: --timeout %v is not a time to wait", cmd.Name(), opt.Timeout)}
		}
		if err := noEmptyNode(cmd, order.Nodes); err != nil {
			return err
		}
		ctx, interrupt, stop := interrupts()
		defer stop()
		opt.Interrupt = interrupt
		p := control.NewPeer(ctl)
		defer p.Close()
		r := control.Give(ctx, p, *order, opt)
		var err error
		switch {
		case asJSON:
			err = writeJSON(cmd.OutOrStdout(), r)
		case r.Interrupted && r.Outcome.Good():
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is %s; the interrupt came too late to stop it\n", ctl, r.Server.State)
		}
		return errors.Join(err, r.Err())
	}
}

// interrupts catches Ctrl-C and what else ends a command: the first closes
// interrupt, which is to stop where that is safe, and the second ends ctx. Call stop
// at the end.
func interrupts() (ctx context.Context, interrupt <-chan struct{}, stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	signals, first := make(chan os.Signal, 2), make(chan struct{})
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-signals:
			case <-ctx.Done():
				return
			}
			if n > 0 {
				cancel()
				return
			}
			close(first)
		}
	}()
	return ctx, first, func() { signal.Stop(signals); cancel() }
}
