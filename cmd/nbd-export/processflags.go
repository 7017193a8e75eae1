package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/control"
	"github.com/nbd-export/nbd-export/internal/bytesize"
)

// processFlags are those of every verb that runs a process that serves images.
type processFlags struct {
	control, pidFile    string
	memory, dirty       bytesize.Size
	l2Cache             bytesize.Size
	allowBacking        []string
	fork                bool
	fullDisk            time.Duration
	repair              *choice
	engine              *choice
	logFile             string
	logLevel, logFormat *choice
}

func newProcessFlags() *processFlags {
	return &processFlags{
		memory: 256 << 20, dirty: 32 << 20, l2Cache: backend.DefaultL2Cache,
		repair:    choose("on", "off"),
		engine:    choose("auto", "portable", "uring"),
		logLevel:  choose("info", "debug", "warn", "error"),
		logFormat: choose("console", "json"),
	}
}

// addPaths and addRest add the flags; a verb's own may stand between them.
func (p *processFlags) addPaths(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&p.control, "control", "", "control socket at `PATH`, for status, handover, activate, inactivate and QMP tools")
	f.StringVar(&p.pidFile, "pid-file", "", "write the process id to `PATH` once connections are accepted")
	for _, name := range []string{"control", "pid-file"} {
		_ = cmd.MarkFlagFilename(name)
	}
	forkFlag(cmd, &p.fork)
}

func (p *processFlags) addRest(cmd *cobra.Command) {
	f := cmd.Flags()
	f.Var(&p.memory, "memory", "`SIZE` of all buffers of the process, in bytes or k, M, G, T")
	f.Var(&p.dirty, "handover-dirty", "slow writers, while inactivation syncs ahead, until at most `SIZE` is left to write")
	f.DurationVar(&p.fullDisk, "full-disk-wait", control.FullDiskTime, "on a stop, wait up to `TIME` for space on a disk that has none for what was written; 0 does not wait")
	p.engine.addTo(cmd, "engine", "", "what waits for the disk: io_uring or, portable, threads")
	f.StringVar(&p.logFile, "log-file", "", "log into the file at `PATH`, which SIGHUP opens anew (default stderr)")
	_ = cmd.MarkFlagFilename("log-file")
	p.logLevel.addTo(cmd, "log-level", "", "least `LEVEL` logged")
	p.logFormat.addTo(cmd, "log-format", "", "`FORMAT` of the log")
}

// addQcow2 adds the flags of qcow2 images.
func (p *processFlags) addQcow2(cmd *cobra.Command) {
	f := cmd.Flags()
	allowBackingFlag(cmd, &p.allowBacking)
	f.Var(&p.l2Cache, "l2-cache-size", "`SIZE` of the tables of a qcow2 image kept in memory; 1/8192 of the disk, with clusters of 64 KiB, covers all of it")
	p.repair.addTo(cmd, "repair-on-activate", "", "repair a qcow2 image whose last owner died, or refuse to activate it")
}

// settle checks the flags and puts them into d. An error is wrong usage.
func (p *processFlags) settle(cmd *cobra.Command, d *daemonOptions) (*zap.Logger, error) {
	if err := needPaths(cmd, "control", "pid-file", "log-file"); err != nil {
		return nil, err
	}
	for _, dir := range p.allowBacking {
		if st, err := os.Stat(dir); err != nil {
			return nil, usageError{fmt.Errorf("%s: --allow-backing: %w", cmd.Name(), err)}
		} else if !st.IsDir() {
			return nil, usageError{fmt.Errorf("%s: --allow-backing %s is not a directory", cmd.Name(), dir)}
		}
	}
	if p.l2Cache < 1<<16 {
		return nil, usageError{fmt.Errorf("%s: --l2-cache-size %s is too little; give at least 64k", cmd.Name(), p.l2Cache.String())}
	}
	if p.memory < 1<<20 {
		return nil, usageError{fmt.Errorf("%s: --memory %s is too little; give at least 1M", cmd.Name(), p.memory.String())}
	}
	if p.fullDisk < 0 {
		return nil, usageError{fmt.Errorf("%s: --full-disk-wait %v is negative; 0 does not wait", cmd.Name(), p.fullDisk)}
	}
	var err error
	if d.inherited, err = inheritSockets(p.control); err != nil {
		return nil, usageError{fmt.Errorf("%s: %w", cmd.Name(), err)}
	}
	if d.fork, d.parent = p.fork, findParent(); d.fork && !d.inherited.empty() {
		return nil, usageError{fmt.Errorf("%s: --fork: who started the server with sockets (LISTEN_FDS) wants this very process; leave --fork out", cmd.Name())}
	}
	d.control, d.pidFile = cmp.Or(p.control, d.inherited.controlPath()), p.pidFile
	d.allowBacking, d.l2Cache, d.noRepair = p.allowBacking, int64(p.l2Cache), p.repair.value == "off"
	d.memory, d.dirty, d.engine, d.fullDisk = int64(p.memory), int64(p.dirty), p.engine.value, p.fullDisk
	var w io.Writer = os.Stderr
	if p.logFile != "" {
		if d.logFile, err = control.OpenLogFile(p.logFile); err != nil {
			return nil, err
		}
		w = d.logFile
	}
	log, err := control.NewLogger(control.NewLines(w), p.logLevel.value, p.logFormat.value, d.logFile != nil || stderrIsFile())
	if err != nil {
		return nil, usageError{err}
	}
	return log, nil
}

// needPaths refuses flags of these names that are given and empty.
func needPaths(cmd *cobra.Command, names ...string) error {
	for _, name := range names {
		if f := cmd.Flags().Lookup(name); f.Changed && f.Value.String() == "" {
			return usageError{fmt.Errorf("%s: --%s needs a path", cmd.Name(), name)}
		}
	}
	return nil
}
