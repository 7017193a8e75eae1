package backend

import (
	"os"
	"strings"
)

// Scopes of locks: whom they keep away.
const (
	scopeAll  = "cluster"    // everybody who can open the file
	scopeHost = "host-local" // only programs on this host
	scopeOff  = "off"
)

// lockScope tells how far byte-range locks on f reach. Devices are not locked
// across hosts; of network file systems the mount options tell, except FUSE,
// which keeps locks in this kernel unless its server asked for them.
func (f *File) lockScope() string {
	switch f.traits.FS {
	case "block", "fuse":
		return scopeHost
	case "nfs", "cifs":
		if !optionsShareLocks(mountOptions(f.fd)) {
			return scopeHost
		}
	}
	return scopeAll
}

// optionsShareLocks judges the super options of an NFS or CIFS mount.
func optionsShareLocks(options string) bool {
	for o := range strings.SplitSeq(options, ",") {
		switch o {
		case "nolock", "local_lock=all", "local_lock=posix", "nobrl":
			return false
		}
	}
	return true
}

// mountOptions are the super options of the mount that fd lies on, from
// /proc, or "" if that cannot be read.
func mountOptions(fd int) string {
	info, err := fdinfo(fd)
	if err != nil {
		return ""
	}
	var id string
	for line := range strings.Lines(info) {
		if v, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			id = strings.TrimSpace(v)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	return superOptions(string(mounts), id)
}

// superOptions finds the line of mount id in a mountinfo: proc(5) has the
// super options as its last field.
func superOptions(mountinfo, id string) string {
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line)
		if len(fields) > 0 && fields[0] == id {
			return fields[len(fields)-1]
		}
	}
	return ""
}
