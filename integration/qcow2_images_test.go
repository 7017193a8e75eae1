package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// qcow2Kind is a kind of image that a user may have.
type qcow2Kind struct {
	name    string
	options string // of qemu-img create; DIR is the image's folder
	fill    string // how what is there at first came: "", "data", "compressed"
	backing string // "", "raw", "qcow2", "chain": of other sizes than the image
	after   string // "snapshot", "snapshot deleted", "bitmap", "dirty", "tail", or "amend" and an option
}

// qcow2Kinds are one or more for each row of the table of features.
var qcow2Kinds = []qcow2Kind{
	{name: "plain"},
	{name: "version 2", options: "compat=0.10,cluster_size=4k", fill: "data"},
	{name: "version 2, backing file", options: "compat=0.10,cluster_size=64k", backing: "raw"},
	{name: "clusters of 512 bytes", options: "cluster_size=512", fill: "data"},
	{name: "clusters of 2 MiB", options: "cluster_size=2M", fill: "data"},
	{name: "refcounts of 1 bit", options: "refcount_bits=1,cluster_size=1k", fill: "data"},
	{name: "refcounts of 64 bits", options: "refcount_bits=64,cluster_size=512", fill: "data"},
	{name: "raw backing file", options: "cluster_size=4k", backing: "raw"},
	{name: "qcow2 backing file", options: "cluster_size=64k", backing: "qcow2"},
	{name: "chain", options: "cluster_size=2k", backing: "chain"},
	{name: "metadata preallocated", options: "preallocation=metadata,cluster_size=4k"},
	{name: "preallocated", options: "preallocation=falloc"},
	{name: "compressed by zlib", options: "cluster_size=4k", fill: "compressed"},
	{name: "compressed by zstd", options: "compression_type=zstd", fill: "compressed"},
	{name: "subclusters", options: "extended_l2=on,cluster_size=16k", fill: "data"},
	{name: "subclusters, compressed", options: "extended_l2=on,cluster_size=64k", fill: "compressed"},
	{name: "subclusters, backing file", options: "extended_l2=on,cluster_size=128k", backing: "qcow2"},
	{name: "data file", options: "data_file=DIR/data,cluster_size=4k", fill: "data"},
	{name: "raw data file", options: "data_file=DIR/data,data_file_raw=on", fill: "data"},
	{name: "data file, subclusters", options: "data_file=DIR/data,extended_l2=on,cluster_size=16k", fill: "data"},
	{name: "data file, backing file", options: "data_file=DIR/data,cluster_size=64k", backing: "raw"},
	{name: "lazy refcounts", options: "lazy_refcounts=on,cluster_size=1k", fill: "data"},
	{name: "dirty", options: "lazy_refcounts=on,cluster_size=4k", fill: "data", after: "dirty"},
	{name: "snapshot", options: "cluster_size=4k", fill: "data", after: "snapshot"},
	{name: "snapshot, compressed", options: "cluster_size=64k", fill: "compressed", after: "snapshot"},
	{name: "snapshot, subclusters", options: "extended_l2=on,cluster_size=16k", fill: "data", after: "snapshot"},
	{name: "bitmap", options: "cluster_size=4k", fill: "data", after: "bitmap"},
	{name: "snapshot deleted", options: "cluster_size=1k", fill: "data", after: "snapshot deleted"},
	{name: "made version 2", options: "cluster_size=4k", fill: "data", after: "amend compat=0.10"},
	{name: "refcounts made wider", options: "cluster_size=512", fill: "data", after: "amend refcount_bits=64"},
	{name: "refcounts made narrower", options: "cluster_size=2k", fill: "data", after: "amend refcount_bits=1"},
	{name: "end within a cluster", fill: "data", after: "tail"},
}

// qcow2Tools are the programs of one version of QEMU; "" are those installed.
type qcow2Tools string

func (q qcow2Tools) path(tool string) string { return filepath.Join(string(q), tool) }

// make makes an image of a kind, on which a disk of size bytes has some data,
// some zeros and some that shows through, and returns its path and what the
// disk holds. The files are named relative to each other, in dir.
func (k qcow2Kind) make(t testing.TB, q qcow2Tools, dir string, seed, size int64) (image string, disk []byte) {
	t.Helper()
	img := q.path("qemu-img")
	image = filepath.Join(dir, "disk.qcow2")
	raw := filepath.Join(dir, "first.raw")
	disk = make([]byte, size)
	patches := func(b []byte, seed int64) {
		for i := int64(0); i*97*kib < int64(len(b)); i++ {
			copy(b[i*97*kib:min(int64(len(b)), i*97*kib+(i%5+1)*11*kib)], randomBytes(seed+i, 60*kib))
		}
		// What can be compressed.
		for i := len(b) / 2; i < min(len(b), len(b)/2+200*kib); i++ {
			b[i] = byte(i / 1000)
		}
	}
	var backing []string
	if k.backing != "" {
		base := make([]byte, size*2/3+513)
		patches(base, seed+100)
		if err := os.WriteFile(filepath.Join(dir, "base.raw"), base, 0o644); err != nil {
			t.Fatal(err)
		}
		copy(disk, base)
		backing = []string{"-b", "base.raw", "-F", "raw"}
		if k.backing != "raw" {
			run(t, img, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", filepath.Join(dir, "base.raw"), filepath.Join(dir, "base.qcow2"))
			clear(disk[len(base):])
			backing = []string{"-b", "base.qcow2", "-F", "qcow2"}
		}
		if k.backing == "chain" {
			middle := filepath.Join(dir, "middle.qcow2")
			run(t, append(append([]string{img, "create", "-q", "-f", "qcow2"}, backing...), "-o", "cluster_size=64k", middle, fmt.Sprint(size+5*kib))...)
			run(t, q.path("qemu-io"), "-f", "qcow2", "-c", "write -q -P 77 100000 70000", "-c", "write -q -z 400k 30k", middle)
			copy(disk[100000:], strings.Repeat("\x4d", 70000))
			clear(disk[400*kib : 430*kib])
			backing = []string{"-b", "middle.qcow2", "-F", "qcow2"}
		}
	}
	args := append([]string{img, "create", "-q", "-f", "qcow2"}, backing...)
	if k.options != "" {
		args = append(args, "-o", strings.ReplaceAll(k.options, "DIR", dir))
	}
	run(t, append(args, image, fmt.Sprint(size))...)
	if k.fill != "" {
		patches(disk, seed)
		if err := os.WriteFile(raw, disk, 0o644); err != nil {
			t.Fatal(err)
		}
		convert := []string{img, "convert", "-n", "-f", "raw", "-O", "qcow2"}
		if k.fill == "compressed" {
			convert = append(convert, "-c")
		}
		run(t, append(convert, raw, image)...)
	}
	switch k.after {
	case "snapshot":
		run(t, img, "snapshot", "-c", "then", image)
	case "snapshot deleted":
		run(t, img, "snapshot", "-c", "then", image)
		run(t, q.path("qemu-io"), "-f", "qcow2", "-c", "write -q -P 78 100000 70000", image)
		copy(disk[100000:], strings.Repeat("\x4e", 70000))
		run(t, img, "snapshot", "-d", "then", image)
	case "bitmap":
		run(t, img, "bitmap", "--add", "-g", "4k", image, "b0")
	case "dirty":
		f, err := os.OpenFile(image, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte{1}, 79); err != nil {
			t.Fatal(err)
		}
	case "tail": // what a copying program left there is nobody's
		f, err := os.OpenFile(image, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.Write(randomBytes(seed, 100001)); err != nil {
			t.Fatal(err)
		}
	}
	if option, ok := strings.CutPrefix(k.after, "amend "); ok {
		run(t, img, "amend", "-f", "qcow2", "-o", option, image)
	}
	return image, disk
}

// check sees that QEMU finds no fault, and with clean no leak either.
func (q qcow2Tools) check(t testing.TB, image string, clean bool) {
	t.Helper()
	r := tryRun(t, q.path("qemu-img"), "check", "-f", "qcow2", image)
	if r.code != 0 && (r.code != 3 || clean) {
		t.Fatalf("qemu-img check of %s: exit status %d\n%s%s", image, r.code, r.stdout, r.stderr)
	}
}

// same sees that QEMU reads the disk that we know.
func (q qcow2Tools) same(t testing.TB, image string, disk []byte) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(raw, disk, 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(raw)
	r := tryRun(t, q.path("qemu-img"), "compare", "-f", "raw", "-F", "qcow2", raw, image)
	if r.code != 0 {
		t.Fatalf("qemu-img compare of %s: exit status %d\n%s%s", image, r.code, r.stdout, r.stderr)
	}
}
