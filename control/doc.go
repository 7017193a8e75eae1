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
// has ASCII only. Unlike QEMU's, the socket serves any number of clients at
// once. Each client's commands run in order, on a goroutine of its own, and
// queries wait for no transition, so a second client always gets an answer.
//
// docs/control.md lists the commands, their extensions and what differs from
// QEMU. Here they are in: commands.go (the table), blockdev.go, nodes.go and
// target.go (nodes and the images behind them), exports.go, bitmaps.go, nbd.go
// (the NBD server), objects.go (its TLS credentials), resize.go, events.go,
// ordernames.go, identity.go and takeoverrequest.go (what a handover and a takeover
// need).
package control
