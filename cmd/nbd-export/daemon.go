package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/export"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
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
	demand            demandOptions
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
	img, hooks, err := openImage(opt.Options)
	if err != nil {
		return err
	}
	index := len(d.registry.Targets())
	takeover := opt.demand.takeover(d)
	observe := control.Observe(state.Options{
		ReadOnly: opt.ReadOnly, Hold: opt.demand.inactive.hold, Wanted: takeover.Want,
		RefuseLate: len(opt.demand.peers) > 0 && !opt.demand.back,
	}, d.log)
	line := observe.Observe
	observe.Observe = func(t state.Transition) {
		// A start that fails is told by the process's last words alone.
		if t.Event == state.Published || d.serving.Load() {
			line(t)
		}
	}
	m := state.NewMachine(img, hooks(observe))
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
	takeover.Serve(&d.registry, target)
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
