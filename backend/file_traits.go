package backend

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Traits are what is known of an open file: where it lives and which ways of
// reading and writing it work.
type Traits struct {
	FS          string // "ext4", "tmpfs", "nfs", ...; "block" for a block device; "other"
	Tmpfs       bool   // the page cache is the storage
	BlockDevice bool
	Direct      bool // O_DIRECT: the page cache is not used
	NowaitReads bool // RWF_NOWAIT works
	InlineReads bool // a read never waits
	Rotational  bool // block devices only: a disk that seeks
	// Align is the alignment in bytes that O_DIRECT asks of offsets and
	// lengths, and 1 without O_DIRECT; a power of two. File takes any.
	Align int
	// BlockSize is the size in bytes that I/O is best a multiple of; a power
	// of two, 512 to 64 KiB.
	BlockSize int

	memAlign, tailUnit int
	spaceAlign         int  // of fallocate: 1 for files, a sector for devices
	inlineWrites       bool // page cache of a local file system
	coherent           bool // all openers share one page cache
	trims              bool // punching a hole is expected to work
	fastZeros          bool // zeroing is expected to be fast
}

// fsKind is what follows from a file system's kind.
type fsKind struct {
	name     string
	local    bool // kept by this kernel alone: coherent cache, fallocate
	inMemory bool
}

var fsKinds = map[int64]fsKind{
	unix.TMPFS_MAGIC:           {"tmpfs", true, true},
	unix.EXT4_SUPER_MAGIC:      {"ext4", true, false}, // ext2 and ext3 as well
	unix.XFS_SUPER_MAGIC:       {"xfs", true, false},
	unix.BTRFS_SUPER_MAGIC:     {"btrfs", true, false},
	unix.NFS_SUPER_MAGIC:       {name: "nfs"},
	unix.CIFS_SUPER_MAGIC:      {name: "cifs"},
	unix.SMB2_SUPER_MAGIC:      {name: "cifs"},
	unix.FUSE_SUPER_MAGIC:      {name: "fuse"},
	unix.OVERLAYFS_SUPER_MAGIC: {name: "overlay"},
}

var errNoDirect = errors.New("the file system does not support O_DIRECT here; use --cache writeback")

// findTraits fills f.traits.
func (f *File) findTraits(st *unix.Stat_t, direct bool) error {
	t := &f.traits
	*t = Traits{FS: "other", Align: 1, BlockSize: pageSize, memAlign: 1, spaceAlign: 1}
	if st.Blksize > 0 && st.Blksize&(st.Blksize-1) == 0 {
		t.BlockSize = int(min(max(st.Blksize, 512), 64<<10))
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		t.FS, t.BlockDevice, t.inlineWrites = "block", true, true
		f.findDeviceTraits(st.Rdev)
	} else {
		var fs unix.Statfs_t
		if err := retry(func() error { return unix.Fstatfs(f.fd, &fs) }); err != nil {
			return f.fail("statfs", err)
		}
		if k, ok := fsKinds[int64(fs.Type)]; ok {
			t.FS, t.Tmpfs, t.InlineReads = k.name, k.inMemory, k.inMemory
			t.coherent, t.inlineWrites = k.local, k.local
			t.trims, t.fastZeros = k.local, k.local
		}
	}
	if direct && t.Tmpfs {
		// Newer kernels take the flag and use the page cache all the same.
		if err := f.clearDirect(); err != nil {
			return err
		}
		direct = false
	}
	if direct {
		a, mem, err := f.findAlign()
		if err != nil {
			return err
		}
		t.Direct, t.Align, t.memAlign, t.inlineWrites = true, a, mem, false
		t.BlockSize = max(t.BlockSize, a)
		// What is written through the page cache takes its whole file
		// system block to the disk.
		t.tailUnit = max(t.BlockSize, pageSize)
		return nil
	}
	if !t.InlineReads {
		var b [1]byte
		_, errno := rawPreadNowait(f.fd, b[:], 0)
		t.NowaitReads = errno == 0 || errno == unix.EAGAIN
	}
	return nil
}

func (f *File) clearDirect() error {
	fl, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(f.fd), unix.F_SETFL, fl&^unix.O_DIRECT)
	}
	if err != nil {
		return f.fail("fcntl", err)
	}
	return nil
}

func (f *File) findDeviceTraits(rdev uint64) {
	t := &f.traits
	t.spaceAlign = 512
	if n, err := unix.IoctlGetInt(f.fd, unix.BLKSSZGET); err == nil && n >= 512 {
		t.spaceAlign = n
	}
	if n, err := unix.IoctlGetInt(f.fd, unix.BLKPBSZGET); err == nil && n >= 512 && n&(n-1) == 0 {
		t.BlockSize = min(max(t.BlockSize, n), 64<<10)
	}
	dir := fmt.Sprintf("/sys/dev/block/%d:%d/", unix.Major(rdev), unix.Minor(rdev))
	queue := func(name string) int64 {
		for _, d := range [...]string{"queue/", "../queue/"} { // a disk, a partition
			if b, err := os.ReadFile(dir + d + name); err == nil {
				n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
				return n
			}
		}
		return 0
	}
	t.Rotational = queue("rotational") == 1
	t.fastZeros = queue("write_zeroes_max_bytes") > 0
	t.trims = t.fastZeros // a hole is punched by unmapping zeroes
}
