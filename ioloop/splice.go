package ioloop

import (
	"math/bits"
	"os"
	"unsafe"

	"github.com/nbd-export/nbd-export/backend"
)

// Pages of a file whose bytes are the guest's for good (backend.Extent.Fixed) are
// not copied into the socket but spliced into it: vmsplice takes them from the map, with
// the headers between, into a pipe, and splice from there into the socket. The
// client's receive copies from the page cache itself. Copying is what most of the
// server's time went into: 1.5 of 2.0 us for 4 KiB of a random page, since neither
// that nor where it goes is in the processor's cache.
//
// Operations/s and server's processor time in microseconds, tmpfs, two cores
// (nbd-export bench), copied and spliced:
//
//	                    Unix socket                 TCP
//	4k, depth 32        433k @2.3   432k @1.9      415k @2.4   550k @1.7
//	  4 connections     473k @2.2   692k @1.3      513k @2.1   658k @1.5
//	16k, depth 16       (copied)                   216k @4.6   277k @3.3
//	  4 connections     181k @5.5   327k @2.9      195k @5.2   229k @3.2
//	64k, depth 8        (sendfile)                  55k @17     74k @13
//	1M, depth 1         3.6k @242   3.8k @102
//
// With one connection on a Unix socket client and server work in turns, and what
// the one saves the other spends; the first replies come earlier, p50 of 4k 25 us
// and 65. With four p99 is 0.7 ms and 4.1.
//
// What is sent together is what one pipe of ordinary size takes: splice gives
// 16 pieces to the socket at once. With pipes of 1 MiB one connection got 281k
// operations over TCP and 15 % to 25 % less on a Unix socket.

const (
	// spliceMin is from where on lending is worth its two calls, in bytes of a send.
	spliceMin = 16 << 10
	// spliceMostTCP: from there on copying is faster over TCP. 256k at depth 4 10.0k
	// @95 copied and 11.3k @87 spliced, 1M 3.5k @240 and 2.2k @450.
	spliceMostTCP = 256 << 10
	// spliceFew is how many slots a reply may take for a pipe to carry enough of
	// them for a client that works in turns with us: it is woken for each pipe. With
	// one connection on a Unix socket 16k at depth 16 got 153k to 167k operations/s,
	// by three in a pipe, and 172k copied; 32k at depth 8 75k to 86k and 88k to 96k.
	spliceFew = 4
)

// cachePage is the size of what is spliced, in bytes, and cacheShift its logarithm:
// with some arm64 kernels it is 16 or 64 KiB.
var (
	cachePage  = int64(os.Getpagesize())
	cacheShift = bits.TrailingZeros64(uint64(cachePage))
)

// toSplice is what the gaps of a reply buffer are, for splicing.
type toSplice struct {
	bytes  int
	slots  int  // of a pipe, with what lies before each
	last   int  // of these, those of the last gap
	copied bool // one of them has to be copied
}

// add notes a gap, which is all of e.
func (l *toSplice) add(e *backend.Extent) {
	l.last = 1 + int((e.Offset+e.Length-1)>>cacheShift-e.Offset>>cacheShift) + 1
	l.slots += l.last
	l.bytes += int(e.Length)
	// A page that is spliced for less than its size is more than the socket counts.
	l.copied = l.copied || !e.Fixed || e.Length < cachePage
}

// full reports whether the pipe has no room for another gap like the last.
func (l *toSplice) full() bool { return l.slots+l.last > pipeSlots }

// splices reports whether the gaps collected so far are to be spliced. A batch that
// writes too is better kept together: 70:30 of 4k at depth 32, without the first line
// here, with it, and without any splicing 382k, 457k and 417k operations/s.
func (c *conn) splices() bool {
	return c.puts == nil &&
		!c.spliced.copied && !c.e.pipes.off.Load() &&
		c.out.pages.prefersSplice(int64(c.spliced.bytes), c.spliced.last > spliceFew && c.e.alone())
}

// splice sends what the socket takes of segs, total bytes, of which n are in pages
// of files: see pageSender.splicePages. Without a pipe they are copied. The caller is
// the sender.
func (c *conn) splice(segs [][]byte, total, n int, waits bool) (sent int) {
	p := c.e.pipes.get()
	if p == nil {
		return c.out.sendPages(segs, total, waits)
	}
	defer c.e.pipes.put(p)
	if !p.room(total - n) {
		return c.out.sendPages(segs, total, waits)
	}
	return c.out.splicePages(p, segs, total, waits)
}

func (s *socket) prefersSplice(n int64, inTurns bool) bool {
	if s.unix {
		return n >= spliceMin && !inTurns
	}
	return n >= spliceMin && n <= spliceMostTCP
}

func (s *socket) splicePages(p *pipe, segs [][]byte, long bool) (int, error) {
	iov := s.out.iov[:0]
	for i, seg := range segs {
		if len(seg) == 0 {
			continue
		}
		n := len(iov)
		iov = iov[:n+1]
		if i%2 == 0 {
			iov[n].Base = p.keep(seg)
		} else {
			iov[n].Base = unsafe.SliceData(seg)
		}
		iov[n].SetLen(len(seg))
	}
	n, err := p.splice(s.rc, iov, long)
	clear(iov)
	return n, err
}
