package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/bench"
	"github.com/nbd-export/nbd-export/control"
)

func newDaemonCommand(signals *control.Signals) *cobra.Command {
	var d daemonOptions
	var servers, nodes, exports []string
	memory := bench.Size(256 << 20)
	logLevel := choose("info", "debug", "warn", "error")
	logFormat := choose("console", "json")
	cmd := &cobra.Command{
		Use:   "daemon [flags]",
		Short: "Serve images that are added and removed over the control socket",
		Long: `Serve any number of images, which are added and removed over the control socket.
It starts with none. The socket speaks QMP: programs and scripts that drive
qemu-storage-daemon work (docs/control.md has the commands). serve is the short
form for one image.

--nbd-server, --blockdev and --export are carried out at the start, in this order;
they take what those of qemu-storage-daemon take.

The pid file is written when the control socket is ready.

Signals: SIGUSR1 activates all images, SIGUSR2 inactivates them, SIGTERM, SIGINT
and SIGQUIT stop in order (a second one stops at once), SIGHUP is ignored. Exit
status is 1 if a last write or flush failed.`,
		Example: `  nbd-export daemon --control /run/nbd.ctl --pid-file /run/nbd.pid

  # the same, with a first image
  nbd-export daemon --control /run/nbd.ctl --nbd-server addr.type=unix,addr.path=/run/nbd.sock \
    --blockdev driver=raw,node-name=vm1,discard=unmap,file.driver=file,file.filename=/srv/vm1.img \
    --export type=nbd,id=vm1,node-name=vm1,writable=on,allow-inactive=on`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case d.control == "":
				return usageError{errors.New("daemon: give --control PATH, the socket that it takes its orders from")}
			case cmd.Flags().Changed("pid-file") && d.pidFile == "":
				return usageError{errors.New("daemon: --pid-file needs a path")}
			case memory < 1<<20:
				return usageError{fmt.Errorf("daemon: --memory %s is too little; give at least 1M", memory.String())}
			}
			d.memory = int64(memory)
			log, err := control.NewLogger(control.NewLines(os.Stderr), logLevel.value, logFormat.value)
			if err != nil {
				return usageError{err}
			}
			for _, o := range []struct {
				flag, command string
				values        []string
			}{
				{"--nbd-server", "nbd-server-start", servers}, {"--blockdev", "blockdev-add", nodes}, {"--export", "block-export-add", exports},
			} {
				for _, v := range o.values {
					d.first = append(d.first, startOrder{o.flag, o.command, v})
				}
			}
			return serve(d, nil, signals, log)
		},
	}
	f := cmd.Flags()
	f.StringVar(&d.control, "control", "", "control socket at `PATH`")
	f.StringVar(&d.pidFile, "pid-file", "", "write the process id to `PATH` once the control socket is ready")
	f.StringArrayVar(&servers, "nbd-server", nil, "start the NBD server: `OPTIONS` as addr.type=unix,addr.path=PATH")
	f.StringArrayVar(&nodes, "blockdev", nil, "add a node: `OPTIONS` of blockdev-add as KEY=VALUE,... or JSON")
	f.StringArrayVar(&exports, "export", nil, "add an export: `OPTIONS` of block-export-add as KEY=VALUE,... or JSON")
	f.Var(&memory, "memory", "`SIZE` of all buffers of the process, in bytes or k, M, G, T")
	logLevel.addTo(cmd, "log-level", "", "least `LEVEL` logged")
	logFormat.addTo(cmd, "log-format", "", "`FORMAT` of the log on stderr")
	f.SortFlags = false
	for _, name := range []string{"control", "pid-file"} {
		_ = cmd.MarkFlagFilename(name)
	}
	return cmd
}
