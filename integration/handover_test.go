package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestHandover(t *testing.T) {
	everyPlace(t, func(t *testing.T, dir string) {
		p := newPair(t, dir)
		for i := range 10 {
			from, to := p.sides[i%2], p.sides[1-i%2]
			switch i {
			case 2: // through commands
				h := handover(t, "exec:"+program(t)+" control-stdio "+from.control, "exec:"+program(t)+" control-stdio "+to.control)
				if h.Outcome != "moved" || h.Images[0].Proof != "owner record" {
					t.Errorf("%+v", h)
				}
			case 3: // for people
				r := cli(t, "handover", "--from", "unix:"+from.control, "--to", to.control)
				if r.code != 0 || !strings.HasPrefix(r.stdout, "handed ") || r.stderr != "" {
					t.Errorf("%+v", r)
				}
			default:
				if h := handover(t, from.control, to.control, "--node", "image0"); h.Outcome != "moved" || h.From.State != "inactive" || h.To.State != "active" {
					t.Errorf("%+v", h)
				}
			}
			if owner := p.judge(); owner != 1-i%2 {
				t.Fatalf("side %d owns the image", owner)
			}
		}
		if h := handover(t, p.sides[1].control, p.sides[0].control); h.Outcome != "already" {
			t.Errorf("%+v", h)
		}
		p.end()
	})
}

func TestHandoverSideBySide(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	a, b := p.sides[0], p.sides[1]
	out := run(t, program(t), "status", "--control", a.control, "--control", "exec:"+program(t)+" control-stdio "+b.control)
	found := false
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "state" {
			found = f[1] == "active" && f[2] == "inactive"
		}
	}
	if !found {
		t.Errorf("both states are not side by side:\n%s", out)
	}
	r := cli(t, "status", "--json", "--control", a.control, "--control", b.control+"x")
	var list []struct {
		Control, Error string
		Status         *struct{ Images []status }
	}
	if err := json.Unmarshal([]byte(r.stdout), &list); err != nil || len(list) != 2 || r.code != 1 ||
		list[0].Status.Images[0].State != "active" || list[1].Status != nil || list[1].Error == "" {
		t.Errorf("%v: %+v", err, r)
	}
	p.end()
}

// The command between the two hosts is slow, or ends, at each message of the
// conversation, and for good or not.
func TestHandoverThroughTrouble(t *testing.T) {
	const messages = 11
	p := newPair(t, tmpfsDir(t))
	from := 0
	outcomes := map[string]int{}
	try := func(trouble string, at, side int, then string) {
		what := fmt.Sprintf("%s message %d of side %d, then %s", trouble, at, side, then)
		ctl := [2]string{p.sides[from].control, p.sides[1-from].control}
		ctl[side] = relay(t, p.sides[(from+side)%2], trouble, at, then)
		flags := []string{"--timeout", (2 * stuckAfter).String()}
		if then == "dead" || trouble == relayStall {
			flags[1] = "300ms"
		}
		cmd := newHandoverProcess(t, ctl[0], ctl[1], flags...)
		p.unlessStuck(cmd)
		h := parseHandover(t, cmd.result())
		outcomes[h.Outcome]++
		p.rest()
		if trouble == relayDelay && h.Outcome != "moved" {
			t.Errorf("%s: %+v", what, h)
		}
		owner := p.judge()
		if h.Outcome == "moved" && owner != 1-from || h.Outcome == "returned" && owner != from {
			t.Errorf("%s: side %d owns the image: %+v", what, owner, h)
		}
		if t.Failed() {
			t.Fatalf("%s: %+v", what, h)
		}
		// Run again, all being well, it finishes or finds that it is done.
		again := handover(t, p.sides[from].control, p.sides[1-from].control)
		if owner := p.judge(); owner != 1-from {
			t.Fatalf("%s (%s: %s), and again (%s: %s): side %d owns the image", what, h.Outcome, h.Error, again.Outcome, again.Error, owner)
		}
		from = 1 - from
	}
	for side := range 2 {
		for at := 1; at <= messages; at++ {
			for _, trouble := range []string{relayDelay, relayBefore, relayAfter} {
				try(trouble, at, side, "well")
			}
			if at == answerToOrder-1 || at == answerToOrder {
				try(relayBefore, at, side, "dead")
				try(relayStall, at, side, "well")
			}
		}
	}
	t.Logf("outcomes: %v", outcomes)
	for _, o := range []string{"moved", "refused", "unknown"} {
		if outcomes[o] == 0 {
			t.Errorf("no handover ended %s: too little happened to prove anything", o)
		}
	}
	p.end()
}

func TestHandoverRefusesOthers(t *testing.T) {
	dir := tmpfsDir(t)
	p := newPair(t, dir)
	refused := func(image, why string, flags ...string) {
		t.Helper()
		other := serve(t, image, append([]string{"--inactive"}, flags...)...)
		before, mine := snap(t, image), p.sides[0].status()
		h := handover(t, p.sides[0].control, other.control)
		if h.Outcome != "refused" || !strings.Contains(h.Error, why) || h.From.State != "active" || h.To.State != "inactive" {
			t.Errorf("want %s: %+v", why, h)
		}
		for _, s := range h.Steps {
			if s.Step == "inactivate" || s.Step == "activate" {
				t.Errorf("refused after %s", s.Step)
			}
		}
		if image != p.image { // which is being written
			sameSnap(t, image, before)
		}
		if now := p.sides[0].status(); now.State != "active" || now.Epoch != mine.Epoch {
			t.Errorf("the owner is %s in epoch %d", now.State, now.Epoch)
		}
		other.stop()
	}
	copied := filepath.Join(dir, "copy.img")
	for name, b := range map[string][]byte{copied: readFile(t, p.image), copied + ".owner": readFile(t, p.image+".owner")} {
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	refused(copied, "not the same image")
	if err := os.Truncate(copied, mib); err != nil {
		t.Fatal(err)
	}
	refused(copied, "not the same image")
	refused(p.image, "without --read-only", "--read-only")
	wantFailure(t, cli(t, "handover", "--from", p.sides[0].control, "--to", p.sides[0].control), 2, "both")
	wantFailure(t, cli(t, "handover", "--from", p.sides[0].control), 2, "--to")
	if h := handover(t, p.sides[0].control, p.sides[1].control, "--node", "nothing"); h.Outcome != "refused" || !strings.Contains(h.Error, "nothing") {
		t.Errorf("%+v", h)
	}
	p.end()
}

// On a terminal each step is shown, with its time.
func TestHandoverOnTerminal(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	screen, stderr := terminal(t)
	cmd := command(context.Background(), program(t), "handover", "--from", p.sides[0].control, "--to", p.sides[1].control)
	cmd.Stderr = stderr
	out, err := cmd.Output()
	stderr.Close()
	if err != nil || !strings.HasPrefix(string(out), "handed ") {
		t.Fatalf("%v: %s", err, out)
	}
	shown, _ := io.ReadAll(screen) // ends with EIO
	if want := regexp.MustCompile(`^(\w+ +[a-z ]+\.\.\.\r\w+ +[a-z ]+[0-9.]+ ms\r\n){4}$`); !want.Match(shown) {
		t.Errorf("%q", shown)
	}
	for _, step := range []string{"check ", "compare ", "inactivate ", "activate "} {
		if strings.Count(string(shown), "\r"+step) != 1 {
			t.Errorf("no line of %s: %q", step, shown)
		}
	}
	p.end()
}

// terminal is a terminal, and what is shown on it.
func terminal(t testing.TB) (screen, tty *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { screen.Close() })
	fd := int(screen.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	return screen, tty
}

// Without owner records one file under one kernel is proof enough.
func TestHandoverWithoutRecord(t *testing.T) {
	p := newPair(t, tmpfsDir(t), "--owner-record", "off")
	if h := handover(t, p.sides[0].control, p.sides[1].control); h.Outcome != "moved" || h.Images[0].Proof != "device and inode" {
		t.Errorf("%+v", h)
	}
	if owner := p.judge(); owner != 1 {
		t.Errorf("side %d owns the image", owner)
	}
	p.end()
}

// Two commands at once, the same way and against each other.
// A full disk must not keep its owner.
func TestHandoverOnFullDisk(t *testing.T) {
	image := smallDisk(t)
	a, b := serve(t, image), serve(t, image, "--inactive")
	c := dialRaw(t, a.socket, "")
	for off := uint64(0); c.do(cmdWrite, 0, off, 4096, randomBytes(int64(off), 4096)).errno == 0; off += 4096 {
	}
	for _, way := range [][2]*daemon{{a, b}, {b, a}} {
		h := handover(t, way[0].control, way[1].control)
		if h.Outcome != "moved" {
			t.Fatalf("%+v", h)
		}
	}
	wantServes(t, c, 0, 1)
}

func TestHandoverRace(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	outcomes := map[string]int{}
	for n := range 12 {
		from := max(0, p.judge())
		a, b := p.sides[from].control, p.sides[1-from].control
		c, d := a, b
		if n%2 == 1 {
			c, d = b, a
		}
		one, two := newHandoverProcess(t, a, b), newHandoverProcess(t, c, d)
		h, g := parseHandover(t, one.result()), parseHandover(t, two.result())
		outcomes[h.Outcome]++
		outcomes[g.Outcome]++
		owner := p.judge()
		if n%2 == 0 && (owner != 1-from || h.From.State != "inactive" || g.To.State != "active") {
			t.Errorf("two the same way: side %d owns the image: %+v and %+v", owner, h, g)
		}
	}
	t.Logf("outcomes: %v", outcomes)
	if owner := p.judge(); owner < 0 {
		p.sides[0].activate()
	}
	p.end()
}

// QEMU's storage daemon can be either side, if the user answers for the image.
func TestHandoverWithQEMU(t *testing.T) {
	image := sparseImage(t, tmpfsDir(t), mib)
	ours, qemu := serve(t, image), serveQSD(t, image, true)
	if h := handover(t, ours.control, qemu.control); h.Outcome != "refused" || !strings.Contains(h.Error, "--assume-same-image") {
		t.Errorf("%+v", h)
	}
	for range 2 {
		wantServes(t, dialRaw(t, ours.socket, ""), 0, 1)
		if h := handover(t, ours.control, qemu.control, "--assume-same-image"); h.Outcome != "moved" || h.To.State != "active" || h.From.State != "inactive" {
			t.Fatalf("%+v", h)
		}
		if h := handover(t, ours.control, qemu.control, "--assume-same-image"); h.Outcome != "already" {
			t.Errorf("%+v", h)
		}
		mustQemuIO(t, qemu.uri(), "write -P 7 4096 4096")
		if h := handover(t, qemu.control, ours.control, "--assume-same-image"); h.Outcome != "moved" || h.To.State != "active" || h.From.State != "inactive" {
			t.Fatalf("%+v", h)
		}
	}
	if fileAt(t, image, 4096, 1)[0] != 7 {
		t.Error("what was written through QEMU is lost")
	}
}

// An order for several nodes that QEMU's daemon refuses half way does not leave
// those before with no owner.
func TestHandoverHalfByQEMU(t *testing.T) {
	ours, qemu := startManager(t, managers[0]), startManager(t, managers[1])
	for _, name := range []string{"a", "b"} {
		image := ours.image(name+".img", mib)
		for _, m := range []*manager{ours, qemu} {
			active := m == qemu
			m.must(
				fmt.Sprintf(`blockdev-add {"driver":"file","node-name":"%s-file","filename":"%s","active":%t}`, name, image, active),
				fmt.Sprintf(`blockdev-add {"driver":"raw","node-name":"%s","file":"%[1]s-file","active":%t}`, name, active))
		}
	}
	for _, m := range []*manager{ours, qemu} {
		m.must(`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}}}`,
			`block-export-add {"type":"nbd","id":"a","node-name":"a","writable":true,"allow-inactive":true}`,
			fmt.Sprintf(`block-export-add {"type":"nbd","id":"b","node-name":"b","writable":true,"allow-inactive":%t}`, m == ours))
	}
	control := func(m *manager) string { return filepath.Join(m.dir, "ctl") }
	qemu.q.Close() // it serves one client at a time
	h := handover(t, control(qemu), control(ours), "--assume-same-image")
	if h.Outcome != "returned" || h.From.State != "active" || h.To.State != "inactive" {
		t.Errorf("%+v", h)
	}
	qemu.kill()
	ours.quit()
}

func TestControlStdio(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), mib))
	const talk = `{"execute":"qmp_capabilities"}{"execute":"query-version","id":"last"}`
	// The end of the input is passed on, and the answers still come.
	r := tryRunInput(t, talk, program(t), "control-stdio", e.control)
	if r.code != 0 || r.stderr != "" || !strings.HasPrefix(r.stdout, `{"QMP"`) || !strings.Contains(r.stdout, `"id": "last"`) {
		t.Errorf("%+v", r)
	}
	wantFailure(t, cli(t, "control-stdio", e.control+"x"), 1, e.control+"x", "no such file")
	wantFailure(t, cli(t, "control-stdio"), 2, "PATH")
	// When the server ends the stream, it ends, although its input goes on.
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p := spawn(t, "control-stdio", func(c *exec.Cmd) { c.Stdin = in }, program(t), "control-stdio", "unix:"+e.control)
	in.Close()
	if _, err := out.WriteString(`{"execute":"qmp_capabilities"}{"execute":"quit"}`); err != nil {
		t.Fatal(err)
	}
	if code := p.wait(startTimeout); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if code := e.wait(startTimeout); code != 0 {
		t.Errorf("the server's exit status is %d", code)
	}
}
