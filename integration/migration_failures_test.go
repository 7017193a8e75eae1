package integration

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

// accidents befall one guest, one after the other. It runs on either side
// before each and afterwards, on exactly one, and goes on writing. The orders
// by which it recovers are those of a management layer: whoever may have the
// image inactivates first, and a side takes it back only unchanged.
var accidents = []struct {
	name string
	run  func(l *life)
}{
	{"cancelled before the handover", func(l *life) {
		m := l.begin()
		m.cancel()
		l.runsHereOnly()
	}},
	{"cancelled when nobody owns the image", func(l *life) {
		m := l.begin()
		l.order(m.from, false)
		l.ownedBy(nil)
		m.takeBack()
		m.cancel()
		l.runsHereOnly()
	}},
	{"cancelled after the handover", func(l *life) {
		m := l.begin()
		m.handOver()
		l.order(m.to, false)
		m.takeBack()
		m.cancel()
		l.runsHereOnly()
	}},
	{"cancelled without giving the image back", func(l *life) {
		m := l.begin()
		l.order(m.from, false)
		l.step("side %s: migrate_cancel, while the exporter is inactive", m.from.name)
		l.qemu(m.from, "migrate_cancel", nil)
		l.pausedByDisk(m.from)
		m.killDestination()
		l.ownedBy(nil)
		l.nothingLost()
		m.takeBack()
		l.step("side %s: cont", m.from.name)
		l.qemu(m.from, "cont", nil)
		l.runsHereOnly()
	}},
	{"resumed before the handover is done", func(l *life) {
		m := l.begin()
		l.order(m.from, false)
		m.complete()
		l.step("side %s: cont, while the exporter is inactive", m.to.name)
		l.qemu(m.to, "cont", nil)
		l.pausedByDisk(m.to)
		l.ownedBy(nil)
		l.nothingLost()
		l.order(m.to, true)
		m.resume()
		l.runsHereOnly()
	}},
	{"a foreign writer has the image", func(l *life) {
		m := l.begin()
		l.order(m.from, false)
		l.step("qemu-io opens the image for writing")
		release := holdByQemuIO(l, l.image)
		l.refused(m.to, " lock")
		l.refused(m.from, " lock", "x-if-unchanged")
		// Nobody can go on, and the guest stands where all it wrote is.
		if st := l.status(m.from); st == "running" {
			l.Errorf("side %s: the guest is %s", m.from.name, st)
		}
		l.nothingLost()
		l.step("qemu-io goes")
		release()
		m.takeBack()
		m.cancel()
		l.runsHereOnly()
	}},
	{"the destination's path names another file", func(l *life) {
		m := l.begin()
		l.order(m.from, false)
		l.step("side %s: the image's path names another file", m.to.name)
		m.to.link(l, sparseImage(l, l.TempDir(), migrateDisk))
		l.refused(m.to, "another file")
		m.to.link(l, l.image)
		m.takeBack()
		m.cancel()
		l.runsHereOnly()
		// A refused activation can be tried again.
		l.migrate()
	}},
	{"the destination's exporter is killed", func(l *life) {
		m := l.begin()
		l.order(m.from, false)
		m.killExporter(m.to)
		l.step("side %s: exporter: active=true, which nobody can answer", m.to.name)
		if err := l.tryOrder(m.to, true); err == nil {
			l.Fatal("a killed exporter obeyed")
		}
		m.takeBack()
		m.cancel()
		l.runsHereOnly()
		l.restart(l.other(), true)
	}},
	{"the destination's exporter is killed when it has claimed the image", func(l *life) {
		m := l.begin()
		l.order(m.from, false)
		m.killAt(m.to, true, "publish")
		m.takeBack()
		m.cancel()
		l.runsHereOnly()
		l.restart(l.other(), true)
	}},
	{"the destination's exporter is killed as the owner", func(l *life) {
		m := l.begin()
		m.handOver()
		m.killExporter(m.to)
		l.ownedBy(nil)
		m.takeBack()
		m.cancel()
		l.runsHereOnly()
		l.restart(l.other(), true)
	}},
	{"the destination's QEMU dies before migrate-continue", func(l *life) {
		m := l.begin()
		m.handOver()
		m.killDestination()
		l.order(m.to, false)
		m.takeBack()
		l.step("side %s: migrate-continue, to nobody", m.from.name)
		l.qemu(m.from, "migrate-continue", map[string]any{"state": "pre-switchover"})
		m.failed()
		l.runsHereOnly()
	}},
	{"the destination's QEMU dies before cont", func(l *life) {
		m := l.begin()
		m.handOver()
		m.complete()
		m.killDestination()
		l.nothingLost()
		l.order(m.to, false)
		m.takeBack()
		l.step("side %s: cont", m.from.name)
		l.qemu(m.from, "cont", nil)
		l.runsHereOnly()
	}},
	{"the source's exporter is killed before it inactivates", func(l *life) {
		m := l.begin()
		m.killExporter(m.from)
		m.goOnWithout()
	}},
	{"the source's exporter is killed while it syncs ahead", killedAt("sync-ahead")},
	{"the source's exporter is killed when it has closed its gate", killedAt("close-gate")},
	{"the source's exporter is killed while it waits for requests", killedAt("drain")},
	{"the source's exporter is killed before it settles", killedAt("settle")},
	{"the source's exporter is killed before it lets its locks go", killedAt("release")},
	{"the source's exporter is killed after it has inactivated", func(l *life) {
		m := l.begin()
		l.order(m.from, false)
		m.killExporter(m.from)
		m.goOnWithout()
	}},
	{"the source's exporter is killed, and the migration cancelled", func(l *life) {
		m := l.begin()
		m.killExporter(m.from)
		l.nothingLost()
		l.restart(m.from, false)
		m.cancel()
		l.runsHereOnly()
	}},
	{"the source's exporter is killed while the guest runs", func(l *life) {
		m := l.launch(64 * kib)
		m.reached(m.from, "active")
		m.killExporter(m.from)
		l.restart(m.from, false)
		l.goesOn() // QEMU has kept what was not answered
		m.limit(0)
		m.reachSwitchover()
		m.handOver()
		m.complete()
		m.resume()
		l.runsHereOnly()
	}},
}

// What can go wrong in a migration, and how the guest gets over it: it runs on
// exactly one side with nothing lost, or is paused and the cause is known.
// NBD_EXPORT_SOAK sets for how long everything goes wrong in random order.
func TestMigrateAccidents(t *testing.T) {
	for _, f := range imageFormats {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			s := newStory(t)
			defer s.tellErrors()
			var l *life
			order := make([]int, len(accidents))
			for i := range order {
				order[i] = i
			}
			end := time.Now().Add(migrateSoak(t))
			for again := true; again; again = time.Now().Before(end) && !t.Failed() {
				for _, i := range order {
					t.Run(accidents[i].name, func(t *testing.T) {
						s.TB = t
						defer func() { s.TB = s.owner }()
						if l == nil {
							l = newLife(s, f, s.TempDir(), [2]exporterKind{hookedExport, hookedExport})
						}
						done := false
						defer func() {
							if !done || t.Failed() {
								// The next accident is another guest's.
								s.tellErrors()
								s.ended, l = false, nil
							}
						}()
						accidents[i].run(l)
						done = true
					})
				}
				if l != nil {
					l.finish()
					l = nil
				}
				rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
			}
		})
	}
}

// Where the guest's memory is lost it can only boot again, on what it had
// reported durable.
func TestMigrateHostDies(t *testing.T) {
	t.Parallel()
	for _, f := range imageFormats {
		for name, run := range map[string]func(l *life){
			"the source, before the handover": func(l *life) {
				m := l.begin()
				l.hostDies(m.from)
				m.killDestination() // what it has of the guest is not all
				l.ownedBy(nil)
				l.order(m.to, true)
				l.restartedAt(m.to)
			},
			"the destination, after cont": func(l *life) {
				l.migrate()
				left := l.other()
				l.hostDies(l.here())
				l.ownedBy(nil)
				// Whoever would take it back there, with the memory of then:
				l.refused(left, "image was modified while inactive", "x-if-unchanged")
				l.order(left, true)
				l.restartedAt(left)
			},
		} {
			t.Run(f.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				s := newStory(t)
				defer s.tellErrors()
				run(newLife(s, f, t.TempDir(), [2]exporterKind{nbdExport, nbdExport}))
			})
		}
	}
}

// hostDies kills all that is on the owner's side. What it leaves has no fault.
func (l *life) hostDies(s *side) {
	l.Helper()
	l.step("side %s: kill QEMU and the exporter", s.name)
	s.vm.Kill()
	l.killExporter(s)
	l.update()
	s.vm, s.qmp = nil, nil
	l.format.check(l, l.image, l.leaks)
}

// restartedAt boots the guest anew on the side that has the image now.
func (l *life) restartedAt(s *side) {
	l.Helper()
	l.ownedBy(s)
	l.nothingLost()
	l.boot(s)
	l.runsHereOnly()
	l.restart(l.other(), true)
	l.migrate()
	l.finish()
}

// killedAt has the source's exporter killed at a step of its inactivation,
// while a second client writes too.
func killedAt(step string) func(l *life) {
	return func(l *life) {
		m := l.begin()
		l.step("side %s: a client fills the page cache", m.from.name)
		w := startFilling(l, m.from.exp.uri())
		m.killAt(m.from, false, step)
		w.nothingLost(l)
		m.goOnWithout()
	}
}

// killAt gives an order to a side's exporter and kills it at a step.
func (m *move) killAt(s *side, active bool, step string) {
	l := m.l
	l.Helper()
	l.step("side %s: exporter: active=%v, up to the step %s", s.name, active, step)
	s.exp.hooks.holdAt(step)
	obeyed := make(chan error, 1)
	go func() {
		_, err := s.ctl.Execute("blockdev-set-active", map[string]any{"active": active})
		obeyed <- err
	}()
	s.exp.hooks.wait()
	m.killExporter(s)
	if err := <-obeyed; err == nil {
		l.Fatal("an exporter obeyed that was killed before")
	}
}

// filling writes numbered blocks to the part of the disk that is not the
// guest's until its exporter lets it no longer.
type filling struct {
	acked int
	ended chan error
}

const (
	fillBlocks = othersSize / mib
	filePiece  = 64 << 10 // a cluster of qcow2
)

func startFilling(l *life, uri string) *filling {
	l.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	c, err := client.Dial(ctx, uri, client.Options{})
	if err != nil {
		l.Fatal(err)
	}
	f := &filling{ended: make(chan error, 1)}
	enough := make(chan struct{})
	go func() {
		defer c.Abort()
		for {
			n := f.acked + 1
			if _, err := c.WriteAt(randomBytes(int64(n), mib), othersOffset+int64(n%fillBlocks)*mib, false); err != nil {
				f.ended <- err
				return
			}
			if f.acked = n; n == fillBlocks/2 {
				close(enough)
			}
		}
	}()
	select {
	case <-enough:
	case err := <-f.ended:
		l.Fatal(err)
	case <-time.After(migrateTimeout):
		l.Fatal("a client's writes are not answered")
	}
	return f
}

// nothingLost requires what was acknowledged; a later block may have taken an
// earlier one's place in part. Where what was not flushed goes with the exporter,
// a piece may also be what it was before, and nothing else.
func (f *filling) nothingLost(l *life) {
	l.Helper()
	l.step("nothing is lost of what the client wrote")
	select {
	case err := <-f.ended:
		if refused := (*client.Error)(nil); errors.As(err, &refused) && refused.Text != inactiveText {
			l.Error(err)
		}
	case <-time.After(migrateTimeout):
		l.Fatal("a client does not notice that the exporter is gone")
	}
	content := l.format.content(l, l.image)
	for n := max(1, f.acked-fillBlocks+2); n <= f.acked; n++ {
		got := fileAt(l, content, othersOffset+int64(n%fillBlocks)*mib, mib)
		want, before := randomBytes(int64(n), mib), make([]byte, mib)
		if n > fillBlocks {
			before = randomBytes(int64(n-fillBlocks), mib)
		}
		for piece := 0; piece < mib; piece += filePiece {
			is := got[piece:][:filePiece]
			if bytes.Equal(is, want[piece:][:filePiece]) {
				continue
			}
			if !l.format.volatile || !bytes.Equal(is, before[piece:][:filePiece]) {
				l.Errorf("block %d of %d acknowledged ones is not there, from byte %d", n, f.acked, piece)
				break
			}
		}
	}
}
