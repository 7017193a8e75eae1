package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const (
	trioSites   = 3
	trioClients = 8
	trioSectors = 256      // that are judged: few, so that clients meet
	trioStride  = 16 * kib // from one of them to the next
	trioSize    = trioSectors * trioStride
	trioRound   = 10 * time.Second
)

// TestThreeExporters has three exporters of one image, eight clients, and
// somebody who throws ownership about, kills and stops exporters and starts
// them again, all at random, and then judges what every client saw.
// NBD_EXPORT_SOAK sets for how long (default 30s), NBD_EXPORT_SEED repeats the
// random choices of a run, and NBD_EXPORT_HISTORY judges a history again that a
// failed run has left.
func TestThreeExporters(t *testing.T) {
	if path := os.Getenv("NBD_EXPORT_HISTORY"); path != "" {
		judgeAgain(t, path)
		return
	}
	// On disk past the page cache a write takes its time, also after the death
	// of its exporter.
	d := soakTime(t, 30*time.Second)
	t.Run("tmpfs", func(t *testing.T) { runTrio(t, tmpfsDir(t), d*2/3) })
	t.Run("disk", func(t *testing.T) { runTrio(t, diskDir(t), d/3, "--cache", "none") })
}

func runTrio(t *testing.T, dir string, d time.Duration, flags ...string) {
	s := newTrio(t, dir, flags...)
	s.onDemand = true
	s.actions = s.allActions()
	for ; d > 0 && !t.Failed(); d -= trioRound {
		s.round(min(trioRound, d), s.orchestrate)
	}
	for extra := 0; extra < extraRounds && !s.did.enough() && !t.Failed(); extra++ {
		s.round(trioRound, s.orchestrate)
	}
	t.Log(&s.did)
	for _, a := range s.actions {
		t.Logf("%4d times: %s", a.times, a.name)
	}
	if !s.did.enough() {
		t.Error("too little happened to prove anything")
	}
}

// Without locks nothing keeps the owners apart, and the judge says so: a test
// of the test.
func TestThreeExportersWithoutLocks(t *testing.T) {
	s := newTrio(t, tmpfsDir(t), "--locking", "off", "--owner-record", "off")
	s.condemned = true
	s.round(time.Hour, func(context.Context) {
		for _, w := range s.sites {
			s.order(w.exporter(), true, byQMP)
		}
		// Until clients of all have been told that they wrote, and everybody has been
		// asked whether it is the owner.
		enough := s.did.samples.Load() + 3*trioSites
		waitFor(t, startTimeout, "writes through all exporters", func() bool {
			return s.did.samples.Load() >= enough && !slices.ContainsFunc(s.sites[:], func(w *site) bool { return w.exporter().acked.Load() < 100 })
		})
	})
	for _, want := range []string{"two owners at once", "no order of the acknowledged writes"} {
		if !slices.ContainsFunc(s.verdicts, func(v string) bool { return strings.Contains(v, want) }) {
			t.Errorf("the judge does not say %q of exporters without locks", want)
		}
	}
	// And says it again of what is kept.
	var again recording
	path := keep(t, s.rec)
	defer os.Remove(path)
	if err := json.Unmarshal(readFile(t, path), &again); err != nil {
		t.Fatal(err)
	}
	if n := len(again.judge()); n != len(s.verdicts) {
		t.Errorf("%d faults of a history that was kept, %d before", n, len(s.verdicts))
	}
}

// trio is the three exporters and all that is known of them.
type trio struct {
	t         *testing.T
	seed      uint64
	image     string
	flags     []string
	actions   []*action
	onDemand  bool // exporters may hold writes and take over by themselves
	takeovers int  // how many of 100 exporters take over by themselves, this round
	start     time.Time
	sites     [trioSites]*site
	condemned bool // the judge is expected to find fault
	verdicts  []string
	rounds    int
	held      []uint64 // what each sector holds between rounds
	did       deeds
	ids, odd  atomic.Uint64
	rnd       *rand.Rand // the orchestrator's

	mu  sync.Mutex // guards rec and its Lives; a leaf
	rec *recording
}

// deeds count what happened.
type deeds struct {
	acked, refused, unknown, reads, mixed, samples, owners, killed, orders, ordersRefused, handovers, takeovers, rests atomic.Uint64
}

// enough happened to prove something.
func (d *deeds) enough() bool {
	return d.acked.Load() >= 100 && d.refused.Load() >= 1 && d.reads.Load() >= 50 && d.owners.Load() >= 5 && d.samples.Load() >= 5
}

func (d *deeds) String() string {
	return fmt.Sprintf("%d writes acknowledged, %d refused, %d unknown; %d reads, %d mixed; %d owners, %d orders carried out, %d refused, %d handovers, %d takeovers, %d times at rest; %d exporters killed; %d samples of state and locks",
		d.acked.Load(), d.refused.Load(), d.unknown.Load(), d.reads.Load(), d.mixed.Load(),
		d.owners.Load(), d.orders.Load(), d.ordersRefused.Load(), d.handovers.Load(), d.takeovers.Load(), d.rests.Load(), d.killed.Load(), d.samples.Load())
}

// site is where one exporter after the other runs, at the same sockets.
type site struct {
	s     *trio
	index int
	dir   string
	now   atomic.Pointer[exporter]
}

func (w *site) exporter() *exporter { return w.now.Load() }

func (w *site) socket() string  { return filepath.Join(w.dir, "nbd") }
func (w *site) control() string { return filepath.Join(w.dir, "ctl") }

// exporter is one process at a site.
type exporter struct {
	*daemon
	s      *trio
	site   *site
	via    int16
	acked  atomic.Uint64 // writes
	ready  atomic.Bool   // it serves; daemon is to be used from then on
	ending atomic.Bool   // the test ends it: connections may break
}

func newTrio(t *testing.T, dir string, flags ...string) *trio {
	s := &trio{t: t, seed: soakSeed(t), image: sparseImage(t, dir, trioSize), flags: flags,
		start: time.Now(), held: make([]uint64, trioSectors)}
	s.rnd = rand.New(rand.NewPCG(s.seed, 0))
	for i := range s.sites {
		s.sites[i] = &site{s: s, index: i, dir: shortDir(t)}
	}
	return s
}

func (s *trio) now() int64 { return int64(time.Since(s.start)) }

// round starts everything, lets clients and the orchestrator at it for a while,
// stops everything, and judges. No process outlives a round, so that nothing of
// it can come later.
func (s *trio) round(d time.Duration, orchestrate func(context.Context)) {
	t := s.t
	s.rounds++
	s.rec = &recording{Seed: s.seed, Round: s.rounds, First: s.held}
	if s.onDemand {
		s.takeovers = []int{0, 40, 80}[s.rounds%3]
	}
	for _, w := range s.sites {
		w.launch(false)
	}
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	var clients, watchers sync.WaitGroup
	histories := make([][]event, trioClients*clientDepth)
	for n := range trioClients {
		s.client(ctx, n, histories[n*clientDepth:(n+1)*clientDepth], &clients)
	}
	watching, stopWatching := context.WithCancel(context.Background())
	defer stopWatching()
	watchers.Go(func() { s.sample(watching) })
	watchers.Go(func() { s.watchRecord(watching) })
	orchestrate(ctx)
	cancel()
	clients.Wait()
	stopWatching()
	watchers.Wait()
	for _, w := range s.sites {
		e := w.exporter()
		// On one host also those that do not own the image have it as it is.
		c := dialRaw(t, w.socket(), "")
		sameBytes(t, "the image through an exporter at rest",
			c.want(0, cmdRead, 0, 0, trioSize, nil).data, readFile(t, s.image))
		c.Close()
		e.end()
	}
	wantLocks(t, s.image, nil)

	rec := s.rec
	rec.End = s.now()
	rec.Events = slices.Concat(histories...)
	rec.Last = make([]uint64, trioSectors)
	found := readFile(t, s.image)
	for i := range rec.Last {
		rec.Last[i] = readSector(found[i*trioStride:][:sectorSize], i)
	}
	s.held = rec.Last
	s.verdicts = rec.judge()
	owners, _ := rec.owners()
	s.did.owners.Add(uint64(len(owners)))
	if n := len(owners); n > 0 && !s.condemned {
		if r, last := s.record(), owners[n-1]; r.Epoch != last.Epoch || r.Clean == last.Died {
			t.Errorf("the owner record says %+v of the last owner: %v", r, last)
		}
	}
	t.Logf("round %d: %d events, %d owners, %d processes, judged in %v", s.rounds, len(rec.Events), len(owners), len(rec.Lives),
		time.Duration(s.now()-rec.End).Round(time.Millisecond))
	if len(s.verdicts) > 0 && !s.condemned {
		t.Errorf("NBD_EXPORT_SEED=%d; judge it again with NBD_EXPORT_HISTORY=%s", s.seed, keep(t, rec))
		report(t, owners, s.verdicts)
	}
}

func report(t *testing.T, owners []ownership, verdicts []string) {
	t.Helper()
	for i, v := range verdicts {
		if i == 5 {
			t.Errorf("and %d more", len(verdicts)-i)
			break
		}
		t.Error(v)
	}
	if len(verdicts) > 0 {
		t.Logf("owners:\n%s", explainOwners(owners))
	}
}

// keep writes a recording to a file that stays.
func keep(t *testing.T, rec *recording) string {
	t.Helper()
	b, err := json.Marshal(rec)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp("", "nbd-export-history-*.json")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func judgeAgain(t *testing.T, path string) {
	t.Helper()
	var rec recording
	if err := json.Unmarshal(readFile(t, path), &rec); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	owners, _ := rec.owners()
	report(t, owners, rec.judge())
}

// launch starts an exporter at a site whose last one has ended, and waits until
// it serves. One that is to start as the owner ends if another is; then an
// inactive one is started.
func (w *site) launch(active bool) *exporter {
	s, t := w.s, w.s.t
	t.Helper()
	flags := append(slices.Clone(s.flags), "--log-format", "json")
	flags = append(flags, s.habits(w)...)
	if !active {
		flags = append(flags, "--inactive")
	}
	e := &exporter{s: s, site: w}
	s.mu.Lock()
	e.via = int16(len(s.rec.Lives))
	s.rec.Lives = append(s.rec.Lives, lifetime{Site: w.index, Started: s.now()})
	s.mu.Unlock()
	// Whoever finds the same one here before and after it dialled has not met the
	// next one.
	w.now.Store(e)
	e.daemon = newDaemonIn(t, w.dir, s.image, func(cmd *exec.Cmd) {
		tee := io.MultiWriter(cmd.Stderr, &logReader{s: s, via: int(e.via)})
		cmd.Stdout, cmd.Stderr = tee, tee
	}, flags...)
	s.mu.Lock()
	s.rec.Lives[e.via].PID = e.pid
	s.mu.Unlock()
	waitFor(t, startTimeout, "an exporter serves, or has ended", func() bool { return !e.alive() || saysReady(e.process, e.pidFile) })
	if e.alive() {
		e.ready.Store(true)
		return e
	}
	e.ending.Store(true)
	if code := e.wait(startTimeout); code != 1 || !active || !isLockRefusal(e.log.String()) {
		t.Fatalf("an exporter ended at start with %d:\n%s", code, e.log)
	}
	s.did.ordersRefused.Add(1)
	return w.launch(false)
}

// logReader notes what an exporter's log says, line by line, and when.
type logReader struct {
	s    *trio
	via  int
	part []byte
}

func (r *logReader) Write(p []byte) (int, error) {
	at := r.s.now()
	r.part = append(r.part, p...)
	lines := strings.Split(string(r.part), "\n")
	r.part = []byte(lines[len(lines)-1])
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	for _, line := range lines[:len(lines)-1] {
		r.s.rec.logged(r.via, line, at)
		if strings.Contains(line, "image taken over") {
			r.s.did.takeovers.Add(1)
		}
	}
	return len(p), nil
}

// end stops an exporter in order.
func (e *exporter) end() {
	e.ending.Store(true)
	e.stop()
	e.quiet = true
}

// slay sends SIGKILL.
func (e *exporter) slay() {
	e.s.mu.Lock()
	e.s.rec.Lives[e.via].Killed = true
	e.s.mu.Unlock()
	e.ending.Store(true)
	e.quiet = true
	e.s.did.killed.Add(1)
	e.signal(syscall.SIGKILL)
}
