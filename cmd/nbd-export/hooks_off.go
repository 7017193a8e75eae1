//go:build !testhooks

package main

import (
	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/state"
)

// openImage opens an image. The second result is for state.Options.Step; see
// hooks_on.go.
func openImage(o backend.Options) (*backend.Raw, func(image string, step state.Step), error) {
	img, err := backend.Open(o)
	return img, nil, err
}
