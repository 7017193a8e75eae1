//go:build testhooks

package backend

// OpenHooked is Open for tests of whole programs. fault runs before each
// system call on the image's files and on its owner record, by any goroutine:
// an error is returned in the call's stead, and a smaller n makes a transfer
// of n bytes at off short. call is one of the names below.
func OpenHooked(o Options, fault func(call string, off int64, n int) (int, error)) (*Raw, error) {
	return open(o, func(op sysop, off int64, n int) (int, error) { return fault(sysopNames[op], off, n) })
}

var sysopNames = [...]string{
	opOpen: "open", opReopen: "reopen", opClose: "close",
	opRead: "read", opTryRead: "try-read",
	opWrite: "write", opTryWrite: "try-write", opWriteDsync: "write-dsync", opSync: "sync",
	opPunch: "punch", opZeroRange: "zero-range", opAllocate: "allocate",
	opSeek: "seek", opStat: "stat", opAdvise: "advise",
	opLock: "lock", opTestLock: "test-lock", opListLocks: "list-locks",
	opRecordOpen: "record-open", opRecordRead: "record-read", opRecordUnlink: "record-unlink",
	opRecordCreate: "record-create", opRecordWrite: "record-write", opRecordClose: "record-close",
	opRecordRename: "record-rename",
}
