package integration

import (
	"os"
	"testing"
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

// tmpfsDir is a temporary directory in memory.
func tmpfsDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nbdx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// places are the kinds of file system the images of a test live on.
var places = map[string]func(testing.TB) string{
	"disk":  func(t testing.TB) string { return t.TempDir() },
	"tmpfs": tmpfsDir,
}

// everyPlace runs a test with images on disk and on tmpfs.
func everyPlace(t *testing.T, f func(t *testing.T, dir string)) {
	for _, name := range []string{"disk", "tmpfs"} {
		t.Run(name, func(t *testing.T) { f(t, places[name](t)) })
	}
}
