package main

import (
	"strings"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/control"
)

func TestWriteStatuses(t *testing.T) {
	now := time.Date(2026, 11, 23, 10, 2, 3, 0, time.UTC)
	image := func(node, state string) control.ImageStatus {
		return control.ImageStatus{
			Node: node, Image: "/srv/" + node + ".img", Format: "raw", Size: 1 << 20, State: control.State(state), Epoch: 7, Since: now,
			Locks: control.Locks{Held: "none", Scope: "cluster"}, Record: control.Record{Path: "/srv/" + node + ".img.owner"},
		}
	}
	a := control.Status{Version: "1.2", PID: 812, Since: now, Images: []control.ImageStatus{image("disk0", "active"), image("disk1", "inactive")}}
	b := control.Status{Version: "QEMU's storage daemon", Images: []control.ImageStatus{{
		Node: "node0", Image: "/srv/disk0.img", Format: "raw", Size: 1 << 20, State: "inactive",
	}}}
	a.Images[0].Step, a.Images[0].StepSeconds = "retire", 0.5
	all := []controlStatus{{Control: "/run/a.ctl", Status: &a}, {Control: "exec:b", Status: &b}, {Control: "/run/c.ctl", Error: "gone"}}
	const want = `control      /run/a.ctl                      exec:b                 /run/c.ctl
server       nbd-export 1.2, pid 812, up 0s  QEMU's storage daemon  does not answer

image        /srv/disk0.img                  /srv/disk0.img
node         disk0                           node0
format       raw                             raw
size         1 MiB (1048576 bytes)           1 MiB (1048576 bytes)
state        active                          inactive
step         retire for 500ms                -
epoch        7                               -
since        2026-11-23 10:02:03 (0s)        -
locks        none (cluster)                  -
owner record /srv/disk0.img.owner            -
connections  0                               -
in flight    0                               -
read         0 bytes in 0 requests           -
written      0 bytes in 0 requests           -

image        /srv/disk1.img
node         disk1
format       raw
size         1 MiB (1048576 bytes)
state        inactive
epoch        7
since        2026-11-23 10:02:03 (0s)
locks        none (cluster)
owner record /srv/disk1.img.owner
connections  0
in flight    0
read         0 bytes in 0 requests
written      0 bytes in 0 requests
`
	var got strings.Builder
	if err := writeStatuses(&got, all, now); err != nil || got.String() != want {
		t.Errorf("%v, got\n%s", err, &got)
	}
}

func TestHandoverTexts(t *testing.T) {
	r := control.HandoverReport{
		Outcome: control.HandoverMoved, Milliseconds: 16.12, Gap: 4.7, Images: []control.HandoverImage{{Image: "/srv/a.img"}},
		From: control.HandoverSide{Control: "a"}, To: control.HandoverSide{Control: "b"},
	}
	for _, c := range []struct {
		change func()
		want   string
	}{
		{func() {}, "handed /srv/a.img over from a to b in 16.1 ms; no writes for at most 4.7 ms"},
		{func() { r.Interrupted = true }, "handed /srv/a.img over from a to b in 16.1 ms; no writes for at most 4.7 ms; the interrupt came too late to stop it"},
		{func() { r.Images = append(r.Images, r.Images[0]); r.Outcome = control.HandoverAlready }, "nothing to do: b owns 2 images"},
	} {
		c.change()
		if got := handedOver(&r); got != c.want {
			t.Errorf("%s; want %s", got, c.want)
		}
	}
	var b strings.Builder
	p := progress(&b)
	s := control.HandoverStep{Name: "check", What: "both sides"}
	p(s, false)
	s.Milliseconds, s.Error = 12_345.6, "no\nway"
	p(s, true)
	if want := "check      both sides            ...\rcheck      both sides            12.3 s failed: no; way\n"; b.String() != want {
		t.Errorf("%q", b.String())
	}
}
