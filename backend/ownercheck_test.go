package backend

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// One that is moved away and back is told of each time it goes.
func TestCheckSeesNameAgain(t *testing.T) {
	path := writeFile(t, t.TempDir(), pattern(5000, 1))
	warned := 0
	r := openImage(t, Options{Path: path, Warn: func(string) { warned++ }}, nil)
	must(t, activate(r, false))
	for i := range 3 {
		must(t, os.Rename(path, path+".away"))
		must(t, r.Check())
		must(t, r.Check())
		if warned != i+1 || r.PathLost() == "" {
			t.Errorf("%d warnings, moved away %d times; lost: %q", warned, i+1, r.PathLost())
		}
		must(t, os.Rename(path+".away", path))
		must(t, r.Check())
		if r.PathLost() != "" {
			t.Errorf("it is back, and said to be at %q", r.PathLost())
		}
	}
	must(t, inactivate(r))
	if r.PathLost() != "" {
		t.Error("an inactive image is lost")
	}
}

// An active image that is removed or replaced by name is told of, once.
func TestCheckSeesName(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, replaced := range []bool{false, true} {
			path := writeFile(t, dir, pattern(5000, 1))
			var warned []string
			r := openImage(t, Options{Path: path, Warn: func(s string) { warned = append(warned, s) }}, nil)
			must(t, activate(r, false))
			must(t, r.Check())
			if len(warned) != 0 || r.PathLost() != "" {
				t.Errorf("%q, %q", warned, r.PathLost())
			}
			must(t, os.Remove(path))
			if replaced {
				must(t, os.WriteFile(path, nil, 0o600))
			}
			must(t, r.Check())
			must(t, r.Check())
			where := procPath(r.cur.Load().file.fd)
			if len(warned) != 1 || !strings.Contains(warned[0], "the path no longer names the image that is being served; its bytes are still reachable as "+where+"; copy them before the server stops") {
				t.Errorf("replaced=%v: %q", replaced, warned)
			}
			wantContent(t, where, pattern(5000, 1))
			if r.PathLost() != where {
				t.Errorf("the image is said to be at %q", r.PathLost())
			}
			must(t, r.Close())
			os.Remove(path)
			os.Remove(path + ".owner")
		}
	})
}

// A shrink is seen by the next check, without any request.
func TestCheckSeesShrink(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 8192))
	var warned []string
	r := openImage(t, Options{Path: path, Warn: func(s string) { warned = append(warned, s) }}, nil)
	must(t, activate(r, false))
	must(t, os.Truncate(path, 4096))
	must(t, r.Check())
	must(t, r.Check())
	if len(warned) != 1 || !strings.Contains(warned[0], "shrunk to 4096") {
		t.Errorf("%q", warned)
	}
	wantErrno(t, write(r, 4000, make([]byte, 97), false), unix.EIO)
	must(t, write(r, 4000, make([]byte, 96), false))
	must(t, os.Truncate(path, 100000)) // grown: what clients know is served
	must(t, r.Check())
	must(t, write(r, 8000, make([]byte, 192), false))
	wantErrno(t, write(r, 8000, make([]byte, 193), false), unix.EIO)
}
