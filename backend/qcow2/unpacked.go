package qcow2

import (
	"slices"
	"sync"
)

// unpackedKept is how many bytes of decompressed clusters an image keeps in
// memory, or one cluster if that is larger.
const unpackedKept = 1 << 20

// unpacked are the compressed clusters that were decompressed last, by their L2
// entries. Reading one of 64 KiB in pieces of 4 KiB decompressed it 16 times: in
// order at depth 1 that gave 3.5k reads/s, and gives 25k/s (qemu-nbd 3.7k/s), at
// depth 16 5.3k/s and 32k/s (5.9k/s); random ones are as they were (zlib, tmpfs,
// two cores).
//
// An entry says which bytes of the file it is made of, and those do not change:
// nobody here compresses anything, whoever else may write the file does it while
// it has no owner or another one, and after that comes another Image; and who has
// an entry pins what it names. So a cluster that is not there any more is not
// found, because no table has its entry.
type unpacked struct {
	mu  sync.Mutex         // leaf
	all []*unpackedCluster // that used last first
}

// unpackedCluster is one of them.
type unpackedCluster struct {
	entry uint64
	done  chan struct{} // closed when buf, or err, is what it is going to be
	buf   *[]byte       // a cluster
	err   error

	// Under unpacked.mu:
	users   int
	dropped bool // not in all; the last user gives buf back
}

// get is the cluster of an entry, size bytes large, until leave. mine says that
// the caller has to decompress it and to close done; otherwise done is to be
// waited for.
func (u *unpacked) get(entry uint64, size int64) (c *unpackedCluster, mine bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	i := slices.IndexFunc(u.all, func(c *unpackedCluster) bool { return c.entry == entry })
	if i < 0 {
		mine = true
		for i = len(u.all); i > 0 && int64(i+1)*size > unpackedKept; i-- {
			u.dropLocked(u.all[i-1])
		}
		c = &unpackedCluster{entry: entry, done: make(chan struct{}), buf: clusters.get(size)}
		u.all = append(u.all, nil)
	} else {
		c = u.all[i]
	}
	copy(u.all[1:i+1], u.all[:i])
	u.all[0] = c
	c.users++
	return c, mine
}

// leave is the end of a get.
func (u *unpacked) leave(c *unpackedCluster) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if c.users--; c.users == 0 && c.dropped {
		clusters.put(c.buf)
	}
}

// forget drops a cluster that could not be decompressed.
func (u *unpacked) forget(c *unpackedCluster) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !c.dropped {
		u.dropLocked(c)
	}
}

// dropLocked takes a cluster out.
func (u *unpacked) dropLocked(c *unpackedCluster) {
	i := slices.Index(u.all, c)
	u.all = slices.Delete(u.all, i, i+1)
	if c.dropped = true; c.users == 0 {
		clusters.put(c.buf)
	}
}
