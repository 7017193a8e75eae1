// Package client is a fast NBD client in pure Go: fixed newstyle handshake,
// simple and structured replies, base:allocation.
//
// [Dial] gives a [Conn], a plain synchronous API that any number of goroutines
// may share: their requests are pipelined over one connection. [DialBatch]
// gives a [Batch], the engine behind load generators: one goroutine keeps a
// fixed number of requests in flight and pays about a microsecond for each.
// [List] asks a server what it exports.
package client
