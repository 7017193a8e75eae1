package main

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/export"
)

const (
	defaultHost = "127.0.0.1"
	defaultPort = 10809
)

// serveFlags are what serve is told: of the process, and of its one image.
type serveFlags struct {
	process *processFlags
	daemon  daemonOptions
	image   imageOptions

	bind string
	port int
	// clients are those of --tls-certificates.
	format, cache, locking, dropCache, discard, clients *choice
}

func newServeCommand(signals *control.Signals) *cobra.Command {
	s := &serveFlags{
		process:   newProcessFlags(),
		format:    choose("auto", "raw", "qcow2"),
		cache:     choose("writeback", "none", "writethrough"),
		locking:   choose("auto", "on", "off"),
		dropCache: choose("auto", "on", "off"),
		discard:   choose("unmap", "ignore"),
		clients:   choose("verify", "any"),
	}
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
			if err := needPaths(cmd, "socket", "tls-certificates"); err != nil {
				return err
			}
			log, err := s.process.settle(cmd, &s.daemon)
			if err != nil {
				return err
			}
			if err := s.settle(cmd.Flags(), args[0]); err != nil {
				return usageError{fmt.Errorf("serve: %w", err)}
			}
			return serve(s.daemon, []imageOptions{s.image}, signals, log)
		},
	}
	s.addTo(cmd)
	return cmd
}

// addTo adds the flags, in the order in which help shows them.
func (s *serveFlags) addTo(cmd *cobra.Command) {
	d, i, f := &s.daemon, &s.image, cmd.Flags()
	f.StringVarP(&d.unix, "socket", "k", "", "listen on a Unix socket at `PATH`")
	f.IntVarP(&s.port, "port", "p", defaultPort, "listen on TCP port `N`; 0 takes a free one")
	f.StringVarP(&s.bind, "bind", "b", defaultHost, "listen on TCP address `ADDR`")
	f.StringVar(&d.tls.Dir, "tls-certificates", "", "require TLS, with the certificates in `DIR`: server-cert.pem, server-key.pem, ca-cert.pem")
	s.clients.addTo(cmd, "tls-clients", "", "clients need a certificate of that authority, or none")
	f.StringVarP(&i.name, "export-name", "x", "", "`NAME` of the export")
	f.StringVarP(&i.description, "description", "D", "", "`TEXT` that describes the export")
	s.format.addTo(cmd, "format", "f", "`FMT` of the image")
	f.StringArrayVarP(&i.bitmaps, "bitmap", "B", nil, "export dirty bitmap `NAME` of a qcow2 image as qemu:dirty-bitmap:NAME; may be given more than once")
	f.BoolVarP(&i.ReadOnly, "read-only", "r", false, "never write to the image")
	f.BoolVar(&i.inactive, "inactive", false, "start without ownership: any number of exporters may")
	i.demand.addTo(cmd)
	s.process.addPaths(cmd)
	ownerRecordFlag(cmd, &i.OwnerRecord)
	s.cache.addTo(cmd, "cache", "", "how the page cache is used")
	s.discard.addTo(cmd, "discard", "", "what clients discard is given back to the file system, or stays allocated")
	s.locking.addTo(cmd, "locking", "", "lock the image while it is active")
	s.dropCache.addTo(cmd, "drop-cache", "", "drop the page cache on activation")
	f.IntVarP(&d.shared, "shared", "e", 0, "at most `N` connections at once; 0 for unlimited")
	f.StringVar(&i.Snapshot, "snapshot", "", "serve internal snapshot `NAME` of a qcow2 image, read-only")
	s.process.addQcow2(cmd)
	s.process.addRest(cmd)
	// For those who are used to qemu-nbd: it is what serve always does.
	f.BoolP("persistent", "t", false, "go on when the last client has left")
	_ = f.MarkHidden("persistent")
	f.SortFlags = false
	_ = cmd.MarkFlagFilename("socket")
	_ = cmd.MarkFlagDirname("tls-certificates")
}

// settle checks the flags and puts them into daemon, which has those of the process
// already, and image, which is at path. An error is wrong usage.
func (s *serveFlags) settle(given *pflag.FlagSet, path string) error {
	d, i := &s.daemon, &s.image
	if err := errors.Join(export.CheckNames(i.name, i.description), export.CheckBitmaps(i.bitmaps)); err != nil {
		return err
	}
	switch {
	case d.unix != "" && d.unix == d.control:
		return fmt.Errorf("--socket and --control are both %s; they are two sockets", d.unix)
	case given.Changed("owner-record") && i.OwnerRecord == "":
		return errors.New("--owner-record needs a path, or off")
	case s.port < 0 || s.port > 65535:
		return fmt.Errorf("--port %d is not between 0 and 65535", s.port)
	case given.Changed("tls-clients") && d.tls.Dir == "":
		return errors.New("--tls-clients is of use only with --tls-certificates")
	case d.shared < 0:
		return fmt.Errorf("--shared %d is negative; 0 means unlimited", d.shared)
	case given.Changed("snapshot") && i.Snapshot == "":
		return errors.New("--snapshot needs the name or ID of a snapshot")
	case i.Snapshot != "" && len(i.bitmaps) > 0:
		return errors.New("--bitmap and --snapshot: bitmaps are of the active disk")
	}
	if err := s.listen(given); err != nil {
		return err
	}
	i.ReadOnly = i.ReadOnly || i.Snapshot != ""
	if err := i.demand.settle(given, d.control, i.ReadOnly); err != nil {
		return err
	}
	d.tls.AnyClient = s.clients.value == "any"
	i.Path, i.Format = path, s.format.value
	i.Cache, i.Locking = backend.CacheMode(s.cache.value), backend.LockingMode(s.locking.value)
	i.DropCache, i.IgnoreDiscard = backend.DropCacheMode(s.dropCache.value), s.discard.value == "ignore"
	return nil
}

// listen finds the TCP address to listen on, if there is to be one.
func (s *serveFlags) listen(given *pflag.FlagSet) error {
	d := &s.daemon
	if len(d.inherited.nbd) > 0 {
		for _, name := range []string{"socket", "port", "bind"} {
			if given.Changed(name) {
				return fmt.Errorf("--%s: the server was started with sockets to listen on (LISTEN_FDS); leave --%s out", name, name)
			}
		}
		return nil
	}
	if d.unix == "" || given.Changed("port") || given.Changed("bind") {
		host := strings.TrimSuffix(strings.TrimPrefix(s.bind, "["), "]") // as in a URI
		d.tcp = net.JoinHostPort(host, strconv.Itoa(s.port))
	}
	return nil
}
