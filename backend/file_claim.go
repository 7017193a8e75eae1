package backend

import "sync"

// The kernel keeps writes to one file apart, so that each sector is the work of
// one of them. What is received into a Place is not written by it: where it met
// a write of the same bytes, by whatever way, it left sectors that were half of one
// and half of the other. So who receives claims the range, which is never waited
// for (the way round it is to write), and everything else that changes the file
// waits for a claim, which lasts as long as it takes to copy what is there.
//
// A file's ranges of claimGrain share the locks, of which there is one set for all
// files: what meets there by chance is only slower. A claim takes 22 ns, and a write
// that is received in place 1,900; for a write by its methods it is 13.
//
// These locks are taken in ascending order of the range, behind all others, and
// nothing is waited for under them but the kernel.
const (
	claimGrain = 128 << 10 // bytes
	claimLocks = 4096      // half of a GiB; what is longer, to zero or to trim, takes all
	// claimStride sets the locks of files apart that are written at the same offsets.
	claimStride = 2654435769 % claimLocks
)

var claims [claimLocks]sync.RWMutex

// Claim is the right to change a range of a file otherwise than by its methods,
// once Try has got it. The zero Claim is to nothing.
type Claim struct{ first, n uint32 } // locks

// Claim is the claim to [off, off+n), which is not empty and has a Place.
func (f *File) Claim(off, n int64) Claim {
	first := off / claimGrain
	return Claim{uint32(f.id.ino)*claimStride + uint32(first), uint32(min((off+n-1)/claimGrain-first+1, claimLocks))}
}

func (c Claim) lock(i uint32) *sync.RWMutex { return &claims[(c.first+i)%claimLocks] }

// Try gets a claim, unless some of it may be being changed. Then Release is to follow.
// Until then the methods of the file that change what is claimed wait, so its holder
// calls none of them.
func (c Claim) Try() bool {
	for i := range c.n {
		if !c.lock(i).TryLock() {
			Claim{c.first, i}.Release()
			return false
		}
	}
	return true
}

// Release ends a claim that Try has got.
func (c Claim) Release() {
	for i := range c.n {
		c.lock(i).Unlock()
	}
}

// Covers reports whether what is claimed by o, of the same file, is by c.
func (c Claim) Covers(o Claim) bool {
	return o.first-c.first < c.n && o.first-c.first+o.n <= c.n
}

// unclaimed waits until nobody claims any of a range that is about to be changed.
// Until changed nobody does.
func (f *File) unclaimed(off, n int64) (c Claim) {
	// Also before the file is mapped: it may be while this change is under way.
	if !f.placeable || n <= 0 {
		return c
	}
	c = f.Claim(off, n)
	for i := range c.n {
		c.lock(i).RLock()
	}
	return c
}

// changed follows unclaimed.
func (c Claim) changed() {
	for i := range c.n {
		c.lock(i).RUnlock()
	}
}
