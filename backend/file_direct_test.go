package backend

import (
	"bytes"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

// Single bytes of one sector written at once are all there.
func TestDirectSharedSector(t *testing.T) {
	for _, size := range []int{64 << 10, 64<<10 + 77} {
		path := writeFile(t, testfs.Disk(t), make([]byte, size))
		f := openTest(t, path, openHow{write: true, direct: true})
		base := int64(size) - 512 // the tail, if there is one
		for _, at := range []int64{0, 4096, base} {
			var wg sync.WaitGroup
			for g := range 8 {
				wg.Go(func() {
					for i := range 16 {
						off := at + int64(i*8+g)
						if err := f.WriteAt([]byte{byte(g + 1)}, off, false); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			b := make([]byte, 128)
			must(t, f.ReadAt(b, at))
			for i, c := range b {
				if c != byte(i%8+1) {
					t.Fatalf("size %d, byte %d is %d", size, at+int64(i), c)
				}
			}
		}
	}
}

// A whole block written beside single bytes of its neighbours, over and over.
func TestDirectMixedWriters(t *testing.T) {
	path := writeFile(t, testfs.Disk(t), make([]byte, 32<<10))
	f := openTest(t, path, openHow{write: true, direct: true})
	a := int64(f.traits.Align)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			off := 4096 + int64(g)*a + a/2 // half of one block, half of the next
			for i := range 50 {
				b := bytes.Repeat([]byte{byte(g<<6 | i)}, int(a))
				if err := f.WriteAt(b, off, false); err != nil {
					t.Error(err)
					return
				}
				got := make([]byte, a)
				if err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, b) {
					t.Errorf("writer %d, round %d: bytes of its own are lost (%v)", g, i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// What is written directly and through the tail's page cache is one file for
// any other opener.
func TestDirectTailCoherent(t *testing.T) {
	const size = 20000
	path := writeFile(t, testfs.Disk(t), make([]byte, size))
	f := openTest(t, path, openHow{write: true, direct: true})
	if f.tailFd < 0 || f.tail.Load() >= size || f.tail.Load()%pageSize != 0 {
		t.Fatalf("tail at %d, descriptor %d", f.tail.Load(), f.tailFd)
	}
	want := make([]byte, size)
	for i := range 40 {
		b := pattern(3000, uint64(i))
		off := size - 3000 - int64(i*37)
		must(t, f.WriteAt(b, off, i%2 == 0))
		copy(want[off:], b)
		wantContent(t, path, want)
	}
	if st := statOf(t, path); st.Size != size {
		t.Fatalf("the size is %d", st.Size)
	}
}

// Zeroing and discarding keep away from a block that is being changed.
func TestDirectZeroExcluded(t *testing.T) {
	path := writeFile(t, testfs.Disk(t), pattern(16<<10, 1))
	for name, erase := range map[string]func(*File) error{
		"zero":  func(f *File) error { return f.Zero(4096, 4096, 0) },
		"punch": func(f *File) error { return f.Punch(4096, 4096) },
	} {
		t.Run(name, func(t *testing.T) {
			read, goOn := make(chan struct{}), make(chan struct{})
			f := openTest(t, path, openHow{write: true, direct: true, faults: func(op sysop, _ int64, n int) (int, error) {
				if op == opWrite { // the block has been read
					close(read)
					<-goOn
				}
				return n, nil
			}})
			var wg sync.WaitGroup
			wg.Go(func() {
				if err := f.WriteAt([]byte{1}, 4100, false); err != nil {
					t.Error(err)
				}
			})
			<-read
			wg.Go(func() {
				if err := erase(f); err != nil {
					t.Error(err)
				}
			})
			for waiting := 0; waiting == 0; time.Sleep(time.Millisecond) {
				f.ranges.mu.Lock()
				waiting = f.ranges.waiting
				f.ranges.mu.Unlock()
			}
			close(goOn)
			wg.Wait()
			b := make([]byte, 4096)
			must(t, f.ReadAt(b, 4096))
			if !bytes.Equal(b, make([]byte, 4096)) {
				t.Error("the erased block is back")
			}
		})
	}
}

func TestRanges(t *testing.T) {
	var r ranges
	a := r.enter(0, 8, false)
	b := r.enter(0, 8, false) // whole blocks do not exclude each other
	entered := make(chan int, 3)
	var left sync.WaitGroup
	left.Go(func() { s := r.enter(4, 12, true); entered <- 1; r.leave(s) })
	waits := func(n int) {
		for {
			r.mu.Lock()
			w := r.waiting
			r.mu.Unlock()
			if w == n {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
	waits(1)
	left.Go(func() { s := r.enter(8, 12, false); entered <- 2; r.leave(s) }) // behind the waiting one
	waits(2)
	c := r.enter(12, 16, true) // elsewhere
	r.leave(c)
	r.leave(a)
	if len(entered) != 0 {
		t.Error("entered too early")
	}
	r.leave(b)
	if x, y := <-entered, <-entered; x != 1 || y != 2 {
		t.Errorf("order %d, %d", x, y)
	}
	left.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.old != nil || r.new != nil {
		t.Error("the list is not empty")
	}
}

func TestDirectRefused(t *testing.T) {
	h := new(failing)
	path := writeFile(t, testfs.Disk(t), make([]byte, 5000))
	h.set(opOpen, unix.EINVAL)
	_, err := openFile(path, openHow{direct: true, faults: h.hook})
	wantErrno(t, err, unix.EINVAL)
	t.Log(err)
	// tmpfs is the page cache: nothing to go around.
	shm := writeFile(t, testfs.Memory(t), make([]byte, 5000))
	f, err := openFile(shm, openHow{direct: true})
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	fl, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0)
	must(t, err)
	if f.traits.Direct || fl&unix.O_DIRECT != 0 {
		t.Error("O_DIRECT stays on tmpfs")
	}
}

func TestAlignedMemory(t *testing.T) {
	b := make([]byte, 3*pageSize)
	path := writeFile(t, testfs.Disk(t), pattern(64<<10, 3))
	f := openTest(t, path, openHow{write: true, direct: true})
	want, err := os.ReadFile(path)
	must(t, err)
	for skip := range 20 {
		p := b[skip : skip+2*pageSize]
		must(t, f.ReadAt(p, 4096))
		if !bytes.Equal(p, want[4096:4096+2*pageSize]) {
			t.Fatalf("memory at +%d", skip)
		}
		must(t, f.WriteAt(p, 4096, false))
	}
	wantContent(t, path, want)
}

// Space that is there again at the second look was missing for the write: past the
// page cache there is nothing else that could have been lost.
func TestDirectNoSpaceForAMoment(t *testing.T) {
	const block = 4096
	h := new(failing)
	f := openTest(t, writeFile(t, testfs.Disk(t), make([]byte, 2*block)), openHow{write: true, direct: true, faults: h.hook})
	b := pattern(2*block, 1)
	h.set(opWriteDsync, unix.ENOSPC)
	must(t, f.WriteAt(b[:block], 0, true))
	must(t, f.WriteAt(b[block:], block, true))
	if h.count(opWriteDsync) != 1 || h.count(opSync) != 2 {
		t.Error(h.calls)
	}
	if err := f.DurableWriteFailed(b, 0, unix.ENOSPC); err != nil {
		t.Error(err)
	}
	got := make([]byte, len(b))
	must(t, f.ReadAt(got, 0))
	if !bytes.Equal(got, b) {
		t.Error("other bytes")
	}
	h.set(opSync, unix.ENOSPC)
	if err := f.WriteAt(b, 0, true); !SyncFailed(err) {
		t.Error(err)
	}
}

// With a tail there are bytes in the page cache: a sync that has lost them tells
// nobody else.
func TestDirectNoSpaceBesideTail(t *testing.T) {
	const block = 4096
	h := new(failing)
	f := openTest(t, writeFile(t, testfs.Disk(t), make([]byte, block+77)), openHow{write: true, direct: true, faults: h.hook})
	h.set(opWriteDsync, unix.ENOSPC)
	if err := f.WriteAt(pattern(block, 1), 0, true); !SyncFailed(err) {
		t.Error(err)
	}
}
