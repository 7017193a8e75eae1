//go:build race

package ioloop

func init() { raceEnabled = true }
