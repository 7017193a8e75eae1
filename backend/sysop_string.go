package backend

import "fmt"

var sysopNames = [...]string{
	opOpen: "open", opReopen: "reopen", opClose: "close",
	opRead: "read", opTryRead: "try-read",
	opWrite: "write", opTryWrite: "try-write", opWriteDsync: "write-dsync", opSync: "sync",
	opPunch: "punch", opZeroRange: "zero-range", opAllocate: "allocate", opTruncate: "truncate",
	opSeek: "seek", opStat: "stat", opAdvise: "advise",
	opLock: "lock", opTestLock: "test-lock", opListLocks: "list-locks",
	opRecordStat: "record-stat", opRecordOpen: "record-open", opRecordRead: "record-read", opRecordUnlink: "record-unlink",
	opRecordCreate: "record-create", opRecordWrite: "record-write", opRecordClose: "record-close",
	opRecordRename: "record-rename", opRecordOverwrite: "record-overwrite",
}

// String names the call, for tests.
func (op sysop) String() string {
	if int(op) < len(sysopNames) && sysopNames[op] != "" {
		return sysopNames[op]
	}
	return fmt.Sprintf("sysop(%d)", uint8(op))
}
