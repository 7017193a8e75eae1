package backend

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestProbe(t *testing.T) {
	at := func(n int, s string) string { return strings.Repeat("\x00", n) + s }
	for first, want := range map[string]string{
		"":                                   "",
		"Q":                                  "",
		"QFI":                                "",
		"QFI\xfb":                            "qcow2",
		"QFI\xfb\x00\x00\x00\x01":            "qcow",
		"QFI\xfb\x00\x00\x00\x03":            "qcow2",
		"QED\x00":                            "qed",
		"KDMV\x01":                           "vmdk",
		"COWD":                               "vmdk",
		"conectix":                           "vpc",
		"vhdxfile":                           "vhdx",
		at(64, "\x7f\x10\xda\xbe"):           "vdi",
		at(63, "\x7f\x10\xda\xbe"):           "",
		"LUKS\xba\xbe\x00\x02":               "luks",
		"WithoutFreeSpace":                   "parallels",
		"WithouFreSpacExt":                   "parallels",
		"Bochs Virtual HD Image":             "bochs",
		"\xeb\x63\x90" + at(507, "\x55\xaa"): "",

		"# Disk DescriptorFile\nversion=1\n":           "vmdk",
		"# Disk DescriptorFile\r\n \nversion=3\r\nCID": "vmdk",
		"version=2\n":             "vmdk",
		"version=4\n":             "",
		"# only a comment":        "",
		"#!/bin/sh\necho hello\n": "",
		"hello\nversion=1\n":      "",
	} {
		if got := Probe([]byte(first)); got != want {
			t.Errorf("%q: %q, want %q", first, got, want)
		}
	}
}

func FuzzProbe(f *testing.F) {
	f.Add([]byte("QFI\xfb"))
	f.Add([]byte("# x\nversion=1\n"))
	f.Fuzz(func(t *testing.T, b []byte) { Probe(b) })
}

// What qemu-img makes is known for what it is.
func TestProbeRealImages(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Fatal("qemu-img is missing: install the Debian package qemu-utils")
	}
	for _, format := range []string{"qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels"} {
		path := filepath.Join(t.TempDir(), "disk")
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", format, path, "4M").CombinedOutput(); err != nil {
			t.Logf("%s: %s", format, out)
			continue
		}
		b, err := os.ReadFile(path)
		must(t, err)
		if got := Probe(b[:probeLength]); got != format {
			t.Errorf("%s is taken for %q", format, got)
		}
	}
}
