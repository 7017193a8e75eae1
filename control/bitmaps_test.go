package control

import (
	"slices"
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/backend"
)

func TestBitmapsOfExports(t *testing.T) {
	g := newGraph(t)
	g.bitmaps = map[string][]backend.Bitmap{
		"a": {{Name: "on", Auto: true, Granularity: 4096, Dirty: 8192}, {Name: "off", Granularity: 512, Dirty: 1024}, {Name: "bad", Auto: true, Inconsistent: true, Granularity: 512}},
	}
	g.start()
	g.talk(
		`blockdev-add {"driver":"file","node-name":"f","filename":"a"}`, "ok",
		`blockdev-add {"driver":"raw","node-name":"n","file":"f"}`, "ok",
		`blockdev-add {"driver":"file","node-name":"b","filename":"b"}`, "ok",
		// In QEMU's words.
		`block-export-add {"type":"nbd","id":"e","node-name":"n","writable":true,"bitmaps":["none"]}`, "Bitmap 'none' is not found",
		`block-export-add {"type":"nbd","id":"e","node-name":"n","writable":true,"bitmaps":[{"node":"n","name":"none"}]}`, "Dirty bitmap 'none' not found",
		`block-export-add {"type":"nbd","id":"e","node-name":"n","writable":true,"bitmaps":[{"node":"none","name":"on"}]}`, "Node 'none' not found",
		`block-export-add {"type":"nbd","id":"e","node-name":"n","writable":true,"bitmaps":["on","bad"]}`, "Bitmap 'bad' is inconsistent and cannot be used",
		`block-export-add {"type":"nbd","id":"e","node-name":"n","bitmaps":["on"]}`, "Enabled bitmap 'on' incompatible with readonly export",
		// In ours.
		`block-export-add {"type":"nbd","id":"e","node-name":"n","bitmaps":["off","off"]}`, `bitmap "off" is named twice`,
		`block-export-add {"type":"nbd","id":"e","node-name":"n","bitmaps":[""]}`, "a bitmap's name is empty",
		`block-export-add {"type":"nbd","id":"e","node-name":"n","bitmaps":[{"node":"b","name":"on"}]}`, "Bitmap 'on' is of node 'b', which is another image",
		`block-export-add {"type":"nbd","id":"e","node-name":"n","bitmaps":["off"]}`, "ok",
		`block-export-add {"type":"nbd","id":"w","node-name":"n","name":"w","writable":true,"bitmaps":["off",{"node":"n","name":"on"}]}`, "ok",
	)
	if got := g.config.NBD.exports.Lookup("w").Bitmaps; !slices.Equal(got, []string{"off", "on"}) {
		t.Errorf("exported: %q", got)
	}
	want := []dirtyBitmap{
		{Name: "bad", Persistent: true, Inconsistent: true, Granularity: 512},
		{Name: "off", Persistent: true, Busy: true, Granularity: 512, Count: 1024},
		{Name: "on", Persistent: true, Busy: true, Recording: true, Granularity: 4096, Count: 8192},
	}
	if got := g.target("n").dirtyBitmaps(); !slices.Equal(got, want) {
		t.Errorf("dirty bitmaps %+v, want %+v", got, want)
	}
	g.talk(
		`block-export-del {"id":"w"}`, "BLOCK_EXPORT_DELETED w", "ok",
		`block-export-del {"id":"e"}`, "BLOCK_EXPORT_DELETED e", "ok",
		`block_resize {"node-name":"n","size":2097152}`, "Bitmap 'bad' is inconsistent and cannot be used",
		`blockdev-set-active {"active":false}`, "ok",
		// Of what another owns it is not known what is in use.
		`block-export-add {"type":"nbd","id":"e","node-name":"n","allow-inactive":true,"bitmaps":["none"]}`, "Bitmap 'none' is not found",
		`block-export-add {"type":"nbd","id":"e","node-name":"n","allow-inactive":true,"bitmaps":["on","bad"]}`, "ok",
	)

	a := g.target("n")
	if got := a.dirtyBitmaps(); got != nil {
		t.Errorf("dirty bitmaps of an inactive image: %+v", got)
	}
	for _, c := range []struct {
		name string
		own  bool
		text string
	}{
		{"on", true, ""},
		{"bad", false, ""},
		{"bad", true, "inconsistent"},
		{"none", false, "has none of that name"},
	} {
		if err := a.CheckBitmaps([]string{c.name}, c.own); c.text == "" && err != nil || c.text != "" && (err == nil || !strings.Contains(err.Error(), c.text)) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
