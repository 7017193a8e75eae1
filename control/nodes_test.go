package control

import (
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// layered is a fake image that leads to others.
type layered struct {
	fakeImage
	about backend.QcowInfo
}

func (l *layered) FileSize() int64                 { return 4096 }
func (l *layered) Qcow2() (backend.QcowInfo, bool) { return l.about, true }

// The names of what images lead to stay the same, and are no other node's; no
// command knows them.
func TestNodesBelow(t *testing.T) {
	b := newBed(t, 0)
	base := backend.Layer{Path: "/srv/base", Format: "raw", Device: true, Size: 1 << 20, FileSize: 1 << 20}
	mid := backend.Layer{Path: "/srv/mid", Format: "qcow2", Size: 2 << 20, FileSize: 5 << 20, Qcow2: &backend.QcowInfo{
		Behind: []backend.Layer{base}, DataFile: "raw", Data: backend.Layer{Path: "/srv/raw", Format: "raw", FileSize: 512},
	}}
	for i := range 2 {
		img := &layered{
			fakeImage{ino: uint64(i), info: backend.Info{Path: fmt.Sprintf("/srv/%d", i), Format: "qcow2"}},
			backend.QcowInfo{Behind: []backend.Layer{mid, base}},
		}
		m := state.NewMachine(img, state.Options{Watch: time.Hour})
		if err := b.Add(&Target{Node: fmt.Sprintf("n%d", i), Image: img, Machine: m}); err != nil {
			t.Fatal(err)
		}
	}
	list := func(flat bool) []blockDevice {
		n := nodeLister{registry: b.Registry, flat: flat}
		for _, x := range b.Targets() {
			n.addTarget(x)
		}
		return n.list
	}
	nodes := list(false)
	var got []string
	names := make(map[string]bool)
	for _, n := range nodes {
		got = append(got, fmt.Sprint(n.File, " ", n.Drv, " ", n.RO, " ", n.BackingDepth, " ", n.Image.VirtualSize))
		if names[n.NodeName] {
			t.Errorf("two nodes are called %s", n.NodeName)
		}
		names[n.NodeName] = true
		if n.RO && b.target(n.NodeName) != nil {
			t.Errorf("commands know %s", n.NodeName)
		}
	}
	below := []string{
		"/srv/mid qcow2 true 1 2097152", "/srv/mid file true 0 5242880", "/srv/raw file true 0 512",
		"/srv/base raw true 0 1048576", "/srv/base host_device true 0 1048576",
	}
	want := slices.Concat(
		[]string{"/srv/0 qcow2 false 2 1048576", "/srv/0 file false 0 4096"}, below,
		[]string{"/srv/1 qcow2 false 2 1048576", "/srv/1 file false 0 4096"}, below)
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
	if again := list(false); !reflect.DeepEqual(again, nodes) {
		t.Errorf("the second time:\n%+v\nthe first:\n%+v", again, nodes)
	}
	if i := nodes[0].Image.BackingImage; i == nil || i.BackingImage == nil || i.BackingImage.Filename != "/srv/base" {
		t.Errorf("behind it is %+v", i)
	}
	if n := list(true)[0]; n.Image.BackingImage != nil || n.BackingDepth != 0 || n.BackingFile != "/srv/mid" {
		t.Errorf("flat: %+v", n)
	}
}
