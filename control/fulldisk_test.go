package control

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A stop waits for space for a limited time, for all images together, and for nothing
// else.
func TestFullDisk(t *testing.T) {
	log, lines := journal()
	var told []string
	const limit = 10 * time.Second
	d := NewFullDisk(limit, func(states string) { told = append(told, states) }, log)
	now, pauses := time.Unix(1000, 0), 0
	d.now = func() time.Time { return now }
	d.pause = func(p time.Duration) { now = now.Add(p); pauses++ }
	full := fmt.Errorf("write a: %w", unix.ENOSPC)
	if d.Again("a", full) || pauses != 0 || len(lines) > 0 {
		t.Error("it waits although the process does not stop")
	}
	d.Stopping()
	if d.Again("a", fmt.Errorf("write a: %w", unix.EIO)) || pauses != 0 {
		t.Error("a stop waits for a disk that fails")
	}
	for d.Again("a", full) {
	}
	if want := int(limit / fullDiskPause); pauses != want || len(told) != want {
		t.Errorf("%d pauses, a service manager told %d times, want %d", pauses, len(told), want)
	}
	if want := "EXTEND_TIMEOUT_USEC=30000000\nSTATUS=The stop waits for space: write a: no space left on device"; told[0] != want {
		t.Errorf("told %q", told[0])
	}
	expect(t, lines, "the stop waits for space: not all that was acknowledged is on disk; make some, or stop at once with a second signal, which loses it: write a: no space left on device")
	if d.Again("b", fmt.Errorf("write b: %w", unix.EDQUOT)) {
		t.Error("another image has time of its own")
	}
	if len(lines) > 0 {
		t.Errorf("it is told again: %s", <-lines)
	}

	d = NewFullDisk(0, nil, log)
	d.Stopping()
	if d.Again("a", full) || len(lines) > 0 {
		t.Error("it waits although it was told not to")
	}

	d = NewFullDisk(FullDiskTime, func(string) {}, log)
	d.Stopping()
	d.now, d.pause = func() time.Time { return now }, func(p time.Duration) { now = now.Add(p) }
	if !d.Again("a", full) || !d.Again("b", unix.EDQUOT) || !d.Again("a", full) || len(lines) != 2 {
		t.Errorf("%d lines for two images", len(lines))
	}
}
