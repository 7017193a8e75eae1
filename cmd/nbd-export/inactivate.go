package main

import (
	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/control"
)

func newInactivateCommand() *cobra.Command {
	var order control.Order
	cmd := &cobra.Command{
		Use:   "inactivate --control CTL",
		Short: "Have a server hand back its images",
		Long: `Have the server behind a control socket hand back all its images, or none if one
of them cannot be settled. When it returns, every write that was acknowledged is
on stable storage, the locks are free, and the server can write the images no
more; its clients stay connected, may read, and get EPERM for writes.

Where that is not done within --timeout, or on Ctrl-C, the order is taken back as
long as writes are still served, and the server stays the owner unless others have
ordered it too; what has gone further is waited for, as long again at most. A second
Ctrl-C ends that at once. Exit status is 0 if the images are inactive, and --json
says more: outcome is done, already, refused, partly, cancelled or unknown.`,
		Example: `  nbd-export inactivate --control /run/a.ctl

  # give up an image whose storage has failed; writes may be lost
  nbd-export inactivate --abandon --control /run/a.ctl`,
		Args: noArgs,
	}
	orderCommand(cmd, &order)
	cmd.Flags().BoolVar(&order.Abandon, "abandon", false, "give up failed images too, although writes may be lost")
	return cmd
}
