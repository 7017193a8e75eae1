package main

import (
	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/control"
)

func newActivateCommand() *cobra.Command {
	order := control.Order{Active: true}
	cmd := &cobra.Command{
		Use:   "activate --control CTL",
		Short: "Make a server the owner of its images",
		Long: `Make the server behind a control socket the owner of all its images, or of none
if one of them cannot be had. It returns when the server is active, at once if
it was. Another owner has to inactivate first: as long as it holds its locks,
activation is refused and changes nothing.

Where the order is not carried out within --timeout, or on Ctrl-C, it is taken back
if it has not begun; one that has is waited for, as long again at most. A second
Ctrl-C ends that at once. Exit status is 0 if the images are active, and --json says
more: outcome is done, already, refused, partly, cancelled or unknown.`,
		Example: `  nbd-export activate --control /run/b.ctl

  # take a disk back, but only if nobody has written to it
  nbd-export activate --if-unchanged --control /run/a.ctl`,
		Args: noArgs,
	}
	orderCommand(cmd, &order)
	cmd.Flags().BoolVar(&order.IfUnchanged, "if-unchanged", false, "refuse if an image was modified since this server gave it away")
	return cmd
}
