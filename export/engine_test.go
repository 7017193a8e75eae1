package export

import (
	"context"
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/export/wire"
	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

// idleWorkers of an engine stay a while for the next burst.
var idleWorkers = goleak.IgnoreAnyFunction("github.com/nbd-export/nbd-export/ioloop.(*scheduler).work")

// The server with the engine and an image on a file: the same conversation,
// and what the ownership of the image changes about it.
func TestEngine(t *testing.T) {
	for _, structured := range []bool{false, true} {
		t.Run(map[bool]string{false: "simple", true: "structured"}[structured], func(t *testing.T) {
			defer goleak.VerifyNone(t, idleWorkers)
			dir := shortDir(t)
			path := filepath.Join(dir, "disk")
			if err := os.WriteFile(path, make([]byte, testSize), 0o600); err != nil {
				t.Fatal(err)
			}
			img, err := backend.Open(backend.Options{Path: path, Format: "raw"})
			if err != nil {
				t.Fatal(err)
			}
			m := state.NewMachine(img, state.Options{})
			disk := ioloop.NewDisk(img, m)
			x := new(Exports)
			if err := x.Add(&Export{Disk: disk}); err != nil {
				t.Fatal(err)
			}
			s := &Server{Exports: x, Mover: ioloop.NewEngine(ioloop.Config{})}
			sock := filepath.Join(dir, "sock")
			l, err := ListenUnix(sock)
			if err != nil {
				t.Fatal(err)
			}
			go func() { _ = s.Serve(l) }()
			nc, err := net.Dial("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			p := &peer{t, nc}
			p.greet(fixedNoZeroes)
			if structured {
				p.final(wire.OptStructuredReply, nil, wire.RepAck)
				p.do(wire.OptSetMetaContext, metaData("", "base:allocation"))
			}
			export := infosOf(t, p.do(wire.OptGo, goData("")))[wire.InfoExport]
			if f := binary.BigEndian.Uint16(export[8:]); f&wire.TransReadOnly != 0 {
				t.Errorf("an inactive image is announced read-only: %#x", f)
			}

			// Inactive: reads and FLUSH succeed, the rest is refused with
			// its payload consumed; validation comes first.
			for _, tt := range []struct {
				cmd     uint16
				offset  uint64
				length  uint32
				payload []byte
				errno   uint32
				data    int
			}{
				{wire.CmdRead, 0, 512, nil, 0, 512},
				{wire.CmdWrite, 0, 512, make([]byte, 512), wire.EPERM, 0},
				{wire.CmdWrite, testSize, 512, make([]byte, 512), wire.ENOSPC, 0},
				{wire.CmdTrim, 0, 512, nil, wire.EPERM, 0},
				{wire.CmdWriteZeroes, 0, 512, nil, wire.EPERM, 0},
				{wire.CmdFlush, 0, 0, nil, 0, 0},
				{wire.CmdCache, 0, 512, nil, wire.EPERM, 0},
				{99, 0, 512, nil, wire.EINVAL, 0},
			} {
				p.write(append(requestHeader(0, tt.cmd, 9, tt.offset, tt.length), tt.payload...))
				if errno, data := p.answer(structured, tt.data); errno != tt.errno || len(data) != tt.data {
					t.Errorf("inactive, %s: errno %d, %d bytes", commandName(tt.cmd), errno, len(data))
				}
			}
			if structured {
				p.write(requestHeader(0, wire.CmdTrim, 9, 0, 512))
				head := p.read(20)
				c, _ := cutChunk(t, append(head, p.read(int(binary.BigEndian.Uint32(head[16:])))...))
				if errno, text := c.errorOf(t); errno != wire.EPERM || text != "export is inactive" {
					t.Errorf("errno %d, text %q", errno, text)
				}
			}

			if err := state.Activate(context.Background(), state.ActivateOptions{}, m); err != nil {
				t.Fatal(err)
			}
			converse(t, p, structured)
			p.write(requestHeader(0, wire.CmdWrite, 9, 0, 1<<31)) // C5: answered, then the end
			if errno, _ := p.answer(structured, 0); errno != wire.EINVAL {
				t.Errorf("errno %d", errno)
			}
			if _, err := nc.Write(make([]byte, 100)); err != nil {
				t.Error(err)
			}
			p.closed()
			_ = nc.Close()

			state.Refuse(m)
			if err := s.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			if err := state.Stop(m); err != nil {
				t.Error(err)
			}
		})
	}
}
