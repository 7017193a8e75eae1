package backend

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A chain of raw and qcow2 files, smaller and larger than what is in front of
// them, shows what it shows QEMU, and only the image itself is written.
func TestChain(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.WriteFile(at("root.raw"), pattern(1<<20+512, 1), 0o600))
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "root.raw", "-F", "raw", at("a.qcow2"), "4M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "-o", "cluster_size=4k", at("b.qcow2"), "2M")
	a := openImage(t, Options{Path: at("a.qcow2"), Format: "qcow2"}, nil)
	must(t, activate(a, false))
	must(t, write(a, 1000, pattern(5000, 2), false))
	must(t, write(a, 3<<20, pattern(5000, 3), false))
	must(t, inactivate(a))
	must(t, a.Close())
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", at("b.qcow2"), "-F", "qcow2", at("disk.qcow2"), "6M")

	o := openImage(t, Options{Path: at("disk.qcow2"), Format: "qcow2"}, nil)
	want := make([]byte, 6<<20)
	copy(want, pattern(1<<20+512, 1))
	copy(want[1000:], pattern(5000, 2))
	wantDisk(t, o, want)
	for _, f := range []string{"root.raw", "a.qcow2", "b.qcow2", "disk.qcow2"} {
		if l := procLocks(t, at(f)); len(l) != 0 {
			t.Errorf("inactive: %s has locks %v", f, l)
		}
	}
	sums := [][32]byte{sumOf(t, at("root.raw")), sumOf(t, at("a.qcow2")), sumOf(t, at("b.qcow2"))}
	must(t, activate(o, false))
	for _, f := range []string{"root.raw", "a.qcow2", "b.qcow2"} {
		if l := procLocks(t, at(f)); len(l) != 3 {
			t.Errorf("active: %s has locks %v, want those of a reader", f, l)
		}
		w := openImage(t, Options{Path: at(f), Format: map[bool]string{true: "raw", false: "qcow2"}[f == "root.raw"]}, nil)
		var le *LockError
		if err := activate(w, false); !errors.As(err, &le) {
			t.Errorf("%s gets a writer: %v", f, err)
		}
		must(t, w.Close())
	}
	must(t, write(o, 1100, pattern(100, 4), false))
	copy(want[1100:], pattern(100, 4))
	must(t, write(o, 1<<20, pattern(100<<10, 5), false))
	copy(want[1<<20:], pattern(100<<10, 5))
	must(t, o.Discard(0, 64<<10))
	clear(want[:64<<10])
	wantDisk(t, o, want)
	must(t, inactivate(o))
	wantDisk(t, o, want)
	if !slices.Equal(sums, [][32]byte{sumOf(t, at("root.raw")), sumOf(t, at("a.qcow2")), sumOf(t, at("b.qcow2"))}) {
		t.Error("a backing file has changed")
	}
	checkQcow(t, at("disk.qcow2"))
	qemuImg(t, "convert", "-O", "raw", at("disk.qcow2"), at("raw"))
	wantContent(t, at("raw"), want)
	must(t, o.Close())
	for _, f := range []string{"root.raw", "a.qcow2", "b.qcow2"} {
		if n, _ := descriptors(t, at(f)); n != 0 {
			t.Errorf("%s: %d descriptors left", f, n)
		}
	}
}

// Names in an image lead to nothing that its user did not expect.
// What the process writes something else into is no image, and not behind one.
func TestReserved(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.WriteFile(at("log"), nil, 0o600))
	must(t, os.WriteFile(at("other"), nil, 0o600))
	var st unix.Stat_t
	must(t, unix.Stat(at("log"), &st))
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", "log", "-F", "raw", at("disk.qcow2"), "1M")
	log := func(dev, ino uint64) string {
		if dev == st.Dev && ino == st.Ino {
			return "the log"
		}
		return ""
	}
	for name, format := range map[string]string{"log": "raw", "disk.qcow2": "qcow2"} {
		o, err := Open(Options{Path: at(name), Format: format, Reserved: log})
		if err == nil {
			err = errors.Join(activate(o, false), o.Close())
		}
		if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "it is the log, and what is written there would end up in the image") {
			t.Errorf("%s: %v", name, err)
		}
	}
	openImage(t, Options{Path: at("other"), Reserved: log}, nil)
}

func TestChainRefuses(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	out := func(name string) string { return filepath.Join(outside, name) }
	must(t, os.WriteFile(out("base.raw"), pattern(1<<20, 1), 0o600))
	must(t, os.WriteFile(in("base.raw"), pattern(1<<20, 1), 0o600))
	must(t, os.Symlink(out("base.raw"), in("link.raw")))
	must(t, os.Mkdir(in("sub"), 0o700))
	for name, c := range map[string]struct {
		backing, format string
		err             unix.Errno
		text            string
	}{
		"outside":     {out("base.raw"), "raw", unix.EACCES, "--allow-backing " + outside},
		"dots":        {"../" + filepath.Base(outside) + "/base.raw", "raw", unix.EACCES, "--allow-backing"},
		"link":        {"link.raw", "raw", unix.EACCES, "--allow-backing " + outside},
		"secrets":     {"/etc/passwd", "raw", unix.EACCES, "--allow-backing /etc"},
		"json":        {`json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}`, "raw", unix.EOPNOTSUPP, "json:"},
		"protocol":    {"nbd://localhost/x", "raw", unix.EOPNOTSUPP, "protocol nbd"},
		"format":      {"base.raw", "vmdk", unix.EOPNOTSUPP, "vmdk"},
		"no format":   {"base.raw", "", unix.EINVAL, "qemu-img rebase -u"},
		"missing":     {"none.raw", "raw", unix.ENOENT, "none.raw"},
		"directory":   {"sub", "raw", unix.EISDIR, "directory"},
		"loop":        {"disk.qcow2", "qcow2", unix.ELOOP, "part of this image already"},
		"not qcow2":   {"base.raw", "qcow2", unix.EIO, "magic number"},
		"inside":      {"base.raw", "raw", 0, ""},
		"file":        {"file:base.raw", "raw", 0, ""},
		"absolute":    {in("base.raw"), "raw", 0, ""},
		"host device": {"base.raw", "host_device", 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := in("disk.qcow2")
			qemuImg(t, "create", "-q", "-f", "qcow2", path, "1M")
			rebase := []string{"rebase", "-u", "-f", "qcow2", "-b", c.backing, path}
			if c.format != "" {
				rebase = slices.Insert(rebase, 1, "-F", c.format)
			}
			if c.format == "" || c.format == "vmdk" {
				// qemu-img would not.
				setBacking(t, path, c.backing, c.format)
			} else {
				qemuImg(t, rebase...)
			}
			o, err := Open(Options{Path: path, Format: "qcow2"})
			if err == nil {
				must(t, o.Close())
			}
			if c.err == 0 {
				must(t, err)
			} else if !errors.Is(err, c.err) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), path) {
				t.Errorf("%v", err)
			} else {
				t.Log(err)
			}
			for _, f := range []string{path, in("base.raw"), out("base.raw")} {
				if n, _ := descriptors(t, f); n != 0 {
					t.Errorf("%s: %d descriptors left", f, n)
				}
			}
			// A guess leads nowhere.
			if o, err := Open(Options{Path: path}); err == nil {
				o.Close()
				t.Error("an image that was guessed to be qcow2 leads to another file")
			}
		})
	}
	t.Run("allowed", func(t *testing.T) {
		path := in("disk.qcow2")
		qemuImg(t, "create", "-q", "-f", "qcow2", "-b", out("base.raw"), "-F", "raw", path)
		o := openImage(t, Options{Path: path, Format: "qcow2", AllowBacking: []string{outside}}, nil)
		wantDisk(t, o, pattern(1<<20, 1))
	})
	t.Run("data file", func(t *testing.T) {
		path := in("data.qcow2")
		qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+out("data"), path, "1M")
		_, err := Open(Options{Path: path, Format: "qcow2"})
		wantErrno(t, err, unix.EACCES)
		openImage(t, Options{Path: path, Format: "qcow2", AllowBacking: []string{outside}}, nil)
	})
}

// setBacking writes a backing file's name, and its format if there is one, into
// a fresh image.
func setBacking(t testing.TB, path, name, format string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	put := func(off int64, b []byte) {
		_, err := f.WriteAt(b, off)
		must(t, err)
	}
	at := int64(0x1000)
	put(at, []byte(name))
	put(8, []byte{0, 0, 0, 0, 0, 0, byte(at >> 8), byte(at), 0, 0, 0, byte(len(name))})
	ext := make([]byte, 24) // behind the fixed part: the format and the end
	if format != "" {
		copy(ext, []byte{0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, byte(len(format))})
		copy(ext[8:], format)
	}
	put(112, ext)
}
