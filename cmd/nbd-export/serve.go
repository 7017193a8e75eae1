package main

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/export"
)

const (
	defaultHost = "127.0.0.1"
	defaultPort = 10809
)

func newServeCommand(signals *control.Signals) *cobra.Command {
	var d daemonOptions
	var i imageOptions
	var bind string
	var port int
	process := newProcessFlags()
	format := choose("auto", "raw", "qcow2")
	cache := choose("writeback", "none", "writethrough")
	locking := choose("auto", "on", "off")
	dropCache := choose("auto", "on", "off")
	discard := choose("unmap", "ignore")
	clients := choose("verify", "any")
	var persistent bool

	cmd := &cobra.Command{
		Use:   "serve [flags] IMAGE",
		Short: "Serve an image file or block device until stopped",
		Long: `Serve an image file or block device until stopped. Without --inactive the server
becomes the owner of the image first, and fails if another process owns it. Who
owns it stands in IMAGE.owner, beside the image (see who).

The backing files and the data file of a qcow2 image are found by the names in it,
in its directory or those of --allow-backing. Without -f an image is served as
qcow2 if it begins like one and leads to no other file.

Without --socket, --port and --bind it listens on TCP 127.0.0.1:10809, or, started
by a socket unit of systemd or by a tool of libnbd, on the sockets that it is given
(docs/running.md). The pid file is written, and systemd told, when connections are
accepted and the control socket is ready.

With --tls-certificates all clients have to use TLS, those of --socket too
(docs/tls.md); otherwise keep TCP to networks that you trust.

While inactive, writes get EPERM; with --inactive-writes hold they wait for the
activation, or a time. With --takeover the first of them brings it about: the
peer that owns the image is asked to let go.

Signals: SIGUSR1 activates, SIGUSR2 inactivates, SIGTERM, SIGINT and SIGQUIT stop
in order (a second one stops at once), SIGHUP opens --log-file anew. Exit status is
1 if a last write or flush failed.`,
		Example: `  # serve a raw disk on a Unix socket, and own it
  nbd-export serve -f raw -k /run/a.sock --control /run/a.ctl disk.img

  # a second exporter of the same disk, which takes over when told to
  nbd-export serve -f raw -k /run/b.sock --control /run/b.ctl --inactive disk.img
  nbd-export handover --from /run/a.ctl --to /run/b.ctl

  # two exporters between which the disk goes by itself, to whose client writes
  nbd-export serve -f raw -k /run/a.sock --control /run/a.ctl --takeover /run/b.ctl disk.img
  nbd-export serve -f raw -k /run/b.sock --control /run/b.ctl --takeover /run/a.ctl --inactive disk.img

  # a qcow2 image whose backing file is elsewhere
  nbd-export serve -f qcow2 --allow-backing /srv/templates -k /run/a.sock vm1.qcow2

  # on the network, under a name, read-only
  nbd-export serve -f raw -r -b 0.0.0.0 -x disk disk.img`,
		Args: oneArg("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			flags := cmd.Flags()
			if err := needPaths(cmd, "socket", "tls-certificates"); err != nil {
				return err
			}
			log, err := process.settle(cmd, &d)
			if err != nil {
				return err
			}
			if err := errors.Join(export.CheckNames(i.name, i.description), export.CheckBitmaps(i.bitmaps)); err != nil {
				return usageError{fmt.Errorf("serve: %w", err)}
			}
			switch {
			case d.unix != "" && d.unix == d.control:
				return usageError{fmt.Errorf("serve: --socket and --control are both %s; they are two sockets", d.unix)}
			case flags.Changed("owner-record") && i.OwnerRecord == "":
				return usageError{errors.New("serve: --owner-record needs a path, or off")}
			case port < 0 || port > 65535:
				return usageError{fmt.Errorf("serve: --port %d is not between 0 and 65535", port)}
			case flags.Changed("tls-clients") && d.tls.Dir == "":
				return usageError{errors.New("serve: --tls-clients is of use only with --tls-certificates")}
			case d.shared < 0:
				return usageError{fmt.Errorf("serve: --shared %d is negative; 0 means unlimited", d.shared)}
			}
			if len(d.inherited.nbd) > 0 {
				for _, name := range []string{"socket", "port", "bind"} {
					if flags.Changed(name) {
						return usageError{fmt.Errorf("serve: --%s: the server was started with sockets to listen on (LISTEN_FDS); leave --%s out", name, name)}
					}
				}
			} else if d.unix == "" || flags.Changed("port") || flags.Changed("bind") {
				host := strings.TrimSuffix(strings.TrimPrefix(bind, "["), "]") // as in a URI
				d.tcp = net.JoinHostPort(host, strconv.Itoa(port))
			}
			if flags.Changed("snapshot") {
				if i.Snapshot == "" {
					return usageError{errors.New("serve: --snapshot needs the name or ID of a snapshot")}
				}
				if len(i.bitmaps) > 0 {
					return usageError{errors.New("serve: --bitmap and --snapshot: bitmaps are of the active disk")}
				}
				i.ReadOnly = true
			}
			if err := i.demand.settle(cmd, d.control, i.ReadOnly); err != nil {
				return usageError{fmt.Errorf("serve: %w", err)}
			}
			d.tls.AnyClient = clients.value == "any"
			i.Path, i.Format = args[0], format.value
			i.Cache, i.Locking = backend.CacheMode(cache.value), backend.LockingMode(locking.value)
			i.DropCache, i.IgnoreDiscard = backend.DropCacheMode(dropCache.value), discard.value == "ignore"
			return serve(d, []imageOptions{i}, signals, log)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&d.unix, "socket", "k", "", "listen on a Unix socket at `PATH`")
	f.IntVarP(&port, "port", "p", defaultPort, "listen on TCP port `N`; 0 takes a free one")
	f.StringVarP(&bind, "bind", "b", defaultHost, "listen on TCP address `ADDR`")
	f.StringVar(&d.tls.Dir, "tls-certificates", "", "require TLS, with the certificates in `DIR`: server-cert.pem, server-key.pem, ca-cert.pem")
	clients.addTo(cmd, "tls-clients", "", "clients need a certificate of that authority, or none")
	f.StringVarP(&i.name, "export-name", "x", "", "`NAME` of the export")
	f.StringVarP(&i.description, "description", "D", "", "`TEXT` that describes the export")
	format.addTo(cmd, "format", "f", "`FMT` of the image")
	f.StringArrayVarP(&i.bitmaps, "bitmap", "B", nil, "export dirty bitmap `NAME` of a qcow2 image as qemu:dirty-bitmap:NAME; may be given more than once")
	f.BoolVarP(&i.ReadOnly, "read-only", "r", false, "never write to the image")
	f.BoolVar(&i.inactive, "inactive", false, "start without ownership: any number of exporters may")
	i.demand.addTo(cmd)
	process.addPaths(cmd)
	ownerRecordFlag(cmd, &i.OwnerRecord)
	cache.addTo(cmd, "cache", "", "how the page cache is used")
	discard.addTo(cmd, "discard", "", "what clients discard is given back to the file system, or stays allocated")
	locking.addTo(cmd, "locking", "", "lock the image while it is active")
	dropCache.addTo(cmd, "drop-cache", "", "drop the page cache on activation")
	f.IntVarP(&d.shared, "shared", "e", 0, "at most `N` connections at once; 0 for unlimited")
	f.StringVar(&i.Snapshot, "snapshot", "", "serve internal snapshot `NAME` of a qcow2 image, read-only")
	process.addQcow2(cmd)
	process.addRest(cmd)
	// For those who are used to qemu-nbd: it is what serve always does.
	f.BoolVarP(&persistent, "persistent", "t", false, "go on when the last client has left")
	_ = f.MarkHidden("persistent")
	f.SortFlags = false
	_ = cmd.MarkFlagFilename("socket")
	_ = cmd.MarkFlagDirname("tls-certificates")
	return cmd
}
