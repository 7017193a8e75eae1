package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/bench"
	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/export"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

const (
	defaultHost = "127.0.0.1"
	defaultPort = 10809
)

// daemonOptions are what a process has once.
type daemonOptions struct {
	unix    string // NBD socket path, "" for none
	tcp     string // NBD address, "" for none
	control string // control socket path, "" for none
	pidFile string // "" for none
	memory  int64  // bytes
	shared  int    // connections, 0 for no limit
}

// imageOptions are one image and its export.
type imageOptions struct {
	backend.Options
	name, description string
	inactive          bool // serve without ownership
}

func newServeCommand(signals *control.Signals) *cobra.Command {
	var d daemonOptions
	var i imageOptions
	var bind string
	var port int
	memory := bench.Size(256 << 20)
	format := choose("auto", "raw", "qcow2")
	cache := choose("writeback", "none", "writethrough")
	locking := choose("auto", "on", "off")
	dropCache := choose("auto", "on", "off")
	logLevel := choose("info", "debug", "warn", "error")
	logFormat := choose("console", "json")

	cmd := &cobra.Command{
		Use:   "serve [flags] IMAGE",
		Short: "Serve an image file or block device until stopped",
		Long: `Serve an image file or block device until stopped. Without --inactive the server
becomes the owner of the image first, and fails if another process owns it. Who
owns it stands in IMAGE.owner, beside the image (see who).

Without --socket, --port and --bind it listens on TCP 127.0.0.1:10809. The pid
file is written when connections are accepted and the control socket is ready.

Signals: SIGUSR1 activates, SIGUSR2 inactivates, SIGTERM, SIGINT and SIGQUIT stop
in order (a second one stops at once), SIGHUP is ignored. Exit status is 1 if a
last write or flush failed.`,
		Example: `  # serve a raw disk on a Unix socket, and own it
  nbd-export serve -f raw -k /run/a.sock --control /run/a.ctl disk.img

  # a second exporter of the same disk, which takes over when told to
  nbd-export serve -f raw -k /run/b.sock --control /run/b.ctl --inactive disk.img
  nbd-export inactivate --control /run/a.ctl && nbd-export activate --control /run/b.ctl

  # on the network, under a name, read-only
  nbd-export serve -f raw -r -b 0.0.0.0 -x disk disk.img`,
		Args: oneArg("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			flags := cmd.Flags()
			for _, name := range []string{"socket", "control", "pid-file"} {
				if flags.Changed(name) && flags.Lookup(name).Value.String() == "" {
					return usageError{fmt.Errorf("serve: --%s needs a path", name)}
				}
			}
			if err := export.CheckNames(i.name, i.description); err != nil {
				return usageError{fmt.Errorf("serve: %w", err)}
			}
			switch {
			case d.unix != "" && d.unix == d.control:
				return usageError{fmt.Errorf("serve: --socket and --control are both %s; they are two sockets", d.unix)}
			case flags.Changed("owner-record") && i.OwnerRecord == "":
				return usageError{errors.New("serve: --owner-record needs a path, or off")}
			case port < 0 || port > 65535:
				return usageError{fmt.Errorf("serve: --port %d is not between 0 and 65535", port)}
			case d.shared < 0:
				return usageError{fmt.Errorf("serve: --shared %d is negative; 0 means unlimited", d.shared)}
			case memory < 1<<20:
				return usageError{fmt.Errorf("serve: --memory %s is too little; give at least 1M", memory.String())}
			}
			if d.unix == "" || flags.Changed("port") || flags.Changed("bind") {
				host := strings.TrimSuffix(strings.TrimPrefix(bind, "["), "]") // as in a URI
				d.tcp = net.JoinHostPort(host, strconv.Itoa(port))
			}
			d.memory = int64(memory)
			i.Path, i.Format = args[0], format.value
			i.Cache, i.Locking = backend.CacheMode(cache.value), backend.LockingMode(locking.value)
			i.DropCache = backend.DropCacheMode(dropCache.value)
			log, err := control.NewLogger(control.NewLines(os.Stderr), logLevel.value, logFormat.value)
			if err != nil {
				return usageError{err}
			}
			return serve(d, []imageOptions{i}, signals, log)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&d.unix, "socket", "k", "", "listen on a Unix socket at `PATH`")
	f.IntVarP(&port, "port", "p", defaultPort, "listen on TCP port `N`; 0 takes a free one")
	f.StringVarP(&bind, "bind", "b", defaultHost, "listen on TCP address `ADDR`")
	f.StringVarP(&i.name, "export-name", "x", "", "`NAME` of the export")
	f.StringVarP(&i.description, "description", "D", "", "`TEXT` that describes the export")
	format.addTo(cmd, "format", "f", "`FMT` of the image")
	f.BoolVarP(&i.ReadOnly, "read-only", "r", false, "never write to the image")
	f.BoolVar(&i.inactive, "inactive", false, "start without ownership: any number of exporters may")
	f.StringVar(&d.control, "control", "", "control socket at `PATH`, for status, activate, inactivate and QMP tools")
	ownerRecordFlag(cmd, &i.OwnerRecord)
	f.StringVar(&d.pidFile, "pid-file", "", "write the process id to `PATH` once connections are accepted")
	cache.addTo(cmd, "cache", "", "how the page cache is used")
	locking.addTo(cmd, "locking", "", "lock the image while it is active")
	dropCache.addTo(cmd, "drop-cache", "", "drop the page cache on activation")
	f.Var(&memory, "memory", "`SIZE` of all buffers of the process, in bytes or k, M, G, T")
	f.IntVarP(&d.shared, "shared", "e", 0, "at most `N` connections at once; 0 for unlimited")
	logLevel.addTo(cmd, "log-level", "", "least `LEVEL` logged")
	logFormat.addTo(cmd, "log-format", "", "`FORMAT` of the log on stderr")
	f.SortFlags = false
	for _, name := range []string{"socket", "control", "pid-file"} {
		_ = cmd.MarkFlagFilename(name)
	}
	return cmd
}

// serve runs a process that serves images until it is stopped.
func serve(opt daemonOptions, images []imageOptions, signals *control.Signals, log *zap.Logger) (err error) {
	if signals == nil {
		signals = control.CatchSignals()
	}
	defer func() { _ = log.Sync() }() // before the last words
	defer signals.Close()
	d := newDaemon(opt, log)
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.listen(); err != nil {
		return err
	}
	for _, i := range images {
		if err := d.add(i); err != nil {
			return err
		}
	}
	return d.run(signals)
}

// daemon wires the rooms of a process together.
type daemon struct {
	opt      daemonOptions
	log      *zap.Logger
	registry control.Registry
	exports  export.Exports
	engine   *ioloop.Engine
	server   *export.Server
	control  *control.Server

	listeners       []net.Listener // of server
	controlListener net.Listener   // nil for none
	pidFile         *control.PIDFile
	failed          chan error    // a listener failed for good
	quit            chan struct{} // closed by the command quit
	activate        []string      // nodes to own from the start
	serving         atomic.Bool
}

func newDaemon(opt daemonOptions, log *zap.Logger) *daemon {
	d := &daemon{opt: opt, log: log, failed: make(chan error, 8), quit: make(chan struct{})}
	d.engine = ioloop.NewEngine(ioloop.Config{Memory: opt.memory, Log: log})
	d.server = &export.Server{Exports: &d.exports, Mover: d.engine, Log: log, Shared: opt.shared}
	d.control = control.NewServer(control.Config{
		Registry: &d.registry, Version: version, Log: log,
		Quit: func() { close(d.quit) },
	})
	return d
}

// listen takes the addresses, so that it is known early whether they are free.
// Nobody is answered yet.
func (d *daemon) listen() error {
	if d.opt.pidFile != "" {
		p, err := control.NewPIDFile(d.opt.pidFile)
		if err != nil {
			return err
		}
		d.pidFile = p
	}
	if d.opt.control != "" {
		l, err := control.Listen(d.opt.control)
		if err != nil {
			return err
		}
		d.controlListener = l
	}
	if d.opt.unix != "" {
		l, err := export.ListenUnix(d.opt.unix)
		if err != nil {
			return err
		}
		d.listeners = append(d.listeners, l)
	}
	if d.opt.tcp != "" {
		l, err := export.ListenTCP(d.opt.tcp)
		if err != nil {
			return err
		}
		d.listeners = append(d.listeners, l)
	}
	return nil
}

// add opens an image, inactive, and puts it under control and on the exports.
func (d *daemon) add(opt imageOptions) error {
	log := d.log.With(zap.String("image", opt.Path))
	if d.opt.control != "" {
		address, err := filepath.Abs(d.opt.control)
		if err != nil {
			return fmt.Errorf("control socket %s: %w", d.opt.control, err)
		}
		opt.ControlAddress = address
	}
	opt.Warn = func(text string) { log.Warn(text) }
	img, err := backend.Open(opt.Options)
	if err != nil {
		return err
	}
	index := len(d.registry.Targets())
	observe := control.Observe(state.Options{ReadOnly: opt.ReadOnly}, d.log)
	line := observe.Observe
	observe.Observe = func(t state.Transition) {
		// A start that fails is told by the process's last words alone.
		if t.Event == state.Published || d.serving.Load() {
			line(t)
		}
	}
	m := state.NewMachine(img, observe)
	disk := ioloop.NewDisk(img, m)
	target := &control.Target{
		Node: fmt.Sprintf("image%d", index), Machine: m, Image: img, Direct: opt.Cache == backend.CacheNone,
		Export: control.Export{
			ID: fmt.Sprintf("export%d", index), Name: opt.name, Description: opt.description, Writable: !opt.ReadOnly,
		},
		Stats: disk.Stats,
		Record: func() control.Record {
			p := img.RecordPlace()
			return control.Record{Path: p.Path, PerProcess: p.PerProcess}
		},
		Locks: func() control.Locks { return control.Locks{Held: img.LocksHeld(), Scope: img.LockScope()} },
	}
	if st, err := os.Stat(opt.Path); err == nil {
		target.Device = st.Mode()&os.ModeDevice != 0
	}
	if err := d.registry.Add(target); err != nil {
		return errors.Join(err, img.Close())
	}
	if !opt.inactive {
		d.activate = append(d.activate, target.Node)
	}
	return d.exports.Add(&export.Export{Name: opt.name, Description: opt.description, Disk: disk, ReadOnly: opt.ReadOnly})
}

// run activates what is to be active, serves, and returns when it is told to
// stop or cannot go on; close does the rest.
func (d *daemon) run(signals *control.Signals) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-signals.Stop():
		case <-d.quit:
		case <-ctx.Done():
		}
		cancel()
	}()
	// Activation can take its time: who asks is told how far it is.
	if l := d.controlListener; l != nil {
		go func() {
			if err := d.control.Serve(l); err != nil {
				d.failed <- fmt.Errorf("control socket %s: %w", d.opt.control, err)
			}
		}()
	}
	if len(d.activate) > 0 {
		if err := d.registry.Activate(ctx, state.ActivateOptions{}, d.activate...); err != nil {
			if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
				return nil // told to stop before there was anything to serve
			}
			return err
		}
	}
	d.serving.Store(true)
	for _, l := range d.listeners {
		go func() {
			if err := d.server.Serve(l); !errors.Is(err, export.ErrServerClosed) {
				d.failed <- fmt.Errorf("cannot accept connections on %s: %w", l.Addr(), err)
			}
		}()
	}
	if d.pidFile != nil {
		if err := d.pidFile.Publish(); err != nil {
			return err
		}
	}
	for _, l := range d.listeners {
		d.log.Info("listening", zap.String("on", l.Addr().Network()+":"+l.Addr().String()))
	}
	signals.Ready(&d.registry, d.log)
	select {
	case <-ctx.Done():
		return nil
	case err := <-d.failed:
		return err
	}
}

// close stops in order whatever has been started, and leaves nothing behind.
func (d *daemon) close() error {
	log := d.log
	if !d.serving.Load() {
		log = zap.NewNop()
	}
	err := control.Stop(&d.registry, d.server, log)
	d.control.Close()
	// Those that nobody served yet are still open.
	for _, l := range d.listeners {
		_ = l.Close()
	}
	if d.controlListener != nil {
		_ = d.controlListener.Close()
	}
	if d.pidFile != nil {
		d.pidFile.Remove()
	}
	return err
}
