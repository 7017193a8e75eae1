package integration

import (
	"cmp"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// lockActor is a program of QEMU with an image: a row of docs/locks.md.
type lockActor struct {
	name   string
	format string
	argv   []string // IMAGE, OVERLAY and OTHER are replaced
	// holds are the bytes it locks as long as it has the image open; the test
	// of others follows from them, see lockRefusal.
	holds []int
	// lasts: it keeps the image open until it is ended. Others come and go
	// too quickly to be looked at.
	lasts bool
	// anyway: it opens the image whoever has it (force-share).
	anyway bool
	// first is what it would hold before holds, nil if that is all the same.
	first []int
}

var (
	allBytes   = []int{100, 101, 103, 201, 203}
	readBytes  = []int{100, 201, 203}
	lockActors = []lockActor{
		{"qemu-io", "qcow2", []string{"qemu-io", "-f", "qcow2", "IMAGE"}, allBytes, true, false, nil},
		{"qemu-io -r", "qcow2", []string{"qemu-io", "-r", "-f", "qcow2", "IMAGE"}, readBytes, true, false, nil},
		{"qemu-io -r -U", "qcow2", []string{"qemu-io", "-r", "-U", "-f", "qcow2", "IMAGE"}, []int{100}, true, true, nil},
		{"qemu-nbd", "qcow2", []string{"qemu-nbd", "-t", "-f", "qcow2", "-k", "OTHER", "IMAGE"}, allBytes, true, false, nil},
		{"qemu-nbd -r", "qcow2", []string{"qemu-nbd", "-t", "-r", "-f", "qcow2", "-k", "OTHER", "IMAGE"}, readBytes, true, false, nil},
		{"qemu-img bench", "qcow2", []string{"qemu-img", "bench", "-f", "qcow2", "-c", "2000000000", "IMAGE"}, readBytes, true, false, nil},
		{"qemu-img bench -w", "qcow2", []string{"qemu-img", "bench", "-w", "-f", "qcow2", "-c", "2000000000", "IMAGE"}, allBytes, true, false, nil},
		{"backing file of qemu-io", "qcow2", []string{"qemu-io", "-f", "qcow2", "OVERLAY"}, readBytes, true, false, nil},
		{"qemu-img info", "qcow2", []string{"qemu-img", "info", "-f", "qcow2", "IMAGE"}, []int{201, 203}, false, false, nil},
		{"qemu-img info -U", "qcow2", []string{"qemu-img", "info", "-U", "-f", "qcow2", "IMAGE"}, nil, false, true, nil},
		{"qemu-img check", "qcow2", []string{"qemu-img", "check", "-f", "qcow2", "IMAGE"}, readBytes, false, false, nil},
		{"qemu-img map", "qcow2", []string{"qemu-img", "map", "-f", "qcow2", "IMAGE"}, readBytes, false, false, nil},
		{"qemu-img compare", "qcow2", []string{"qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", "IMAGE", "IMAGE"}, readBytes, false, false, nil},
		{"qemu-img convert from", "qcow2", []string{"qemu-img", "convert", "-r", "4k", "-S", "0", "-f", "qcow2", "-O", "raw", "IMAGE", "OTHER"}, readBytes, true, false, nil},
		{"qemu-img snapshot -l", "qcow2", []string{"qemu-img", "snapshot", "-l", "IMAGE"}, readBytes, false, false, nil},
		{"qemu-img snapshot -c", "qcow2", []string{"qemu-img", "snapshot", "-c", "s", "IMAGE"}, allBytes, false, false, nil},
		{"qemu-img amend", "qcow2", []string{"qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=off", "IMAGE"}, allBytes, false, false, nil},
		{"qemu-img commit", "qcow2", []string{"qemu-img", "commit", "-f", "qcow2", "OVERLAY"}, allBytes, false, false, readBytes},
		{"qemu-img resize", "qcow2", []string{"qemu-img", "resize", "-f", "qcow2", "IMAGE", "+64k"}, allBytes, false, false, nil},

		{"qemu-io", "raw", []string{"qemu-io", "-f", "raw", "IMAGE"}, []int{100, 101}, true, false, nil},
		{"qemu-io -r", "raw", []string{"qemu-io", "-r", "-f", "raw", "IMAGE"}, []int{100}, true, false, nil},
		{"qemu-nbd", "raw", []string{"qemu-nbd", "-t", "-f", "raw", "-k", "OTHER", "IMAGE"}, []int{100, 101, 203}, true, false, nil},
		{"qemu-nbd -r", "raw", []string{"qemu-nbd", "-t", "-r", "-f", "raw", "-k", "OTHER", "IMAGE"}, []int{100, 203}, true, false, nil},
		{"qemu-img bench", "raw", []string{"qemu-img", "bench", "-f", "raw", "-c", "2000000000", "IMAGE"}, []int{100}, true, false, nil},
		{"qemu-img bench -w", "raw", []string{"qemu-img", "bench", "-w", "-f", "raw", "-c", "2000000000", "IMAGE"}, []int{100, 101}, true, false, nil},
		{"qemu-img info", "raw", []string{"qemu-img", "info", "-f", "raw", "IMAGE"}, nil, false, false, nil},
		{"qemu-img convert from", "raw", []string{"qemu-img", "convert", "-r", "4k", "-S", "0", "-f", "raw", "-O", "raw", "IMAGE", "OTHER"}, readBytes, true, false, nil},
		{"qemu-img resize", "raw", []string{"qemu-img", "resize", "-f", "raw", "IMAGE", "+64k"}, []int{100, 101, 103}, false, false, nil},
		{"qemu-img create onto it", "raw", []string{"qemu-img", "create", "-f", "raw", "IMAGE", "1M"}, []int{101, 103, 203}, false, false, nil},
		{"qemu-img create qcow2 onto it", "raw", []string{"qemu-img", "create", "-f", "qcow2", "IMAGE", "1M"}, []int{101, 103, 203}, false, false, nil},
	}
)

// refusal is what a is told while others hold held, "" if it may.
func (a *lockActor) refusal(held []int) string {
	if a.anyway {
		return ""
	}
	return cmp.Or(lockRefusal(a.first, held), lockRefusal(a.holds, held))
}

// lockRefusal is what QEMU's rule says to one who would hold want while
// others hold held: "" or the error. It is in block/file-posix.c,
// raw_check_lock_bytes.
func lockRefusal(want, held []int) string {
	perms := []string{"consistent read", "write", "write unchanged", "resize"}
	for bit, perm := range perms {
		if slices.Contains(want, 100+bit) && slices.Contains(held, 200+bit) {
			return fmt.Sprintf("Failed to get %q lock", perm)
		}
	}
	for bit, perm := range perms {
		if slices.Contains(want, 200+bit) && slices.Contains(held, 100+bit) {
			return fmt.Sprintf("Failed to get shared %q lock", perm)
		}
	}
	return ""
}

// lockTable is the table of docs/locks.md.
func lockTable() string {
	bytes := func(list []int) string {
		if len(list) == 0 {
			return "–"
		}
		return strings.Trim(strings.ReplaceAll(fmt.Sprint(list), " ", ", "), "[]")
	}
	may := func(refusal string) string {
		return cmp.Or(strings.TrimSuffix(strings.TrimPrefix(refusal, "Failed to get "), " lock"), "yes")
	}
	var b strings.Builder
	b.WriteString("| program | format | locks | opens an image we own | ... we serve read-only | we may own it beside | ... serve it read-only |\n")
	b.WriteString("| --- | --- | --- | --- | --- | --- | --- |\n")
	for _, a := range lockActors {
		ours, ro := "–", "–"
		if a.lasts {
			ours, ro = may(lockRefusal(activeLocks, a.holds)), may(lockRefusal(readOnlyLocks, a.holds))
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s |\n",
			a.name, a.format, bytes(a.holds), may(a.refusal(activeLocks)), may(a.refusal(readOnlyLocks)), ours, ro)
	}
	return b.String()
}

var updateLocks = flag.Bool("update-locks", false, "write the table into docs/locks.md")

func TestLockTableOfDocs(t *testing.T) {
	const path, begin, end = "../docs/locks.md", "<!-- begin: integration/lockmatrix_test.go -->\n", "<!-- end -->"
	text := string(readFile(t, path))
	head, rest, ok := strings.Cut(text, begin)
	table, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no %s ... %s", path, begin, end)
	}
	if *updateLocks {
		if err := os.WriteFile(path, []byte(head+begin+lockTable()+end+tail), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if table != lockTable() {
		t.Errorf("the table in %s is out of date; write it with: go test -run TestLockTableOfDocs -update-locks .", path)
	}
}

// heldBytes adds the bytes of two holders, as /proc/locks lists them.
func heldBytes(a, b []int) []int {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return all
}

// lockBench is an image with our exporters and QEMU's tools of one version.
type lockBench struct {
	tools  string // folder, "" for the installed ones
	dir    string
	images map[string]string  // by format
	rw, ro map[string]*daemon // ours, inactive
}

func newLockBench(t *testing.T, tools, dir string) *lockBench {
	b := &lockBench{tools: tools, dir: dir, images: map[string]string{}, rw: map[string]*daemon{}, ro: map[string]*daemon{}}
	content := randomImage(t, dir, 1, 4*mib) // more than qemu-img convert moves at once
	for _, format := range []string{"raw", "qcow2"} {
		image := filepath.Join(dir, format)
		run(t, "qemu-img", "convert", "-f", "raw", "-O", format, content, image)
		b.images[format] = image
		b.rw[format] = serve(t, image, "--inactive")
		b.ro[format] = serve(t, image, "--inactive", "--read-only")
	}
	return b
}

func (b *lockBench) argv(t *testing.T, a lockActor) []string {
	t.Helper()
	image, overlay := b.images[a.format], filepath.Join(b.dir, "overlay")
	if slices.Contains(a.argv, "OVERLAY") {
		run(t, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", image, "-F", a.format, overlay, "4M")
	}
	argv := slices.Clone(a.argv)
	for i, arg := range argv {
		switch arg {
		case "IMAGE":
			argv[i] = image
		case "OVERLAY":
			argv[i] = overlay
		case "OTHER":
			argv[i] = filepath.Join(shortDir(t), "s")
		}
	}
	if b.tools != "" {
		argv[0] = filepath.Join(b.tools, argv[0])
	}
	return argv
}

// hold starts a, which lasts, and returns once it has the image, of which ours
// are locked by us, or has ended; and how to end it. On the way it may have the
// image open twice, and lock more than in the end.
func (b *lockBench) hold(t *testing.T, a lockActor, ours []int) (p *process, release func()) {
	t.Helper()
	var stdin io.WriteCloser
	p = spawn(t, a.name, func(c *exec.Cmd) {
		var err error
		if stdin, err = c.StdinPipe(); err != nil { // what qemu-io waits for
			t.Fatal(err)
		}
	}, b.argv(t, a)...)
	image, want := b.images[a.format], heldBytes(ours, a.holds)
	waitFor(t, startTimeout, fmt.Sprintf("%s (%s) holds %v or gives up", a.name, a.format, a.holds), func() bool {
		return slices.Equal(processLocks(t, p.pid, image), a.holds) && slices.Equal(fileLocks(t, image), want) || !p.alive()
	})
	return p, func() {
		stdin.Close()
		_ = p.cmd.Process.Kill() // it may have ended by that
		p.wait(startTimeout)
	}
}

// try has a open the image, and returns what it says if that is refused.
func (b *lockBench) try(t *testing.T, a lockActor, ours []int) (refused bool, said string) {
	t.Helper()
	if !a.lasts {
		r := tryRun(t, b.argv(t, a)...)
		return r.code != 0, r.stderr
	}
	p, release := b.hold(t, a, ours)
	if !p.alive() {
		return p.wait(startTimeout) != 0, p.log.String()
	}
	release()
	return false, ""
}

func wantRefusal(t *testing.T, who, want string, refused bool, said string) {
	t.Helper()
	if refused != (want != "") || !strings.Contains(said, want) {
		t.Errorf("%s: refused: %v, %q; want %q", who, refused, said, want)
	}
}

// TestLockMatrix holds what QEMU's programs lock, and whom they and we let
// in, against docs/locks.md, in both directions.
func TestLockMatrix(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	seven := strings.TrimSpace(run(t, "scripts/qemu7"))
	for _, v := range []struct{ name, tools, dir string }{
		{"10", "", tmpfsDir(t)},
		{"7.2", seven, diskDir(t)},
	} {
		t.Run(v.name, func(t *testing.T) {
			b := newLockBench(t, v.tools, v.dir)
			t.Run("they have it", b.theyHave)
			t.Run("we have it", b.weHave)
		})
	}
}

// theyHave: QEMU's programs have the image, and we try to get it.
func (b *lockBench) theyHave(t *testing.T) {
	for _, a := range lockActors {
		if !a.lasts {
			continue
		}
		image := b.images[a.format]
		p, release := b.hold(t, a, nil)
		if !p.alive() {
			t.Errorf("%s (%s) cannot have the image while we are inactive: %s", a.name, a.format, p.log)
			continue
		}
		for _, e := range []struct {
			*daemon
			holds []int
		}{{b.rw[a.format], activeLocks}, {b.ro[a.format], readOnlyLocks}} {
			who := fmt.Sprintf("activation beside %s (%s), to hold %v", a.name, a.format, e.holds)
			want := lockRefusal(e.holds, a.holds)
			r := cli(t, "activate", "--control", e.control)
			wantRefusal(t, who, want, r.code != 0, r.stderr)
			if want != "" {
				wantLocks(t, image, a.holds)
				for _, part := range []string{image, "; stop that program"} {
					if !strings.Contains(r.stderr, part) {
						t.Errorf("%s: %q does not say %q", who, r.stderr, part)
					}
				}
				continue
			}
			wantLocks(t, image, heldBytes(a.holds, e.holds))
			e.inactivate()
		}
		// A new exporter is refused alike.
		if want := lockRefusal(activeLocks, a.holds); want != "" {
			wantFailure(t, cli(t, "serve", "-f", "raw", "-k", shortDir(t)+"/nbd", image), 1, image, want)
		}
		// Looking on is allowed.
		dialRaw(t, b.rw[a.format].socket, "").want(0, cmdRead, 0, 0, 4096, nil)
		release()
		wantLocks(t, image, nil)
	}
}

// weHave: we have the image in each way, and QEMU's programs try to get it.
func (b *lockBench) weHave(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		image := b.images[format]
		for _, state := range []struct {
			name  string
			e     *daemon
			holds []int
		}{
			{"active", b.rw[format], activeLocks},
			{"active, read-only", b.ro[format], readOnlyLocks},
			{"inactive", nil, nil}, // last: what may write now does
		} {
			if state.e != nil {
				state.e.activate()
			}
			before := snap(t, image)
			for _, a := range lockActors {
				if a.format != format {
					continue
				}
				want := a.refusal(state.holds)
				refused, said := b.try(t, a, state.holds)
				wantRefusal(t, fmt.Sprintf("%s (%s) while we are %s", a.name, format, state.name), want, refused, said)
				wantLocks(t, image, state.holds)
			}
			if state.e != nil {
				sameSnap(t, image, before)
				state.e.inactivate()
			}
		}
	}
}
