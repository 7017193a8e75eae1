// Package ioloop moves: it takes requests off a connection and puts bytes
// where they belong. It knows sockets, host files and buffers; what a request
// looks like on the wire it learns from a Codec, where bytes live from a
// backend.Image, and whether a request may run from the image's gate
// (package state).
//
// One goroutine per connection receives, decodes, and executes inline what
// cannot wait for a device; the rest goes to an io_uring or to workers, and a
// writer goroutine exists only while a client does not take its replies. The
// pipeline stands in conn.go.
package ioloop
