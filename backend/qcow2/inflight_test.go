package qcow2

import (
	"bytes"
	"testing"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// watched is a file that tells before it is written to.
type watched struct {
	*memfile.File
	before func(off int64)
}

func (w *watched) WriteAt(p []byte, off int64, durable bool) error {
	w.before(off)
	return w.File.WriteAt(p, off, durable)
}

// TestBlocksBeingWrittenStayInMemory has refcount blocks trimmed and read again
// while a flush writes what they were changed to: nobody may see them as they
// were before.
func TestBlocksBeingWrittenStayInMemory(t *testing.T) {
	const size = 1 << 20
	w := &watched{made(t, "1m", "cluster_size=512,refcount_bits=64"), func(int64) {}}
	im := begun(t, w, Options{})
	if err := im.writeAt(bytes.Repeat([]byte{1}, size), 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	im.Close()

	im = begun(t, w, Options{})
	defer im.Close()
	if err := im.Discard(0, size); err != nil {
		t.Fatal(err)
	}
	// Frees the clusters; their refcounts are written by the next one.
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	changed := make(map[int64][]byte)
	for _, b := range im.refs.dirty {
		changed[b.index] = bytes.Clone(b.b)
	}
	if len(changed) <= 8 {
		t.Fatalf("only %d blocks have changed", len(changed))
	}
	w.before = func(int64) {
		w.before = func(int64) {}
		im.alloc.filling.Lock()
		defer im.alloc.filling.Unlock()
		im.refs.mu.Lock()
		im.refs.trimLocked(0) // as for the sake of others that are read
		im.refs.mu.Unlock()
		for index, want := range changed {
			b, err := im.loadBlock(index)
			if err != nil {
				t.Error(err)
				return
			}
			im.refs.mu.Lock()
			if !bytes.Equal(b.b, want) {
				t.Errorf("refcount block %d was read from the file before it was written", index)
			}
			b.users--
			im.refs.mu.Unlock()
		}
	}
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	im.refs.mu.Lock()
	im.refs.trimLocked(0)
	kept := len(im.refs.blocks)
	im.refs.mu.Unlock()
	if kept > 8 {
		t.Errorf("%d blocks stay in memory after they were written", kept)
	}
	if err := im.Settle(); err != nil {
		t.Fatal(err)
	}
	checked(t, w.Bytes(), true)
}

// TestGivenBackIsNotFoundAgain gives clusters back after a refill has seen that
// none is ready, and before it looks for some in their block.
func TestGivenBackIsNotFoundAgain(t *testing.T) {
	im := begun(t, made(t, "1m", "cluster_size=4k"), Options{})
	defer im.Close()
	got, err := im.take(1, MayBlock)
	if err != nil {
		t.Fatal(err)
	}
	for im.alloc.have > 0 {
		if _, err := im.take(im.alloc.have, MayBlock); err != nil {
			t.Fatal(err)
		}
	}
	// What reclaimRanges does when more is freed than is kept ready.
	im.alloc.scan, im.alloc.old = 0, im.alloc.end
	im.giveBack(got)
	im.alloc.filling.Lock()
	_, err = im.scanBlock(0)
	im.alloc.filling.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if im.alloc.have != 1 {
		t.Errorf("%d clusters are ready after one was given back", im.alloc.have)
	}
}
