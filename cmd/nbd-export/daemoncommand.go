package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/control"
)

func newDaemonCommand(signals *control.Signals) *cobra.Command {
	var d daemonOptions
	var objects, servers, nodes, exports []string
	process := newProcessFlags()
	cmd := &cobra.Command{
		Use:   "daemon [flags]",
		Short: "Serve images that are added and removed over the control socket",
		Long: `Serve any number of images, which are added and removed over the control socket.
It starts with none. The socket speaks QMP: programs and scripts that drive
qemu-storage-daemon work (docs/control.md has the commands). serve is the short
form for one image.

--object, --nbd-server, --blockdev and --export are carried out at the start, in this
order; they take what those of qemu-storage-daemon take.

The pid file is written, and systemd told, when the control socket is ready. That
may be one of systemd's, as those for clients may (docs/running.md).

Signals: SIGUSR1 activates all images, SIGUSR2 inactivates them, SIGTERM, SIGINT
and SIGQUIT stop in order (a second one stops at once), SIGHUP opens --log-file
anew. Exit status is 1 if a last write or flush failed.`,
		Example: `  nbd-export daemon --control /run/nbd.ctl --pid-file /run/nbd.pid

  # the same, with a first image
  nbd-export daemon --control /run/nbd.ctl --nbd-server addr.type=unix,addr.path=/run/nbd.sock \
    --blockdev driver=raw,node-name=vm1,discard=unmap,file.driver=file,file.filename=/srv/vm1.img \
    --export type=nbd,id=vm1,node-name=vm1,writable=on,allow-inactive=on`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			log, err := process.settle(cmd, &d)
			if err != nil {
				return err
			}
			if d.control == "" {
				return usageError{errors.New("daemon: give --control PATH, the socket that it takes its orders from")}
			}
			for _, o := range []struct {
				flag, command string
				values        []string
			}{
				{"--object", "object-add", objects}, {"--nbd-server", "nbd-server-start", servers}, {"--blockdev", "blockdev-add", nodes}, {"--export", "block-export-add", exports},
			} {
				for _, v := range o.values {
					d.first = append(d.first, startOrder{o.flag, o.command, v})
				}
			}
			return serve(d, nil, signals, log)
		},
	}
	f := cmd.Flags()
	process.addPaths(cmd)
	f.StringArrayVar(&objects, "object", nil, "make TLS credentials: `OPTIONS` as tls-creds-x509,id=ID,endpoint=server,dir=DIR or JSON")
	f.StringArrayVar(&servers, "nbd-server", nil, "start the NBD server: `OPTIONS` as addr.type=unix,addr.path=PATH or JSON")
	f.StringArrayVar(&nodes, "blockdev", nil, "add a node: `OPTIONS` of blockdev-add as KEY=VALUE,... or JSON")
	f.StringArrayVar(&exports, "export", nil, "add an export: `OPTIONS` of block-export-add as KEY=VALUE,... or JSON")
	process.addQcow2(cmd)
	process.addRest(cmd)
	f.SortFlags = false
	return cmd
}
