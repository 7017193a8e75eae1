package backend

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A file that this process owns is mapped for reading, so that what its page
// cache holds can be sent without being read into a buffer first: 4 KiB of a
// random page take 0.53 us to copy from the map, and 1.2 us (tmpfs) or 0.8 us
// (ext4) to pread, after which they are copied once more.
//
// Only system calls touch the map. Where the file has become shorter, or its
// disk fails, they say EFAULT, while Go code would be killed by SIGBUS. It
// belongs to the description that holds the file's locks, and is closed with
// it, or right after it: see File.release.
type pageMap struct {
	// wanted: the description is that of an owner, in a page cache that all
	// openers share. The others of an image are read with pread: a stale page
	// would be pinned by a map, and a hole of somebody else's file filled.
	wanted bool

	base   atomic.Pointer[byte] // nil before the first use, and if mapping failed
	once   sync.Once
	length int64 // bytes that are mapped, when base is not nil
	told   bool  // mincore tells the truth, when base is not nil

	uncounted atomic.Bool // cachestat is refused for this file
}

// Pages is [off, off+n) of the file's map, if all of it is in the page cache,
// and so no hole; otherwise the answer is nil. The bytes are for system calls
// only: see pageMap. They may leave the cache at any time, and then touching
// them waits for the disk; whether the file reaches to the end of the last page
// is for Reaches to say. They stay mapped as long as the file is open. It
// neither waits nor allocates.
func (f *File) Pages(off, n int64) []byte {
	m := &f.pages
	if !m.wanted {
		return nil
	}
	base := m.base.Load()
	if base == nil {
		m.once.Do(f.mapPages)
		if base = m.base.Load(); base == nil {
			return nil
		}
	}
	if n <= 0 || off < 0 || off > m.length-n || f.faults.check(opTryRead, off) != nil || !f.cached(off, n) {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(base), off)), n)
}

// mapAhead is how far past its present end a regular file is mapped, in bytes:
// images of some formats grow. Addresses cost nothing until there are pages.
const mapAhead = 1 << 38

func (f *File) mapPages() {
	length := f.size
	if !f.traits.BlockDevice {
		length += mapAhead
	}
	p, err := unix.MmapPtr(f.fd, 0, nil, uintptr(length), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil { // more than this process may have, perhaps
		length = f.size
		p, err = unix.MmapPtr(f.fd, 0, nil, uintptr(length), unix.PROT_READ, unix.MAP_SHARED)
	}
	if err != nil {
		return // too large for the address space, or not for mapping
	}
	// Of a file that this process could not write mincore says that all is there.
	f.pages.told = f.writable || unix.Faccessat2(f.fd, "", unix.W_OK, unix.AT_EMPTY_PATH|unix.AT_EACCESS) == nil
	f.pages.length = length
	f.pages.base.Store((*byte)(p))
}

// trimPages takes the pages off the map, which fills again as it is used: writing
// a page back looks for who maps it. On tmpfs nothing is written back, and unmapping,
// 30 ms for a GiB of 4 KiB pages, is for later: there a pair of orders at 10,000
// writes/s took 1.09 and 0.92 ms with trimming, 0.84 and 0.79 without.
func (f *File) trimPages() {
	if f.traits.Tmpfs {
		return
	}
	if base := f.pages.base.Load(); base != nil {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(unsafe.Pointer(base)), uintptr(f.pages.length), unix.MADV_DONTNEED)
	}
}

func (f *File) unmapPages() error {
	base := f.pages.base.Swap(nil)
	if base == nil {
		return nil
	}
	if err := unix.MunmapPtr(unsafe.Pointer(base), uintptr(f.pages.length)); err != nil {
		return f.fail("munmap", err)
	}
	return nil
}

// Reaches reports whether the file still has [0, end). A page that is only
// partly behind the end of the file reads as zeros there.
func (f *File) Reaches(end int64) bool {
	if f.traits.BlockDevice {
		return true
	}
	var st unix.Stat_t
	_, _, errno := unix.RawSyscall(unix.SYS_FSTAT, uintptr(f.fd), uintptr(unsafe.Pointer(&st)), 0)
	return errno == 0 && st.Size >= end
}

// noCachestat: the kernel is older than Linux 6.5.
var noCachestat atomic.Bool

// cached reports whether every page of the range is in the page cache. On
// tmpfs that tells holes, and what was swapped out, from data.
//
// cachestat takes 0.16 to 0.2 us for 4 KiB and 0.3 for 64 KiB, mincore, which
// looks at the map, 0.36 to 0.56 for 4 KiB.
//
// Linux refuses cachestat for a file that this process neither has open for writing
// nor owns nor could write (can_do_cachestat in mm/filemap.c), as a backing file may
// be; that says nothing of the others.
func (f *File) cached(off, n int64) bool {
	first, last := off>>cacheShift, (off+n-1)>>cacheShift
	pages := uint64(last - first + 1)
	if !noCachestat.Load() && !f.pages.uncounted.Load() {
		in := unix.CachestatRange{Off: uint64(off), Len: uint64(n)}
		var out unix.Cachestat_t
		_, _, errno := unix.RawSyscall6(unix.SYS_CACHESTAT, uintptr(f.fd), uintptr(unsafe.Pointer(&in)), uintptr(unsafe.Pointer(&out)), 0, 0, 0)
		if errno == 0 {
			return out.Cache == pages
		}
		if errno == unix.ENOSYS {
			noCachestat.Store(true)
		}
		f.pages.uncounted.Store(true)
	}
	if !f.pages.told {
		return false
	}
	base := uintptr(unsafe.Pointer(f.pages.base.Load()))
	for first <= last {
		var in [256]byte
		n := min(last-first+1, int64(len(in)))
		_, _, errno := unix.RawSyscall(unix.SYS_MINCORE, base+uintptr(first*cachePage), uintptr(n*cachePage), uintptr(unsafe.Pointer(&in)))
		if errno != 0 {
			return false
		}
		for _, b := range in[:n] {
			if b&1 == 0 {
				return false
			}
		}
		first += n
	}
	return true
}
