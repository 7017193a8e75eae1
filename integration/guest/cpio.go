package guest

import (
	"bytes"
	"fmt"
	"path"
	"strings"
)

// archive writes a cpio archive in the "newc" form, which is what the kernel
// unpacks as its first root file system. Archives may be put one behind the
// other: the kernel unpacks them in turn.
type archive struct {
	buf  bytes.Buffer
	ino  int
	dirs map[string]bool
}

const (
	modeDir     = 0o040755
	modeFile    = 0o100755
	modeSymlink = 0o120777
)

func newArchive() *archive { return &archive{dirs: map[string]bool{".": true, "/": true}} }

func (a *archive) entry(name string, mode int, data []byte) {
	a.ino++
	// Fields: ino, mode, uid, gid, nlink, mtime, size, device (2), rdevice (2),
	// length of the name, checksum (unused).
	fmt.Fprintf(&a.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.buf.WriteString(name)
	a.buf.WriteByte(0)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

// dir adds a directory and those above it, each once.
func (a *archive) dir(name string) {
	name = strings.TrimPrefix(path.Clean(name), "/")
	if name == "" || a.dirs[name] {
		return
	}
	a.dir(path.Dir(name))
	a.dirs[name] = true
	a.entry(name, modeDir, nil)
}

func (a *archive) file(name string, data []byte) {
	a.dir(path.Dir(name))
	a.entry(strings.TrimPrefix(name, "/"), modeFile, data)
}

func (a *archive) symlink(name, target string) {
	a.dir(path.Dir(name))
	a.entry(strings.TrimPrefix(name, "/"), modeSymlink, []byte(target))
}

// finish ends the archive and returns it.
func (a *archive) finish() []byte {
	a.entry("TRAILER!!!", 0, nil)
	return a.buf.Bytes()
}
