package backend

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2"
)

func TestCreate(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		at := func(name string) string { return filepath.Join(dir, name) }
		must(t, CreateRaw(at("raw"), 12345, 0))
		wantContent(t, at("raw"), make([]byte, 12345))
		wantErrno(t, CreateRaw(at("raw"), 1, 0), unix.EEXIST)
		wantErrno(t, CreateRaw(at("negative"), -1, 0), unix.EINVAL)
		must(t, os.Symlink(at("nowhere"), at("link")))
		wantErrno(t, CreateRaw(at("link"), 1, 0), unix.EEXIST)

		// A data file is beside the image, and as long as the disk.
		must(t, CreateQcow2(at("disk"), qcow2.CreateOptions{Size: 1 << 20, DataFile: "data", DataFileRaw: true}))
		wantContent(t, at("data"), make([]byte, 1<<20))
		c, err := OpenChain(at("disk"), "auto", ChainOptions{Lock: true})
		must(t, err)
		l := c.Links[0]
		if len(c.Links) != 1 || l.Format != "qcow2" || l.Header.Size != 1<<20 || l.Data == nil || l.Image == nil {
			t.Errorf("%+v", l)
		}
		must(t, c.Close())
		if all, _ := descriptors(t, at("disk")); all != 0 {
			t.Errorf("%d descriptors are left", all)
		}

		// What fails leaves nothing, and takes nothing away.
		wantErrno(t, CreateQcow2(at("other"), qcow2.CreateOptions{Size: 1 << 20, DataFile: "data"}), unix.EEXIST)
		wantErrno(t, CreateQcow2(at("other"), qcow2.CreateOptions{Size: 1 << 20, DataFile: "other"}), unix.EEXIST)
		wantErrno(t, CreateQcow2(at("other"), qcow2.CreateOptions{Size: -1}), unix.EINVAL)
		names, err := os.ReadDir(dir)
		must(t, err)
		if len(names) != 4 { // raw, link, disk, data
			t.Errorf("left behind: %v", names)
		}
	})
}
