package qcow2

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"
)

// Options of an Image.
type Options struct {
	// Data is the external data file, nil if the guest's clusters are in the
	// image itself.
	Data File
	// Backing shows through what the image has not, nil for zeros.
	Backing Backing
	// L2Cache is how many bytes of L2 tables are kept in memory, 0 for
	// DefaultL2Cache.
	L2Cache int64
	// KeepSpace: what is discarded keeps its space on the host.
	KeepSpace bool
	// NoRepair: Begin refuses an image that is dirty.
	NoRepair bool
	// Fixed: the image's file, as a block device, cannot become longer.
	Fixed bool
	// Step, for tests, is called at each step of Begin and Settle, by whoever
	// called that. nil is for none.
	Step func(Step)
	// Warn gets a line about what the user should know; nil drops them. It may
	// be called by any goroutine.
	Warn func(string)
}

// DefaultL2Cache in bytes: it maps 256 GiB with clusters of 64 KiB.
const DefaultL2Cache = 32 << 20

// Image is an open qcow2 image. Map, Unmap, Prepare, Commit, Abort, Flush,
// Discard, Zero and Status may be called by any number of goroutines at once.
type Image struct {
	f, data File // the same where there is no data file
	h       *Header
	g       Geometry
	opts    Options

	l1Shift    int // of a guest offset, for its L1 entry
	subBits    int // of a subcluster, or of a cluster where there are none
	sliceBits  int // of the entries of a slice
	sliceWords int

	l1   []uint64 // decoded; atomic
	dirs []atomic.Pointer[table]

	cache  cache
	pins   pins
	busy   busy
	refs   refcounts
	alloc  allocator
	free   freeing
	flush  flusher
	tables sync.Mutex // see cache for the order

	bitmaps  bitmaps
	unpacked unpacked

	// l1Unsure are tables that the header may name instead of ours, since a write of
	// it has failed. Under flusher.running, or where nothing else runs.
	l1Unsure []hostRange

	// stepping: Begin or Settle is under way, beside which nothing changes
	// tables. It is only looked at where Options.Step is set.
	stepping bool

	headerMu sync.Mutex // leaf
	begun    atomic.Bool
	closed   atomic.Bool // after it was begun
	broken   atomic.Bool // marked corrupt
}

// New makes an Image for reading from a file and its header. It writes
// nothing, and does not own the files.
func New(f File, h *Header, o Options) (*Image, error) {
	return newImage(f, h, h.L1Offset, h.L1Entries, o)
}

func newImage(f File, h *Header, l1Offset int64, l1Entries int, o Options) (*Image, error) {
	if o.L2Cache == 0 {
		o.L2Cache = DefaultL2Cache
	}
	if o.Warn == nil {
		o.Warn = func(string) {}
	}
	copied := *h
	g := h.Geometry()
	im := &Image{f: f, data: f, h: &copied, g: g, opts: o}
	if h.RefcountLength == 0 {
		return nil, im.damaged("it has no refcount table; nbd-export check --repair all makes one")
	}
	if g.External {
		im.data = o.Data
	}
	im.l1Shift = g.l2Bits() + g.ClusterBits
	im.subBits = bits.TrailingZeros64(uint64(g.SubclusterSize()))
	size := min(sliceSize, g.ClusterSize())
	im.sliceWords = int(size / 8)
	im.sliceBits = bits.TrailingZeros64(uint64(size / g.EntrySize()))
	im.cache.limit = int(max(o.L2Cache/size, 2))
	im.alloc.least = growMin
	im.cache.loading = make(map[loadKey]*load)
	im.refs.metadata = make(clusterSet)
	im.dirs = make([]atomic.Pointer[table], l1Entries)
	im.l1 = make([]uint64, l1Entries)
	return im, im.readL1(l1Offset)
}

// readL1 reads the L1 table anew.
func (im *Image) readL1(off int64) error {
	if len(im.l1) == 0 {
		return nil
	}
	if off > im.f.Length()-8*int64(len(im.l1)) {
		return im.damaged("its L1 table reaches past the end of the file")
	}
	return readWords(im.f, im.l1, off)
}

// Size of the guest's disk in bytes.
func (im *Image) Size() int64 { return im.h.Size }

// Header is the image's header. It is not to be changed.
func (im *Image) Header() *Header { return im.h }

// pauseForPins gives a read that is under way time to end.
func (im *Image) pauseForPins() { time.Sleep(50 * time.Microsecond) }
