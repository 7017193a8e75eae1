// Package integration tests nbd-export from the outside: the binary, its
// command line, its signals and its control socket, against the clients and
// servers that people use with it. It is a module of its own so that what it
// needs never reaches those who only use nbd-export.
package integration
