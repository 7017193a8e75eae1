package main

// causes says, by cell id, what limits a cell whose goal is missed and what was
// tried; by reasoning, unless it quotes a measurement. The report prints it with
// the miss; -render writes the report anew from raw figures after a change here.
var causes = map[string]string{
	"tmpfs-unix-randread-4k-d32-c1": "pages are spliced, so the server copies nothing. The client copies them from where no cache has them, in 1.4 us for each, and sleeps in between; " +
		"to wake it takes 13 to 25 us of the server's time (ftrace), once for eight replies. Where it has no time to sleep, with four connections or over TCP, both are faster.",
	"tmpfs-unix-randread-4k-d32-c4": "both cores are busy, one of them with the client, which copies pages that no cache has: 1.0 of its 1.4 us.",
	"tmpfs-unix-randread-4k-d1-c1": "with spinning, most of what is left is the system calls of both sides and the client's wake-up; the rate of both peers changes twofold with whether the client runs on the server's core. " +
		"Pinned to one core together, server and client get 101k at 5 us, but a server cannot keep its client there, and pinned alone it has 30k to 46k.",
	"tmpfs-unix-randread-16k-d16-c1": "the kernel's copy into the socket and the client's out of it. Spliced it was 0.8 to 1.0x of this, by three replies in a pipe: the client is woken for each pipe.",
	"tmpfs-unix-randread-64k-d8-c1-discard": "nothing is copied, by the server or by the client. The server's core is 0.87 busy and the client's 0.64; in between each waits for the other. " +
		"A third of the server's time is what sendfile does page by page, 8 % switches of threads, 6 % waking the client (perf).",
	"tmpfs-unix-randread-1M-d4-c1-discard": "nothing is copied, by the server or by the client. The server's core is 0.94 busy: a third of that is what sendfile does page by page, " +
		"and 34 % are switches of threads (perf).",
	"tmpfs-unix-randwrite-4k-d32-c1": "as for reads; in other runs 2.6x and 3.0x, which is above the goal.",
	"tmpfs-unix-mixed-4k-d32-c1":     "as for reads, and these are copied in batches that write: spliced, eight at a time, they would have the writes carried out in small groups, which was slower (382k to 457k).",
	"tmpfs-tcp-randread-4k-d32-c1":   "both sides are busy: the client copies pages that no cache has, and both have the packets of the loopback.",
	"direct-unix-randread-4k-d1-c1":  "the disk: fio gets 11.9k operations/s of it at this depth, by preads and by io_uring alike, and there is nothing to be quicker at.",
	"direct-unix-randread-4k-d32-c1": "fio gets 87k to 129k operations/s of this disk at this depth, all servers 60k to 70k: there an operation waits for three processors to wake, too. " +
		"Of our time 20 % is the copy into the socket, 19 % switches of threads, 11 % telling the device (perf).",
	"direct-unix-randread-4k-d32-c4":       "the disk: fio gets 103k to 138k operations/s with four jobs at this depth.",
	"direct-unix-randwrite-4k-d32-c1":      "as for reads.",
	"ext4-cold-unix-randread-4k-d32-c1":    "as with O_DIRECT: fio gets 104k operations/s at this depth, without a server between.",
	"ext4-cold-unix-read-1M-d4-c1-discard": "the disk gives fio 1.4k to 1.8k at this depth; reading ahead comes close to it, in some rounds.",
	"tmpfs-unix-randread-1M-d1-c1-discard": "one request at a time: server and client work in turns.",
	"tmpfs-unix-randread-4k-d1-c4":         "the server sleeps and is woken for nearly each request, which takes 13 to 25 us of who wakes it and 25 to 60 until it runs (ftrace); spinning with several busy connections costs more than it brings. Pinned to one core together, server and client get 129k at 4.3 us.",
	"tmpfs-tcp-randread-64k-d8-c1-discard": "pages are spliced, so nothing is copied, by the server or by the client. The server's core is 0.96 busy, with the loopback's packets; " +
		"14 % of its time is waking the other side and 12 % taking hold of pages (perf).",
	"tmpfs-tcp-randread-1M-d4-c1-discard": "41 % of the server's time is the copy into the socket, 23 % waking the other side (perf). Without it, by sendfile, it was slower: " +
		"2.1k operations/s at 480 us and 3.6k at 278, with a client that copies.",
	"tmpfs-unix-randwrite-1M-d4-c1": "of the server's time 57 % goes into copying from the socket into the pages of the file (perf), some of the rest into threads that wake for every piece that arrives; " +
		"a payload that is not yet whole in the socket takes the way through a buffer.",
	"tmpfs-tcp-randwrite-1M-d4-c1":               "as on the Unix socket; the window is often too small at first for a payload to be whole in the socket.",
	"ext4-cached-unix-randread-4k-d32-c1":        "as on tmpfs.",
	"ext4-cached-unix-randread-1M-d4-c1-discard": "as on tmpfs, nothing is copied. The server's core is 0.9 busy: 30 % of that is what sendfile does page by page, and as much switches of threads (perf).",
}

// handoverCauses says what limits handovers that miss their goals; with
// figures of the debug log's step times and of an empty command on the same
// machine. Printed with the misses.
const handoverCauses = `What limits the misses:

- Orders, idle and on tmpfs: *limit*, which makes the system calls of a change of owner and does nothing else, on a
  thread that waits in them, takes 0.3 to 0.45 of what QEMU's pair does. Half of QEMU's would leave 0.06 ms above that, idle, for
  two processes to be run by Go's scheduler, to read JSON, and to check all that a change of owner checks, in caches
  that are cold after 20 ms; ours take 0.25 ms for it. Pairs after pauses of 20 ms, of 3 ms and without one take 0.6,
  0.4 and 0.25 ms (QEMU's 0.8, 0.6 and 0.5). The way there and back is 0.25 ms of it (*orders for nothing*). A record
  that is written into what the last one was, and a map that is made when it is first used, took 0.03 to 0.05 ms each
  off. Without a difference that could be told from noise: system calls past Go's scheduler for what is in memory; to
  look at an order and take it off the socket after the answer, so that the client is not woken for nothing (its
  processor sleeps the deeper); and to leave out what is done ahead where there is nothing to sync.
- Writes, on tmpfs: a client that asks *limit* every 0.1 ms who takes its writes has two thirds of QEMU's gap: the
  asking is 0.25 ms of it, with any server.
- qcow2 on tmpfs: the same, and 0.15 ms for its tables: they are read anew under the locks, as everything is, hashed
  for the fingerprint, and read once more for the view that the inactive side serves. QEMU's writers have stopped
  there before it is asked, so it has nothing to drain.
- Reads beside as many writes as it takes: they wait for their turn with connections that take more than twice as many
  writes as QEMU's, on two cores, handover or not.
- Reads beside writes to ext4: their longest gap is as long between handovers. Traced, one of 7.8 ms was spent
  in the queue of one processor, behind the kernel's part of a sync in pieces of 1 to 1.5 ms (this kernel preempts at
  ticks, 250 a second), while the other processor was idle for 4 ms of it. Shorter slices and a lower priority of what
  syncs made no difference to the longest. More threads than processors ended those of 16 to 22 ms.
`

// qcowLimits says what limits qcow2 cells that miss their goals, by the name that
// they have in qcowCells.
var qcowLimits = map[string]string{
	"": "Of what has no limit named here: not yet found.",
	"pages": "1M reads: raw sends pages of its file that stay the file's until the client takes them (sendfile). A cluster of a\n" +
		"  qcow2 image may have become another block's by then, by a discard here, or by the next owner, which may come after this\n" +
		"  process has ended and its socket has not. So what qcow2 reads is copied into the socket, as raw's is where sendfile\n" +
		"  is not worth it: 3.5k operations/s at 300 us.",
	"new": "An empty image: half of the server's time is the kernel's, for pages that are new to the file and for waking and being\n" +
		"  woken by the client (perf: on tmpfs 21 % switches, 16 % finding and clearing pages; on ext4 17 % and 25 % for reservations,\n" +
		"  extents and buffers). Of ours nothing takes more than 4 %.",
	"copy": "An overlay: the rest of the cluster, 60 KiB, is copied by the kernel in 38 to 44 us by a read and a write, one at a time,\n" +
		"  since the file is locked meanwhile. copy_file_range does it in 28 to 31 and was tried: 5 % more operations at 12 % less CPU.\n" +
		"  At most that is 35k operations/s, where three times qemu-nbd's are 70k.",
	"mapped": "4k reads: after four seconds under this load both give the same. Loads as short as these find pages that are not mapped\n" +
		"  yet, and those of a qcow2 image are mapped one by one where a raw file's are in large folios.",
}
