package control

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// PIDFile tells supervisors that the server is ready, and its process id. It
// appears under its name at once and complete. It is locked as long as its
// process lives, so that one which is left from a dead process is told from one
// that is not, whoever has the process id by now.
type PIDFile struct {
	path      string
	file      *os.File
	own       os.FileInfo
	published bool // renamed to path
}

// NewPIDFile prepares the file beside path; nothing is at path yet. It fails
// where Publish would.
func NewPIDFile(path string) (*PIDFile, error) {
	fail := func(err error) (*PIDFile, error) {
		if e, ok := errors.AsType[*fs.PathError](err); ok {
			err = e.Err // without the name of the temporary file
		}
		return nil, fmt.Errorf("cannot write pid file %s: %w; choose a path in a directory that is writable", path, err)
	}
	if st, err := os.Lstat(path); err == nil && !st.Mode().IsRegular() {
		return nil, fmt.Errorf("cannot write pid file %s: a file that is not a regular one is there; choose another path", path)
	}
	if err := replaceable(path); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fail(err)
	}
	p := &PIDFile{path: path, file: f}
	if _, err = fmt.Fprintf(f, "%d\n", os.Getpid()); err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		p.own, err = f.Stat()
	}
	if err != nil {
		p.Remove()
		return fail(err)
	}
	// Where files cannot be locked, the path of a live server is not protected.
	_ = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	return p, nil
}

// replaceable refuses to replace what is at path unless that is nothing, or a
// pid file from before: a mistyped path must not cost anybody a file, least of
// all an image, and a server must not lose its own to another.
func replaceable(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot write pid file %s: what is there cannot be read: %w", path, err)
	}
	defer f.Close()
	b := make([]byte, 32)
	n, err := io.ReadFull(f, b)
	text := strings.TrimSpace(string(b[:n]))
	_, number := strconv.ParseUint(text, 10, 32)
	if err == nil /* longer than any pid */ || number != nil && text != "" {
		return fmt.Errorf("cannot write pid file %s: a file that is no pid file is there; choose another path, or remove it", path)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("cannot write pid file %s: it is that of a server that runs, pid %s; choose another path, or stop that server", path, text)
	}
	return nil
}

// Publish puts the file in place, over one that is left from before.
func (p *PIDFile) Publish() error {
	if err := replaceable(p.path); err != nil { // another server may have come first
		return err
	}
	if err := os.Rename(p.file.Name(), p.path); err != nil {
		return fmt.Errorf("cannot write pid file %s: %w", p.path, err)
	}
	p.published = true
	return nil
}

// Remove takes the file away, unless another process has put its own there.
func (p *PIDFile) Remove() {
	defer p.file.Close() // and its lock
	if !p.published {
		_ = os.Remove(p.file.Name())
		return
	}
	if st, err := os.Lstat(p.path); err == nil && os.SameFile(st, p.own) {
		_ = os.Remove(p.path)
	}
}
