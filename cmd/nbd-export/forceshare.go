package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/backend"
)

// forceShareFlag defines -U, as of qemu-img.
func forceShareFlag(cmd *cobra.Command, v *bool, usage string) {
	cmd.Flags().BoolVarP(v, "force-share", "U", false, usage)
}

const forceShareUsage = "look at it without locks, also while somebody writes it: what is shown may be half changed"

// refusedToLook is err, with what to do if somebody else has the image.
func refusedToLook(err error) error {
	if _, ok := errors.AsType[*backend.LockError](err); ok {
		return fmt.Errorf("%w; or look at it all the same, while it changes, with -U", err)
	}
	return err
}

// tellWriter says on standard error who writes an image that was looked at with
// -U.
func tellWriter(cmd *cobra.Command, image, ownerRecord string) {
	seen, err := backend.Who(image, ownerRecord)
	if err == nil && seen.Written() {
		_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "nbd-export: warning: %s may be half changed: %s\n", image, judge(image, seen, time.Now()).Verdict)
	}
}
