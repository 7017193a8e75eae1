package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/control"
)

func newControlStdioCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "control-stdio PATH",
		Short: "Connect standard input and output to a control socket",
		Long: `Connect standard input and output to the control socket at PATH, so that a server
on another host can be given orders over ssh: every verb that takes a control
socket takes exec:COMMAND in its place. The end of the input is passed on; it
ends when the server ends the connection.`,
		Example: `  nbd-export status --control 'exec:ssh hostB nbd-export control-stdio /run/b.ctl'

  nbd-export handover --from /run/a.ctl \
    --to 'exec:ssh -o BatchMode=yes hostB nbd-export control-stdio /run/b.ctl'`,
		Args: oneArg("PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := strings.TrimPrefix(args[0], "unix:")
			nc, err := control.DialSocket(cmd.Context(), path)
			if err != nil {
				if sys, ok := errors.AsType[syscall.Errno](err); ok {
					err = sys
				}
				return fmt.Errorf("no server answers at %s: %w", path, err)
			}
			return relay(nc.(*net.UnixConn), os.Stdin, os.Stdout)
		},
	}
}

// relay copies in to nc and nc to out until nc ends.
func relay(nc *net.UnixConn, in io.Reader, out io.Writer) error {
	go func() {
		// An input that breaks is one that ended: the server has to know that
		// nobody asks any more, and its answers still have somewhere to go.
		_, _ = io.Copy(nc, in)
		_ = nc.CloseWrite()
	}()
	_, err := io.Copy(out, nc)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		_ = nc.Close()
		return fmt.Errorf("control stream: %w", err)
	}
	return nc.Close()
}
