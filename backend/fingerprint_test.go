package backend

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What was just written is dated by the clock, so that what the next owner writes at
// once has another date; on kernels that date by their tick TestTwoOwners needs it.
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
		for {
			at := time.Now().Truncate(4 * time.Millisecond)
			date(at)
			r.cur.Load().stamp()
			if m := mtime(); m.After(at) && !m.After(time.Now()) {
				break
			}
			if age := time.Since(at); age < tick { // else this was too slow for it
				t.Fatalf("written %v ago, and dated by the tick", age)
			}
		}
		old := time.Now().Add(-time.Hour).Truncate(time.Second)
		date(old)
		must(t, inactivate(r))
		if m := mtime(); !m.Equal(old) {
			t.Errorf("written at %v, dated %v", old, m)
		}

		// Who wrote nothing dates nothing.
		must(t, activate(r, true))
		at := time.Now()
		date(at)
		must(t, inactivate(r))
		if m := mtime(); !m.Equal(at) {
			t.Errorf("not written, but dated %v, was %v", m, at)
		}
	})
}
