package backend

// slots bound how many writes of a file are in the kernel at once. It carries out
// one buffered write of a file at a time, and lets writers sleep while too much is
// dirty. Who waits there keeps one of the few threads that Go runs goroutines on,
// until Go's monitor takes it away after 20 us to 20 ms, and then has to queue for one
// again: connections that only read stood behind all of that. Who waits here leaves
// the thread to others.
//
// With one write at a time the next one's thread has to be woken first: four
// connections wrote 13 to 25 % less.
//
// A client that reads 4 KiB that are cached 2,000 times a second, beside four
// connections that write 4 KiB at depth 32 as fast as they can, ext4, two cores,
// three runs of 5 s: 960 to 1,260 reads/s, each of them more than a second late;
// so, and with two threads more (spareThreads in cmd/nbd-export), 2,000/s, p50 0.24 to
// 0.29 ms and p99 6 to 9 (nbdkit 0.09 and 10, qemu-nbd 0.5 to 1.2 and 16 to 35).
// Writes/s of four connections without the reader: 4 KiB 189k and 175k, 64 KiB 36k
// and 42k.
type slots chan struct{}

const mostSlots = 2

// newSlots is for a file with these traits that is open for writing; nil, which bounds
// nothing, where nothing sleeps, and where as many writes are at it at once as come:
// past the page cache, on block devices, and who knows where else.
func newSlots(t *Traits) slots {
	if !t.inlineWrites || t.Tmpfs || t.BlockDevice {
		return nil
	}
	return make(slots, mostSlots)
}

// take waits for a slot. give is to follow.
func (s slots) take() {
	if s != nil {
		s <- struct{}{}
	}
}

func (s slots) give() {
	if s != nil {
		<-s
	}
}
