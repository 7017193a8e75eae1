package integration

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

var update = flag.Bool("update", false, "write the tables in docs anew")

const (
	crashDocs  = "../docs/crash-matrix.md"
	crashIntro = `# The crash matrix

Two exporters, A and B, serve one image. A owns it and is told to hand it over,
then B is told to take it. Every step of that is a place where something can go
wrong: either process is killed, stopped and continued, or told to end, or a
system call of the step fails, while clients write through both and read
through both. These tables are written by the test that has all of it happen,
` + "`integration/crashmatrix_test.go`" + ` (` + "`go test -run 'TestCrashMatrix$' -update`" + ` in
` + "`integration/`" + `), and it fails when anything comes out differently. What must come
out it derives from the rules in ` + "`integration/crashrules_test.go`" + `.

A cell says what A and B are afterwards, and who owns the image next: "inactive,
killed → A". C is an exporter that is started then. "Not clean" is what the
owner record says where the last owner did not let go in order, so that the next
one knows.

In every cell the test also requires that

- at most one exporter says that it owns the image, at the step and afterwards, and
  the owner record names it;
- who says so has its locks and can write, and nobody else has a lock or a
  descriptor that can write;
- every acknowledged write is in the image, no refused one is, and no read was
  torn that no write overlapped;
- an exporter that stands still at a step keeps the image from the other if it
  has the locks, and finds out that it came too late if it had not;
- a write that fails meanwhile is its client's misfortune and stops no handover;
- after a failed sync writes and flushes fail, the other exporter is refused,
  and only an abandon lets the image go;
- the next owner gets the image, with a higher epoch, and clients write there.
  A takes it back with ` + "`--if-unchanged`" + `, which refuses exactly if B has written.
`
)

const crashQcow2Intro = `
## qcow2

The same with a qcow2 image. It is let go and taken in more steps, those of
` + "`backend/qcow2/step.go`" + `: its tables and its dirty bitmap are written, and it is
mended. When A lets go, a write is under way that needs new clusters and, if A stops,
a new L2 table; otherwise that has been written ahead. The image that B takes was
left dirty, with refcounts that are too low and a feature that nobody knows. Each
cell requires all of the above, but that writes since the last flush may be gone with
an owner that was killed or abandoned, each as a whole; and also that

- ` + "`qemu-img check`" + ` finds no error, whenever nobody owns the image, and no leak
  either unless an owner was killed, abandoned, or could not stop in order;
- qemu-img reads what the clients wrote.
`

// checkCrashDocs holds the tables in docs against what happened.
func checkCrashDocs(t *testing.T, ends map[string]string) {
	var b strings.Builder
	b.WriteString(crashIntro)
	cell := func(s *crashScene, step string, a accident) string {
		if end, ok := ends[crashCell{s, step, a}.String()]; ok {
			return end
		}
		return "–"
	}
	for i := range crashScenes {
		s := &crashScenes[i]
		if i == len(rawScenes) {
			b.WriteString(crashQcow2Intro)
		}
		heading := "##"
		if s.format != "" {
			heading = "###"
		}
		fmt.Fprintf(&b, "\n%s %s\n\n| step |", heading, s.title)
		var all []accident
		for kind := range fails {
			for who := range 2 {
				a := accident{kind: kind, who: who}
				all = append(all, a)
				fmt.Fprintf(&b, " %s |", a)
			}
		}
		b.WriteString("\n| --- |" + strings.Repeat(" --- |", len(all)) + "\n")
		for _, step := range s.steps {
			fmt.Fprintf(&b, "| `%s` |", step.name)
			for _, a := range all {
				fmt.Fprintf(&b, " %s |", cell(s, step.name, a))
			}
			b.WriteString("\n")
		}
		b.WriteString("\n| step | what fails | EIO | ENOSPC |\n| --- | --- | --- | --- |\n")
		for _, step := range s.steps {
			for _, call := range step.calls {
				fail := func(errno syscall.Errno) string {
					return cell(s, step.name, accident{kind: fails, who: s.actor, call: call, errno: errno})
				}
				fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", step.name, call.name, fail(syscall.EIO), fail(syscall.ENOSPC))
			}
		}
	}
	if *update {
		if err := os.WriteFile(crashDocs, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if have := readFile(t, crashDocs); string(have) != b.String() {
		t.Errorf("%s is not what happened; look at what changed with\n\tgo test -run 'TestCrashMatrix$' -update && git diff ../docs", crashDocs)
	}
}
