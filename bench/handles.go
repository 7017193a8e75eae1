package bench

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// writableHandles lists the descriptors and shared maps by which a process could
// change a file.
func writableHandles(pid int, path string) ([]string, error) {
	target, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, e := range entries {
		st, err := os.Stat(filepath.Join(dir, e.Name()))
		if err != nil || !os.SameFile(st, target) {
			continue // closed meanwhile, or something else
		}
		flags, err := descriptorFlags(pid, e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if flags&syscall.O_ACCMODE != syscall.O_RDONLY {
			found = append(found, "descriptor "+e.Name())
		}
	}
	maps, err := writableMaps(pid, path, target)
	return append(found, maps...), err
}

// descriptorFlags are the open flags of a descriptor of a process.
func descriptorFlags(pid int, fd string) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if text, ok := strings.CutPrefix(line, "flags:"); ok {
			return strconv.ParseInt(strings.TrimSpace(text), 8, 64)
		}
	}
	return 0, fmt.Errorf("no flags in /proc/%d/fdinfo/%s", pid, fd)
}

// writableMaps lists the shared writable maps of a file. It is known by its path,
// or by device and inode where the process sees another path.
func writableMaps(pid int, path string, target os.FileInfo) ([]string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st := target.Sys().(*syscall.Stat_t)
	dev := fmt.Sprintf("%02x:%02x", unix.Major(st.Dev), unix.Minor(st.Dev))
	inode := strconv.FormatUint(st.Ino, 10)
	var found []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// address perms offset dev inode path
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || (fields[5] != path && (fields[3] != dev || fields[4] != inode)) {
			continue
		}
		if perms := fields[1]; strings.Contains(perms, "w") && strings.Contains(perms, "s") {
			found = append(found, "map "+fields[0])
		}
	}
	return found, lines.Err()
}

// stat fills in what stat knows of a file.
func (a *appearance) stat(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	s := st.Sys().(*syscall.Stat_t)
	a.mtime, a.size, a.blocks = st.ModTime(), st.Size(), s.Blocks
	a.ctime = time.Unix(s.Ctim.Unix())
	return nil
}
