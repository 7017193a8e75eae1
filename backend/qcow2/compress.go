package qcow2

import (
	"bytes"
	"compress/flate"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// ReadCompressed fills dst with bytes of the Compressed extent p.Extents[i],
// from skip bytes into it. It may block.
func (im *Image) ReadCompressed(p *Plan, i int, skip int64, dst []byte) error {
	e := &p.Extents[i]
	return e.Image.readCompressed(e.Entry, e.Offset+skip, dst)
}

// readCompressed fills dst with the bytes of a compressed cluster from off.
func (im *Image) readCompressed(entry uint64, off int64, dst []byte) error {
	if int64(len(dst)) == im.g.ClusterSize() {
		return im.decompress(entry, dst) // whoever reads so does not come again
	}
	c, mine := im.unpacked.get(entry, im.g.ClusterSize())
	defer im.unpacked.leave(c)
	if mine {
		c.err = im.decompress(entry, *c.buf)
		close(c.done)
	} else {
		<-c.done
	}
	if c.err != nil {
		im.unpacked.forget(c)
		return c.err
	}
	copy(dst, (*c.buf)[off:])
	return nil
}

// decompress fills dst, which is as long as a cluster, from a compressed
// cluster (section "Compressed Clusters Descriptor"). What follows the
// compressed bytes in their last sector is of no meaning.
func (im *Image) decompress(entry uint64, dst []byte) error {
	off, n := im.g.compressed(entry)
	// The file need not have a whole last sector.
	if n = min(n, im.f.Length()-off); n <= 0 {
		return im.odd("a compressed cluster at %#x lies past the end of the file", off)
	}
	src := clusters.get(n)
	defer clusters.put(src)
	if err := im.f.ReadAt((*src)[:n], off); err != nil {
		return err
	}
	var err error
	if im.h.CompressionType == Zstd {
		err = unzstd(dst, (*src)[:n])
	} else {
		err = inflate(dst, (*src)[:n])
	}
	if err != nil {
		// No reason to end writing: it is one cluster of the guest's.
		return im.damaged("the compressed cluster at %#x cannot be decompressed: %v", off, err)
	}
	return nil
}

var inflaters = sync.Pool{New: func() any { return flate.NewReader(nil) }}

func inflate(dst, src []byte) error {
	r := inflaters.Get().(io.ReadCloser)
	defer inflaters.Put(r)
	if err := r.(flate.Resetter).Reset(bytes.NewReader(src), nil); err != nil {
		return err
	}
	_, err := io.ReadFull(r, dst)
	return err
}

// The window of a decoder is at most what a cluster can need.
var unzstders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(8<<20), zstd.WithDecoderLowmem(true))
	if err != nil {
		panic(err) // the options are constants
	}
	return d
}}

func unzstd(dst, src []byte) error {
	d := unzstders.Get().(*zstd.Decoder)
	defer unzstders.Put(d)
	if err := d.Reset(bytes.NewReader(src)); err != nil {
		return err
	}
	_, err := io.ReadFull(d, dst)
	return err
}

// clusters are buffers of up to two clusters, to be used again.
var clusters buffers

type buffers struct{ pools [maxClusterBits + 2]sync.Pool }

// get gives a buffer of n bytes, whose contents are anything.
func (b *buffers) get(n int64) *[]byte {
	class := minClusterBits
	for int64(1)<<class < n {
		class++
	}
	if p, ok := b.pools[class].Get().(*[]byte); ok {
		*p = (*p)[:n]
		return p
	}
	p := make([]byte, n, 1<<class)
	return &p
}

func (b *buffers) put(p *[]byte) {
	class := minClusterBits
	for 1<<class < cap(*p) {
		class++
	}
	b.pools[class].Put(p)
}
