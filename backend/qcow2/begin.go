package qcow2

import (
	"cmp"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Begin makes the image writable. It is called under the locks, when nothing
// can refuse any more but what is in the image, and nothing else uses it. What
// it writes is in an order in which a crash leaves an image that is no worse.
// progress, which may be nil, tells how much of a repair is done, in bytes.
// After an error the image is not begun.
func (im *Image) Begin(progress func(done, total int64)) error {
	if im.h.Incompatible&Corrupt != 0 {
		return im.refused(unix.EIO, "it is marked corrupt, and served for reading only; look at it with nbd-export check, and mend it with --repair all")
	}
	if im.h.Incompatible&Dirty != 0 && im.opts.NoRepair {
		return im.refused(unix.EIO, "it was not closed in order and its refcounts may be wrong; mend it with nbd-export check --repair all")
	}
	im.stepping = true
	defer func() { im.stepping = false }()
	if err := im.beginBitmaps(); err != nil {
		return err
	}
	if im.h.Incompatible&Dirty != 0 {
		if err := im.repairDirty(progress); err != nil {
			return err
		}
	}
	if err := im.readRefcountTable(); err != nil {
		return err
	}
	if err := im.findMetadata(); err != nil {
		return err
	}
	im.forgetTables() // those in memory were read before it was known what is metadata
	if unknown := im.h.Autoclear &^ knownAutoclear; unknown != 0 {
		im.at(StepAutoclear)
		if err := im.f.WriteAt(be64(im.h.Autoclear&^unknown), offAutoclear, false); err != nil {
			return err
		}
		if err := im.f.Sync(); err != nil {
			return err
		}
		im.h.Autoclear &^= unknown
	}
	if err := im.makeWhole(); err != nil {
		return err
	}
	im.allowTimer()
	im.begun.Store(true)
	return nil
}

// makeWhole makes the files reach to where their last clusters end.
func (im *Image) makeWhole() error {
	a := &im.alloc
	a.fixed = im.opts.Fixed
	length := im.f.Length()
	if whole := im.g.Clusters(length) << im.g.ClusterBits; !a.fixed && whole > length {
		if err := im.f.Resize(whole); err != nil {
			return err
		}
		length = whole
	}
	a.end = length >> im.g.ClusterBits
	a.old, a.scan = a.end, 0
	if im.g.External && im.data.Length() < im.Size() {
		if err := im.data.Resize(im.Size()); err != nil {
			return fmt.Errorf("the data file of %s is shorter than the disk: %w", im.f.Path(), err)
		}
	}
	return nil
}

// Settle makes everything durable and the image clean: no cluster is leaked,
// the file ends where its last cluster does. Nothing but Map and Unmap may run
// meanwhile. After an error that is no failed sync the image is as usable as
// before, and Settle can be called again. Afterwards it can go on being used.
//
// An image that was marked corrupt is made durable and that is all: whoever
// opens it next finds the mark.
func (im *Image) Settle() error {
	if !im.begun.Load() {
		return im.lost()
	}
	im.stopTimer()
	defer im.allowTimer()
	im.stepping = true
	defer func() { im.stepping = false }()
	for {
		if err := im.settleBitmaps(); err != nil {
			return err
		}
		// The file is cut before the flush, whose sync makes that durable: no
		// table in the file names what is cut off, as the last flush left it.
		im.trim()
		if err := im.Flush(); err != nil {
			return err
		}
		if im.broken.Load() || !im.dirty() {
			im.at(StepSettled)
			return nil
		}
		// What a read still uses is freed when that has ended, which waits for
		// storage and for nothing else.
		for im.inLimbo() {
			im.pauseForPins()
			im.at(StepGiveBack)
			if err := im.reclaim(); err != nil {
				return err
			}
		}
	}
}

// trim cuts off what the file was made longer by and what is not used.
func (im *Image) trim() {
	a, r := &im.alloc, &im.refs
	if a.fixed {
		return
	}
	a.filling.Lock()
	defer a.filling.Unlock()
	r.mu.Lock()
	slices.SortFunc(a.ready, func(x, y run) int { return cmp.Compare(y.first, x.first) })
	was, end, n := a.end, a.end, 0
	for n < len(a.ready) && a.ready[n].first+a.ready[n].n == end {
		im.unreadyLocked(a.ready[n])
		end = a.ready[n].first
		n++
	}
	a.ready = slices.Delete(a.ready, 0, n)
	a.end, a.old = end, min(a.old, end)
	r.mu.Unlock()
	if end == was {
		return
	}
	im.at(StepTrim)
	if err := im.f.Resize(end << im.g.ClusterBits); err != nil {
		// The clusters are free and the file is a little long.
		r.mu.Lock()
		a.end = was
		r.mu.Unlock()
		im.opts.Warn(err.Error())
	}
}

// unreadyLocked forgets a run of what is ready.
func (im *Image) unreadyLocked(x run) {
	per := im.g.refcountsPerBlock()
	for c := x.first; c < x.first+x.n; c++ {
		im.refs.blocks[c/per].users--
	}
	im.alloc.have -= x.n
}

// Close ends writing, beside whatever is under way: what was not written by then
// is lost. Of an image that was begun Flush, Settle and all changes fail with EIO
// from then on; Map goes on as before.
func (im *Image) Close() {
	if im.begun.Load() {
		im.closed.Store(true) // first, so that no flush takes it for one that has nothing to write
		im.begun.Store(false)
	}
	im.stopTimer()
}

// lost is the error of an image that was closed, which may have lost what nobody
// writes any more; nil of one that was never begun, and has nothing to write.
func (im *Image) lost() error {
	if im.closed.Load() {
		return im.refused(unix.EIO, "it was given up, and what was not written before is lost")
	}
	return nil
}
