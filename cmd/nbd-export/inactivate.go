package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/control"
)

func newInactivateCommand() *cobra.Command {
	var opt control.InactivateOptions
	var nodes []string
	cmd := &cobra.Command{
		Use:   "inactivate --control CTL",
		Short: "Have a server hand back its images",
		Long: `Have the server behind a control socket hand back all its images, or none if one
of them cannot be settled. When it returns, every write that was acknowledged is
on stable storage, the locks are free, and the server can write the images no
more; its clients stay connected, may read, and get EPERM for writes.`,
		Example: `  nbd-export inactivate --control /run/a.ctl

  # give up an image whose storage has failed; writes may be lost
  nbd-export inactivate --abandon --control /run/a.ctl`,
		Args: noArgs,
	}
	orderCommand(cmd, func(ctx context.Context, c *control.Client) error { return c.Inactivate(ctx, opt, nodes...) })
	nodeFlag(cmd, &nodes)
	cmd.Flags().BoolVar(&opt.Abandon, "abandon", false, "give up failed images too, although writes may be lost")
	return cmd
}
