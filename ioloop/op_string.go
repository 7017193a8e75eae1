package ioloop

var opNames = [...]string{
	OpRead: "read", OpWrite: "write", OpFlush: "flush", OpDiscard: "discard", OpZero: "zeroing",
	OpCache: "cache", OpStatus: "block status", OpReject: "rejected request", OpDisconnect: "disconnect",
}

// String is the operation's name in logs.
func (o Op) String() string { return opNames[o] }
