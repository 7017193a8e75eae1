package integration

import (
	"os"
	"path/filepath"
	"testing"
)

// takeover are exporters of which each takes the image from the other when its
// client writes. Each knows where the other's control socket will be.
func takeover(t testing.TB) [2]exporterKind {
	dir := shortDir(t)
	var kinds [2]exporterKind
	for i := range kinds {
		own, peer := filepath.Join(dir, string(rune('a'+i))), filepath.Join(dir, string(rune('b'-i)))
		kinds[i] = nbdExport
		kinds[i].start = func(t testing.TB, f imageFormat, image string, inactive bool) *daemon {
			t.Helper()
			flags := []string{"-f", f.name, "--takeover", peer, "--inactive-writes", "hold=60s"}
			if inactive {
				flags = append(flags, "--inactive")
			}
			e := serve(t, image, flags...)
			if err := os.Symlink(e.control, own); err != nil {
				t.Fatal(err)
			}
			return e
		}
	}
	return kinds
}

// Nobody gives an order to either exporter: the guest's first write at its new
// side is held until that side's exporter has taken the image over.
func TestMigrateByTakeover(t *testing.T) {
	t.Parallel()
	for _, f := range imageFormats {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			tellStory(t, func(s *story, tb timings) {
				backAndForthByTakeover(s, f, t.TempDir(), 10, tb)
			})
		})
	}
}

func backAndForthByTakeover(s *story, f imageFormat, dir string, moves int, tb timings) {
	s.Helper()
	l := newLife(s, f, dir, takeover(s))
	for range moves {
		m := l.begin()
		m.complete()
		m.meanwhile(func() { l.ownedBy(m.from); l.nothingLost() }) // nothing was written yet
		m.resume()
		l.runsHereOnly()
		tb.add("takeover", m)
	}
	for _, side := range l.sides {
		side.exp.log.wait(s, 0, "side "+side.name+" took the image over", func(line string) bool {
			return containsAll(line, "image taken over", `reason="a client wrote"`)
		})
	}
	l.finish()
	s.Logf("the guest made %d records", l.said["raw"]+l.said["file"]-2*(firstRecord-1))
}
