package backend

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

// As many writes of a file on disk as it has slots are in the kernel at once, however
// they came, and no more; a durable one, which syncs there, takes none.
func TestWritesTakeSlots(t *testing.T) {
	path := filepath.Join(testfs.Disk(t), "image")
	if err := os.WriteFile(path, make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	inside, most := 0, 0
	entered, leave := make(chan struct{}, 16), make(chan struct{})
	hook := func(op sysop, _ int64, n int) (int, error) {
		if op != opTryWrite && op != opWrite {
			return n, nil
		}
		mu.Lock()
		inside++
		most = max(most, inside)
		mu.Unlock()
		entered <- struct{}{}
		<-leave
		mu.Lock()
		inside--
		mu.Unlock()
		return n, nil
	}
	f := openTest(t, path, openHow{write: true, faults: hook})
	if f.slots == nil || !f.InlineWrite(0, int(cachePage)) {
		t.Fatalf("%s is on no file system that this is for: %s", path, f.traits.FS)
	}
	b := make([]byte, cachePage)
	check := func(err error) {
		if err != nil {
			t.Error(err)
		}
	}
	var wg sync.WaitGroup
	const writes = 3 * 3
	for i := range int64(writes / 3) {
		off := i * 256 << 10
		wg.Go(func() { _, err := f.TryWriteAt(b, off); check(err) })
		wg.Go(func() { _, err := f.TryWriteVector([][]byte{b, b}, off+64<<10); check(err) })
		wg.Go(func() { check(f.WriteAt(b, off+192<<10, false)) })
	}
	for range mostSlots {
		<-entered
	}
	must(t, f.WriteAt(b, 0, true)) // the others are there
	for range writes - mostSlots {
		leave <- struct{}{}
		<-entered // one goes, and one comes
	}
	close(leave)
	wg.Wait()
	if most != mostSlots {
		t.Errorf("%d writes in the kernel at once, want %d", most, mostSlots)
	}
}

// Where writes of one file do not wait for each other in the kernel nothing is bounded.
func TestNoSlots(t *testing.T) {
	for name, tt := range map[string]Traits{"tmpfs": {Tmpfs: true}, "direct": {Direct: true}, "device": {BlockDevice: true}} {
		if newSlots(&tt) != nil {
			t.Errorf("%s: slots", name)
		}
	}
	slots(nil).take()
	slots(nil).give()
}
