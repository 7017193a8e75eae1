package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2"
)

// CreateRaw makes a raw image of size bytes of zeros at path, where nothing may
// be. It is durable on return. An error of p is a *qcow2.OptionError.
func CreateRaw(path string, size int64, p qcow2.Preallocation) error {
	if p == qcow2.PreallocateMetadata {
		return &qcow2.OptionError{Option: "preallocation", What: "a raw image has no metadata; falloc and full take its space"}
	}
	return create(func(made func(string) (*File, error)) error {
		f, err := made(path)
		if err != nil {
			return err
		}
		if err := f.Resize(size); err != nil {
			return err
		}
		if err := p.Take(f, 0, size); err != nil {
			return err
		}
		return f.Sync()
	})
}

// CreateQcow2 makes a qcow2 image at path, and the data file that o names, a
// relative name beside it; nothing may be at either place. It is durable on
// return. An error of o is a *qcow2.OptionError, before anything is made.
func CreateQcow2(path string, o qcow2.CreateOptions) error {
	if err := qcow2.CheckCreate(o); err != nil {
		return err
	}
	return create(func(made func(string) (*File, error)) error {
		f, err := made(path)
		if err != nil {
			return err
		}
		var data qcow2.NewFile
		if o.DataFile != "" {
			name := o.DataFile
			if !filepath.IsAbs(name) {
				name = filepath.Join(filepath.Dir(path), name)
			}
			if data, err = made(name); err != nil {
				return err
			}
		}
		return qcow2.Create(f, data, o)
	})
}

// create calls fill, which makes new files by its argument. They are closed
// afterwards, and removed if it failed.
func create(fill func(made func(path string) (*File, error)) error) error {
	var files []*File
	err := fill(func(path string) (*File, error) {
		f, err := newHostFile(path)
		if err == nil {
			files = append(files, f)
		}
		return f, err
	})
	dirs := make(map[string]bool)
	for _, f := range files {
		if e := f.Close(); err == nil {
			err = e
		}
		dirs[filepath.Dir(f.path)] = true
	}
	for dir := range dirs {
		if err == nil {
			err = syncDir(dir)
		}
	}
	if err != nil {
		for _, f := range files {
			if e := unix.Unlink(f.path); e != nil {
				err = errors.Join(err, &fs.PathError{Op: "remove what was made of", Path: f.path, Err: e})
			}
		}
	}
	return err
}

// newHostFile makes an empty file, open for writing.
func newHostFile(path string) (*File, error) {
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
		return err
	})
	switch err {
	case nil:
	case unix.EEXIST:
		err = &refusal{"something is there already, and it is never overwritten; remove it first, or choose another name", unix.EEXIST}
	case unix.ENOENT:
		err = fmt.Errorf("%w; its directory has to exist", err)
	case unix.EACCES, unix.EPERM, unix.EROFS:
		err = fmt.Errorf("%w; choose a directory in which the user that runs nbd-export may write", err)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "create image", Path: path, Err: err}
	}
	f, err := newFile(fd, path, openHow{write: true})
	if err != nil {
		_ = unix.Unlink(path)
	}
	return f, err
}

// syncDir makes the names in a directory durable, where the file system can.
func syncDir(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = retry(func() error { return unix.Fsync(fd) })
		unix.Close(fd)
	}
	if err != nil && err != unix.EINVAL {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}
