package integration

import (
	"net"
	"slices"
	"testing"

	gonbd "github.com/pojntfx/go-nbd/pkg/client"
)

// go-nbd's own client lists our exports. It sends no client flags at all, for
// which QEMU hangs up, as it may; we answer.
func TestGoNBDList(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), mib), "--export-name", "disk")
	c, err := net.Dial("unix", e.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	names, err := gonbd.List(c)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(names, []string{"disk"}) {
		t.Errorf("exports %q, want disk", names)
	}
}
