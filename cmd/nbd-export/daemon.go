package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/export"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

// daemonOptions are what a process has once.
type daemonOptions struct {
	unix      string // NBD socket path, "" for none
	tcp       string // NBD address, "" for none
	control   string // control socket path, "" for none
	inherited inherited
	pidFile   string            // "" for none
	logFile   *control.LogFile  // nil where the log goes to stderr
	memory    int64             // bytes
	shared    int               // connections, 0 for no limit
	tls       export.TLSOptions // of unix and tcp; without a directory there is no TLS
	dirty     int64             // bytes that an inactivation may leave when its gate closes
	engine    string            // "auto", "portable" or "uring"
	fullDisk  time.Duration     // that a stop waits for space
	fork      bool              // serve in another process
	parent    parent            // that waits for this one to serve
	first     []startOrder

	// Of qcow2 images:
	allowBacking []string // directories
	l2Cache      int64    // bytes, of each that has no other
	noRepair     bool
}

// startOrder is a command of the control socket that came with the start.
type startOrder struct{ flag, command, options string }

// imageOptions are one image and its export.
type imageOptions struct {
	backend.Options
	name, description string
	bitmaps           []string // that are exported with it
	inactive          bool     // serve without ownership
	demand            demandOptions
}

// serve runs a process that serves images until it is stopped.
func serve(opt daemonOptions, images []imageOptions, signals *control.Signals, log *zap.Logger) (err error) {
	if signals == nil {
		signals = control.CatchSignals()
	}
	defer func() { _ = log.Sync() }() // before the last words
	defer signals.Close()
	if opt.fork && !opt.parent.exists() {
		return inBackground(signals)
	}
	signals.Hangup(opt.logFile, log)
	d, err := newDaemon(opt, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.listen(); err != nil {
		return err
	}
	for _, i := range images {
		if err := d.add(i); err != nil {
			return err
		}
	}
	for _, o := range opt.first {
		if err := d.control.Run(o.command, o.options); err != nil {
			return fmt.Errorf("%s %s: %w", o.flag, o.options, err)
		}
	}
	return d.run(signals)
}

// daemon wires the rooms of a process together.
type daemon struct {
	opt      daemonOptions
	log      *zap.Logger
	registry control.Registry
	engine   *ioloop.Engine
	portable bool // it has no io_uring
	nbd      *control.NBD
	control  *control.Server
	later    *control.Later
	fullDisk *control.FullDisk

	supervisor      control.Supervisor
	tls             *tls.Config    // of listeners, nil for none
	listeners       []net.Listener // of nbd, until it serves them
	controlListener net.Listener   // nil for none
	pidFile         *control.PIDFile
	failed          chan error    // a listener failed for good
	quit            chan struct{} // closed by the command quit
	activate        []string      // nodes to own from the start
	serving         atomic.Bool
}

func newDaemon(opt daemonOptions, log *zap.Logger) (*daemon, error) {
	ring, err := openUring(opt.engine, log)
	if err != nil {
		return nil, err
	}
	d := &daemon{
		opt: opt, log: log, later: control.NewLater(), supervisor: control.FindSupervisor(), failed: make(chan error, 8), quit: make(chan struct{}),
		listeners: opt.inherited.nbd, controlListener: opt.inherited.control,
	}
	d.fullDisk = control.NewFullDisk(opt.fullDisk, d.tellSupervisor, log)
	d.portable = ring == nil
	d.engine = ioloop.NewEngine(ioloop.Config{Memory: opt.memory, Ring: ring, Log: log})
	d.nbd = &control.NBD{Mover: d.engine, Log: log}
	d.control = control.NewServer(control.Config{
		Registry: &d.registry, NBD: d.nbd, Version: version, Log: log,
		Open: func(o backend.Options) (*control.Target, error) { return d.open(imageOptions{Options: o}) },
		Quit: func() { close(d.quit) },
	})
	return d, nil
}

// openUring opens what the engine asked for needs; nil for the portable one.
func openUring(engine string, log *zap.Logger) (*ioloop.Uring, error) {
	if engine == "portable" {
		return nil, nil
	}
	ring, err := ioloop.OpenUring()
	switch {
	case err == nil:
		return ring, nil
	case engine == "uring":
		return nil, fmt.Errorf("--engine uring: %w", err)
	}
	log.Info("the portable engine serves", zap.NamedError("because", err))
	return nil, nil
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
	if d.opt.control != "" && d.controlListener == nil {
		l, err := control.Listen(d.opt.control)
		if err != nil {
			return err
		}
		d.controlListener = l
	}
	if d.opt.tls.Dir != "" {
		c, err := export.NewTLS(d.opt.tls)
		if err != nil {
			return err
		}
		d.tls = c
	}
	if d.opt.unix != "" || d.opt.tcp != "" || len(d.listeners) > 0 {
		d.nbd.Reserve()
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
	target, err := d.open(opt)
	if err != nil {
		return err
	}
	index := len(d.registry.Targets())
	target.Node = fmt.Sprintf("image%d", index)
	target.Export = control.Export{
		ID: fmt.Sprintf("export%d", index), Name: opt.name, Description: opt.description, Writable: !opt.ReadOnly,
	}
	target.Served = &export.Export{
		Name: opt.name, Description: opt.description, Disk: target.Disk, ReadOnly: opt.ReadOnly, Bitmaps: opt.bitmaps,
	}
	if err := target.CheckBitmaps(opt.bitmaps, !opt.inactive && !opt.ReadOnly); err != nil {
		return errors.Join(err, state.Stop(target.Machine))
	}
	if err := d.registry.Add(target); err != nil {
		return errors.Join(err, state.Stop(target.Machine))
	}
	if !opt.inactive {
		d.activate = append(d.activate, target.Node)
	} else if err := unusable(target.Image); err != nil {
		d.log.Warn("the image could not be activated as it is", zap.String("image", opt.Path), zap.Error(err))
	}
	return d.nbd.Add(target.Served)
}

// unusable is what would keep an inactive image from being activated, nil if
// nothing is known that would.
func unusable(img backend.Image) error {
	i, ok := img.(interface{ Identify() backend.Identity })
	if !ok {
		return nil
	}
	id := i.Identify()
	return cmp.Or(id.OpenErr, id.RecordErr)
}

// open opens an image, inactive, with all that serves it but nodes and exports.
func (d *daemon) open(opt imageOptions) (*control.Target, error) {
	log := d.log.With(zap.String("image", opt.Path))
	if d.opt.control != "" {
		address, err := filepath.Abs(d.opt.control)
		if err != nil {
			return nil, fmt.Errorf("control socket %s: %w", d.opt.control, err)
		}
		opt.ControlAddress = address
	}
	opt.Warn = func(text string) { log.Warn(text) }
	opt.Later, opt.Reserved = d.later.Do, d.reserved
	opt.AllowBacking, opt.NoRepair, opt.L2Cache = d.opt.allowBacking, d.opt.noRepair, cmp.Or(opt.L2Cache, d.opt.l2Cache)
	img, hooks, err := openImage(opt.Options)
	if err != nil {
		return nil, err
	}
	takeover := opt.demand.takeover(d)
	options := state.Options{
		ReadOnly: opt.ReadOnly, Hold: opt.demand.inactive.hold, Wanted: takeover.Want,
		RefuseLate: len(opt.demand.peers) > 0 && !opt.demand.back,
		Later:      d.later.Do,
		Unwritten:  d.fullDisk.Again,
	}
	var pace *ioloop.Pace
	if !opt.ReadOnly && (opt.Cache == backend.CacheWriteback || opt.Cache == "") { // otherwise no write leaves anything dirty
		pace = ioloop.NewPace(d.opt.dirty)
		options.Pacer = pace
	}
	observe := control.Observe(options, d.log)
	line := observe.Observe
	observe.Observe = func(t state.Transition) {
		// A start that fails is told by the process's last words alone.
		if t.Event == state.Published || d.serving.Load() {
			line(t)
		}
	}
	m := state.NewMachine(img, hooks(observe))
	spareThreads(img.Info(), d.portable)
	disk := ioloop.NewDisk(img, m)
	if pace != nil {
		disk.SetPace(pace)
	}
	target := &control.Target{
		Machine: m, Image: img, Disk: disk, Direct: opt.Cache == backend.CacheNone,
		Stats: disk.Stats,
		Record: func() control.Record {
			p := img.RecordPlace()
			return control.Record{Path: p.Path, PerProcess: p.PerProcess}
		},
		Repairing: func() (done, total int64) {
			if p := img.Repairing(); p != nil {
				done, total = p.Done, p.Total
			}
			return done, total
		},
		PathLost: img.PathLost,
		Locks:    func() control.Locks { return control.Locks{Held: img.LocksHeld(), Scope: img.LockScope()} },
	}
	if st, err := os.Stat(opt.Path); err == nil {
		target.Device = st.Mode()&os.ModeDevice != 0
	}
	takeover.Serve(&d.registry, target)
	return target, nil
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
			if _, locked := errors.AsType[*backend.LockError](err); locked {
				err = fmt.Errorf("%w; or serve it with --inactive, until it is handed over to this server", err)
			}
			return err
		}
	}
	d.serving.Store(true)
	if len(d.listeners) > 0 {
		opt := control.NBDOptions{Shared: d.opt.shared, TLS: d.tls, Failed: func(err error) { d.failed <- err }}
		if err := d.nbd.Start(opt, d.listeners...); err != nil {
			return err
		}
	}
	if d.pidFile != nil {
		if err := d.pidFile.Publish(); err != nil {
			return err
		}
	}
	for _, l := range d.listeners {
		d.log.Info("listening", zap.String("on", l.Addr().Network()+":"+l.Addr().String()))
	}
	if len(d.listeners) == 0 {
		d.log.Info("taking orders", zap.String("control", d.opt.control))
	}
	signals.Ready(&d.registry, d.log)
	d.tellSupervisor("READY=1")
	d.opt.parent.release(d.log, d.opt.logFile)
	select {
	case <-ctx.Done():
		return nil
	case err := <-d.failed:
		return err
	}
}

// reserved is backend.Options.Reserved: a log is appended to whatever is there.
func (d *daemon) reserved(dev, ino uint64) string {
	switch {
	case d.opt.logFile != nil && d.opt.logFile.Is(dev, ino):
		return "the log file (--log-file)"
	case control.StderrIs(dev, ino):
		return "where the log goes (standard error)"
	}
	return ""
}

// tellSupervisor tells the service manager a state. It is no reason to stop if
// that does not want to know.
func (d *daemon) tellSupervisor(state string) {
	if err := d.supervisor.Tell(state); err != nil {
		d.log.Warn(err.Error())
	}
}

// close stops in order whatever has been started, and leaves nothing behind.
func (d *daemon) close() error {
	log := d.log
	if d.serving.Load() {
		d.fullDisk.Stopping()
		d.tellSupervisor("STOPPING=1")
	} else {
		log = zap.NewNop()
	}
	err := control.Stop(&d.registry, d.nbd, log)
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
	d.later.Close()
	return err
}
