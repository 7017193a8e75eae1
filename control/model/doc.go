// Package model explores the handover of an image between two exporters: every
// order of every step of both, of commands, crashes, failures, and messages
// that are late or lost. It has no code but its tests; docs/model.md says what
// it checks and what it assumes.
package model
