package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

// qcow2IO runs commands of qemu-io on an image.
func qcow2IO(t testing.TB, image string, commands ...string) {
	t.Helper()
	argv := []string{"qemu-io", "-f", "qcow2"}
	for _, c := range commands {
		argv = append(argv, "-c", c)
	}
	run(t, append(argv, image)...)
}

// members decodes a JSON object.
func members(t testing.TB, text string) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return m
}

// sameMembers sees that got has all that want has, whatever else it has.
func sameMembers(t testing.TB, what string, got, want any) {
	t.Helper()
	w, ok := want.(map[string]any)
	g, _ := got.(map[string]any)
	switch {
	case !ok && !reflect.DeepEqual(got, want):
		t.Errorf("%s is %v, qemu-img has %v", what, got, want)
	case ok:
		for name := range maps.Keys(w) {
			sameMembers(t, what+"."+name, g[name], w[name])
		}
	}
}

// What create makes is to QEMU what its own qemu-img makes of the same options.
func TestCreateAsQEMU(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	for _, options := range []string{
		"", "cluster_size=512", "cluster_size=2M,lazy_refcounts=on", "cluster_size=16k,extended_l2=on,compression_type=zstd",
		"refcount_bits=1", "refcount_bits=64,cluster_size=4096", "compat=0.10", "compat=v3", "data_file=DIR/a,,b", "data_file=DIR/d,data_file_raw=on",
		"data_file=DIR/d,extended_l2=on,data_file_raw=on",
	} {
		for _, size := range []string{"0", "1000", "3M", "12345678"} {
			t.Run(options+"/"+size, func(t *testing.T) {
				info := map[string]map[string]any{}
				for _, by := range []string{"qemu", "us"} {
					dir := shortDir(t) // the test's name has commas
					image := filepath.Join(dir, "i.qcow2")
					args := []string{"create", "-f", "qcow2"}
					if options != "" {
						args = append(args, "-o", strings.ReplaceAll(options, "DIR", dir))
					}
					args = append(args, image, size)
					if by == "us" {
						run(t, append([]string{program(t)}, args...)...)
					} else {
						run(t, append([]string{"qemu-img"}, args...)...)
					}
					run(t, "qemu-img", "check", "-q", image)
					text := strings.ReplaceAll(run(t, "qemu-img", "info", "--output=json", image), dir, "DIR")
					info[by] = members(t, text)
					for _, name := range []string{"children", "actual-size"} {
						delete(info[by], name)
					}
					if size != "0" {
						qcow2IO(t, image, "write -P 5 0 512", "read -P 5 0 512")
						run(t, "qemu-img", "check", "-q", image)
					}
				}
				if !reflect.DeepEqual(info["us"], info["qemu"]) {
					t.Errorf("qemu-img info says %v\nof its own        %v", info["us"], info["qemu"])
				}
			})
		}
	}
}

// mapped is what qemu-img map shows of the tables: not where clusters are in the
// file, nor whether they are holes there. Neighbours that differ in nothing else
// are one.
func mapped(t testing.TB, format, image string) string {
	t.Helper()
	var all []struct {
		Start, Depth              int64
		Present, Data, Compressed bool
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "-f", format, "--output=json", image)), &all); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	last := ""
	for _, m := range all {
		is := fmt.Sprint(m.Depth, m.Present, m.Data, m.Compressed)
		if is != last {
			fmt.Fprintf(&b, "%d: %s\n", m.Start, is)
		}
		last = is
	}
	return b.String()
}

// What is preallocated is to QEMU what its qemu-img preallocates.
func TestCreatePreallocated(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	for _, c := range []struct{ format, options string }{
		{"qcow2", "preallocation=off"}, {"qcow2", "preallocation=metadata"}, {"qcow2", "preallocation=falloc"}, {"qcow2", "preallocation=full"},
		{"qcow2", "preallocation=full,cluster_size=512,refcount_bits=1"}, {"qcow2", "preallocation=metadata,cluster_size=2M,refcount_bits=64"},
		{"qcow2", "preallocation=falloc,compat=0.10"}, {"qcow2", "preallocation=metadata,extended_l2=on"},
		{"qcow2", "preallocation=metadata,extended_l2=on,backing_file=DIR/base,backing_fmt=raw"},
		{"qcow2", "preallocation=metadata,data_file=DIR/d"}, {"qcow2", "preallocation=falloc,data_file=DIR/d"},
		{"qcow2", "preallocation=full,data_file=DIR/d,data_file_raw=on"},
		{"raw", "preallocation=off"}, {"raw", "preallocation=falloc"}, {"raw", "preallocation=full"},
	} {
		for _, size := range []string{"1000", "12345678"} {
			t.Run(c.format+"/"+c.options+"/"+size, func(t *testing.T) {
				images, maps, space := map[string]string{}, map[string]string{}, map[string]int64{}
				for _, by := range []string{"qemu", "us"} {
					dir := shortDir(t) // the test's name has commas
					image := filepath.Join(dir, "i")
					images[by] = image
					run(t, "qemu-img", "create", "-q", "-f", "raw", filepath.Join(dir, "base"), "9M")
					args := []string{"create", "-f", c.format, "-o", strings.ReplaceAll(c.options, "DIR", dir), image, size}
					if by == "us" {
						run(t, append([]string{program(t)}, args...)...)
					} else {
						run(t, append([]string{"qemu-img"}, args...)...)
					}
					maps[by] = mapped(t, c.format, image)
					for _, name := range []string{image, filepath.Join(dir, "d")} {
						if st, err := os.Stat(name); err == nil {
							space[by] += st.Sys().(*syscall.Stat_t).Blocks * 512
						}
					}
				}
				if maps["us"] != maps["qemu"] && c.format == "qcow2" {
					t.Errorf("qemu-img map says\n%sof its own\n%s", maps["us"], maps["qemu"])
				}
				of := int64(0) // QEMU takes none for a data file
				if strings.Contains(c.options, "falloc") || strings.Contains(c.options, "full") {
					fmt.Sscan(size, &of)
				}
				if taken := space["us"]; taken < of || taken > max(of, space["qemu"])+512*kib {
					t.Errorf("it takes %d bytes of space, qemu-img's %d", taken, space["qemu"])
				}
				run(t, "qemu-img", "compare", "-q", "-f", c.format, "-F", c.format, images["us"], images["qemu"])
				if c.format == "raw" {
					return
				}
				ours, theirs := members(t, run(t, "qemu-img", "check", "--output=json", images["us"])), members(t, run(t, "qemu-img", "check", "--output=json", images["qemu"]))
				for _, name := range []string{"total-clusters", "allocated-clusters", "leaks", "corruptions"} {
					if ours[name] != theirs[name] {
						t.Errorf("qemu-img check says %s %v, of its own %v", name, ours[name], theirs[name])
					}
				}
				if size != "1000" {
					qcow2IO(t, images["us"], "write -P 5 1M 3M", "read -P 5 1M 3M", "read -P 0 0 1M", "read -P 0 4M 5M")
					run(t, "qemu-img", "check", "-q", images["us"])
				}
			})
		}
	}
}

func TestCreateOverlay(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	dir := t.TempDir()
	base, middle, overlay := filepath.Join(dir, "base.img"), filepath.Join(dir, "middle.qcow2"), filepath.Join(dir, "overlay.qcow2")
	for _, args := range [][]string{
		{"-f", "raw", base, "3M"},
		{"-b", "base.img", "-F", "raw", middle},
		{"-b", middle, "-F", "qcow2", overlay, "5M"},
	} {
		if r := cli(t, append([]string{"create"}, args...)...); r.code != 0 || r.stdout+r.stderr != "" {
			t.Fatalf("create %q: %+v", args, r)
		}
	}
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 3 1M 1M", base)
	qcow2IO(t, overlay, "read -P 3 1M 1M", "read -P 0 4M 1M", "write -P 4 1500k 64k", "read -P 4 1500k 64k")
	for _, image := range []string{middle, overlay} {
		run(t, "qemu-img", "check", "-q", image)
	}
	unsafe := filepath.Join(dir, "unsafe.qcow2")
	run(t, program(t), "create", "-u", "-o", "size=4M,backing_file=later.img,backing_fmt=raw", unsafe)
	if info := members(t, run(t, "qemu-img", "info", "--output=json", unsafe)); info["backing-filename"] != "later.img" || info["virtual-size"] != float64(4*mib) {
		t.Errorf("with -u it is %v", info)
	}
	if v := members(t, run(t, "qemu-img", "info", "--output=json", middle))["virtual-size"]; v != float64(3*mib) {
		t.Errorf("an image without a size has %v bytes, its backing file 3M", v)
	}
}

// What is there is not touched, and what fails leaves nothing.
func TestCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	there := filepath.Join(dir, "there")
	if err := os.WriteFile(there, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := snap(t, there)
	image := filepath.Join(dir, "new")
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{1, "never overwritten", []string{there, "1M"}},
		{1, "never overwritten", []string{"-f", "raw", there, "1M"}},
		{1, "never overwritten", []string{"-o", "data_file=there", image, "1M"}},
		{1, "no such file", []string{"-b", "gone", "-F", "raw", image}},
		{1, "is not qcow2", []string{"-b", "there", "-F", "qcow2", image}},
		{1, "no such file or directory", []string{filepath.Join(dir, "no", "dir"), "1M"}},
		{2, "go together", []string{"-b", "there", image, "1M"}},
		{2, "SIZE", []string{image}},
		{2, "size", []string{image, "much"}},
		{2, "cluster_size: 1000 is not a power of two", []string{"-o", "cluster_size=1000", image, "1M"}},
		{2, "no such option", []string{"-o", "colour=red", image, "1M"}},
		{2, "must be one of off, on", []string{"-o", "lazy_refcounts=perhaps", image, "1M"}},
		{2, "data_file_raw", []string{"-o", "data_file_raw=on", image, "1M"}},
		{2, "choose a larger cluster_size", []string{"-o", "cluster_size=512", image, "1T"}},
		{2, "for qcow2", []string{"-f", "raw", "-o", "cluster_size=4k", image, "1M"}},
		{2, "no metadata", []string{"-f", "raw", "-o", "preallocation=metadata", image, "1M"}},
		{2, "off, metadata, falloc, full", []string{"-o", "preallocation=some", image, "1M"}},
		{2, "extended_l2", []string{"-o", "preallocation=metadata,backing_file=there,backing_fmt=raw", image}},
		{2, "given twice", []string{"-o", "size=1M", image, "1M"}},
		{2, "SIZE", []string{"-u", "-b", "gone", "-F", "raw", image}},
		{2, "no encrypted images", []string{"-o", "encrypt.format=luks", image, "1M"}},
		{2, "must be one of", []string{"-f", "vmdk", image, "1M"}},
	} {
		r := cli(t, append([]string{"create"}, c.args...)...)
		if r.code != c.code || !strings.Contains(r.stderr, c.want) {
			t.Errorf("create %q: exit status %d: %s; want %d, %q", c.args, r.code, r.stderr, c.code, c.want)
		}
	}
	sameSnap(t, there, before)
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}

// richImage is a chain of images that have all kinds of clusters; it returns
// the top one.
func richImage(t testing.TB, dir string, seed uint64) string {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 11))
	pick := func(s ...string) string { return s[rng.IntN(len(s))] }
	backing := []string{}
	var path string
	for level := range 1 + rng.IntN(3) {
		path = filepath.Join(dir, fmt.Sprintf("%d", level))
		size := fmt.Sprint((1 + rng.Int64N(64)) * 64 * kib)
		if level == 0 && rng.IntN(2) == 0 {
			run(t, "qemu-img", "create", "-q", "-f", "raw", path, size)
			run(t, "qemu-io", "-f", "raw", "-c", "write -P 1 16k 40k", path)
			backing = []string{"-b", path, "-F", "raw"}
			continue
		}
		options := pick("cluster_size=4k", "cluster_size=64k", "cluster_size=512", "cluster_size=16k,extended_l2=on,compression_type=zstd", "compat=0.10", "cluster_size=32k,lazy_refcounts=on")
		if len(backing) == 0 {
			options += pick("", ",preallocation=metadata")
		}
		run(t, append(append([]string{"qemu-img", "create", "-q", "-f", "qcow2", "-o", options}, backing...), path, size)...)
		var commands []string
		for range 6 {
			off, n := rng.Int64N(60)*kib, (1+rng.Int64N(4))*kib
			commands = append(commands, fmt.Sprintf(pick("write -P 7 %d %d", "write -z %d %d", "write -z -u %d %d", "discard %d %d"), off, n))
		}
		if rng.IntN(2) == 0 {
			commands = append(commands, "write -c -P 9 0 64k")
		}
		// Some are past the end of a small image, which is refused.
		for _, c := range commands {
			tryRun(t, "qemu-io", "-f", "qcow2", "-c", c, path)
		}
		if !strings.Contains(options, "0.10") {
			run(t, "qemu-img", "bitmap", "--add", "-g", "32k", path, "changes")
		}
		run(t, "qemu-img", "snapshot", "-c", "before", path)
		qcow2IO(t, path, "write -P 8 0 4k")
		backing = []string{"-b", path, "-F", "qcow2"}
	}
	return path
}

func TestMapAsQEMU(t *testing.T) {
	need(t, "qemu-io", "qemu-utils")
	for seed := range uint64(24) {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			t.Parallel()
			image := richImage(t, t.TempDir(), seed)
			if got, want := run(t, program(t), "map", "--json", image), run(t, "qemu-img", "map", "--output=json", image); got != want {
				t.Errorf("map --json:\n%s\nqemu-img:\n%s", got, want)
			}
			// qemu-img has no text for what is compressed.
			got, r := run(t, program(t), "map", image), tryRun(t, "qemu-img", "map", image)
			if compressed := strings.Contains(got, "compressed"); compressed != (r.code != 0) || !compressed && got != r.stdout {
				t.Errorf("map:\n%s\nqemu-img:\n%+v", got, r)
			}
		})
	}
}

func TestInfoAsQEMU(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	for seed := range uint64(12) {
		image := richImage(t, t.TempDir(), seed)
		var ours, theirs []any
		for _, c := range []struct {
			out  *[]any
			argv []string
		}{
			{&ours, []string{program(t), "info", "--json", "--backing-chain", image}},
			{&theirs, []string{"qemu-img", "info", "--output=json", "--backing-chain", image}},
		} {
			if err := json.Unmarshal([]byte(run(t, c.argv...)), c.out); err != nil {
				t.Fatal(err)
			}
		}
		if len(ours) != len(theirs) {
			t.Fatalf("seed %d: a chain of %d images, qemu-img sees %d", seed, len(ours), len(theirs))
		}
		for i, want := range theirs {
			delete(want.(map[string]any), "children")
			sameMembers(t, fmt.Sprintf("seed %d: image %d", seed, i), ours[i], want)
		}
		var first any
		if err := json.Unmarshal([]byte(run(t, program(t), "info", "--json", image)), &first); err != nil || !reflect.DeepEqual(first, ours[0]) {
			t.Errorf("seed %d: without --backing-chain it is %v, %v", seed, first, err)
		}
	}
}

// What people read has what they look for.
func TestInfoForPeople(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	dir := t.TempDir()
	image := filepath.Join(dir, "i.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "20G")
	run(t, "qemu-img", "snapshot", "-c", "monday", image)
	run(t, "qemu-img", "bitmap", "--add", image, "night\x1bly")
	out := run(t, program(t), "info", image)
	for _, want := range []string{"virtual size: 20 GiB (21474836480 bytes)\n", "monday", "night?ly: granularity 64 KiB, flags auto\n",
		"owner: nobody owns it\n", "cluster_size: 65536\n", "owner record: " + image + ".owner\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("it lacks %q:\n%s", want, out)
		}
	}
	theirs, _, _ := strings.Cut(run(t, "qemu-img", "info", image), "Format specific")
	if _, list, ok := strings.Cut(theirs, "Snapshot list:\n"); !ok || !strings.Contains(out, list) {
		t.Errorf("the snapshots are not listed as qemu-img does:\n%s\n%s", out, theirs)
	}
	raw := sparseImage(t, dir, 3*mib)
	e := serve(t, raw)
	if out := run(t, program(t), "info", raw); !strings.Contains(out, fmt.Sprintf("pid %d", e.cmd.Process.Pid)) || !strings.Contains(out, "file format: raw") {
		t.Errorf("it does not name the owner:\n%s", out)
	}
}

// check has qemu-img check's exit statuses and figures, and what it mended
// qemu-img finds clean.
func TestCheckAsQEMU(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	damage := func(t *testing.T, image string, off int64, b ...byte) {
		t.Helper()
		if err := os.Truncate(image, 24*64*kib); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(image, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name         string
		make         func(t *testing.T, image string)
		code         int
		leaks, whole int // status after --repair leaks and all
	}{
		{"healthy", func(*testing.T, string) {}, 0, 0, 0},
		// QEMU's layout: the refcount block is cluster 2, the first refcount
		// of 16 bits that of the header.
		{"leaked", func(t *testing.T, image string) { damage(t, image, 2*64*kib+2*20, 0, 1) }, 3, 0, 0},
		{"counted too low", func(t *testing.T, image string) { damage(t, image, 2*64*kib+2*5, 0, 0) }, 2, 2, 0},
		{"both", func(t *testing.T, image string) {
			damage(t, image, 2*64*kib+2*20, 0, 1)
			damage(t, image, 2*64*kib+2*5, 0, 0)
		}, 2, 2, 0},
		{"dirty", func(t *testing.T, image string) {
			run(t, "qemu-img", "amend", "-o", "lazy_refcounts=on", image)
			tryRun(t, "qemu-io", "-f", "qcow2", "-c", "write 2M 1M", "-c", "abort", image)
		}, 2, 2, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			make := func() string {
				image := filepath.Join(t.TempDir(), "i.qcow2")
				run(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
				qcow2IO(t, image, "write -P 6 0 500k", "write -c -P 7 1M 64k")
				c.make(t, image)
				return image
			}
			image := make()
			ours, theirs := cli(t, "check", "--json", image), tryRun(t, "qemu-img", "check", "--output=json", image)
			if ours.code != c.code || theirs.code != c.code {
				t.Errorf("exit status %d, of qemu-img %d; want %d\n%s", ours.code, theirs.code, c.code, ours.stdout)
			}
			want := members(t, theirs.stdout)
			sameMembers(t, "check", members(t, ours.stdout), want)
			if r := cli(t, "check", image); r.code != c.code || (r.code == 0) != strings.Contains(r.stdout, "No errors were found") || r.stderr != "" {
				t.Errorf("check: %+v", r)
			}
			for repair, code := range map[string]int{"leaks": c.leaks, "all": c.whole} {
				image := make()
				if r := cli(t, "check", "--repair", repair, image); r.code != code {
					t.Errorf("--repair %s: %+v", repair, r)
				}
				if r := tryRun(t, "qemu-img", "check", image); r.code != code {
					t.Errorf("after --repair %s qemu-img check: %+v", repair, r)
				}
				if r := cli(t, "who", "--json", image); !strings.Contains(r.stdout, `"clean": true`) {
					t.Errorf("after --repair %s: %s", repair, r.stdout)
				}
				if code == 0 {
					qcow2IO(t, image, "read -P 6 0 500k", "read -P 7 1M 64k")
				}
			}
		})
	}
}

// Nobody may write an image while it is looked at, and the error says who does.
func TestVerbsRefuseOwnedImages(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	image := filepath.Join(t.TempDir(), "i.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
	e := serve(t, image) // as a raw image, which is nothing to the locks
	before := snap(t, image)
	for _, args := range [][]string{{"check", image}, {"check", "--repair", "all", image}, {"map", image}} {
		if r := cli(t, args...); r.code != 1 || !strings.Contains(r.stderr, fmt.Sprintf("pid %d", e.cmd.Process.Pid)) || strings.Contains(r.stderr, "-U") != (len(args) == 2) {
			t.Errorf("%q of an owned image: %+v", args, r)
		}
	}
	sameSnap(t, image, before)
	for _, verb := range []string{"check", "map", "info"} {
		r := cli(t, verb, "-U", "--json", image)
		warned := strings.Contains(r.stderr, fmt.Sprintf("pid %d", e.cmd.Process.Pid))
		if r.code != 0 || warned != (verb != "info") || !json.Valid([]byte(r.stdout)) {
			t.Errorf("%s -U of an owned image: %+v", verb, r)
		}
	}
	if r := cli(t, "check", "-U", "--repair", "all", image); r.code != 1 || !strings.Contains(r.stderr, "only looks") {
		t.Errorf("a repair with -U: %+v", r)
	}
	sameSnap(t, image, before)
	e.inactivate()
	for _, args := range [][]string{{"check", image}, {"check", "--repair", "leaks", image}, {"map", image}} {
		if r := cli(t, args...); r.code != 0 {
			t.Errorf("%q of an image that nobody owns: %+v", args, r)
		}
	}
	e.activate()
}

// What is no qcow2 image is said to be none, whatever the verb.
func TestVerbsOnOtherFiles(t *testing.T) {
	dir := t.TempDir()
	raw := sparseImage(t, dir, mib)
	odd := filepath.Join(dir, "odd.qcow2")
	if err := os.WriteFile(odd, []byte("QFI\xfb\x00\x00\x00\x03and not much more"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{63, "no tables", []string{"check", raw}},
		{1, "too short", []string{"check", odd}},
		{1, "too short", []string{"check", "--repair", "all", odd}},
		{1, "too short", []string{"info", odd}},
		{1, "too short", []string{"map", odd}},
		{1, "no such file", []string{"info", filepath.Join(dir, "gone")}},
		{1, "no such file", []string{"map", filepath.Join(dir, "gone")}},
		{1, "no such file", []string{"check", filepath.Join(dir, "gone")}},
		{1, "unknown flag", []string{"check", "--mend", odd}},
		{1, "must be one of leaks, all", []string{"check", "--repair", "some", odd}},
		{2, "needs one argument", []string{"info"}},
		{2, "unknown flag", []string{"map", "--start", odd}},
	} {
		r := cli(t, c.args...)
		if r.code != c.code || !strings.Contains(strings.ToLower(r.stderr), c.want) {
			t.Errorf("%q: %+v; want %d, %q", c.args, r, c.code, c.want)
		}
	}
}
