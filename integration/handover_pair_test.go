package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
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
	Steps   []handoverStep
	Images  []struct{ Proof string }
	From    handoverSide `json:"from"`
	To      handoverSide `json:"to"`
}

type handoverStep struct {
	Step, Error string
	MS          float64
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

// rest waits until what is under way at either side has ended, which it does by
// itself.
func (p *pair) rest() {
	p.t.Helper()
	waitFor(p.t, startTimeout, "both sides are at rest", func() bool {
		s := p.states()
		return !strings.HasSuffix(s[0], "ing") && !strings.HasSuffix(s[1], "ing")
	})
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
	// Those of a side that was killed end with the I/O it had submitted.
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

// stuckAfter is when a handover takes longer than on any machine.
const stuckAfter = time.Minute

// unlessStuck waits until a handover is over. If it is stuck, it and the exporters
// say where they are, which ends them.
func (p *pair) unlessStuck(h *handoverProcess) {
	p.t.Helper()
	select {
	case <-h.exited:
		return
	case <-time.After(stuckAfter):
	}
	for _, stuck := range []*process{h.process, p.sides[0].process, p.sides[1].process} {
		if stuck.alive() {
			stuck.signal(syscall.SIGABRT)
			stuck.wait(startTimeout)
		}
	}
	p.t.Fatalf("not over within %v", stuckAfter)
}

func (h *handoverProcess) result() result {
	h.t.Helper()
	code := h.wait(toolTimeout)
	return result{stdout: h.stdout.String(), stderr: h.log.String(), code: code}
}
