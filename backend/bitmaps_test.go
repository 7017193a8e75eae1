package backend

import (
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestBitmapsOfOwned(t *testing.T) {
	path := makeQcow(t, t.TempDir(), "1M")
	qemuImg(t, "bitmap", "--add", "-g", "4k", path, "a")
	o := openImage(t, Options{Path: path, Format: "qcow2"}, nil)
	wantStatus := func(want ...Status) {
		t.Helper()
		got, err := o.BitmapStatus(nil, "b", 0, o.Size(), 100)
		must(t, err)
		if !slices.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	}
	// Somebody else makes another one.
	qemuImg(t, "bitmap", "--remove", path, "a")
	qemuImg(t, "bitmap", "--add", "-g", "4k", path, "b")
	wantBitmaps := func(dirty int64) {
		t.Helper()
		all, err := o.Bitmaps()
		must(t, err)
		if !slices.Equal(all, []Bitmap{{Name: "b", Granularity: 4096, Auto: true, Dirty: dirty}}) {
			t.Errorf("%+v", all)
		}
	}
	wantBitmaps(0)
	for range 2 { // each ownership goes on where the last one has ended
		must(t, activate(o, false))
		must(t, write(o, 8192, make([]byte, 100), false))
		wantStatus(Status{Length: 8192}, Status{4096, StatusDirty}, Status{Length: 1<<20 - 12288})
		wantBitmaps(4096)
		if got, err := o.BitmapStatus(nil, "b", 0, 1<<20, 1); err != nil || len(got) != 1 {
			t.Errorf("one was asked for: %v, %v", got, err)
		}
		must(t, inactivate(o))
		wantStatus(Status{Length: 8192}, Status{4096, StatusDirty}, Status{Length: 1<<20 - 12288})
		checkQcow(t, path)
		if info := qemuImg(t, "info", path); strings.Contains(info, "in-use") || !strings.Contains(info, "auto") {
			t.Errorf("qemu-img info:\n%s", info)
		}
	}
	wantBitmaps(0)
	// It grows with the disk.
	must(t, activate(o, false))
	must(t, o.Resize(2<<20))
	must(t, write(o, 2<<20-1, make([]byte, 1), false))
	grown := []Status{{Length: 8192}, {4096, StatusDirty}, {Length: 2<<20 - 16384}, {4096, StatusDirty}}
	wantStatus(grown...)
	must(t, inactivate(o))
	wantStatus(grown...)
	checkQcow(t, path)
	_, err := o.BitmapStatus(nil, "b", 2<<20-1, 2, 1)
	wantErrno(t, err, unix.EIO)

	raw := openImage(t, Options{Path: writeFile(t, t.TempDir(), make([]byte, 512))}, nil)
	if all, err := raw.Bitmaps(); len(all) != 0 || err != nil {
		t.Errorf("%v %v", all, err)
	}
	_, err = raw.BitmapStatus(nil, "b", 0, 1, 1)
	wantErrno(t, err, unix.ENOENT)
}

// A bitmap that tells nothing keeps nobody from what else there is to be told:
// all is dirty by it. One that cannot be read now is an error.
func TestBitmapsThatTellNothing(t *testing.T) {
	path := makeQcow(t, t.TempDir(), "1M")
	qemuImg(t, "bitmap", "--add", "-g", "4k", path, "b")
	qemuImg(t, "bitmap", "--add", "--disable", path, "off")
	owner := openImage(t, Options{Path: path, Format: "qcow2"}, nil)
	must(t, activate(owner, false))
	must(t, write(owner, 0, make([]byte, 1), false))
	must(t, inactivate(owner))
	qemuImg(t, "bitmap", "--merge", "b", path, "off")
	must(t, activate(owner, false))
	must(t, write(owner, 0, make([]byte, 1), false))
	must(t, owner.Flush())
	died := writeFile(t, t.TempDir(), contentOf(t, path))

	var f failing
	var warned []string
	o := openImage(t, Options{Path: died, Format: "qcow2", Warn: func(s string) { warned = append(warned, s) }}, f.hook)
	must(t, activate(o, false))
	for _, c := range []struct{ name, why string }{
		{"b", "is inconsistent"},
		{"none", "it has no bitmap"},
	} {
		warned = nil
		for range 2 {
			got, err := o.BitmapStatus([]Status{{Length: 1}}, c.name, 4096, 100, 1)
			if err != nil || !slices.Equal(got, []Status{{Length: 1}, {100, StatusDirty}}) {
				t.Errorf("%s: %v, %v", c.name, got, err)
			}
		}
		if len(warned) != 1 || !strings.Contains(warned[0], c.why) {
			t.Errorf("%s: logged %q", c.name, warned)
		}
	}
	f.set(opRead, unix.EIO)
	_, err := o.BitmapStatus(nil, "off", 0, 1, 1)
	wantErrno(t, err, unix.EIO)
	f.set(opRead, nil)
	if got, err := o.BitmapStatus(nil, "off", 0, 1<<20, 9); err != nil || !slices.Equal(got, []Status{{64 << 10, StatusDirty}, {Length: 960 << 10}}) {
		t.Errorf("%v, %v", got, err)
	}
}
