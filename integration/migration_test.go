package integration

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"
)

// migrateSoak is how long the long variant of a test goes on; 0: the short one.
func migrateSoak(t testing.TB) time.Duration {
	t.Helper()
	s := os.Getenv("NBD_EXPORT_SOAK")
	if s == "" {
		return 0
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatalf("NBD_EXPORT_SOAK: %v", err)
	}
	return d
}

// switchover is a way for the image to get to the other side while the guest
// is between the two.
type switchover struct {
	name string
	hand func(m *move)
}

// ordered are those in which somebody orders it; TestMigrateByTakeover does
// without.
var ordered = []switchover{
	{"control socket", func(m *move) {
		began := time.Now()
		m.l.order(m.from, false)
		m.l.order(m.to, true)
		m.handover = time.Since(began)
	}},
	{"signal", orderedBy("signal")},
	{"verb", orderedBy("verb")},
}

func orderedBy(name string) func(m *move) {
	return func(m *move) {
		m.l.step("side %s: exporter: inactivate by %s", m.from.name, name)
		began := time.Now()
		orders[name](m.from.exp, false)
		m.l.step("side %s: exporter: activate by %s", m.to.name, name)
		orders[name](m.to.exp, true)
		m.handover = time.Since(began)
	}
}

// backAndForth lives a guest's life in which it moves so many times.
func backAndForth(s *story, f imageFormat, dir string, kinds [2]exporterKind, moves int, by []switchover, tb timings) {
	s.Helper()
	l := newLife(s, f, dir, kinds)
	for n := range moves {
		way := by[n%len(by)]
		m := l.begin()
		m.meanwhile(func() { l.refused(m.to, " lock") }) // it has an owner
		way.hand(m)
		m.meanwhile(func() { l.ownedBy(m.to); l.nothingLost() })
		m.complete()
		m.resume()
		l.runsHereOnly()
		tb.add(way.name+", "+m.from.kind.name+" to "+m.to.kind.name, m)
	}
	l.finish()
	s.Logf("the guest made %d records", l.said["raw"]+l.said["file"]-2*(firstRecord-1))
}

// A guest that never stops writing is sent back and forth between two hosts
// that share its image, and loses nothing.
func TestMigrateBackAndForth(t *testing.T) {
	t.Parallel()
	for _, f := range imageFormats {
		for _, place := range []string{"disk", "tmpfs"} {
			if place == "tmpfs" && migrateSoak(t) == 0 {
				continue
			}
			t.Run(f.name+" on "+place, func(t *testing.T) {
				t.Parallel()
				tellStory(t, func(s *story, tb timings) {
					backAndForth(s, f, places[place](t), [2]exporterKind{nbdExport, nbdExport}, 10, ordered, tb)
				})
			})
		}
	}
}

// tellStory has f run once, or again and again for as long as
// NBD_EXPORT_SOAK says.
func tellStory(t *testing.T, f func(s *story, tb timings)) {
	t.Helper()
	s := newStory(t)
	defer s.tellErrors()
	tb := timings{}
	defer tb.log(t)
	end := time.Now().Add(migrateSoak(t))
	for again := true; again; again = time.Now().Before(end) {
		f(s, tb)
	}
}

// Our exporter on one side, QEMU's own storage daemon on the other. The guest
// is paused when QEMU's daemon is told to inactivate, so that it is spared the
// race that it has with writers.
func TestMigrateWithQEMUStorageDaemon(t *testing.T) {
	t.Parallel()
	need(t, "qemu-storage-daemon", "qemu-system-common")
	for _, kinds := range [][2]exporterKind{{nbdExport, qemuDaemon}, {qemuDaemon, nbdExport}} {
		if kinds[0].name == qemuDaemon.name && migrateSoak(t) == 0 {
			continue
		}
		t.Run(kinds[0].name+" first", func(t *testing.T) {
			t.Parallel()
			tellStory(t, func(s *story, tb timings) {
				backAndForth(s, imageFormats[0], t.TempDir(), kinds, 4, ordered[:1], tb)
			})
		})
	}
}

// timings are of migrations, by what moved them. They are logged as medians.
type timings map[string][]*move

func (tb timings) add(by string, m *move) { tb[by] = append(tb[by], m) }

func (tb timings) log(t testing.TB) {
	for by, moves := range tb {
		of := func(f func(m *move) time.Duration) string {
			var all []time.Duration
			for _, m := range moves {
				all = append(all, f(m))
			}
			slices.Sort(all)
			ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
			return fmt.Sprintf("%.1f ms (%.1f at most)", ms(all[len(all)/2]), ms(all[len(all)-1]))
		}
		t.Logf("%d migrations, %s: both orders to the exporters %s; the guest stood still %s, reported no record for %s; in all %s",
			len(moves), by,
			of(func(m *move) time.Duration { return m.handover }),
			of(func(m *move) time.Duration { return m.down }),
			of(func(m *move) time.Duration { return m.silent }),
			of(func(m *move) time.Duration { return m.total }))
	}
}
