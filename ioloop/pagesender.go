package ioloop

import "golang.org/x/sys/unix"

// pageSender is a transport that can send pages of files: see backend.File.Pages.
type pageSender interface {
	// sendPages is trySend, but errFault if the first byte to send is in a
	// page that cannot be read. long says that it may have to wait for a disk,
	// or takes as long.
	sendPages(segs [][]byte, long bool) (int, error)
	// splicePages is sendPages of segs of which the second, the fourth and so on are
	// not copied: they stay pages of the file until the client takes them. p has
	// room for the others, and keeps what the socket does not take.
	splicePages(p *pipe, segs [][]byte, long bool) (int, error)
	// prefersSplice reports whether splicePages is the faster way for n bytes of
	// pages. inTurns says that it is one send of several to a client that has
	// nothing else to do.
	prefersSplice(n int64, inTurns bool) bool
	// sendFile is sendPages of head and n bytes at off of the file fd, which
	// are not copied: they stay pages of the file until the client takes them.
	sendFile(head []byte, fd int, off, n int64, long bool) (int, error)
	// fileWay says whether sendFile is the faster way for n bytes, and when. more
	// says that other requests have come.
	fileWay(n int64, more bool) fileWay
	// takesFiles is whether fileWay may be whenItFits for n bytes. It is for any
	// goroutine.
	takesFiles(n int64) bool
	// waitToFit waits until fileWay is not whenItFits for n bytes.
	waitToFit(n int64) error
}

// fileWay: see pageSender.
type fileWay uint8

const (
	notAsFile  fileWay = iota
	asFile             // now
	whenItFits         // the socket has no room for all of it
)

// errFault: see pageSender.
const errFault = unix.EFAULT
