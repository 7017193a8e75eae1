package backend

import (
	"bytes"
	"strings"
)

// probeLength is how much of an image Probe looks at, in bytes; QEMU's
// BLOCK_PROBE_BUF_SIZE.
const probeLength = 512

// magics are the first bytes of image formats, or bytes at a fixed place.
var magics = []struct {
	at     int
	magic  string
	format string
}{
	{0, "QFI\xfb\x00\x00\x00\x01", "qcow"},
	{0, "QFI\xfb", "qcow2"},
	{0, "QED\x00", "qed"},
	{0, "KDMV", "vmdk"},
	{0, "COWD", "vmdk"},
	{0, "conectix", "vpc"},
	{0, "vhdxfile", "vhdx"},
	{64, "\x7f\x10\xda\xbe", "vdi"},
	{0, "LUKS\xba\xbe", "luks"},
	{0, "WithoutFreeSpace", "parallels"},
	{0, "WithouFreSpacExt", "parallels"},
	{0, "Bochs Virtual HD Image", "bochs"},
	{0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"},
}

// Probe names the image format whose header first begins with, as QEMU calls
// it, or "" if it is none of those that can be told from a raw disk. first is
// the beginning of the image, 512 bytes if it has as many.
func Probe(first []byte) string {
	for _, m := range magics {
		if len(first) >= m.at && bytes.HasPrefix(first[m.at:], []byte(m.magic)) {
			return m.format
		}
	}
	if isVMDKDescriptor(first) {
		return "vmdk"
	}
	return ""
}

// isVMDKDescriptor knows a VMDK that is a text naming other files: after
// comments and blank lines comes the version (QEMU's vmdk_probe).
func isVMDKDescriptor(b []byte) bool {
	for line := range strings.Lines(string(b)) {
		switch s := strings.Trim(line, " \r\n"); {
		case s == "", strings.HasPrefix(line, "#"):
			continue
		default:
			return s == "version=1" || s == "version=2" || s == "version=3"
		}
	}
	return false
}
