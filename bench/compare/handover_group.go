package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// verbDaemon starts without an image; blockdev-add brings them.
const verbDaemon = "daemon"

// handoverGroup hands over many images of one process on tmpfs as one group.
func (r *runner) handoverGroup(ctx context.Context, files map[string]string, h *handoverReport) (err error) {
	if !hasVerb(r.cfg.ours, verbDaemon) {
		h.NoGroup = "this nbd-export adds no images while it runs"
		r.say("%s: not measured: %s", groupID, h.NoGroup)
		return nil
	}
	images, err := newStore(r.cfg.shm, groupImage, groupSize)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, images.remove()) }()
	var paths []string
	for i := range groupSize {
		path, err := images.image(ctx, fmt.Sprint(i))
		if err != nil {
			return err
		}
		paths = append(paths, path)
	}
	var pairs []*exporters
	defer func() {
		for _, x := range pairs {
			x.stop()
		}
	}()
	for _, program := range []string{programOurs, programQSD} {
		x := newGroup(program, files[program], r.sockets)
		pairs = append(pairs, x)
		x.moves.Cell, x.moves.Program = groupID, program
		h.Moves = append(h.Moves, &x.moves)
		if err := x.start(ctx); err != nil {
			return err
		}
		for side := range x.procs {
			if err := x.listen(ctx, side); err != nil {
				return err
			}
			for i, path := range paths {
				if err := x.add(ctx, side, fmt.Sprintf("disk%d", i), path); err != nil {
					return err
				}
			}
		}
	}
	for range groupRounds {
		for _, x := range pairs {
			if err := x.moveGroup(ctx); err != nil {
				x.moves.Failures = append(x.moves.Failures, err.Error())
				return nil
			}
		}
	}
	for _, x := range pairs {
		r.say("%s, %s: %d handovers, orders %v", groupID, x.program, x.moves.Done, middleTime(x.moves.Orders))
	}
	return nil
}

// newGroup are exporters without an image.
func newGroup(program, file, dir string) *exporters {
	x := &exporters{program: program, bare: true}
	x.make(file, dir, "", func(e endpoint) []string {
		if program == programQSD {
			// It does not raise its limit of open files itself.
			return append([]string{"prlimit", "--nofile=8192:", e.binary}, monitorArgs(e.address)...)
		}
		return []string{e.binary, verbDaemon, "--control", e.address, "--log-level", "warn"}
	})
	for _, p := range x.procs {
		p.name += "-group"
		p.address = filepath.Join(dir, p.name+".sock")
		p.argv = p.server.argv(p.endpoint)
	}
	return x
}

// listen starts the NBD server of a side.
func (x *exporters) listen(ctx context.Context, side int) error {
	type path struct {
		Path string `json:"path"`
	}
	type address struct {
		Type string `json:"type"`
		Data path   `json:"data"`
	}
	return x.clients[side].Execute(ctx, "nbd-server-start", struct {
		Address address `json:"addr"`
	}{address{"unix", path{x.procs[side].address + ".nbd"}}}, nil)
}

// add gives a side an image, inactive, and exports it: QEMU takes no lock of an
// image that nobody uses.
func (x *exporters) add(ctx context.Context, side int, node, path string) error {
	type file struct {
		Driver string `json:"driver"`
		Path   string `json:"filename"`
		Active bool   `json:"active"`
	}
	err := x.clients[side].Execute(ctx, "blockdev-add", struct {
		Driver string `json:"driver"`
		Node   string `json:"node-name"`
		Active bool   `json:"active"`
		File   file   `json:"file"`
	}{"raw", node, false, file{"file", path, false}}, nil)
	if err != nil {
		return err
	}
	return x.clients[side].Execute(ctx, "block-export-add", struct {
		Type     string `json:"type"`
		ID       string `json:"id"`
		Node     string `json:"node-name"`
		Name     string `json:"name"`
		Writable bool   `json:"writable"`
		Inactive bool   `json:"allow-inactive"`
	}{"nbd", "export-" + node, node, node, true, true}, nil)
}

// moveGroup activates everything on one side, hands it over, and lets it go.
func (x *exporters) moveGroup(ctx context.Context) error {
	if err := x.order(ctx, 0, true); err != nil {
		return err
	}
	start := time.Now()
	if err := x.order(ctx, 0, false); err != nil {
		return err
	}
	if err := x.order(ctx, 1, true); err != nil {
		return err
	}
	x.moves.Orders = append(x.moves.Orders, time.Since(start))
	x.moves.Done++
	return x.order(ctx, 1, false)
}
