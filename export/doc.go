// Package export speaks: it is the NBD side of nbd-export. It negotiates the
// handshake, knows which exports there are, turns request headers into
// ioloop requests, and says which error goes on the wire. It knows no image
// format and no file descriptor of an image; package ioloop moves the bytes.
//
// The protocol is doc/proto.md of the NBD project
// (https://github.com/NetworkBlockDevice/nbd), called "the specification" in
// comments here.
//
// # What is negotiated
//
//   - Handshake: fixed newstyle with NO_ZEROES. Options of a client
//     that did not claim fixed newstyle are answered all the same: it may not
//     rely on that, but clients that forget the flag do (go-nbd's List).
//   - Options: EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED_REPLY,
//     LIST_META_CONTEXT and SET_META_CONTEXT, and STARTTLS where the server has
//     certificates: then all others but ABORT get ERR_TLS_REQD before it.
//     EXTENDED_HEADERS and everything unknown get ERR_UNSUP and haggling goes
//     on. Errors carry a text that says what is wrong.
//   - Infos: EXPORT and BLOCK_SIZE always; NAME and DESCRIPTION on request.
//   - Metadata contexts: base:allocation, and qemu:dirty-bitmap:NAME for the
//     bitmaps of an export.
//   - Transmission flags: SEND_FLUSH, SEND_FUA and SEND_CACHE always;
//     CAN_MULTI_CONN unless only one connection is allowed; SEND_DF with
//     structured replies; ROTATIONAL by the image;
//     READ_ONLY on read-only exports, and on the others SEND_WRITE_ZEROES,
//     SEND_FAST_ZERO and, where the host can discard, SEND_TRIM.
//   - Replies: simple, or structured once negotiated. With structured replies
//     every reply is a structured one, and errors carry their text.
//
// Size and flags never depend on who owns the image: a client that connects
// to an inactive exporter sees a writable export whose writes fail with EPERM
// until it is activated, and no client is disconnected by a handover. Both
// are fixed for the life of a connection.
//
// # Limits
//
// A handshake must be over in 10 seconds and 10,000 options. An option's data
// may be 64 KiB; up to 32 MiB are discarded and answered with ERR_TOO_BIG,
// with more the client is disconnected. A READ or WRITE may be 32 MiB; a
// longer READ gets EINVAL, a longer WRITE gets EINVAL and its payload is
// discarded up to 64 MiB, beyond that the client is disconnected after the
// reply. TRIM, WRITE_ZEROES, CACHE and BLOCK_STATUS have no limit but the
// export's size.
//
// # Errors
//
//   - EPERM: a write to a read-only export ("export is read-only"), or a
//     request to one that is not active here ("export is inactive").
//   - EINVAL: unknown commands and flags, a READ, TRIM, CACHE or BLOCK_STATUS
//     past the end, or anything the host says that NBD has no code for.
//   - ENOSPC: a WRITE or WRITE_ZEROES past the end; disk full; quota.
//   - EIO: the host's storage failed, or the image is in a failed state.
//   - ENOMEM: as the host says it.
//   - EOVERFLOW: likewise, where the specification allows it.
//   - ENOTSUP: a FAST_ZERO request that would not be fast, nothing else.
//   - ESHUTDOWN: the server is stopping.
//
// # Stopping
//
// Server.Refuse closes the listeners and answers options of unfinished
// handshakes with ERR_SHUTDOWN. Server.Shutdown then stops receiving on the
// other connections, so that each ends when what it has received is answered.
// In between requests get ESHUTDOWN from the gate. Server.Close ends
// everything at once.
package export
