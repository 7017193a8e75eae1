package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

// handoverReport is what "handover --json" prints.
type handoverReport struct {
	Outcome string  `json:"outcome"`
	Error   string  `json:"error"`
	Next    string  `json:"next"`
	IfGone  string  `json:"next-if-gone"`
	Gap     float64 `json:"gap-ms"`
	Steps   []struct{ Step, Error string }
	Images  []struct{ Proof string }
	From    handoverSide `json:"from"`
	To      handoverSide `json:"to"`
}

type handoverSide struct{ State, Error string }

// handover runs the verb with --json; more flags may be given.
func handover(t testing.TB, from, to string, flags ...string) handoverReport {
	t.Helper()
	return parseHandover(t, cli(t, append([]string{"handover", "--json", "--from", from, "--to", to}, flags...)...))
}

func parseHandover(t testing.TB, r result) (h handoverReport) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.stdout), &h); err != nil {
		t.Fatalf("handover --json: %v\nexit status %d\n%s%s", err, r.code, r.stdout, r.stderr)
	}
	good := h.Outcome == "moved" || h.Outcome == "already"
	switch {
	case good != (r.code == 0), !good && r.code != 1:
		t.Errorf("outcome %q with exit status %d", h.Outcome, r.code)
	case !good && (h.Next == "" || !strings.Contains(r.stderr, h.Next) || strings.Count(r.stderr, "\n") != 1):
		t.Errorf("the error is not one line that says what to run next (%s): %s", h.Next, r.stderr)
	}
	return h
}

// pair is two exporters of one image, and clients that write through both.
type pair struct {
	t     testing.TB
	image string
	sides [2]*daemon
	load  [2]*writer
}

func newPair(t testing.TB, dir string, flags ...string) *pair {
	t.Helper()
	p := &pair{t: t, image: sparseImage(t, dir, 4*mib)}
	p.sides = [2]*daemon{serve(t, p.image, flags...), serve(t, p.image, append(slices.Clone(flags), "--inactive")...)}
	for i := range p.sides {
		p.load[i] = startWriter(t, p.sides[i], i)
	}
	return p
}

// states is what both sides say, "gone" for one that has ended.
func (p *pair) states() (s [2]string) {
	for i, e := range p.sides {
		s[i] = "gone"
		if e.alive() {
			q := e.qmp()
			s[i] = q.status().State
			q.Close()
		}
	}
	return s
}

// judge requires that at most one side owns the image, and that its locks say
// the same. It returns the owner's number, -1 for none.
func (p *pair) judge() int {
	p.t.Helper()
	owner := -1
	states := p.states()
	for i, s := range states {
		switch s {
		case "active":
			if owner >= 0 {
				p.t.Fatalf("both sides are active")
			}
			owner = i
			if held := processLocks(p.t, p.sides[i].pid, p.image); !slices.Equal(held, activeLocks) {
				p.t.Errorf("an active side holds %v", held)
			}
		case "inactive":
			if held := processLocks(p.t, p.sides[i].pid, p.image); len(held) > 0 {
				p.t.Errorf("an inactive side holds %v", held)
			}
			if w := writableHolds(p.t, p.sides[i].pid, p.image); len(w) > 0 {
				p.t.Errorf("an inactive side can write: %v", w)
			}
		case "gone":
		default:
			p.t.Errorf("a side is %s", s)
		}
	}
	var want []int
	if owner >= 0 {
		want = activeLocks
	}
	// The list is not read at once: while others lock, one may show twice.
	waitFor(p.t, startTimeout, fmt.Sprintf("%v are the bytes locked", want), func() bool {
		return slices.Equal(fileLocks(p.t, p.image), want)
	})
	return owner
}

// agree requires that a report says what is.
func (p *pair) agree(h handoverReport, from int) {
	p.t.Helper()
	for i, said := range map[int]string{from: h.From.State, 1 - from: h.To.State} {
		if is := p.states()[i]; said != is && said != "unknown" {
			p.t.Errorf("the report says %s of a side that is %s: %+v", said, is, h)
		}
	}
}

// end stops the clients and requires that everything they were told is there.
func (p *pair) end() {
	p.t.Helper()
	for _, w := range p.load {
		w.stop()
	}
	for _, e := range p.sides {
		if e.alive() {
			e.stop()
		}
	}
	content := readFile(p.t, p.image)
	total := uint64(0)
	for _, w := range p.load {
		total += w.acked
		w.judge(content)
	}
	if total == 0 {
		p.t.Error("no write was acknowledged at all")
	}
}

// writer is a client that writes numbered sectors, one after the other, to
// sectors that are its own, through one exporter.
type writer struct {
	t      testing.TB
	e      *daemon
	first  int      // its sectors
	last   []uint64 // last id acknowledged of each
	sent   []uint64 // last id sent to each
	acked  uint64
	cancel context.CancelFunc
	done   sync.WaitGroup
}

const writerSectors = 64

func startWriter(t testing.TB, e *daemon, n int) *writer {
	return (&writer{
		t: t, first: n * writerSectors, last: make([]uint64, writerSectors), sent: make([]uint64, writerSectors),
	}).again(e)
}

// again starts w, or goes on where it has stopped, through an exporter.
func (w *writer) again(e *daemon) *writer {
	w.e = e
	var ctx context.Context
	ctx, w.cancel = context.WithCancel(context.Background())
	w.done.Go(func() { w.run(ctx) })
	w.t.Cleanup(w.stop)
	return w
}

func (w *writer) stop() { w.cancel(); w.done.Wait() }

func (w *writer) run(ctx context.Context) {
	var c *client.Conn
	defer func() {
		if c != nil {
			c.Abort()
		}
	}()
	b := make([]byte, sectorSize)
	for id := slices.Max(w.sent) + 1; ctx.Err() == nil; id++ {
		if c == nil {
			dialed, err := client.Dial(ctx, w.e.uri(), client.Options{})
			if err != nil {
				select {
				case <-w.e.exited:
					return
				case <-ctx.Done():
					return
				case <-time.After(20 * time.Millisecond):
				}
				continue
			}
			c = dialed
			context.AfterFunc(ctx, c.Abort)
		}
		i := int(id % writerSectors)
		fillSector(b, w.first+i, id)
		w.sent[i] = id
		_, err := c.WriteAt(b, int64(w.first+i)*sectorSize, false)
		var no *client.Error
		switch {
		case err == nil:
			w.last[i], w.acked = id, w.acked+1
		case errors.As(err, &no):
			if no.Errno != syscall.EPERM && no.Errno != syscall.ESHUTDOWN {
				w.t.Errorf("a client got %v", err)
			}
			time.Sleep(time.Millisecond)
		default:
			c.Abort()
			c = nil
		}
		time.Sleep(200 * time.Microsecond) // the machine has other work
	}
}

func (w *writer) judge(content []byte) {
	w.t.Helper()
	for i, last := range w.last {
		at := (w.first + i) * sectorSize
		if now := readSector(content[at:at+sectorSize], w.first+i); now == torn || now < last || now > w.sent[i] {
			w.t.Errorf("sector %d holds write %d; %d was acknowledged, %d sent", w.first+i, now, last, w.sent[i])
		}
	}
}

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
		flags := []string{"--timeout", "20s"}
		if then == "dead" || trouble == relayStall {
			flags[1] = "300ms"
		}
		h := handover(t, ctl[0], ctl[1], flags...)
		outcomes[h.Outcome]++
		// What is under way ends by itself.
		waitFor(t, startTimeout, "both sides are at rest", func() bool {
			s := p.states()
			return !strings.HasSuffix(s[0]+s[1], "ing")
		})
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

// answerToOrder is the number of the message, through a command, that answers
// the order to inactivate or activate; the order is the one before.
const answerToOrder = 9

// letGo begins a handover and stops it where the source is inactive and the
// command does not know yet.
func (p *pair) letGo(flags ...string) (*handoverProcess, *held) {
	p.t.Helper()
	ctl, answer := hold(p.t, p.sides[0], answerToOrder)
	cmd := newHandoverProcess(p.t, ctl, p.sides[1].control, flags...)
	answer.wait(cmd.process)
	if s := p.states(); s != [2]string{"inactive", "inactive"} {
		p.t.Fatalf("the sides are %v before the source's answer; %s", s, cmd.log)
	}
	return cmd, answer
}

// The destination refuses when the source has let go: it is taken back.
func TestHandoverReturns(t *testing.T) {
	dir := tmpfsDir(t)
	link, other := filepath.Join(dir, "link"), filepath.Join(dir, "other")
	p := &pair{t: t, image: sparseImage(t, dir, 4*mib)}
	pointTo := func(target string) {
		t.Helper()
		if err := errors.Join(os.RemoveAll(link), os.Symlink(target, link)); err != nil {
			t.Fatal(err)
		}
	}
	pointTo(p.image)
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p.sides = [2]*daemon{serve(t, p.image), serve(t, link, "--inactive")}
	for i := range p.sides {
		p.load[i] = startWriter(t, p.sides[i], i)
	}

	cmd, answer := p.letGo()
	pointTo(other)
	answer.release()
	if h := parseHandover(t, cmd.result()); h.Outcome != "returned" || h.From.State != "active" || h.To.State != "inactive" {
		t.Errorf("%+v", h)
	}
	if owner := p.judge(); owner != 0 {
		t.Fatalf("side %d owns the image", owner)
	}
	// Nor when it is written to meanwhile.
	pointTo(p.image)
	cmd, answer = p.letGo()
	pointTo(other)
	if f, err := os.OpenFile(p.image, os.O_WRONLY, 0); err != nil {
		t.Fatal(err)
	} else if _, err := f.WriteAt([]byte{1}, 3*mib); err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	answer.release()
	h := parseHandover(t, cmd.result())
	if h.Outcome != "unowned" || !strings.Contains(h.Error, "image was modified while inactive") {
		t.Errorf("%+v", h)
	}
	if owner := p.judge(); owner != -1 {
		t.Fatalf("side %d owns the image", owner)
	}
	pointTo(p.image)
	if h := handover(t, p.sides[0].control, p.sides[1].control); h.Outcome != "moved" {
		t.Errorf("%+v", h)
	}
	p.end()
}

// patiences are the timeouts of handovers that have to time out at one point:
// the least with which a machine that is busy gets there.
var patiences = []string{"500ms", "2s", "8s"}

// A destination that hangs when the source has let go leaves both as they are,
// and it is finished once it answers.
func TestHandoverDestinationHangs(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	for i, patience := range patiences {
		ctl, answer := hold(t, p.sides[0], answerToOrder)
		cmd := newHandoverProcess(t, ctl, p.sides[1].control, "--timeout", patience)
		answer.wait(cmd.process)
		p.sides[1].signal(syscall.SIGSTOP)
		answer.release()
		h := parseHandover(t, cmd.result())
		p.sides[1].signal(syscall.SIGCONT)
		if h.Outcome == "moved" && i < len(patiences)-1 {
			t.Logf("%s was over before the destination was stopped", patience)
			handover(t, p.sides[1].control, p.sides[0].control)
			continue
		}
		if h.Outcome != "unknown" || h.To.State != "unknown" || h.From.State != "inactive" || h.IfGone == "" {
			t.Errorf("%+v", h)
		}
		break
	}
	if h := handover(t, p.sides[0].control, p.sides[1].control); h.Outcome != "moved" && h.Outcome != "already" {
		t.Errorf("%+v", h)
	}
	if owner := p.judge(); owner != 1 {
		t.Errorf("side %d owns the image", owner)
	}
	p.end()
}

// A destination that dies when the source has let go is seen to be gone, and
// the source takes back.
func TestHandoverDestinationDies(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	cmd, answer := p.letGo()
	p.sides[1].kill()
	answer.release()
	if h := parseHandover(t, cmd.result()); h.Outcome != "returned" || h.From.State != "active" || h.To.State != "unknown" {
		t.Errorf("%+v", h)
	}
	if owner := p.judge(); owner != 0 {
		t.Errorf("side %d owns the image", owner)
	}
	p.end()
}

// The same, where the destination cannot be seen to be gone.
func TestHandoverRemoteDies(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	ctl, order := hold(t, p.sides[1], answerToOrder-1)
	cmd := newHandoverProcess(t, p.sides[0].control, ctl, "--timeout", "2s")
	order.wait(cmd.process)
	p.sides[1].kill()
	order.release()
	h := parseHandover(t, cmd.result())
	if h.Outcome == "returned" {
		t.Fatal("2s were over before the destination was killed: this machine is too busy to test anything")
	}
	if h.Outcome != "unknown" || h.From.State != "inactive" || h.IfGone == "" || p.judge() != -1 {
		t.Errorf("%+v", h)
	}
	run(t, "/bin/sh", "-c", strings.Replace(h.IfGone, "nbd-export", program(t), 1))
	if owner := p.judge(); owner != 0 {
		t.Errorf("side %d owns the image after %s", owner, h.IfGone)
	}
	p.end()
}

// Either exporter is killed at each message from the proof on: afterwards at
// most one owns the image, and what the command says to run next makes the
// survivor the owner.
func TestHandoverExporterKilled(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	from := 0
	outcomes := map[string]int{}
	for n := range 2 * 2 * 6 {
		victim, at, through := (from+n)%2, answerToOrder-3+n/4, n/2%2
		ctl := [2]string{p.sides[from].control, p.sides[1-from].control}
		var message *held
		ctl[through], message = hold(t, p.sides[(from+through)%2], at)
		cmd := newHandoverProcess(t, ctl[0], ctl[1], "--timeout", "700ms")
		message.wait(cmd.process)
		p.sides[victim].kill()
		message.release()
		h := parseHandover(t, cmd.result())
		outcomes[h.Outcome]++
		what := fmt.Sprintf("side %d killed at message %d through %d, from %d: %+v", victim, at, through, from, h)
		switch owner := p.judge(); {
		case owner == 1-victim:
		case h.Outcome == "moved" && victim != from: // it had answered that it owns it
			p.sides[from].activate()
		case [2]string{h.From.State, h.To.State}[(victim+from)%2] != "unknown":
			t.Logf("the time was over before the kill: %s", what)
			p.sides[1-victim].activate()
		default:
			next := h.Next
			if h.IfGone != "" {
				next = h.IfGone
			}
			if !strings.Contains(next, " activate ") {
				t.Fatalf("nobody owns the image, and it says to run %s: %s", next, what)
			}
			run(t, "/bin/sh", "-c", strings.Replace(next, "nbd-export", program(t), 1))
			if owner := p.judge(); owner != 1-victim {
				t.Fatalf("the survivor does not own the image after %s: %s", next, what)
			}
		}
		p.load[victim].stop()
		p.sides[victim] = serve(t, p.image, "--inactive")
		p.load[victim].again(p.sides[victim])
		from = 1 - victim
	}
	t.Logf("outcomes: %v", outcomes)
	p.end()
}

// handoverProcess is a handover that runs beside the test.
type handoverProcess struct {
	*process
	stdout *logBuffer
}

func newHandoverProcess(t testing.TB, from, to string, flags ...string) *handoverProcess {
	t.Helper()
	h := &handoverProcess{stdout: new(logBuffer)}
	argv := append([]string{program(t), "handover", "--json", "--from", from, "--to", to}, flags...)
	h.process = spawn(t, "handover", func(c *exec.Cmd) { c.Stdout = h.stdout }, argv...)
	return h
}

func (h *handoverProcess) result() result {
	h.t.Helper()
	code := h.wait(toolTimeout)
	return result{stdout: h.stdout.String(), stderr: h.log.String(), code: code}
}

// The command is killed, or told to stop, at every message: run again it
// finishes.
func TestHandoverKilled(t *testing.T) {
	p := newPair(t, tmpfsDir(t))
	from := 0
	outcomes := map[string]int{}
	for n := range 3 * 2 * 11 {
		sig := []syscall.Signal{syscall.SIGKILL, syscall.SIGINT, syscall.SIGTERM}[n%3]
		side, at := n/3%2, 1+n/6
		ctl := [2]string{p.sides[from].control, p.sides[1-from].control}
		var message *held
		ctl[side], message = hold(t, p.sides[(from+side)%2], at)
		cmd := newHandoverProcess(t, ctl[0], ctl[1])
		message.wait(cmd.process)
		_ = cmd.cmd.Process.Signal(sig) // it may just have ended
		if sig == syscall.SIGKILL {
			cmd.wait(toolTimeout)
		}
		message.release()
		if code := cmd.wait(toolTimeout); code == 128+int(syscall.SIGKILL) {
			outcomes["killed"]++
		} else {
			h := parseHandover(t, cmd.result())
			outcomes[h.Outcome]++
			p.agree(h, from)
		}
		again := handover(t, p.sides[from].control, p.sides[1-from].control)
		if owner := p.judge(); owner != 1-from || again.Outcome != "moved" && again.Outcome != "already" {
			t.Fatalf("%v at message %d of side %d: side %d owns the image: %+v", sig, at, side, owner, again)
		}
		from = 1 - from
	}
	t.Logf("outcomes: %v", outcomes)
	for _, o := range []string{"killed", "cancelled", "moved"} {
		if outcomes[o] == 0 {
			t.Errorf("no handover ended %s: too little happened to prove anything", o)
		}
	}
	p.end()
}

// Two commands at once, the same way and against each other.
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
