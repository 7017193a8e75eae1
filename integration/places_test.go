package integration

import (
	"os"
	"testing"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

// shortDir is a temporary directory whose paths fit into a socket address.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "nbdx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func diskDir(t testing.TB) string { return testfs.Disk(t) }

func tmpfsDir(t testing.TB) string { return testfs.Memory(t) }

// places are the kinds of file system the images of a test live on.
var places = map[string]func(testing.TB) string{
	"disk":  diskDir,
	"tmpfs": tmpfsDir,
}

// everyPlace runs a test with images on disk and on tmpfs.
func everyPlace(t *testing.T, f func(t *testing.T, dir string)) {
	for _, name := range []string{"disk", "tmpfs"} {
		t.Run(name, func(t *testing.T) { f(t, places[name](t)) })
	}
}
