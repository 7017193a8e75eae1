//go:build race

package qcow2

func init() { stride = 7 }
