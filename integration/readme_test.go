package integration

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The README's first commands do what it says: all succeed, but for those that it
// says fail, and why.
func TestReadme(t *testing.T) {
	need(t, "qemu-io", "qemu-utils")
	need(t, "nbdinfo", "libnbd-bin")
	_, text, found := strings.Cut(string(readFile(t, "../README.md")), "\n## One minute\n")
	text, _, ends := strings.Cut(text, "\nAs a block device ")
	if !found || !ends {
		t.Fatal("README.md does not go from one minute to block devices")
	}
	dir := shortDir(t)
	if err := os.Symlink(program(t), filepath.Join(dir, "nbd-export")); err != nil {
		t.Fatal(err)
	}
	shell := func(line string) (string, error) {
		cmd := command(context.Background(), "bash", "-c", line)
		cmd.Dir, cmd.SysProcAttr = dir, nil // the servers outlive it
		cmd.Env = append(cmd.Env, "PATH="+dir+":"+systemPath)
		said, err := cmd.CombinedOutput()
		return string(said), err
	}
	t.Cleanup(func() { _, _ = shell("kill $(cat *.pid)") })
	ran := 0
	for _, block := range regexp.MustCompile("(?s)\n```sh\n(.*?)```").FindAllStringSubmatch(text, -1) {
		for line := range strings.Lines(block[1]) {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "#") || strings.HasPrefix(line, "make ") {
				continue // there are tests of the demo
			}
			_, why, fails := strings.Cut(line, "# fails: ")
			said, err := shell(line)
			if fails != (err != nil) || fails && !strings.Contains(said, why) {
				t.Fatalf("%s\n%v\n%s", line, err, said)
			}
			ran++
		}
	}
	if ran < 15 {
		t.Errorf("only %d commands", ran)
	}
	if said, err := shell("kill $(cat a.pid b.pid)"); err != nil { // as it ends
		t.Errorf("%v: %s", err, said)
	}
	for _, name := range []string{"disk.sock", "disk.pid", "a.sock", "b.sock", "a.pid", "b.pid"} {
		waitFor(t, startTimeout, name+" is gone", func() bool {
			_, err := os.Lstat(filepath.Join(dir, name))
			return os.IsNotExist(err)
		})
	}
}
