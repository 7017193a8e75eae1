//go:build !testhooks

package main

import (
	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// openImage opens an image. The second result adds the hooks of tests to a
// machine's options; here there are none, see hooks_on.go.
func openImage(o backend.Options) (*backend.Owned, func(state.Options) state.Options, error) {
	img, err := backend.Open(o)
	return img, noHooks, err
}

func noHooks(o state.Options) state.Options { return o }
