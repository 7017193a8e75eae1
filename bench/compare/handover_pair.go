package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/nbd-export/nbd-export/control"
)

// programQSD has what QEMU has for this: blockdev-set-active on each side.
const programQSD = "qemu-storage-daemon"

// orderTimeout is for an order, or a client's way to the new owner.
const orderTimeout = time.Minute

// exporters are two daemons of one program on the same images, owning nothing at
// first. Who has both control sockets is the orderer, or clients where they are bare.
type exporters struct {
	program string
	node    string // of the one image
	bare    bool   // they have no NBD socket: the address is the control socket's
	procs   [2]*process
	orderer *orderer
	clients [2]*control.Client
	moves   moves
}

func controlPath(e endpoint) string { return e.address + ".ctl" }

// control is the control socket of a side.
func (x *exporters) control(side int) string {
	if x.bare {
		return x.procs[side].address
	}
	return controlPath(x.procs[side].endpoint)
}

// newExporters are for one image. file is the program's.
func newExporters(program, file, dir, image, format string) *exporters {
	x := &exporters{program: program, node: "image0"} // limit looks at no name
	argv := func(e endpoint) []string {
		return []string{e.binary, "serve", "-f", format, "-k", e.address, "--control", controlPath(e), "--log-level", "warn", "--inactive", e.image}
	}
	switch program {
	case programLimit:
		argv = func(e endpoint) []string {
			return []string{e.binary, limitOwnerArg, e.address, controlPath(e), e.image}
		}
	case programQSD:
		x.node = "disk"
		argv = func(e endpoint) []string {
			// The NBD server last: when it answers the monitor does too.
			return append([]string{e.binary}, append(monitorArgs(controlPath(e)),
				"--blockdev", "driver=file,node-name=file,filename="+e.image+",active=off",
				"--blockdev", "driver="+format+",node-name=disk,file=file,active=off",
				"--nbd-server", "addr.type=unix,addr.path="+e.address+",max-connections=0",
				"--export", "type=nbd,id=export,node-name=disk,name=,writable=on,allow-inactive=on")...)
		}
	}
	x.make(file, dir, image, argv)
	return x
}

func monitorArgs(path string) []string {
	return []string{"--chardev", "socket,id=control,path=" + path + ",server=on,wait=off", "--monitor", "chardev=control"}
}

func (x *exporters) make(file, dir, image string, argv func(endpoint) []string) {
	for side := range x.procs {
		s := server{name: fmt.Sprintf("%s-%c", x.program, 'a'+side), program: x.program, argv: argv}
		e := endpoint{binary: file, image: image, transport: "unix", address: filepath.Join(dir, s.name+".sock")}
		x.procs[side] = &process{server: s, endpoint: e, argv: argv(e)}
	}
}

// shown is how a side is started, for people.
func (x *exporters) shown() string {
	p := x.procs[0]
	line := strings.ReplaceAll(p.shown(p.argv), p.image, "$IMAGE")
	line = strings.ReplaceAll(line, controlPath(p.endpoint), "$CONTROL")
	return strings.ReplaceAll(line, p.address, "$SOCKET")
}

func (x *exporters) start(ctx context.Context) (err error) {
	for side, p := range x.procs {
		if err := p.start(ctx); err != nil {
			return err
		}
		if !x.bare {
			continue
		}
		if x.clients[side], err = control.Dial(ctx, x.control(side)); err != nil {
			return err
		}
	}
	if x.bare {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	x.orderer, err = startOrders(ctx, self, orderConfig{[2]string{x.control(0), x.control(1)}, x.node})
	return err
}

func (x *exporters) stop() {
	if x.orderer != nil {
		x.orderer.stop()
		x.orderer = nil
	}
	for side, p := range x.procs {
		if c := x.clients[side]; c != nil {
			_ = c.Close()
			x.clients[side] = nil
		}
		if p.ended != nil {
			p.stop()
		}
	}
}

// crashed says which side has ended, and its last words; "" if none has. One
// that dumps its core takes a moment.
func (x *exporters) crashed() string {
	for until := time.Now().Add(time.Second); ; time.Sleep(10 * time.Millisecond) {
		for _, p := range x.procs {
			if p.alive() {
				continue
			}
			said := p.said.String()
			if i := strings.LastIndexByte(said, '\n'); i >= 0 {
				said = said[i+1:]
			}
			return fmt.Sprintf("%v: %s", p.cmd.ProcessState, said)
		}
		if time.Now().After(until) {
			return ""
		}
	}
}

// order gives a side an order.
func (x *exporters) order(ctx context.Context, side int, active bool) error {
	if x.orderer != nil {
		_, err := x.orderer.give(oneOrder{side, active})
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, orderTimeout)
	defer cancel()
	return x.clients[side].SetActive(ctx, active)
}

// command hands over as a person does, and returns how long that took.
func (x *exporters) command(ctx context.Context, ours string, from, to int) (time.Duration, error) {
	run := func(args ...string) error {
		cmd := exec.CommandContext(ctx, ours, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	a, b := x.control(from), x.control(to)
	verb := hasVerb(ours, "handover")
	start := time.Now()
	if verb {
		err := run("handover", "--from", a, "--to", b)
		return time.Since(start), err
	}
	err := run("inactivate", "--control", a)
	if err == nil {
		err = run("activate", "--control", b)
	}
	return time.Since(start), err
}

// hasVerb says whether our program has a verb.
func hasVerb(ours, verb string) bool {
	out, err := exec.Command(ours, "--help").CombinedOutput()
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(out)) {
		if w := strings.Fields(line); len(w) > 1 && strings.HasPrefix(line, " ") && w[0] == verb {
			return true
		}
	}
	return false
}
