package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/integration/guest"
)

// migrateTimeout bounds every wait for QEMU or the guest, which are emulated
// on a machine that may be busy.
const migrateTimeout = 3 * time.Minute

// exporterKind is a program that can own the image on one side.
type exporterKind struct {
	name  string
	start func(t testing.TB, f imageFormat, image string, inactive bool) *daemon
	locks func(f imageFormat) []int // it holds while active
}

var (
	nbdExport = exporterKind{
		name: "nbd-export",
		start: func(t testing.TB, f imageFormat, image string, inactive bool) *daemon {
			t.Helper()
			return serve(t, image, exportFlags(f, inactive)...)
		},
		locks: func(imageFormat) []int { return activeLocks },
	}
	// hookedExport is the same, and can be stopped at its steps.
	hookedExport = exporterKind{
		name: nbdExport.name,
		start: func(t testing.TB, f imageFormat, image string, inactive bool) *daemon {
			t.Helper()
			h, prepare := newHooks(t)
			e := servePrepared(t, image, prepare, exportFlags(f, inactive)...)
			e.hooks = h
			return e
		},
		locks: nbdExport.locks,
	}
	// qemuDaemon serves raw only, as serveQSD does.
	qemuDaemon = exporterKind{
		name: "qemu-storage-daemon",
		start: func(t testing.TB, _ imageFormat, image string, inactive bool) *daemon {
			t.Helper()
			return serveQSD(t, image, inactive)
		},
		locks: func(imageFormat) []int { return []int{100, 101, 203} },
	}
)

func exportFlags(f imageFormat, inactive bool) []string {
	flags := []string{"-f", f.name}
	if inactive {
		flags = append(flags, "--inactive")
	}
	return flags
}

// side is one host of the migrations: its exporter, and the QEMU that is
// connected to it, if there is one.
type side struct {
	name string
	kind exporterKind
	path string // of the image, a link of the side's own
	exp  *daemon
	ctl  *guest.QMP // the exporter's control socket
	vm   *guest.Guest
	qmp  *guest.QMP // its monitor
}

// life is a guest from its boot to its end, on whatever side it is.
type life struct {
	*story
	format imageFormat
	image  string
	sides  [2]*side
	at     int            // the side where the guest is
	hosts  []*guest.Guest // all QEMUs it has run in
	read   int            // of them, those whose output is in said for good
	said   ledger
	moves  int
	// leaks: an exporter was killed, perhaps when it had counted clusters and not
	// yet named them.
	leaks bool
}

// newLife makes an image, starts an exporter of each kind, the first as its
// owner, and boots a guest on that side.
func newLife(s *story, f imageFormat, dir string, kinds [2]exporterKind) *life {
	s.Helper()
	l := &life{story: s, format: f, said: ledger{}}
	s.logs, s.steps = l.allLogs, nil
	s.step("make the image and start the exporters")
	l.image = migrateImage(s, f, dir)
	for i, kind := range kinds {
		name := string(rune('A' + i))
		l.sides[i] = &side{name: name, kind: kind, path: filepath.Join(dir, name)}
		l.sides[i].link(s, l.image)
		l.use(l.sides[i], kind.start(s, f, l.sides[i].path, i > 0))
	}
	l.boot(l.sides[0])
	return l
}

// boot starts the guest from what is on its disk.
func (l *life) boot(s *side) {
	l.Helper()
	l.step("side %s: boot the guest", s.name)
	l.startVM(s)
	l.arrived(s)
	l.goesOn()
}

// use makes e the exporter of a side.
func (l *life) use(s *side, e *daemon) {
	l.Helper()
	ctl, err := guest.DialQMP(e.control, migrateTimeout)
	if err != nil {
		l.Fatalf("side %s: control socket of %s: %v", s.name, s.kind.name, err)
	}
	l.Cleanup(func() { ctl.Close() })
	s.exp, s.ctl = e, ctl
}

// restart starts an exporter with the sockets of the one that was killed.
func (l *life) restart(s *side, inactive bool) {
	l.Helper()
	l.step("side %s: start another exporter in place of the killed one", s.name)
	old := s.exp
	argv := slices.DeleteFunc(slices.Clone(old.cmd.Args), func(a string) bool { return a == "--inactive" })
	if inactive {
		argv = slices.Insert(argv, len(argv)-1, "--inactive")
	}
	e := &daemon{image: old.image, socket: old.socket, control: old.control, pidFile: old.pidFile, name: old.name, hooks: old.hooks}
	e.process = spawn(l, s.kind.name, func(cmd *exec.Cmd) { cmd.Env = old.cmd.Env }, argv...)
	l.Cleanup(func() {
		switch {
		case e.ended:
		case e.alive():
			e.stop()
		default:
			l.Errorf("side %s: the exporter died: %v", s.name, e.cmd.ProcessState)
		}
	})
	// The pid file of the killed one is still there.
	waitFor(l, startTimeout, "the new exporter accepts connections", func() bool {
		if !e.alive() {
			e.ended = true
			l.Fatalf("side %s: %s ended at start: %v\n%s", s.name, e.process.name, e.cmd.ProcessState, e.log)
		}
		return strings.TrimSpace(string(readFile(l, e.pidFile))) == fmt.Sprint(e.pid)
	})
	l.use(s, e)
}

func (l *life) startVM(s *side, args ...string) {
	l.Helper()
	s.vm = guest.Start(l, guest.Config{
		Script: migrateScript(l.said["raw"]),
		Args: append([]string{
			// A guest whose disk fails stops, and QEMU says why; when the
			// exporter is gone it waits for another one.
			"-blockdev", "driver=nbd,node-name=disk,discard=unmap,reconnect-delay=600,server.type=unix,server.path=" + s.exp.socket,
			"-device", "virtio-blk-pci,drive=disk,werror=stop,rerror=stop",
		}, args...),
		MemoryMiB: 128,
		Timeout:   time.Hour,
	})
	qmp, err := guest.DialQMP(s.vm.QMPPath, migrateTimeout)
	if err != nil {
		l.Fatalf("side %s: QEMU: %v", s.name, err)
	}
	l.Cleanup(func() { qmp.Close() })
	s.qmp = qmp
}

func (l *life) here() *side  { return l.sides[l.at] }
func (l *life) other() *side { return l.sides[1-l.at] }

// allLogs ends the guests, because QEMU's own messages can be had only then.
func (l *life) allLogs() string {
	var b strings.Builder
	for _, s := range l.sides {
		if s == nil {
			continue
		}
		if s.exp != nil {
			state := "running"
			if !s.exp.alive() {
				state = s.exp.cmd.ProcessState.String()
			}
			fmt.Fprintf(&b, "=== side %s: %s, pid %d: %s\n%s", s.name, s.kind.name, s.exp.pid, state, lastLines(s.exp.log.String(), 40))
		}
		if s.vm != nil {
			s.vm.Kill()
			fmt.Fprintf(&b, "=== side %s: %s\n", s.name, s.vm.Logs(25))
		}
	}
	return b.String()
}

// tryOrder tells the exporter of a side to be active or not.
func (l *life) tryOrder(s *side, active bool, more ...string) error {
	l.Helper()
	args := map[string]any{"active": active}
	for _, m := range more {
		args[m] = true
	}
	_, err := s.ctl.Execute("blockdev-set-active", args)
	if refusal := (*guest.QMPError)(nil); err != nil && !errors.As(err, &refusal) {
		l.blameQEMU(s)
	}
	return err
}

// blameQEMU fails the test by name if an exporter that does not answer is
// QEMU's own daemon.
func (l *life) blameQEMU(s *side) {
	l.Helper()
	if s.kind.name != qemuDaemon.name {
		return
	}
	select {
	case <-s.exp.exited:
	case <-time.After(startTimeout):
		l.Fatalf("side %s: QEMU's own storage daemon hangs, which is no failure of nbd-export", s.name)
	}
	l.Fatalf("side %s: QEMU's own storage daemon crashed (%v), which is no failure of nbd-export; it said:\n%s",
		s.name, s.exp.cmd.ProcessState, s.exp.log)
}

func (l *life) order(s *side, active bool, more ...string) {
	l.Helper()
	l.step("side %s: exporter: active=%v %v", s.name, active, more)
	if err := l.tryOrder(s, active, more...); err != nil {
		l.Fatalf("side %s: %s: active=%v: %v", s.name, s.kind.name, active, err)
	}
}

// refused gives an order that must not be obeyed, and whose refusal says why.
func (l *life) refused(s *side, why string, more ...string) {
	l.Helper()
	l.step("side %s: exporter: active=true %v, which must be refused", s.name, more)
	err := l.tryOrder(s, true, more...)
	if err == nil || !strings.Contains(err.Error(), why) {
		l.Fatalf("side %s: %s: activation: %v, want a refusal with %q", s.name, s.kind.name, err, why)
	}
	if l.active(s) {
		l.Fatalf("side %s: active after a refused activation", s.name)
	}
}

// active is what an exporter says of itself.
func (l *life) active(s *side) bool {
	l.Helper()
	var nodes []struct{ Active bool }
	answer, err := s.ctl.Execute("query-named-block-nodes", nil)
	if err == nil {
		err = json.Unmarshal(answer, &nodes)
	}
	if err != nil || len(nodes) == 0 {
		l.blameQEMU(s)
		l.Fatalf("side %s: query-named-block-nodes: %d nodes, %v", s.name, len(nodes), err)
	}
	return nodes[0].Active
}

// qemu has a side's QEMU execute a command.
func (l *life) qemu(s *side, command string, args any) json.RawMessage {
	l.Helper()
	answer, err := s.qmp.Execute(command, args)
	if err != nil {
		l.Fatalf("side %s: QEMU: %s: %v", s.name, command, err)
	}
	return answer
}

// status is the guest's in a side's QEMU.
func (l *life) status(s *side) string {
	l.Helper()
	var st struct{ Status string }
	if err := json.Unmarshal(l.qemu(s, "query-status", nil), &st); err != nil {
		l.Fatal(err)
	}
	return st.Status
}

// update reads what the guest has said since the last time.
func (l *life) update() {
	for _, vm := range l.hosts[l.read:] {
		l.said.note(vm.Output())
	}
	l.read = max(0, len(l.hosts)-1)
}

// goesOn waits until the guest has made records of each kind that it began
// after the call.
func (l *life) goesOn() {
	l.Helper()
	l.step("side %s: the guest writes records", l.here().name)
	for _, kind := range recordKinds {
		line := l.here().vm.Lines()
		for range 2 { // the first may have been on its way
			line = l.says("durable "+kind+` \d{8}\.`, line)
		}
	}
	l.update()
}

// says waits until the guest prints such a line.
func (l *life) says(line string, from int) (next int) {
	l.Helper()
	const ended = `failed .*|##guest-exit.*`
	said, next, err := l.here().vm.WaitWithin(migrateTimeout, "^("+line+"|"+ended+")$", from)
	switch {
	case err != nil:
		st, _ := l.here().qmp.Execute("query-status", nil)
		l.Fatalf("side %s: %v; QEMU says %s", l.here().name, err, st)
	case !regexp.MustCompile("^" + line + "$").MatchString(said):
		l.Fatalf("side %s: the guest's script ended: %s", l.here().name, said)
	}
	return next
}

// runsHereOnly requires that the guest runs on this side and on no other, and
// that this side's exporter, and no other, owns the image.
func (l *life) runsHereOnly() {
	l.Helper()
	l.goesOn()
	l.step("side %s: the guest and the image are on this side only", l.here().name)
	if st := l.status(l.here()); st != "running" {
		l.Fatalf("side %s: the guest is %s", l.here().name, st)
	}
	if vm := l.other().vm; vm != nil {
		select {
		case <-vm.Done():
		default:
			if st := l.status(l.other()); st == "running" {
				l.Fatalf("side %s: the guest runs there too", l.other().name)
			}
		}
	}
	l.ownedBy(l.here())
}

// ownedBy requires that the exporter of a side, nil for none, says that it is
// active and has the locks, and that nobody else does.
func (l *life) ownedBy(owner *side) {
	l.Helper()
	var want []int
	for _, s := range l.sides {
		if !s.exp.alive() {
			continue
		}
		var locks []int
		if s == owner {
			locks = s.kind.locks(l.format)
			want = locks
		}
		if l.active(s) != (s == owner) {
			l.Errorf("side %s: the exporter says active=%v", s.name, s != owner)
		}
		if got := processLocks(l, s.exp.pid, l.image); !slices.Equal(got, locks) {
			l.Errorf("side %s: the exporter holds the bytes %v, want %v", s.name, got, locks)
		}
	}
	if got := fileLocks(l, l.image); !slices.Equal(got, want) {
		l.Errorf("locked bytes of the image: %v, want %v", got, want)
	}
}

// nothingLost requires of the image, to which nobody writes, every record that
// the guest has reported durable.
func (l *life) nothingLost() {
	l.Helper()
	l.update()
	l.step("everything is there up to %v", l.said)
	content := l.format.content(l, l.image)
	if err := checkRing(content, l.said); err != nil {
		l.Fatal(err)
	}
	if err := checkFiles(l, content, l.said); err != nil {
		l.Fatal(err)
	}
}

// finish has the guest stop, compare and check, and judges the image.
func (l *life) finish() {
	l.Helper()
	l.step("side %s: the guest stops and checks its file system", l.here().name)
	vm := l.here().vm
	vm.Send("stop")
	l.ended(l.here())
	r := vm.Wait()
	if r.ExitCode != 0 {
		l.Fatalf("the guest's script ended with status %d", r.ExitCode)
	}
	l.update()
	l.consoles()
	l.step("both exporters stop")
	for _, s := range l.sides {
		if s.kind.name == nbdExport.name {
			s.exp.stop()
		} else {
			s.exp.kill()
		}
	}
	wantLocks(l, l.image, nil)
	l.format.check(l, l.image, l.leaks)
	content := l.format.content(l, l.image)
	run(l, "e2fsck", "-f", "-n", content)
	l.nothingLost()
}

// killExporter ends a side's exporter where it stands.
func (l *life) killExporter(s *side) {
	l.Helper()
	l.leaks = true
	s.exp.kill()
}

// consoles requires that no kernel saw an error of the disk.
func (l *life) consoles() {
	l.Helper()
	for _, vm := range l.hosts {
		if text := vm.Console(); strings.Contains(text, "I/O error") || strings.Contains(text, "EXT4-fs error") {
			l.Errorf("the guest's kernel saw errors:\n%s", text)
		}
	}
}

// arrived notes that the guest runs on a side.
func (l *life) arrived(s *side) {
	l.at = slices.Index(l.sides[:], s)
	l.hosts = append(l.hosts, s.vm)
}

// leave ends a QEMU that has given its guest away.
func (l *life) leave(s *side) {
	l.Helper()
	defer func() { s.vm, s.qmp = nil, nil }()
	if !s.exp.alive() {
		// To end in order it would wait for the exporter to come back.
		l.step("side %s: kill QEMU, whose guest and exporter have gone", s.name)
		s.vm.Kill()
		return
	}
	l.step("side %s: QEMU, whose guest has gone, quits", s.name)
	l.qemu(s, "quit", nil)
	l.ended(s)
}

// ended waits for a QEMU's end.
func (l *life) ended(s *side) {
	l.Helper()
	select {
	case <-s.vm.Done():
	case <-time.After(migrateTimeout):
		l.Fatalf("side %s: QEMU does not end", s.name)
	}
}

// pausedByDisk requires that a guest has been paused by an error of its disk,
// and that its QEMU says so.
func (l *life) pausedByDisk(s *side) {
	l.Helper()
	l.step("side %s: the guest is paused because its disk is inactive", s.name)
	e, err := s.qmp.WaitEvent("BLOCK_IO_ERROR", nil, migrateTimeout)
	if err != nil {
		l.Fatalf("side %s: %v", s.name, err)
	}
	if reason := fmt.Sprint(e.Data["reason"]); e.Data["action"] != "stop" || !strings.Contains(reason, "not permitted") {
		l.Fatalf("side %s: QEMU says of the disk: %v", s.name, e.Data)
	}
	if _, err := s.qmp.WaitEvent("STOP", nil, migrateTimeout); err != nil {
		l.Fatalf("side %s: %v", s.name, err)
	}
	if st := l.status(s); st != "io-error" {
		l.Fatalf("side %s: the guest is %s", s.name, st)
	}
}

// link makes the path by which a side's exporter knows the image name a file.
func (s *side) link(t testing.TB, file string) {
	t.Helper()
	if err := os.Remove(s.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if err := os.Symlink(file, s.path); err != nil {
		t.Fatal(err)
	}
}
