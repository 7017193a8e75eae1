package backend

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	sock := filepath.Join(dir, "sock")
	l, err := net.Listen("unix", sock)
	must(t, err)
	defer l.Close()
	fifo := filepath.Join(dir, "fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	qcow2 := filepath.Join(dir, "qcow2")
	must(t, os.WriteFile(qcow2, []byte("QFI\xfb\x00\x00\x00\x03"), 0o600))
	vmdk := filepath.Join(dir, "vmdk")
	must(t, os.WriteFile(vmdk, []byte("KDMV"), 0o600))
	raw := writeFile(t, dir, make([]byte, 1000))
	loop := filepath.Join(dir, "loop")
	must(t, os.Symlink("loop", loop))

	for _, c := range []struct {
		o    Options
		err  unix.Errno
		text string
	}{
		{Options{Path: filepath.Join(dir, "none")}, unix.ENOENT, "nbd-export create -f raw"},
		{Options{Path: "nbd+unix:///?socket=/run/a"}, unix.ENOENT, "a file or a block device, given by its path"},
		{Options{Path: `json:{"driver":"raw"}`}, unix.ENOENT, "a file or a block device, given by its path"},
		{Options{Path: dir}, unix.EISDIR, "directory"},
		{Options{Path: raw + "/x"}, unix.ENOTDIR, ""},
		{Options{Path: loop}, unix.ELOOP, ""},
		{Options{Path: fifo}, unix.EINVAL, "FIFO"},
		{Options{Path: sock}, unix.EINVAL, "socket"},
		{Options{Path: "/dev/null"}, unix.EINVAL, "character device"},
		{Options{Path: qcow2}, unix.EIO, "too short for a header"},
		{Options{Path: qcow2, Format: "qcow2"}, unix.EIO, "too short for a header"},
		{Options{Path: raw, Format: "qcow2"}, unix.EOPNOTSUPP, "this is not a qcow2 image"},
		{Options{Path: vmdk}, unix.EOPNOTSUPP, "vmdk"},
		{Options{Path: raw, Format: "vmdk"}, unix.EINVAL, "--format"},
		{Options{Path: raw, Cache: "unsafe"}, unix.EINVAL, "--cache"},
		{Options{Path: raw, Locking: "maybe"}, unix.EINVAL, "--locking"},
		{Options{Path: raw, DropCache: "maybe"}, unix.EINVAL, "--drop-cache"},
	} {
		r, err := Open(c.o)
		if err == nil {
			r.Close()
			t.Errorf("%+v: no error", c.o)
			continue
		}
		if !isErrno(err, c.err) || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: %v", c.o, err)
		}
		t.Log(err)
	}
	for _, path := range []string{raw, qcow2, vmdk} {
		if n, _ := descriptors(t, path); n != 0 {
			t.Errorf("%s: %d descriptors left", path, n)
		}
	}
	// Raw is raw if the user says so.
	r, err := Open(Options{Path: qcow2, Format: "raw"})
	must(t, err)
	r.Close()
}

func TestOpenHints(t *testing.T) {
	for _, c := range []struct {
		how  openHow
		err  error
		text string
	}{
		{openHow{}, unix.EACCES, "readable"},
		{openHow{write: true}, unix.EACCES, "--read-only"},
		{openHow{write: true}, unix.EROFS, "--read-only"},
		{openHow{direct: true}, unix.EINVAL, "--cache writeback"},
	} {
		path := writeFile(t, t.TempDir(), nil)
		h := new(failing)
		h.set(opOpen, c.err)
		c.how.faults = h.hook
		_, err := openFile(path, c.how)
		wantErrno(t, err, c.err)
		if !strings.Contains(err.Error(), c.text) {
			t.Error(err)
		}
	}
}

func TestOpenProbed(t *testing.T) {
	var warned []string
	r, err := Open(Options{Path: writeFile(t, t.TempDir(), make([]byte, 100)), Warn: func(s string) { warned = append(warned, s) }})
	must(t, err)
	defer r.Close()
	if len(warned) != 1 || !strings.Contains(warned[0], "-f raw") || !r.format.(*rawFormat).guard.on {
		t.Errorf("%q", warned)
	}
}

func TestOpenEmpty(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		for _, cache := range []CacheMode{CacheWriteback, CacheNone, CacheWritethrough} {
			r := openImage(t, Options{Path: writeFile(t, dir, nil), Format: "auto", Cache: cache}, nil)
			if r.Size() != 0 {
				t.Error(r.Size())
			}
			must(t, activate(r, true))
			must(t, r.Flush())
			wantErrno(t, write(r, 0, []byte{1}, false), unix.EIO)
			must(t, inactivate(r))
		}
	})
}

func TestInfo(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 100))
		i := openImage(t, Options{Path: path, ReadOnly: true, Cache: CacheWritethrough}, nil).Info()
		if i.Path != path || i.Format != "raw" || !i.ReadOnly || !i.WriteThrough || i.MinBlock != 1 || i.MaxBlock != 32<<20 ||
			i.PreferredBlock < 4096 || i.PreferredBlock&(i.PreferredBlock-1) != 0 {
			t.Errorf("%+v", i)
		}
	})
}
