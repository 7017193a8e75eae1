package backend

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What the next owner writes at once shows, also where the kernel dates both
// writes alike.
func TestStamp(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 5000))
		date := func(at time.Time) {
			t.Helper()
			ts := unix.NsecToTimespec(at.UnixNano())
			must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, 0))
		}
		mtime := func() time.Time {
			st := statOf(t, path)
			return time.Unix(st.Mtim.Unix())
		}
		r := openImage(t, Options{Path: path}, nil)

		must(t, activate(r, false))
		must(t, write(r, 0, []byte("mine"), false))
		tick := time.Now().Truncate(4 * time.Millisecond)
		date(tick)
		must(t, inactivate(r))
		if m := mtime(); !m.After(tick) || m.After(time.Now()) {
			t.Errorf("written at %v, dated %v", tick, m)
		}
		date(tick) // what a write within the tick would do
		var me *ModifiedError
		if err := activate(r, true); !errors.As(err, &me) {
			t.Errorf("%v, want that it was modified", err)
		}

		// What was written long ago keeps its time.
		old := time.Now().Add(-time.Hour).Truncate(time.Second)
		must(t, activate(r, false))
		date(old)
		must(t, inactivate(r))
		if m := mtime(); !m.Equal(old) {
			t.Errorf("dated %v, was %v", m, old)
		}
		must(t, activate(r, true))
	})
}
