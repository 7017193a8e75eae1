package integration

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// dirtyRun is a run of a dirty bitmap.
type dirtyRun struct {
	Offset, Length int64
	Type           int // 1 is dirty
}

// bitmapImage makes a qcow2 image of 2 MiB with an enabled bitmap "b" of 64 KiB
// and a disabled one "off". DIR in options is where it is.
func bitmapImage(t testing.TB, options string) string {
	t.Helper()
	need(t, "qemu-img", "qemu-utils")
	dir := t.TempDir()
	image := filepath.Join(dir, "bits.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", strings.ReplaceAll(options, "DIR", dir), image, "2M")
	run(t, "qemu-img", "bitmap", "--add", "-g", "64k", image, "b")
	run(t, "qemu-img", "bitmap", "--add", "--disable", image, "off")
	return image
}

// mapOf is a bitmap as libnbd gets it from a server.
func mapOf(t testing.TB, name string, server ...string) (runs []dirtyRun) {
	t.Helper()
	need(t, "nbdinfo", "libnbd-bin")
	r := tryRun(t, append([]string{"nbdinfo", "--json", "--map=qemu:dirty-bitmap:" + name}, server...)...)
	if err := json.Unmarshal([]byte(r.stdout), &runs); r.code != 0 || err != nil {
		t.Fatalf("nbdinfo: exit status %d, %v\n%s%s", r.code, err, r.stdout, r.stderr)
	}
	return runs
}

// qemuMapOf is a bitmap as qemu-img gets it from a server.
func qemuMapOf(t testing.TB, name, socket string) string {
	t.Helper()
	return run(t, "qemu-img", "map", "--output=json", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+socket+",x-dirty-bitmap=qemu:dirty-bitmap:"+name)
}

// inQEMU is a bitmap as QEMU's server has it from the image.
func inQEMU(t testing.TB, name, image string) []dirtyRun {
	t.Helper()
	run(t, "qemu-img", "check", "-q", image)
	return mapOf(t, name, "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, image, "]")
}

func TestDirtyBitmapToClients(t *testing.T) {
	image := bitmapImage(t, "cluster_size=4k")
	e := serve(t, image, "-f", "qcow2", "--bitmap", "b", "--bitmap", "off")
	mustQemuIO(t, e.uri(), "write -P 1 200k 1k", "write -z 1M 128k", "discard 1900k 4k")
	want := []dirtyRun{
		{0, 192 << 10, 0}, {192 << 10, 64 << 10, 1}, {256 << 10, 768 << 10, 0},
		{1 << 20, 128 << 10, 1}, {1152 << 10, 704 << 10, 0}, {1856 << 10, 64 << 10, 1}, {1920 << 10, 128 << 10, 0},
	}
	if got := mapOf(t, "b", e.uri()); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := mapOf(t, "off", e.uri()); !slices.Equal(got, []dirtyRun{{0, 2 << 20, 0}}) {
		t.Errorf("the disabled one: %v", got)
	}
	ours := qemuMapOf(t, "b", e.socket)
	// All contexts of one connection at once, and one descriptor.
	python(t, e.uri(), `
h = connect("base:allocation", "qemu:dirty-bitmap:off", "qemu:dirty-bitmap:b")
for flags, n in ((0, 7), (nbd.CMD_FLAG_REQ_ONE, 1)):
    seen = {}
    h.block_status(2 << 20, 0, lambda context, off, entries, err: seen.update({context: entries}), flags)
    assert set(seen) == {"base:allocation", "qemu:dirty-bitmap:off", "qemu:dirty-bitmap:b"}, seen
    b = seen["qemu:dirty-bitmap:b"]
    assert len(b) == 2 * n and b[:2] == [192 << 10, 0], b
    assert seen["qemu:dirty-bitmap:off"] == [2 << 20, 0], seen
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(uri.split("socket=")[1])
for query, want in (("qemu:", 2), ("qemu:dirty-bitmap:", 2), ("qemu:dirty-bitmap:b", 1), ("qemu:dirty-bitmap:c", 0)):
    names = []
    h.clear_meta_contexts()
    h.add_meta_context(query)
    h.opt_list_meta_context(names.append)
    assert len(names) == want, (query, names)
h.opt_abort()
`)
	e.stop()
	if got := inQEMU(t, "b", image); !slices.Equal(got, want) {
		t.Errorf("QEMU reads %v, want %v", got, want)
	}
	q := spawnQemuNBD(t, image, "b")
	if theirs := qemuMapOf(t, "b", q.socket); theirs != ours {
		t.Errorf("qemu-img map of qemu-nbd:\n%sof nbd-export:\n%s", theirs, ours)
	}
}

// spawnQemuNBD serves a bitmap of an image with QEMU.
func spawnQemuNBD(t testing.TB, image, bitmap string) *target {
	t.Helper()
	dir := shortDir(t)
	tg := &target{socket: filepath.Join(dir, "nbd")}
	pidFile := filepath.Join(dir, "pid")
	tg.process = spawn(t, "qemu-nbd", nil, "qemu-nbd", "-r", "-t", "-f", "qcow2", "-B", bitmap, "-k", tg.socket, "--pid-file="+pidFile, image)
	waitReady(tg.process, pidFile)
	return tg
}

func TestBitmapsThatCannotBeExported(t *testing.T) {
	image := bitmapImage(t, "cluster_size=4k")
	serveFails(t, 1, []string{"-f", "qcow2", "--bitmap", "none", image}, `bitmap "none"`, "has none of that name", "qemu-img bitmap --add")
	serveFails(t, 2, []string{"-f", "qcow2", "--bitmap", "b", "--bitmap", "b", image}, `bitmap "b" is named twice`)
	serveFails(t, 2, []string{"-f", "qcow2", "--bitmap", "b", "--snapshot", "s", image}, "bitmaps are of the active disk")
	raw := filepath.Join(t.TempDir(), "raw")
	run(t, "qemu-img", "create", "-q", "-f", "raw", raw, "1M")
	serveFails(t, 1, []string{"-f", "raw", "--bitmap", "b", raw}, "has none of that name")

	// Of an owner that died.
	e := serve(t, image, "-f", "qcow2", "--bitmap", "b")
	mustQemuIO(t, e.uri(), "write 0 1k")
	e.kill()
	serveFails(t, 1, []string{"-f", "qcow2", "--bitmap", "b", image}, `bitmap "b"`, "is inconsistent", "qemu-img bitmap --remove")
	if out := run(t, "qemu-img", "info", image); !strings.Contains(out, "in-use") {
		t.Errorf("qemu-img info:\n%s", out)
	}
	run(t, "qemu-img", "bitmap", "--remove", image, "b")
	run(t, "qemu-img", "check", "-q", "-r", "leaks", image)
	serve(t, image, "-f", "qcow2", "--bitmap", "off")
}

// Each in turn writes to one image; who owns it last has all that both have
// changed.
func TestBitmapsInHandoversWithQEMU(t *testing.T) {
	for _, options := range []string{"cluster_size=64k", "cluster_size=512,lazy_refcounts=on", "data_file=DIR/data"} {
		t.Run(strings.ReplaceAll(options, ",", " "), func(t *testing.T) {
			image := bitmapImage(t, options)
			e, q := serve(t, image, "-f", "qcow2", "--bitmap", "b"), serveQSDFormat(t, image, "qcow2", true)
			e.inactivate()
			changed := make([]bool, 32)
			for round := range 12 {
				owner := []*daemon{e, q}[round%2]
				owner.activate()
				block := round * 7 % 32
				mustQemuIO(t, owner.uri(), fmt.Sprintf("write -P %d %dk 4k", round+1, block*64+8))
				changed[block] = true
				if owner == e {
					if got := mapOf(t, "b", e.uri()); !slices.Equal(got, runsOf(changed)) {
						t.Fatalf("round %d: %v, want %v", round, got, runsOf(changed))
					}
				}
				owner.inactivate()
				if got := inQEMU(t, "b", image); !slices.Equal(got, runsOf(changed)) {
					t.Fatalf("round %d: in the image %v, want %v", round, got, runsOf(changed))
				}
			}
		})
	}
}

// runsOf makes runs of blocks of 64 KiB.
func runsOf(blocks []bool) (runs []dirtyRun) {
	for i, b := range blocks {
		typ := 0
		if b {
			typ = 1
		}
		if k := len(runs) - 1; k >= 0 && runs[k].Type == typ {
			runs[k].Length += 64 << 10
		} else {
			runs = append(runs, dirtyRun{int64(i) << 16, 64 << 10, typ})
		}
	}
	return runs
}

// What a script is told of bitmaps, it is told as by QEMU's daemon.
func TestBitmapsOfNodes(t *testing.T) {
	told := make(map[string][]string)
	for _, kind := range managers {
		m := startManager(t, kind)
		image := filepath.Join(m.dir, "bits.qcow2")
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "2M")
		run(t, "qemu-img", "bitmap", "--add", image, "bad")
		tryRun(t, "qemu-io", "-f", "qcow2", "-c", "write 0 512", "-c", "sigraise 9", image) // its owner dies
		run(t, "qemu-img", "bitmap", "--add", "-g", "4k", image, "on")
		run(t, "qemu-img", "bitmap", "--add", "--disable", image, "off")
		run(t, "qemu-io", "-f", "qcow2", "-c", "write 100k 1k", image)
		run(t, "qemu-img", "bitmap", "--merge", "on", image, "off")
		ask := func() {
			t.Helper()
			list, _ := m.ask("query-named-block-nodes")["return"].([]any)
			bitmaps := make(map[string]any)
			for _, n := range list {
				n := n.(map[string]any)
				bitmaps[n["node-name"].(string)] = n["dirty-bitmaps"]
			}
			b, err := json.Marshal(bitmaps)
			if err != nil {
				t.Fatal(err)
			}
			told[kind] = append(told[kind], string(b))
		}
		m.must(
			`blockdev-add {"driver":"file","node-name":"f","filename":"bits.qcow2","active":false}`,
			`blockdev-add {"driver":"qcow2","node-name":"n","file":"f","active":false}`,
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}}}`,
		)
		ask()
		m.must(`blockdev-set-active {"node-name":"n","active":true}`)
		ask()
		m.must(
			`block-export-add {"type":"nbd","id":"e","node-name":"n","writable":true,"bitmaps":["on"]}`,
			`block-export-add {"type":"nbd","id":"r","node-name":"n","name":"r","bitmaps":["off"]}`,
		)
		ask()
		mustQemuIO(t, nbdURI("n", filepath.Join(m.dir, "nbd")), "write 1M 10k", "write -z 0 64k")
		m.must(`block-export-del {"id":"e","mode":"hard"}`)
		m.event("BLOCK_EXPORT_DELETED e")
		ask()
		m.must(`block-export-del {"id":"r","mode":"hard"}`)
		m.event("BLOCK_EXPORT_DELETED r")
		m.must(`blockdev-set-active {"node-name":"n","active":false}`)
		ask()
		m.must(
			`blockdev-del {"node-name":"n"}`,
			`blockdev-set-active {"node-name":"f","active":true}`,
			`blockdev-add {"driver":"qcow2","node-name":"n","file":"f","read-only":true}`,
		)
		ask()
		m.quit()
	}
	ours, theirs := told[managers[0]], told[managers[1]]
	for i := range theirs {
		// QEMU goes on to tell of an inconsistent one that it does not own any more.
		if i == 4 {
			theirs[i] = `{"f":null,"n":null}`
		}
		if ours[i] != theirs[i] {
			t.Errorf("answer %d:\nours   %s\ntheirs %s", i, ours[i], theirs[i])
		}
	}
	for _, s := range []string{`"busy":true,"count":65536`, `"busy":false,"count":81920`, `"inconsistent":true`, `"recording":true`} {
		if !strings.Contains(ours[3], s) {
			t.Errorf("%s lacks %s", ours[3], s)
		}
	}
}

// A disk that becomes larger takes its bitmaps along, as in QEMU's daemon: each
// goes on with what the other has left.
func TestBitmapsGrowWithTheDisk(t *testing.T) {
	image := bitmapImage(t, "cluster_size=512")
	run(t, "qemu-img", "bitmap", "--add", "-g", "4k", image, "fine")
	want := map[string][]dirtyRun{
		"b":    {{0, 2 << 20, 0}},
		"fine": {{0, 2 << 20, 0}},
	}
	size := 2 << 20
	for round := range 4 {
		m := startManagerIn(t, managers[round%2], filepath.Dir(image))
		socket := filepath.Join(m.dir, "nbd")
		m.must(
			`nbd-server-start {"addr":{"type":"unix","data":{"path":"nbd"}}}`,
			`blockdev-add {"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"bits.qcow2"}}`,
		)
		// More clusters of bits of one and then of all, and of tables.
		grown := []int{9 << 20, 50 << 20, 600 << 20, 2 << 30}[round]
		m.must(fmt.Sprintf(`block_resize {"node-name":"n","size":%d}`, grown))
		m.must(`block-export-add {"type":"nbd","id":"e","node-name":"n","writable":true,"bitmaps":["b","fine","off"]}`)
		for name, runs := range want {
			last := &runs[len(runs)-1]
			last.Length += int64(grown - size)
			if got := mapOf(t, name, nbdURI("n", socket)); !slices.Equal(got, runs) {
				t.Fatalf("round %d: %s of %s: %v, want %v", round, m.kind, name, got, runs)
			}
		}
		// Its last 64 KiB are as new as they are dirty.
		mustQemuIO(t, nbdURI("n", socket), fmt.Sprintf("write %d 64k", grown-64<<10))
		for name, runs := range want {
			runs[len(runs)-1].Length -= 64 << 10
			want[name] = append(runs, dirtyRun{int64(grown) - 64<<10, 64 << 10, 1}, dirtyRun{int64(grown), 0, 0})
		}
		size = grown
		m.quit()
		for name, runs := range want {
			if got := inQEMU(t, name, image); !slices.Equal(got, runs[:len(runs)-1]) {
				t.Fatalf("round %d: QEMU reads %s: %v, want %v", round, name, got, runs)
			}
		}
		if got := inQEMU(t, "off", image); !slices.Equal(got, []dirtyRun{{0, int64(grown), 0}}) {
			t.Fatalf("round %d: the disabled one: %v", round, got)
		}
	}
}

// Bitmaps that nobody can trust keep a disk from growing, as in QEMU.
func TestInconsistentBitmapsDoNotGrow(t *testing.T) {
	for _, kind := range managers {
		m := startManagerIn(t, kind, shortDir(t))
		image := filepath.Join(m.dir, "bits.qcow2")
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "2M")
		run(t, "qemu-img", "bitmap", "--add", image, "bad")
		tryRun(t, "qemu-io", "-f", "qcow2", "-c", "write 0 512", "-c", "sigraise 9", image)
		m.must(`blockdev-add {"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"bits.qcow2"}}`)
		m.fails(`block_resize {"node-name":"n","size":4194304}`, "Bitmap 'bad' is inconsistent and cannot be used")
		m.quit()
	}
}

// A client keeps its connection while a bitmap it has selected goes, by another
// owner, and comes again. What is not known is dirty, and nothing else is kept from
// the client.
func TestBitmapsThatVanish(t *testing.T) {
	image := bitmapImage(t, "cluster_size=64k")
	e := serve(t, image, "-f", "qcow2", "--bitmap", "b", "--bitmap", "off")
	python(t, e.uri(), fmt.Sprintf(`
import subprocess

def owned_by_another(*commands):
    subprocess.run([%q, "inactivate", "--control", %q], check=True)
    for c in commands:
        subprocess.run(c.split(), stdout=subprocess.DEVNULL)
    subprocess.run([%[1]q, "activate", "--control", %[2]q], check=True)

def told(flags=0):
    seen = {}
    h.block_status(1 << 20, 0, lambda context, off, entries, err: seen.update({context: entries}), flags)
    assert seen["qemu:dirty-bitmap:off"] == [1 << 20, 0], seen
    assert seen["base:allocation"][:2] == [64 << 10, 0], seen
    return seen["qemu:dirty-bitmap:b"]

image = %[3]q
h = connect("base:allocation", "qemu:dirty-bitmap:b", "qemu:dirty-bitmap:off")
h.pwrite(b"x" * 65536, 0)
known = [64 << 10, 1, 960 << 10, 0]
assert told() == known
owned_by_another("qemu-img bitmap --remove " + image + " b")
assert told() == told(nbd.CMD_FLAG_REQ_ONE) == [1 << 20, 1]
owned_by_another("qemu-img bitmap --add " + image + " b")
assert told() == [1 << 20, 0]
h.pwrite(b"x" * 65536, 0)
assert told() == known
`, program(t), e.control, image))
	const isTold = `bitmap "b" are told that all is dirty`
	e.log.wait(t, 0, "clients are told of bitmap b", func(l string) bool { return strings.Contains(l, isTold) })
	if n := strings.Count(e.log.String(), isTold); n != 1 {
		t.Errorf("logged %d times:\n%s", n, e.log)
	}
}
