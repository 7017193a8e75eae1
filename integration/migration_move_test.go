package integration

import (
	"fmt"
	"maps"
	"path/filepath"
	"time"

	"github.com/nbd-export/nbd-export/integration/guest"
)

// move is a migration of the guest to the other side.
type move struct {
	l        *life
	from, to *side
	began    time.Time
	paused   time.Time     // when the guest stood still
	aside    time.Duration // of that, what the test took for its own checks
	handover time.Duration // what the two orders took
	total    time.Duration // from migrate to cont, without aside
	down     time.Duration // from pause to cont, without aside
	silent   time.Duration // from pause to the first record, without aside
}

// begin starts a QEMU on the other side and the migration to it, which stops
// before the switchover.
func (l *life) begin() *move {
	l.Helper()
	m := l.launch(0)
	m.reachSwitchover()
	return m
}

// launch begins the migration, at so many bytes each second; 0: without limit.
func (l *life) launch(bandwidth int64) *move {
	l.Helper()
	l.moves++
	m := &move{l: l, from: l.here(), to: l.other()}
	l.step("migration %d: start QEMU on side %s", l.moves, m.to.name)
	l.startVM(m.to, "-incoming", "defer", "-S")
	capabilities := map[string]any{"capabilities": []map[string]any{
		{"capability": "events", "state": true}, {"capability": "pause-before-switchover", "state": true},
	}}
	l.qemu(m.from, "migrate-set-capabilities", capabilities)
	l.qemu(m.to, "migrate-set-capabilities", capabilities)
	m.limit(bandwidth)
	l.step("migration %d: side %s to side %s: migrate", l.moves, m.from.name, m.to.name)
	uri := map[string]any{"uri": "unix:" + filepath.Join(shortDir(l), "migration")}
	l.qemu(m.to, "migrate-incoming", uri)
	m.began = time.Now()
	l.qemu(m.from, "migrate", uri)
	return m
}

func (m *move) limit(bandwidth int64) {
	m.l.Helper()
	if bandwidth == 0 {
		bandwidth = 1 << 40
	}
	m.l.qemu(m.from, "migrate-set-parameters", map[string]any{"max-bandwidth": bandwidth})
}

// reached waits for a state of the migration on one side.
func (m *move) reached(s *side, want string) {
	m.l.Helper()
	m.l.step("migration %d: side %s: reaches %s", m.l.moves, s.name, want)
	e, err := s.qmp.WaitEvent("MIGRATION", func(e guest.Event) bool {
		return e.Data["status"] == want || e.Data["status"] == "failed" || e.Data["status"] == "cancelled"
	}, migrateTimeout)
	if err == nil && e.Data["status"] != want {
		info, _ := s.qmp.Execute("query-migrate", nil)
		err = fmt.Errorf("it is %v: %s", e.Data["status"], info)
	}
	if err != nil {
		m.l.Fatalf("side %s: %v", s.name, err)
	}
}

func (m *move) reachSwitchover() {
	m.l.Helper()
	m.reached(m.from, "pre-switchover")
	m.paused = time.Now()
	m.l.update()
	m.meanwhile(m.l.nothingLost)
}

// meanwhile does something for the test's own sake while the guest is paused.
func (m *move) meanwhile(f func()) {
	m.l.Helper()
	began := time.Now()
	f()
	m.aside += time.Since(began)
}

// complete sends the rest of the guest to its new side, where it stays paused.
func (m *move) complete() {
	m.l.Helper()
	m.l.step("migration %d: side %s: migrate-continue", m.l.moves, m.from.name)
	m.l.qemu(m.from, "migrate-continue", map[string]any{"state": "pre-switchover"})
	m.reached(m.to, "completed")
	m.reached(m.from, "completed")
}

// resume lets the guest go on at its new side. The old QEMU ends.
func (m *move) resume() {
	m.l.Helper()
	l := m.l
	l.step("migration %d: side %s: cont", l.moves, m.to.name)
	l.update()
	before := maps.Clone(l.said)
	l.qemu(m.to, "cont", nil)
	m.total, m.down = time.Since(m.began)-m.aside, time.Since(m.paused)-m.aside
	l.arrived(m.to)
	l.says(`durable \w+ \d{8}\.`, 0)
	m.silent = time.Since(m.paused) - m.aside
	l.leave(m.from)
	l.goesOn()
	for kind, n := range ledger.note(ledger{}, m.to.vm.Output()) {
		// A report may have been cut in two, but no record is left out.
		if n != before[kind]+1 && n != before[kind]+2 {
			l.Errorf("the guest reported %s %d before the migration and then %d", kind, before[kind], n)
		}
	}
}

// cancel ends a migration before the switchover. The guest goes on where it
// was, if its disk lets it.
func (m *move) cancel() {
	m.l.Helper()
	m.l.step("migration %d: side %s: migrate_cancel", m.l.moves, m.from.name)
	m.l.qemu(m.from, "migrate_cancel", nil)
	m.reached(m.from, "cancelled")
	m.killDestination()
}

func (m *move) killDestination() {
	m.l.step("side %s: kill QEMU", m.to.name)
	if m.to.vm != nil {
		m.to.vm.Kill()
	}
	m.to.vm, m.to.qmp = nil, nil
}

// migrate moves the guest with nothing in the way.
func (l *life) migrate() {
	l.Helper()
	m := l.begin()
	m.handOver()
	m.complete()
	m.resume()
	l.runsHereOnly()
}

func (m *move) handOver() {
	m.l.Helper()
	m.l.order(m.from, false)
	m.l.order(m.to, true)
	m.l.ownedBy(m.to)
}

// takeBack makes the source's exporter active again, which it may be only if
// nobody has written meanwhile.
func (m *move) takeBack() {
	m.l.Helper()
	m.l.nothingLost()
	m.l.order(m.from, true, "x-if-unchanged")
}

func (m *move) killExporter(s *side) {
	m.l.Helper()
	m.l.step("side %s: kill the exporter", s.name)
	m.l.killExporter(s)
}

// goOnWithout finishes a migration whose source's exporter was killed when all
// of the guest's writes were durable.
func (m *move) goOnWithout() {
	m.l.Helper()
	m.l.ownedBy(nil)
	m.l.nothingLost()
	m.l.order(m.to, true)
	m.l.ownedBy(m.to)
	m.complete()
	m.resume()
	m.l.runsHereOnly()
	m.l.restart(m.from, true)
}

// failed waits for the source to notice that the migration cannot be done.
func (m *move) failed() {
	m.l.Helper()
	m.l.step("migration %d: side %s: fails", m.l.moves, m.from.name)
	if _, err := m.from.qmp.WaitEvent("MIGRATION", func(e guest.Event) bool { return e.Data["status"] == "failed" }, migrateTimeout); err != nil {
		m.l.Fatal(err)
	}
}
