package main

// causes says, by cell id, what limits a cell whose goal is missed and what was
// tried; by reasoning, unless it quotes a measurement. The report prints it with
// the miss; -render writes the report anew from raw figures after a change here.
var causes = map[string]string{
	"tmpfs-unix-randread-4k-d32-c1":  "every read is copied by pread; page references in the send are not built yet.",
	"tmpfs-unix-randread-4k-d32-c4":  "as with one connection; two cores are shared by four connections and the client.",
	"tmpfs-unix-randread-4k-d1-c1":   "the server sleeps between requests; a bounded spin for a single busy connection is not built yet.",
	"tmpfs-unix-randread-16k-d16-c1": "every read is copied by pread; page references in the send are not built yet.",
	"tmpfs-unix-randread-64k-d8-c1":  "every read is copied by pread, and each reply is a send of its own.",
	"tmpfs-unix-randread-1M-d4-c1":   "a read is copied through a buffer larger than the second-level cache, by a worker; sendfile is not built yet.",
	"tmpfs-unix-randread-1M-d1-c1":   "a read is copied through a buffer larger than the second-level cache, and handed to a worker and back.",
	"tmpfs-unix-randwrite-1M-d4-c1": "of the server's time 57 % goes into copying from the socket into the pages of the file (perf), some of the rest into threads that wake for every piece that arrives; " +
		"a payload that is not yet whole in the socket takes the way through a buffer.",
	"tmpfs-tcp-randwrite-1M-d4-c1":        "as on the Unix socket; the window is often too small at first for a payload to be whole in the socket.",
	"ext4-cached-unix-randread-4k-d32-c1": "every read is copied by pread; page references in the send are not built yet.",
	"ext4-cached-unix-randread-1M-d4-c1":  "a read is copied through a buffer larger than the second-level cache, by a worker; sendfile is not built yet.",
}

// handoverCauses says what limits handovers that miss their goals; with
// figures of the debug log's step times and of an empty command on the same
// machine. Printed with the misses.
const handoverCauses = `What limits the misses:

- Idle, and on tmpfs: two commands that do nothing take 0.43 ms on our sockets and 0.85 ms on QEMU's, which is a
  machine that is slow to wake a process. Of the rest, some 0.46 ms on tmpfs, half are the two renames of the owner
  record with the looks at it before, a quarter is opening and locking. QEMU writes no record.
- Idle on ext4, by the difference to tmpfs: 0.35 ms are an fdatasync with nothing dirty, and 0.5 ms the renames,
  for which ext4 allocates blocks at once (allocating them before gained nothing).
- Reads: their longest gap is as long between handovers, so it is the load's, or the machine's, not the handover's.
- 10,000 writes/s on ext4: the median is half of the goal; the p99 of 70 is the worst of them.
`
