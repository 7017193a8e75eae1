package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/client"
)

const (
	crashBlock   = 4096 // bytes of a write
	crashBlocks  = 16   // that one writer writes in turn
	crashWriters = 2    // at each exporter
	crashStripes = 10   // writers of one image at most
	crashFlush   = 4    // writes between two flushes
	crashPause   = time.Millisecond
)

// crashLoad writes to an image through all of its exporters, whoever owns it,
// and reads through all of them. Blocks say which write they are of; each is
// written by one writer.
type crashLoad struct {
	t       testing.TB
	content func() []byte // of all blocks
	mu      sync.Mutex
	blocks  [crashStripes*crashBlocks + 1]crashBlockLog // the last is written once, see crashRun.fresh
	lost    bool                                        // what was not flushed may be gone with its owner
	stripes int                                         // that have a writer
	odd     map[string]bool                             // errors that nobody asked for
	ids     atomic.Uint64
	running sync.RWMutex // held by who is in a request
	fronts  []*crashFront
	stopped chan struct{}
	done    sync.WaitGroup
}

// crashBlockLog is what is known of a block.
type crashBlockLog struct {
	acked   uint64          // the last write that was acknowledged, 0 for none
	durable uint64          // that is there, or a later one, whatever becomes of the owner
	since   []uint64        // those that were acknowledged after it
	unknown []uint64        // writes since then that may be there or not
	refused map[uint64]bool // all that must not be there
	// Writes begun and ended: a read that no write overlaps is not torn.
	begun, ended atomic.Uint64
}

func newCrashLoad(t testing.TB, content func() []byte) *crashLoad {
	l := &crashLoad{t: t, content: content, odd: map[string]bool{}, stopped: make(chan struct{})}
	t.Cleanup(l.stop)
	return l
}

// stop ends the load.
func (l *crashLoad) stop() {
	l.mu.Lock()
	select {
	case <-l.stopped:
	default:
		close(l.stopped)
	}
	l.mu.Unlock()
	for _, f := range l.fronts {
		f.hangUp()
	}
	l.done.Wait()
}

// pause lets what is under way end, and holds the rest until resume is called.
// Nobody may have parked a request.
func (l *crashLoad) pause() (resume func()) {
	l.t.Helper()
	locked := make(chan struct{})
	go func() {
		l.running.Lock()
		close(locked)
	}()
	select {
	case <-locked:
	case <-time.After(startTimeout):
		l.t.Fatal("a request is not answered")
	}
	return l.running.Unlock
}

// settled says that what is acknowledged is durable.
func (l *crashLoad) settled() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.blocks {
		l.blocks[i].settled()
	}
}

func (k *crashBlockLog) settled() { k.durable, k.since = k.acked, nil }

// flushed says that a flush was answered which began after the last write to a
// stripe. Of an owner that is being lost it says nothing: once it has abandoned the
// image it answers that there is nothing to flush.
func (l *crashLoad) flushed(stripe int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range crashBlocks {
		if !l.lost {
			l.blocks[stripe*crashBlocks+i].settled()
		}
	}
}

// lose says that the owner goes without having written all: of an image with
// tables, what was written since the last flush may be gone too.
func (l *crashLoad) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost = true
}

// crashFront is the load at one exporter.
type crashFront struct {
	l     *crashLoad
	conns []*client.Conn
	acked atomic.Int64 // writes
	reads atomic.Int64
	// allowed errors besides those that any owner may give.
	allowed atomic.Pointer[[]syscall.Errno]
}

// at starts writers and a reader at an exporter.
func (l *crashLoad) at(uri string) *crashFront {
	l.t.Helper()
	f := &crashFront{l: l}
	f.allow()
	l.fronts = append(l.fronts, f)
	for i := range crashWriters + 1 {
		ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
		c, err := client.Dial(ctx, uri, client.Options{})
		cancel()
		if err != nil {
			l.t.Fatal(err)
		}
		f.conns = append(f.conns, c)
		if i == crashWriters {
			l.done.Go(func() { f.read(c) })
			continue
		}
		if l.stripes == crashStripes {
			l.t.Fatal("more writers than the image has room for")
		}
		stripe := l.stripes
		l.stripes++
		l.done.Go(func() { f.write(c, stripe) })
	}
	return f
}

// allow says which errors are no surprise from now on.
func (f *crashFront) allow(errnos ...syscall.Errno) { f.allowed.Store(&errnos) }

// hangUp ends the load at this exporter.
func (f *crashFront) hangUp() {
	for _, c := range f.conns {
		c.Abort()
	}
}

// turn runs one round of requests, and reports whether there is another.
func (f *crashFront) turn(round func() error) bool {
	f.l.running.RLock()
	err := round()
	f.l.running.RUnlock()
	if err != nil {
		return false
	}
	select {
	case <-f.l.stopped:
		return false
	case <-time.After(crashPause):
		return true
	}
}

// lost returns err if it ends the connection; an answer nobody asked for is
// noted.
func (f *crashFront) lost(what string, err error) error {
	var answer *client.Error
	if err == nil || !errors.As(err, &answer) {
		return err
	}
	may := *f.allowed.Load()
	if answer.Errno != syscall.ESHUTDOWN && !slices.Contains(may, answer.Errno) &&
		!(answer.Errno == syscall.EPERM && strings.HasPrefix(answer.Text, inactiveText)) {
		f.l.mu.Lock()
		f.l.odd[fmt.Sprintf("%s: %v", what, err)] = true
		f.l.mu.Unlock()
	}
	return nil
}

func fillCrashBlock(b []byte, block int, id uint64) {
	for i := 0; i < crashBlock; i += sectorSize {
		fillSector(b[i:i+sectorSize], (block*crashBlock+i)/sectorSize, id)
	}
}

// crashBlockID is the write whose work a block is, 0 for none, or torn.
func crashBlockID(b []byte, block int) uint64 {
	id := readSector(b[:sectorSize], block*crashBlock/sectorSize)
	for i := sectorSize; i < crashBlock; i += sectorSize {
		if readSector(b[i:i+sectorSize], (block*crashBlock+i)/sectorSize) != id {
			return torn
		}
	}
	return id
}

func (f *crashFront) write(c *client.Conn, stripe int) {
	l := f.l
	b := make([]byte, crashBlock)
	for n := 0; f.turn(func() error {
		block := stripe*crashBlocks + n%crashBlocks
		err := l.write(c, b, block, int64(block)*crashBlock)
		if err == nil {
			f.acked.Add(1)
		}
		if err := f.lost("WRITE", err); err != nil || n%crashFlush != crashFlush-1 {
			return err
		}
		if err = c.Flush(); err == nil {
			l.flushed(stripe)
		}
		return f.lost("FLUSH", err)
	}); n++ {
	}
}

// write writes a block, for which b is room, at off, and notes what became of it.
func (l *crashLoad) write(c *client.Conn, b []byte, block int, off int64) error {
	k := &l.blocks[block]
	id := l.ids.Add(1)
	fillCrashBlock(b, block, id)
	k.begun.Add(1)
	_, err := c.WriteAt(b, off, false)
	k.ended.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	var answer *client.Error
	switch {
	case err == nil:
		k.acked, k.unknown = id, nil
		k.since = append(k.since, id)
	case errors.As(err, &answer) && (answer.Errno == syscall.EPERM || answer.Errno == syscall.ESHUTDOWN):
		if k.refused == nil {
			k.refused = map[uint64]bool{}
		}
		k.refused[id] = true
	default:
		k.unknown = append(k.unknown, id)
	}
	return err
}

func (f *crashFront) read(c *client.Conn) {
	l := f.l
	b := make([]byte, crashBlock)
	for f.turn(func() error {
		block := rand.IntN(crashStripes * crashBlocks)
		k := &l.blocks[block]
		before := k.ended.Load()
		_, err := c.ReadAt(b, int64(block)*crashBlock)
		if err == nil {
			f.reads.Add(1)
			if crashBlockID(b, block) == torn && k.begun.Load() == before {
				l.mu.Lock()
				l.odd[fmt.Sprintf("block %d was read torn while nobody wrote it", block)] = true
				l.mu.Unlock()
			}
		}
		return f.lost("READ", err)
	}) {
	}
}

// wait waits until more writes are acknowledged.
func (f *crashFront) wait(writes int64) {
	f.l.t.Helper()
	goal := f.acked.Load() + writes
	waitFor(f.l.t, startTimeout, "writes are acknowledged", func() bool { return f.acked.Load() >= goal })
}

// check requires, while nobody writes, that the image holds all writes that
// were acknowledged, and none that was refused.
func (l *crashLoad) check(when string) {
	l.t.Helper()
	defer l.pause()()
	content := l.content()
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.blocks {
		k := &l.blocks[i]
		id := crashBlockID(content[i*crashBlock:(i+1)*crashBlock], i)
		switch {
		case id == k.acked || slices.Contains(k.unknown, id):
		case l.lost && (id == k.durable || slices.Contains(k.since, id)):
		case id == torn && len(k.unknown) > 0:
		case k.refused[id]:
			l.t.Errorf("%s: block %d holds write %d, which was refused", when, i, id)
		default:
			l.t.Errorf("%s: block %d holds %d instead of write %d, which was acknowledged, or %v", when, i, id, k.acked, k.unknown)
		}
		if l.lost && id != torn {
			k.acked = id
			k.settled()
		}
	}
	l.lost = false
	for what := range l.odd {
		l.t.Errorf("%s: %s", when, what)
	}
	clear(l.odd)
}
