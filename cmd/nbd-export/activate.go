package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/state"
)

func newActivateCommand() *cobra.Command {
	var opt state.ActivateOptions
	var nodes []string
	cmd := &cobra.Command{
		Use:   "activate --control CTL",
		Short: "Make a server the owner of its images",
		Long: `Make the server behind a control socket the owner of all its images, or of none
if one of them cannot be had. It returns when the server is active, at once if
it was. Another owner has to inactivate first: as long as it holds its locks,
activation is refused and changes nothing.`,
		Example: `  nbd-export activate --control /run/b.ctl

  # take a disk back, but only if nobody has written to it
  nbd-export activate --if-unchanged --control /run/a.ctl`,
		Args: noArgs,
	}
	orderCommand(cmd, func(ctx context.Context, c *control.Client) error { return c.Activate(ctx, opt, nodes...) })
	nodeFlag(cmd, &nodes)
	cmd.Flags().BoolVar(&opt.IfUnchanged, "if-unchanged", false, "refuse if an image was modified since this server gave it away")
	return cmd
}

// controlUsage explains CTL.
const controlUsage = "control socket `CTL` of the server: its path, or exec:COMMAND, whose standard input and output it is (required)"

// nodeFlag names the images that an order is for.
func nodeFlag(cmd *cobra.Command, nodes *[]string) {
	cmd.Flags().StringArrayVar(nodes, "node", nil, "only the image with node `NAME`, as status shows it; may be repeated")
}

// orderCommand gives cmd the flag --control and runs order on a client of
// that socket.
func orderCommand(cmd *cobra.Command, order func(context.Context, *control.Client) error) {
	var path string
	cmd.Flags().StringVar(&path, "control", "", controlUsage)
	_ = cmd.MarkFlagFilename("control")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if path == "" {
			return usageError{fmt.Errorf("%s needs --control CTL", cmd.Name())}
		}
		ctx := cmd.Context()
		c, err := control.Dial(ctx, path)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		if err := order(ctx, c); err != nil {
			if _, refused := errors.AsType[*control.Error](err); refused {
				return fmt.Errorf("server at %s: %w", path, err)
			}
			return err
		}
		return nil
	}
}
