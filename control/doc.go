// Package control takes orders: from Unix signals and from the control
// socket, which speaks QMP, the protocol QEMU's daemons are driven with. It
// holds the registry of the images a process serves, carries out what is
// ordered on one of them or on all, stops the process in order, and has the
// client for the socket.
//
// # The control socket
//
// Framing and errors are those of QEMU 10: a greeting, capabilities
// negotiation with qmp_capabilities, then requests {"execute", "arguments",
// "id"} in any whitespace, each answered by one line that ends in CRLF and
// has ASCII only. The commands blockdev-set-active, query-block-exports,
// query-named-block-nodes, query-commands, query-version and quit have QEMU's
// names, arguments, results and error texts. Unlike QEMU's, the socket serves
// any number of clients at once. Each client's commands run in order, on a
// goroutine of its own, and queries wait for no transition, so a second
// client always gets an answer.
//
// Every image has two node names: the format node, image0, image1 and so on,
// and the file node under it, image0-file. Ownership belongs to the image, so
// both have the same state; inactivating the file node alone is refused while
// the format node above it is active, as in QEMU.
//
// Extensions are named x-...:
//
//   - blockdev-set-active takes x-if-unchanged (with active true: refuse if
//     the image was modified since this process gave it away), x-abandon
//     (with active false: give up failed images too, although writes may be
//     lost), x-node-names (several images as one group, all or none) and
//     x-order (a name for x-cancel).
//   - x-query-status returns all that "nbd-export status" shows.
//   - x-identify says of each image, or of those in x-node-names, what tells
//     it from others, and whether this process could open it for writing. With
//     nonce, that is written into the owner records of those it owns, for
//     another exporter to find beside its own image.
//   - x-takeover asks, in the name of host and pid, for an image that a client
//     of theirs wants to write to. granted in the answer says that it is
//     inactive here (owned, that it was active until now); if not, reason says
//     why, and retry-seconds when to ask again. It is not carried out for a
//     client that has hung up.
//   - x-cancel stops an inactivation, of one image or of all, as long as
//     writes are still served; the image stays active. With order it takes
//     back the blockdev-set-active whose x-order that is: one that has not
//     begun never will, as when it is still on its way on a connection that
//     broke; running in the answer says that it is under way.
package control
