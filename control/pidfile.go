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
)

// PIDFile tells supervisors that the server is ready, and its process id. It
// appears under its name at once and complete.
type PIDFile struct {
	path string
	file *os.File // not renamed yet, nil afterwards
	own  os.FileInfo
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
	if !replaceable(path) {
		return nil, fmt.Errorf("cannot write pid file %s: a file that is no pid file is there; choose another path, or remove it", path)
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
	return p, nil
}

// replaceable reports whether what is at path is nothing, or a pid file from
// before: a mistyped path must not cost anybody a file, least of all an image.
func replaceable(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	b := make([]byte, 32)
	n, err := io.ReadFull(f, b)
	if err == nil { // longer than any pid
		return false
	}
	text := strings.TrimSpace(string(b[:n]))
	_, err = strconv.ParseUint(text, 10, 32)
	return err == nil || text == ""
}

// Publish puts the file in place, over one that is left from before.
func (p *PIDFile) Publish() error {
	if err := os.Rename(p.file.Name(), p.path); err != nil {
		return fmt.Errorf("cannot write pid file %s: %w", p.path, err)
	}
	_ = p.file.Close()
	p.file = nil
	return nil
}

// Remove takes the file away, unless another process has put its own there.
func (p *PIDFile) Remove() {
	if p.file != nil {
		_ = os.Remove(p.file.Name())
		_ = p.file.Close()
		p.file = nil
		return
	}
	if st, err := os.Lstat(p.path); err == nil && os.SameFile(st, p.own) {
		_ = os.Remove(p.path)
	}
}
