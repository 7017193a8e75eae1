package export

import (
	"testing"
	"testing/synctest"

	"go.uber.org/zap/zaptest/observer"

	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
)

func TestRemoveUnused(t *testing.T) {
	served(t, func(t *testing.T, s *Server, l *pipes, _ *observer.ObservedLogs) {
		a, b := l.dial(t), l.dial(t)
		a.enter()
		b.greet(fixedNoZeroes)
		e := s.Exports.Lookup("")
		synctest.Wait()
		if s.RemoveUnused(e) || s.Exports.Lookup("") != e {
			t.Fatal("removed under a client")
		}
		gone := s.Gone(e)
		select {
		case <-gone:
			t.Fatal("gone with a client")
		default:
		}
		_ = a.nc.Close()
		<-gone
		if !s.RemoveUnused(e) {
			t.Error("not removed, although nobody is left")
		}
		b.final(wire.OptGo, goData(""), wire.RepErrUnknown)
		<-s.Gone(e)
		_ = b.nc.Close()
	}, func(s *Server) { s.Mover = waiting{} })
}

// What a write-through export writes is durable when it is acknowledged.
func TestWriteThrough(t *testing.T) {
	c := newCodec(terms{size: 4096, trans: transFlags(testInfo(), false, true), structured: true, writeThrough: true})
	for cmd, want := range map[uint16]ioloop.Flags{
		wire.CmdWrite: ioloop.FUA, wire.CmdTrim: ioloop.FUA, wire.CmdWriteZeroes: ioloop.FUA, wire.CmdRead: 0, wire.CmdCache: 0,
	} {
		var r ioloop.Request
		if _, err := c.Decode(requestHeader(0, cmd, 0, 0, 512), &r); err != nil || r.Err != nil || r.Flags != want {
			t.Errorf("%s: flags %#x, %v, %v", commandName(cmd), r.Flags, err, r.Err)
		}
	}
}
