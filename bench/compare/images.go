package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// store keeps the images of one directory, one for each server.
type store struct {
	dir  string
	size int64
}

// newStore makes a directory for images inside parent.
func newStore(parent string, size int64, count int) (*store, error) {
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(parent, &fs); err != nil {
		return nil, fmt.Errorf("%s: %w", parent, err)
	}
	if need := uint64(size) * uint64(count); fs.Bavail*uint64(fs.Bsize) < need+need/20 {
		return nil, fmt.Errorf("%s: %d images of %d bytes do not fit; see --image-size", parent, count, size)
	}
	dir, err := os.MkdirTemp(parent, "nbd-export-compare-")
	return &store{dir, size}, err
}

func (s *store) remove() error {
	if s == nil {
		return nil
	}
	return os.RemoveAll(s.dir)
}

// image is the path of an image, written through and not in the page cache if it is
// new.
func (s *store) image(ctx context.Context, name string) (string, error) {
	paths, err := s.images(ctx, name)
	if err != nil {
		return "", err
	}
	return paths[0], nil
}

// images are those of several names. New ones are written in turns: in memory made
// first our server needed 7 % more for the same work than in that made next.
func (s *store) images(ctx context.Context, names ...string) (paths []string, err error) {
	var made []*os.File
	defer func() {
		for _, f := range made {
			_ = f.Close()
		}
	}()
	for _, name := range names {
		path := filepath.Join(s.dir, name+".img")
		paths = append(paths, path)
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		made = append(made, f)
	}
	if err := fill(ctx, s.size, made); err != nil {
		return nil, err
	}
	for _, f := range made {
		if err := dropCache(f.Name()); err != nil {
			return nil, err
		}
	}
	return paths, nil
}

// fill writes size bytes that do not compress to each file, so that no layer below
// can make less of them.
func fill(ctx context.Context, size int64, files []*os.File) error {
	b := make([]byte, 8<<20)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(b)
	for done := int64(0); done < size; done += int64(len(b)) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		for i := 0; i < len(b); i += 4096 { // no block twice
			b[i], b[i+1], b[i+2] = byte(done>>23), byte(done>>31), byte(done>>39)
		}
		for _, f := range files {
			if _, err := f.Write(b[:min(int64(len(b)), size-done)]); err != nil {
				return err
			}
		}
	}
	for _, f := range files {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

// dropCache takes a file out of the page cache, except pages that somebody has
// mapped; dirty ones are written first.
func dropCache(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	return os.NewSyscallError("fadvise", unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// dropAllCaches does it for all files; only root can.
func dropAllCaches() { _ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0) }

// sync writes what is dirty, so that it does not disturb the next load.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// resident is the share of the first size bytes of a file that is in the page
// cache, -1 if the kernel (before 6.5) does not tell.
func resident(path string, size int64) float64 {
	f, err := os.Open(path)
	if err != nil {
		return -1
	}
	defer f.Close()
	var c unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Len: uint64(size)}, &c, 0); err != nil {
		return -1
	}
	return float64(c.Cache) * float64(os.Getpagesize()) / float64(size)
}

// isCold is the share of an image in the page cache that still counts as none.
const isCold = 0.005

// isWarm is the share that counts as all.
const isWarm = 0.999

// chill empties the page cache of p's image, by ever stronger means: pages that
// the server has mapped only go when it lets go of them.
func chill(ctx context.Context, p *process) (share float64, err error) {
	for _, stronger := range []func() error{
		func() error { return nil },
		func() error { dropAllCaches(); return nil },
		func() error { return p.restart(ctx) },
	} {
		if err := errors.Join(stronger(), dropCache(p.image)); err != nil {
			return -1, err
		}
		if share = resident(p.image, p.size); share <= isCold {
			break
		}
	}
	return share, nil
}
