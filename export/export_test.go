package export

import (
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/ioloop"
)

func TestExports(t *testing.T) {
	x := new(Exports)
	if x.Lookup("") != nil || len(x.All()) != 0 || x.Remove("a") != nil {
		t.Error("the zero value is not empty")
	}
	disk := &ioloop.Disk{Image: newImage(1)}
	for _, bad := range []*Export{
		{Name: "no disk"},
		{Name: "no image", Disk: &ioloop.Disk{}},
		{Name: "a\x00", Disk: disk},
		{Name: "\xff", Disk: disk},
		{Name: strings.Repeat("x", 4097), Disk: disk},
		{Name: "a", Description: strings.Repeat("x", 4097), Disk: disk},
		{Name: "a", Description: "\x00", Disk: disk},
	} {
		if err := x.Add(bad); err == nil || len(err.Error()) > 300 {
			t.Errorf("%.10q: %v", bad.Name, err)
		}
	}
	for _, name := range []string{"b", "", "a"} {
		if err := x.Add(&Export{Name: name, Disk: disk}); err != nil {
			t.Error(err)
		}
	}
	if err := x.Add(&Export{Name: "a", Disk: disk}); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("twice: %v", err)
	}
	var names []string
	for _, e := range x.All() {
		names = append(names, e.Name)
	}
	if got := strings.Join(names, ","); got != ",a,b" {
		t.Errorf("All: %q", got)
	}
	if e := x.Remove("a"); e == nil || e.Name != "a" || x.Lookup("a") != nil {
		t.Error("Remove")
	}
}

func TestReadOnlyImage(t *testing.T) {
	img := newImage(1)
	img.info.ReadOnly = true
	if e := (&Export{Disk: &ioloop.Disk{Image: img}}); !e.readOnly() {
		t.Error("an image that is never written to is exported writable")
	}
}
