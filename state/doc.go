// Package state decides who owns an image.
//
// Each image has a Machine: its ownership state, its epoch and its gate. The
// gate says of every request whether it may run now, must wait or is refused;
// the Machine changes the answer, in an order in which at no moment two
// processes may write. What it moves is anything that satisfies Image; the
// package knows no protocol, no format and no files, and imports nothing of
// this module.
//
// The transitions are one table (transitions.go), from which the names, the
// diagram in docs/architecture.md and the test of every (state, event) pair
// are made.
package state
