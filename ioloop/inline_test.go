package ioloop

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// twoExtents splits what is prepared into two extents at at.
type twoExtents struct {
	backend.Image
	at               int64
	commits, aborted int
}

func (w *twoExtents) Prepare(p *backend.Plan, off int64, payload []byte, mode backend.Mode) error {
	if err := w.Image.Prepare(p, off, payload, mode); err != nil {
		return err
	}
	a := p.Extents[0]
	b := a
	a.Length, b.Offset, b.Length = w.at, a.Offset+w.at, a.Length-w.at
	p.Extents = append(p.Extents[:0], a, b)
	return nil
}

func (w *twoExtents) Commit(p *backend.Plan) (durable bool) { w.commits++; return w.Image.Commit(p) }
func (w *twoExtents) Abort(p *backend.Plan)                 { w.aborted++; w.Image.Abort(p) }

// A write of which the kernel takes only a part ends where it is, under its
// admission: a worker would ask the gate again, and a refusal would leave half
// of a refused write in the image. What makes it short here is memory that
// cannot be read.
func TestShortInlineWrite(t *testing.T) {
	const page = 4096
	payload, err := unix.Mmap(-1, 0, 2*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	must(t, err)
	defer func() { must(t, unix.Munmap(payload)) }()
	copy(payload, contents)
	must(t, unix.Mprotect(payload[page:], unix.PROT_NONE))
	for name, split := range map[string]bool{"short": false, "second extent": true} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, rigConfig{tmpfs: true, size: 1 << 20})
			img := &twoExtents{Image: r.raw, at: page}
			c := &conn{disk: &Disk{Image: r.raw}}
			if split {
				c.disk.Image = img
			}
			var p backend.Plan
			req := &Request{Op: OpWrite, Length: 2 * page, Payload: 2 * page}
			if err := c.tryWrite(req, payload, &p); !errors.Is(err, unix.EFAULT) {
				t.Errorf("%v, want what the rest of the write says", err)
			}
			if got := r.content(); !bytes.Equal(got[:page], contents[:page]) || !bytes.Equal(got[page:], make([]byte, len(got)-page)) {
				t.Error("it was not begun")
			}
			// One that has not begun is left to a worker.
			req.Offset, req.Length = page, page
			img.at = page / 2
			if err := c.tryWrite(req, payload[page:], &p); err != backend.ErrWait {
				t.Errorf("%v, want ErrWait", err)
			}
			if split && (img.commits != 0 || img.aborted != 2) {
				t.Errorf("%d commits, %d aborted", img.commits, img.aborted)
			}
			if s := r.m.Status().State; s != state.Active {
				t.Error(s)
			}
		})
	}
}
