package backend

import (
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	// OwnerRecordOff as Options.OwnerRecord keeps no record.
	OwnerRecordOff = "off"

	recordSuffix = ".owner"
)

// RecordPlace says where an image's epochs are kept: Path, or if that is "",
// nowhere, for the reason PerProcess.
type RecordPlace struct{ Path, PerProcess string }

// String is the path, or "per process (why)".
func (p RecordPlace) String() string {
	if p.Path != "" {
		return p.Path
	}
	return fmt.Sprintf("per process (%s)", p.PerProcess)
}

// placeRecord finds the place of the record of the image at path, device if
// it is a block device. explicit is Options.OwnerRecord.
func placeRecord(path, explicit string, device bool) RecordPlace {
	switch {
	case explicit == OwnerRecordOff:
		return RecordPlace{PerProcess: "--owner-record off"}
	case explicit != "":
		if target, err := filepath.EvalSymlinks(explicit); err == nil {
			explicit = target
		}
		abs, err := filepath.Abs(explicit)
		if err != nil {
			return RecordPlace{PerProcess: err.Error()}
		}
		return RecordPlace{Path: abs}
	case device:
		return RecordPlace{PerProcess: "a block device needs --owner-record PATH"}
	}
	// Beside the file itself, where exporters meet that know it by other
	// names.
	target, err := path, error(nil)
	if !noSymlinks(path) {
		target, err = filepath.EvalSymlinks(path)
	}
	if err == nil {
		target, err = filepath.Abs(target)
	}
	if err != nil {
		return RecordPlace{PerProcess: fmt.Sprintf("the image has no path: %v", err)}
	}
	return RecordPlace{Path: target + recordSuffix}
}

// noSymlinks reports whether the path is known to lead to a file without a
// symbolic link: one call instead of one for each directory. False says nothing.
func noSymlinks(path string) bool {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &how)
	if err != nil {
		return false // one is, or the kernel has no such call
	}
	_ = unix.Close(fd)
	return true
}
